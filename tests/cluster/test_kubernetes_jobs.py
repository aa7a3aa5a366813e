import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.api_server_kinds import Kind, RefusedError
from tests.cluster.kubernetes_fixtures import GPU_NODE, World, training, world

from hasten.cluster.backend import Status
from hasten.core.errors import ClusterError, ExistsError, NotFoundError

__all__ = ["world"]


def test_a_job_is_made_with_what_belongs_to_it_and_leaves_nothing_behind(world: World, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    files = [f"{tmp_path / 'settings.json'}:/etc/settings.json"]
    world.backend.submit(training(config_file=files, tensorboard=True, logdir="/mnt/logs"))
    result = world.leftovers()
    assert result == [
        "ConfigMap/convert-bloom-config",
        "Deployment/convert-bloom-tensorboard",
        "PyTorchJob/convert-bloom",
        "Service/convert-bloom-tensorboard",
    ]
    job = world.object("PyTorchJob", "convert-bloom")
    for kind in ("ConfigMap", "Deployment", "Service"):
        owners = world.store.all(kind)[0]["metadata"]["ownerReferences"]
        assert [owner["uid"] for owner in owners] == [job["metadata"]["uid"]]
    assert {each["manager"] for each in job["metadata"]["managedFields"]} == {"hasten"}
    world.run(world.train("convert-bloom"))
    world.backend.delete_job("convert-bloom", "default")
    assert world.store.names("PyTorchJob", "Pod") == []  # at once: its name is free again
    assert world.leftovers() == []


def test_a_dry_run_asks_nothing(world: World) -> None:
    assert [each["kind"] for each in world.backend.plan_job(training())] == ["PyTorchJob"]
    assert world.server.requests == []


def test_nothing_is_left_of_a_submit_that_fails(world: World, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    job = training(config_file=[f"{tmp_path / 'a'}:/a"], tensorboard=True, logdir="/mnt/logs")
    world.server.rules.denied.add(("create", "services"))
    with pytest.raises(ClusterError, match="admin may not create services in namespace default"):
        world.backend.submit(job)
    assert world.leftovers() == []

    def refuse(kind: Kind, body: dict[str, Any]) -> None:
        if kind.kind == "ConfigMap":
            raise RefusedError(400, "BadRequest", 'admission webhook "policy" denied the request: no files')

    world.store.admission.append(refuse)
    with pytest.raises(ClusterError, match="no files"):
        world.backend.submit(job)
    assert world.leftovers() == []


def test_a_name_that_is_taken(world: World) -> None:
    world.backend.submit(training())
    before = world.object("PyTorchJob", "convert-bloom")
    with pytest.raises(ExistsError, match="PyTorchJob convert-bloom in namespace default already"):
        world.backend.submit(training(gpus=4))
    assert world.object("PyTorchJob", "convert-bloom") == before


def test_a_config_map_of_somebody_else_is_not_taken_over(world: World, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    foreign = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "convert-bloom-config"},
        "data": {"k": "v"},
    }
    world.store.write(foreign)
    with pytest.raises(ExistsError, match="ConfigMap convert-bloom-config"):
        world.backend.submit(training(config_file=[f"{tmp_path / 'a'}:/a"]))
    assert world.leftovers() == ["ConfigMap/convert-bloom-config"]
    assert world.object("ConfigMap", "convert-bloom-config")["data"] == {"k": "v"}


def test_an_interrupt_rolls_back(world: World) -> None:
    def interrupt(kind: Kind, body: dict[str, Any]) -> None:
        if kind.kind == "Service":
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    world.store.admission.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        world.backend.submit(training(tensorboard=True, logdir="/mnt/logs"))
    assert world.leftovers() == []


def test_a_job_goes_through_its_states(world: World) -> None:
    backend = world.backend
    backend.submit(training(workers=3, gpus=2, priority="high"))
    job = backend.job("convert-bloom", "default")
    assert (job.status, job.gpus, job.priority, job.trainer) == (Status.PENDING, 6, "high", "PYTORCHJOB")
    assert job.reason == "there are no pods yet, and no operator has taken up this PyTorchJob: does it run?"
    world.set_conditions("convert-bloom", "Created")
    pods = [world.train("convert-bloom", index) for index in (2, 0, 1)]
    for pod in pods:
        world.run(pod)
    world.set_conditions("convert-bloom", "Created", "Running", startTime="2026-11-23T10:00:00Z")
    job = backend.job("convert-bloom", "default")
    assert (job.status, job.reason) == (Status.RUNNING, None)
    assert [(instance.name, instance.is_chief, instance.gpus, instance.node) for instance in job.instances] == [
        ("convert-bloom-master-0", True, 2, GPU_NODE),
        ("convert-bloom-worker-0", False, 2, GPU_NODE),
        ("convert-bloom-worker-1", False, 2, GPU_NODE),
    ]
    world.run(pods[1], "Succeeded")
    world.set_conditions("convert-bloom", "Created", "Running", "Succeeded", completionTime="2026-11-23T10:03:00Z")
    job = backend.job("convert-bloom", "default")
    assert job.status is Status.SUCCEEDED
    assert job.ended is not None
    assert job.ended.isoformat() == "2026-11-23T10:03:00+00:00"


def test_conditions_in_their_order(world: World) -> None:
    world.backend.submit(training())
    for held, status in (
        (("Queuing",), Status.QUEUING),
        (("Queuing", "Running"), Status.RUNNING),
        (("Queuing", "Running", "Failed"), Status.FAILED),
        (("Running", "Failed", "Succeeded"), Status.SUCCEEDED),
    ):
        world.set_conditions("convert-bloom", *held)
        assert world.backend.jobs("default")[0].status is status


UNSCHEDULABLE = {
    "type": "PodScheduled",
    "status": "False",
    "reason": "Unschedulable",
    "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
}
NO_CLAIM = {**UNSCHEDULABLE, "message": '0/3 nodes are available: persistentvolumeclaim "bloom-pvc" not found.'}


def _waiting(reason: str, message: str) -> dict[str, Any]:
    return {"containerStatuses": [{"name": "pytorch", "state": {"waiting": {"reason": reason, "message": message}}}]}


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ({"conditions": [UNSCHEDULABLE]}, r"master-0: Unschedulable: 0/3 nodes are available: 3 Insufficient"),
        ({"conditions": [NO_CLAIM]}, r'"bloom-pvc" not found\.; create the volume with `hasten cluster data create`'),
        (_waiting("ImagePullBackOff", 'Back-off pulling image "hasten:1"'), "ImagePullBackOff: Back-off pulling image"),
        (_waiting("CreateContainerConfigError", 'secret "k" not found'), 'CreateContainerConfigError: secret "k" not'),
    ],
)
def test_why_a_job_is_pending(world: World, status: dict[str, Any], reason: str) -> None:
    world.backend.submit(training())
    world.set_conditions("convert-bloom", "Created")
    world.train("convert-bloom", **status)
    for job in (world.backend.jobs("default")[0], world.backend.job("convert-bloom", "default")):
        assert job.status is Status.PENDING
        assert job.reason is not None
        assert re.search(reason, job.reason)


def test_a_quota_is_told_by_events_in_their_order(world: World) -> None:
    world.backend.submit(training())
    world.set_conditions("convert-bloom", "Created")
    job = world.object("PyTorchJob", "convert-bloom")
    message = 'Error creating: pods "convert-bloom-master-0" is forbidden: exceeded quota: gpus'
    world.event(job, "FailedCreatePod", message, "2026-11-23T10:00:09Z")
    world.event(job, "Created", "PyTorchJob is created", "2026-11-23T10:00:01Z", kind="Normal")
    world.event(world.object("Namespace", "default"), "Other", "of somebody else", "2026-11-23T10:00:02Z")
    found = world.backend.job("convert-bloom", "default")
    assert [(event.reason, event.source) for event in found.events] == [
        ("Created", "pytorchjob/convert-bloom"),
        ("FailedCreatePod", "pytorchjob/convert-bloom"),
    ]
    assert found.reason is not None
    assert "exceeded quota" in found.reason
    assert found.events[1].message.endswith("(2 times)")


def test_a_volume_that_cannot_be_mounted_is_told_by_events(world: World) -> None:
    world.backend.submit(training())
    world.set_conditions("convert-bloom", "Created")
    pod = world.train("convert-bloom", **_waiting("ContainerCreating", ""))
    assert world.backend.job("convert-bloom", "default").reason == "its pods are being started"
    world.event(pod, "FailedMount", "MountVolume.SetUp failed: timed out", "2026-11-23T10:00:00Z")
    reason = world.backend.job("convert-bloom", "default").reason
    assert reason == "pod/convert-bloom-master-0: FailedMount: MountVolume.SetUp failed: timed out (2 times)"


def test_why_a_job_failed(world: World) -> None:
    world.backend.submit(training())
    world.run(world.train("convert-bloom"), "Failed", exitCode=137, reason="OOMKilled")
    world.set_conditions("convert-bloom", "Created", "Failed")
    job = world.backend.job("convert-bloom", "default")
    assert job.status is Status.FAILED
    assert job.reason == "convert-bloom-master-0: container pytorch ended with status 137 (OOMKilled)"
    assert job.ended is not None


def test_a_train_job_runs_when_its_pods_do(world: World) -> None:
    world.backend.submit(training(api="trainer", workers=2, gpus=4))
    owner = world.object("TrainJob", "convert-bloom")
    for index in (1, 0):
        labels = {
            "jobset.sigs.k8s.io/jobset-name": "convert-bloom",
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(index),
        }
        spec = {"containers": [{"name": "node", "resources": {"limits": {"nvidia.com/gpu": "4"}}}]}
        world.run(world.pod(f"convert-bloom-node-0-{index}-abcde", labels, spec, owner))
    job = world.backend.jobs("default")[0]
    assert (job.status, job.trainer, job.gpus) == (Status.RUNNING, "TRAINJOB", 8)
    assert [instance.name for instance in job.instances if instance.is_chief] == ["convert-bloom-node-0-0-abcde"]
    world.set_conditions("convert-bloom", "Complete", kind="TrainJob")
    assert world.backend.job("convert-bloom", "default").status is Status.SUCCEEDED
    world.backend.delete_job("convert-bloom", "default")
    assert world.leftovers() == []


def test_an_indexed_job_has_its_pods_and_no_others(world: World) -> None:
    world.backend.submit(training(api="indexed", workers=3, parallelism=2, gpus=4))
    owner = world.object("Job", "convert-bloom")
    for job, indices in ({"convert-bloom": (1, 0), "others": (0,)}).items():
        own = {"app.kubernetes.io/managed-by": "hasten"} if job == "convert-bloom" else {}
        for index in indices:
            labels = {"batch.kubernetes.io/job-name": job, "batch.kubernetes.io/job-completion-index": str(index)}
            world.run(world.pod(f"{job}-{index}-abcde", labels | own, owner["spec"]["template"]["spec"], owner))
    world.store.write(
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "others", "namespace": "default"}, "spec": {}}
    )
    (found,) = world.backend.jobs("default")
    assert (found.name, found.status, found.trainer, found.gpus) == ("convert-bloom", Status.RUNNING, "JOB", 8)
    assert [instance.name for instance in found.instances] == ["convert-bloom-0-abcde", "convert-bloom-1-abcde"]
    for ask in (world.backend.job, world.backend.delete_job):
        with pytest.raises(NotFoundError, match="there is no training job others"):
            ask("others", "default")
    world.set_conditions("convert-bloom", "Failed", kind="Job")
    assert world.backend.job("convert-bloom", "default").status is Status.FAILED
    world.set_conditions("convert-bloom", "Complete", kind="Job")
    assert world.backend.job("convert-bloom", "default").status is Status.SUCCEEDED
    world.backend.delete_job("convert-bloom", "default")
    world.store.crds.clear()
    with pytest.raises(ClusterError, match="does not know the kind PyTorchJob"):
        world.connect().jobs("default")


def test_jobs_of_all_namespaces_newest_first(world: World) -> None:
    world.store.write({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default-group"}})
    for number, namespace in enumerate(("default", "default-group", "default")):
        world.backend.submit(training(f"job-{number}", namespace=namespace))
        found = world.object("PyTorchJob", f"job-{number}")
        world.change(found, {"metadata": {**found["metadata"], "creationTimestamp": f"2026-11-23T10:00:0{number}Z"}})
    assert [job.name for job in world.backend.jobs(None)] == ["job-2", "job-1", "job-0"]
    assert [job.name for job in world.backend.jobs("default")] == ["job-2", "job-0"]


def test_a_deletion_that_does_not_end_says_what_it_waits_for(world: World) -> None:
    world.backend.submit(training())
    found = world.object("PyTorchJob", "convert-bloom")
    world.change(found, {"metadata": {**found["metadata"], "finalizers": ["example.com/backup"]}})
    with pytest.raises(ClusterError, match=r"waits for: example.com/backup"):
        world.connect(deletion_timeout_s=0.3).delete_job("convert-bloom", "default")
