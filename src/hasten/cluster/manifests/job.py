"""A PyTorchJob (kubeflow.org/v1), named and labelled as Arena does it.

Its operator sets MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK in every container, and the same as PET_* for torchrun.
"""

import math
import re

from hasten.cluster.manifests.pod import (
    HOME,
    MANAGER,
    Object,
    Storage,
    container,
    container_security,
    environment,
    given,
    literal,
    merged,
    metadata,
    pod,
    storage,
)
from hasten.cluster.spec import TrainingJob, seconds
from hasten.core.errors import ConfigError

RSYNC_IMAGE = "registry.cn-zhangjiakou.aliyuncs.com/acs/rsync:v3.1.0-aliyun"
GIT_IMAGE = "registry.k8s.io/git-sync/git-sync:v4.4.2"
KUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_LONGEST_HOST = 63


def job_labels(job: TrainingJob) -> dict[str, str]:
    """Arena's labels."""
    kind = {"pytorchjob": "PyTorchJob", "trainer": "TrainJob", "indexed": "Job"}[job.api]
    return {"app": kind.lower(), "release": job.name, "createdBy": kind}


def pytorch_job(job: TrainingJob) -> Object:
    """The object."""
    check_host(job, f"{job.name}-worker-{job.workers - 2}" if job.workers > 1 else f"{job.name}-master-0")
    replicas = {"Master": _replica(job, 1, "OnFailure" if job.retry else "Never")}
    if job.workers > 1:
        replicas["Worker"] = _replica(job, job.workers - 1, "OnFailure")
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": job_metadata(job),
        "spec": {
            **given(nprocPerNode=job.nproc_per_node),
            "pytorchReplicaSpecs": replicas,
            "runPolicy": _run_policy(job),
        },
    }


def check_host(job: TrainingJob, longest: str) -> None:
    """ConfigError where the longest name of a job's instances is none that a host can have."""
    if len(longest) > _LONGEST_HOST:
        raise ConfigError(
            f"--name {job.name!r} is too long: its instance {longest!r} would have more than {_LONGEST_HOST} letters"
        )


def job_metadata(job: TrainingJob) -> Object:
    """Metadata of the job itself; a queue is a label for Kueue."""
    result = metadata(job, job.name, job_labels(job))
    if job.queue:
        result["labels"][KUEUE_LABEL] = job.queue
    return result


def _run_policy(job: TrainingJob) -> Object:
    scheduling = given(minAvailable=job.workers if job.gang else None, queue=job.queue)
    if scheduling and job.priority:
        scheduling["priorityClass"] = job.priority
    return {
        "cleanPodPolicy": job.clean_task_policy or "Running",
        # The operator ends a job as soon as its containers have been restarted so often.
        "backoffLimit": job.retry + 1 if job.retry else 0,
        **time_limits(job),
        **given(schedulingPolicy=scheduling),
    }


def time_limits(job: TrainingJob) -> Object:
    """--running-timeout and --ttl-after-finished in whole seconds, rounded up."""
    limits = {}
    if job.running_timeout is not None:
        limits["activeDeadlineSeconds"] = max(1, math.ceil(seconds(job.running_timeout, "--running-timeout")))
    if job.ttl_after_finished is not None:
        limits["ttlSecondsAfterFinished"] = math.ceil(seconds(job.ttl_after_finished, "--ttl-after-finished"))
    return limits


def _replica(job: TrainingJob, count: int, restart: str) -> Object:
    held = storage(job)
    first = code_sync(job, held)
    main = container(job, "pytorch", job_command(job), environment(job), held)
    return {
        "replicas": count,
        "restartPolicy": restart,
        "template": {
            "metadata": {"labels": pod_labels(job), **given(annotations=merged({}, job.annotation, "--annotation"))},
            "spec": pod(job, main, held.volumes, **given(initContainers=first)),
        },
    }


def job_command(job: TrainingJob) -> list[str]:
    """The shell, with the user's command as one argument."""
    return [job.shell, "-c", literal(job.command)]


def pod_labels(job: TrainingJob) -> dict[str, str]:
    """Labels of its pods."""
    own = {**job_labels(job), "app.kubernetes.io/managed-by": MANAGER}
    if job.gang:  # for the scheduler of Alibaba Cloud; others read the PodGroup that the operator makes
        own["pod-group.scheduling.sigs.k8s.io/name"] = job.name
        own["pod-group.scheduling.sigs.k8s.io/min-available"] = str(job.workers)
    return merged(own, job.label, "--label")


def code_sync(job: TrainingJob, held: Storage) -> list[Object]:
    """The init container that fetches the code into WORKING_DIR/code, as Arena's does."""
    if job.sync_mode is None or job.sync_source is None:
        return []
    held.add("code-sync", {"emptyDir": {}}, f"{(job.working_dir or HOME).rstrip('/')}/code")
    source = literal(job.sync_source)
    if job.sync_mode == "rsync":
        how = {"image": RSYNC_IMAGE, "command": ["rsync", "-a", "--no-owner", "--no-group", source, "/code"]}
    else:
        options = [f"--repo={source}", "--root=/code", f"--link={_project(job.sync_source)}", "--one-time"]
        how = {"image": GIT_IMAGE, "args": options}
    return [
        {
            "name": "init-code",
            **how,
            "imagePullPolicy": "IfNotPresent",
            "env": environment(job),
            "securityContext": container_security(),
            "volumeMounts": [
                {"name": "code-sync", "mountPath": "/code"},
                *(mount for mount in held.mounts if mount["name"] in ("tmp", "home")),
            ],
        }
    ]


def _project(source: str) -> str:
    name = source.rstrip("/").rpartition("/")[2].removesuffix(".git")
    if not re.fullmatch(r"\w[-.\w]*", name):
        raise ConfigError(f"--sync-source {source!r} is not the address of a git repository")
    return name
