"""TensorBoard beside a job: a Deployment and a Service."""

from dataclasses import replace

from hasten.cluster.manifests.job import job_labels
from hasten.cluster.manifests.pod import (
    MANAGER,
    Object,
    add_scratch,
    base_environment,
    container_security,
    metadata,
    pod,
    shared_storage,
)
from hasten.cluster.spec import TrainingJob, checked_name
from hasten.core.errors import ConfigError

IMAGE = "tensorflow/tensorflow:2.19.0"
PORT = 6006
_DEFAULT_FOLDER = "/training_logs"


def tensorboard_objects(job: TrainingJob) -> list[Object]:
    """The Deployment and the Service, or nothing; ConfigError where TensorBoard could not see the job's logs."""
    if not job.tensorboard:
        return []
    folder = job.logdir or _DEFAULT_FOLDER
    held = shared_storage(job)
    if not held.holds(folder):
        raise ConfigError(
            f"TensorBoard runs in a pod of its own and cannot see the job's {folder}: give a --logdir that lies in "
            "a volume (--data NAME:/PATH)"
        )
    name = checked_name(f"{job.name}-tensorboard", "--name makes the TensorBoard's name, which")
    labels = {**job_labels(job), "role": "tensorboard"}
    add_scratch(held)
    main = {
        "name": "tensorboard",
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["tensorboard", "--logdir", folder, "--host", "0.0.0.0", "--port", str(PORT)],
        "env": base_environment(gpu=False),
        "ports": [{"name": "tensorboard", "containerPort": PORT}],
        "readinessProbe": {"httpGet": {"path": "/", "port": "tensorboard"}, "periodSeconds": 5},
        "securityContext": container_security(),
        "volumeMounts": held.mounts,
    }
    template = {
        "metadata": {"labels": {**labels, "app.kubernetes.io/managed-by": MANAGER}},
        "spec": pod(replace(job, host_network=False), main, held.volumes),
    }
    spec = {"replicas": 1, "selector": {"matchLabels": labels}, "template": template}
    ports = [{"name": "tensorboard", "port": PORT, "targetPort": "tensorboard"}]
    return [
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata(job, name, labels), "spec": spec},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata(job, name, labels),
            "spec": {"type": "ClusterIP", "selector": labels, "ports": ports},
        },
    ]
