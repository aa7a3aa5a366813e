"""An Indexed Job (batch/v1): instances that know their number and nothing else of each other.

Each is tried again on its own, and those that fail for good do not end the others.
"""

from hasten.cluster.manifests.job import (
    check_host,
    code_sync,
    job_command,
    job_metadata,
    pod_labels,
    time_limits,
)
from hasten.cluster.manifests.pod import Object, container, environment, given, merged, pod, refuse_options, storage
from hasten.cluster.spec import TrainingJob

_OF_GROUPS = ("clean_task_policy", "gang", "nproc_per_node")
"""Options of jobs whose instances work together."""


def indexed_job(job: TrainingJob) -> Object:
    """The object; UnsupportedError for options of jobs whose instances work together."""
    refuse_options(job, _OF_GROUPS, "an Indexed Job", "its instances are independent")
    check_host(job, f"{job.name}-{job.workers - 1}")
    held = storage(job)
    first = code_sync(job, held)
    main = container(job, "main", job_command(job), environment(job), held)
    annotations = merged({}, job.annotation, "--annotation")
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": job_metadata(job),
        "spec": {
            "completionMode": "Indexed",
            "completions": job.workers,
            "parallelism": min(job.parallelism or job.workers, job.workers),
            "backoffLimitPerIndex": job.retry,
            **time_limits(job),
            "template": {
                "metadata": {"labels": pod_labels(job), **given(annotations=annotations)},
                "spec": pod(job, main, held.volumes, restartPolicy="Never", **given(initContainers=first)),
            },
        },
    }
