"""A cluster for tests: the small API server, the backend that talks to it, and who else acts in it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.api_server import ADMIN, ApiServer

from hasten.cluster.backend import Backend
from hasten.cluster.kubernetes.backend import KubernetesBackend
from hasten.cluster.spec import TrainingJob, TritonServer

Object = dict[str, Any]
GPU_NODE = "192.168.123.35"


class World:
    """The server, a backend, and what operators, schedulers and kubelets do."""

    def __init__(self, server: ApiServer, folder: Path) -> None:
        self.server, self.store, self.folder = server, server.store, folder
        self.backend: Backend = self.connect()

    def connect(self, token: str | None = ADMIN, namespace: str | None = None, **options: Any) -> KubernetesBackend:
        """Another connection."""
        path = self.folder / f"kubeconfig-{token}-{namespace}"
        return KubernetesBackend(self.server.kubeconfig(path, token, namespace), **options)

    def leftovers(self) -> list[str]:
        """All that there is once the cluster has come to rest."""
        self.store.settle()
        return self.store.names()

    def object(self, kind: str, name: str) -> Object:
        """An object as it is stored."""
        return next(each for each in self.store.all(kind) if each["metadata"]["name"] == name)

    def set_conditions(self, job: str, *types: str, kind: str = "PyTorchJob", **status: Any) -> None:
        """What a training operator writes."""
        found = self.object(kind, job)
        stamp = "2026-11-23T10:00:00Z"
        conditions = [
            {"type": each, "status": "True", "lastTransitionTime": stamp, "message": f"job {job} is {each}"}
            for each in types
        ]
        self.change(found, {"status": {"conditions": conditions, **status}})

    def change(self, found: Object, patch: Object) -> None:
        """Merge a patch into an object, as one who is part of the cluster."""
        metadata = {"name": found["metadata"]["name"], "namespace": found["metadata"].get("namespace", "")}
        self.store.write({"apiVersion": found["apiVersion"], "kind": found["kind"], "metadata": metadata, **patch})

    def train(self, job: str, index: int = 0, **status: Any) -> Object:
        """A pod that the training operator makes for a PyTorchJob: the master, then workers."""
        owner = self.object("PyTorchJob", job)
        role = "Master" if index == 0 else "Worker"
        number = max(0, index - 1)
        template = owner["spec"]["pytorchReplicaSpecs"][role]["template"]
        labels = {
            **template["metadata"].get("labels", {}),
            "training.kubeflow.org/job-name": job,
            "training.kubeflow.org/replica-type": role.lower(),
            "training.kubeflow.org/replica-index": str(number),
        }
        return self.pod(f"{job}-{role.lower()}-{number}", labels, template["spec"], owner, **status)

    def pod(self, name: str, labels: dict[str, str], spec: Object, owner: Object | None, **status: Any) -> Object:
        """A pod; on a node if it has a phase other than Pending."""
        namespace = owner["metadata"]["namespace"] if owner else "default"
        metadata: Object = {"name": name, "namespace": namespace, "labels": labels}
        if owner is not None:
            reference = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "controller": True}
            reference |= {"name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"]}
            metadata["ownerReferences"] = [{**reference, "blockOwnerDeletion": True}]
        phase = status.setdefault("phase", "Pending")
        if phase != "Pending":
            status = {"hostIP": GPU_NODE, **status}
            spec = {**spec, "nodeName": "gpu-1"}
        return self.store.write(
            {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": status}
        )

    def run(self, pod: Object, phase: str = "Running", **state: Any) -> None:
        """What a kubelet tells of a pod: its containers run, or ended with state's exitCode."""
        states = {"Running": {"running": {"startedAt": "2026-11-23T10:00:00Z"}}}
        ended = {"exitCode": 0 if phase == "Succeeded" else 1, "finishedAt": "2026-11-23T10:03:00Z", **state}
        container = {
            "ready": phase == "Running",
            "restartCount": 0,
            "state": states.get(phase, {"terminated": ended}),
        }
        statuses = [{"name": each["name"], **container} for each in pod["spec"]["containers"]]
        status = {"phase": phase, "hostIP": GPU_NODE, "containerStatuses": statuses}
        self.change(pod, {"spec": {"nodeName": "gpu-1"}, "status": status})

    def event(self, about: Object, reason: str, message: str, at: str, kind: str = "Warning") -> None:
        """Something that happened."""
        metadata = {"name": f"{about['metadata']['name']}.{reason.lower()}", "namespace": "default"}
        named = {key: about["metadata"][key] for key in ("name", "uid")}
        event = {"involvedObject": {"kind": about["kind"], **named}, "reason": reason, "message": message}
        times = {"lastTimestamp": at, "type": kind, "count": 2}
        self.store.write({"apiVersion": "v1", "kind": "Event", "metadata": metadata, **event, **times})


def training(name: str = "convert-bloom", **options: Any) -> TrainingJob:
    """The conversion of the article."""
    wanted = {"image": "hasten:1", "gpus": 1, "command": "python convert.py -i /mnt/model", "data": ["bloom-pvc:/mnt"]}
    return TrainingJob(name=name, **{**wanted, **options})


def serving(name: str = "ft-triton-bloom", version: str = "1", **options: Any) -> TritonServer:
    """The server of the article."""
    wanted = {"image": "hasten:1", "gpus": 2, "model_repository": "/mnt/triton_repo", "data": ["bloom7b1-pvc:/mnt"]}
    return TritonServer(name=name, version=version, **{**wanted, **options})


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A cluster with nothing in it."""
    server = ApiServer()
    try:
        yield World(server, tmp_path)
    finally:
        server.close()
