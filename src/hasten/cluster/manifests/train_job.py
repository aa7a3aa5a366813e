"""A TrainJob (trainer.kubeflow.org/v1alpha1) over the cluster's runtime torch-distributed.

A TrainJob says what to run; its runtime decides how pods are built, and only some of that can be patched. Its operator
sets the PET_* variables, which torchrun reads, in every container.
"""

from hasten.cluster.manifests.job import job_command, job_labels, job_metadata, time_limits
from hasten.cluster.manifests.pod import (
    MANAGER,
    Object,
    container_security,
    environment,
    given,
    merged,
    pod_security,
    refuse_options,
    resources,
    storage,
    toleration,
)
from hasten.cluster.spec import TrainingJob, pairs
from hasten.core.errors import ConfigError

RUNTIME = "torch-distributed"
_CONTAINER = "node"
"""What the runtime calls its container and the set of its pods."""
_LONGEST_POD_NAME = 63

_RUNTIMES_OWN = (
    "clean_task_policy",
    "gang",
    "host_network",
    "image_pull_policy",
    "priority",
    "retry",
    "scheduler",
    "sync_mode",
    "ttl_after_finished",
    "working_dir",
)


def train_job(job: TrainingJob) -> Object:
    """The object; UnsupportedError for options that the runtime decides."""
    _refuse(job)
    if not job.image:
        raise ConfigError("--image is required in a cluster")
    longest = _LONGEST_POD_NAME - len(f"-{_CONTAINER}-0-{job.workers - 1}-abcde")
    if len(job.name) > longest:
        raise ConfigError(
            f"--name {job.name!r} is too long for a TrainJob of --workers {job.workers}: at most {longest} letters"
        )
    count = job.nproc_per_node
    trainer = {
        "image": job.image,
        "command": job_command(job),
        "env": environment(job),
        "numNodes": job.workers,
        **given(numProcPerNode=int(count) if count and count.isdecimal() else None, resourcesPerNode=resources(job)),
    }
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": job_metadata(job),
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": RUNTIME},
            "trainer": trainer,
            "runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": {"template": _patch(job)}}],
            **time_limits(job),
        },
    }


def _refuse(job: TrainingJob) -> None:
    more = [f"--nproc-per-node {job.nproc_per_node}"] if job.nproc_per_node in ("cpu", "gpu") else []
    refuse_options(job, _RUNTIMES_OWN, "a TrainJob", f"the runtime {RUNTIME} decides that", more)


def _patch(job: TrainingJob) -> Object:
    """What is changed in the runtime's JobSet."""
    held = storage(job)
    labels = merged({**job_labels(job), "app.kubernetes.io/managed-by": MANAGER}, job.label, "--label")
    capabilities = ("IPC_LOCK",) if job.rdma else ()
    main = {
        "name": _CONTAINER,
        "volumeMounts": held.mounts,
        "securityContext": container_security(*capabilities),
    }
    spec = {
        "securityContext": pod_security(),
        **given(
            nodeSelector=pairs(job.selector, "--selector"),
            tolerations=[toleration(text) for text in job.toleration],
            imagePullSecrets=[{"name": name} for name in job.image_pull_secret],
        ),
        "volumes": held.volumes,
        "containers": [main],
    }
    annotations = merged({}, job.annotation, "--annotation")
    pods = {"metadata": {"labels": labels, **given(annotations=annotations)}, "spec": spec}
    return {"spec": {"replicatedJobs": [{"name": _CONTAINER, "template": {"spec": {"template": pods}}}]}}
