import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.local_site import Site, alive, site
from tests.waiting import eventually

from hasten.cluster.backend import Status
from hasten.cluster.local.gpus import devices
from hasten.core.errors import ConfigError

HOLD = "echo $CUDA_VISIBLE_DEVICES; exec sleep 600"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("HASTEN_GPUS", "4")
    with site(tmp_path / "home") as result:
        yield result


def waits(here: Site, name: str, reason: str) -> None:
    job = here.reaches(name, lambda job: job.reason == reason)
    assert job.status is Status.PENDING


def test_gpus_are_handed_out_and_queued_for(here: Site) -> None:
    here.submit("three", HOLD, gpus=3)
    here.running("three")
    here.submit("two", HOLD, gpus=1, workers=2, gang=True)
    waits(here, "two", "waits for 2 GPUs, 1 of 4 is free")
    here.submit("one", HOLD, gpus=1)
    waits(here, "one", "waits for 1 GPU, 1 of 4 is free, 1 before it in the queue")  # else `two` might wait for ever
    (node,) = here.backend.nodes()
    assert (node.gpus, node.allocated_gpus) == (4, 3)
    eventually(lambda: here.logs("three") == ["0,1,2"], lambda: f"{here.logs('three')}")
    here.backend.delete_job("three", "default")
    here.running("two")
    here.running("one")
    for name, instance, device in (
        ("two", "two-master-0", "0"),
        ("two", "two-worker-0", "1"),
        ("one", "one-master-0", "2"),
    ):
        eventually(lambda: bool(here.logs(name, instance=instance)), lambda: "no output")  # noqa: B023
        assert here.logs(name, instance=instance) == [device]
    assert here.job("two").gpus == 2
    assert here.backend.nodes()[0].allocated_gpus == 3
    with pytest.raises(ConfigError, match=r"--gpus asks for 6 GPUs \(3 instances of 2\), this machine has 4$"):
        here.submit("six", HOLD, gpus=2, workers=3)


def test_gpus_of_a_supervisor_that_was_killed_go_to_the_next(here: Site) -> None:
    """Once the processes that still had them are ended."""
    here.submit("first", HOLD, gpus=4)
    here.running("first")
    here.submit("second", "echo $CUDA_VISIBLE_DEVICES", gpus=4)
    waits(here, "second", "waits for 4 GPUs, 0 of 4 are free")
    state = here.state("first")
    os.kill(state.pid or 0, signal.SIGKILL)
    assert here.ended("second").status is Status.SUCCEEDED
    assert not alive(state.instances[0].pid or 0)
    assert here.job("first").reason == "its supervisor was killed"
    assert here.logs("second") == ["0,1,2,3"]
    assert list((here.home / "gpus").rglob("*.ticket")) == []


def test_a_job_that_waits_can_be_deleted(here: Site) -> None:
    here.submit("holds", HOLD, gpus=4)
    here.running("holds")
    here.submit("waits", HOLD, gpus=4)
    waits(here, "waits", "waits for 4 GPUs, 0 of 4 are free")
    assert here.logs("waits") == []
    here.backend.delete_job("waits", "default")
    assert len(list((here.home / "gpus").rglob("*.ticket"))) == 1


def test_jobs_come_in_the_order_of_their_submission(here: Site, tmp_path: Path) -> None:
    here.submit("holds", "sleep 0.8", gpus=4)
    for number in range(5):
        here.submit(f"next-{number}", f"echo {number} >> {tmp_path}/order", gpus=4 if number % 2 else 3)
    for number in range(5):
        assert here.ended(f"next-{number}").status is Status.SUCCEEDED
    assert (tmp_path / "order").read_text().split() == ["0", "1", "2", "3", "4"]


def test_how_many_gpus_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.cluster.local import gpus as local_gpus

    assert devices({"HASTEN_GPUS": "2", "CUDA_VISIBLE_DEVICES": "7"}) == ["0", "1"]
    assert devices({"CUDA_VISIBLE_DEVICES": "3, GPU-ab"}) == ["3", "GPU-ab"]
    assert devices({"CUDA_VISIBLE_DEVICES": ""}) == []
    with pytest.raises(ConfigError, match="HASTEN_GPUS='two' is not a number"):
        devices({"HASTEN_GPUS": "two"})
    monkeypatch.setattr(local_gpus, "_DEVICES", tmp_path)
    for name in ("nvidia0", "nvidia5", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert devices({}) == ["0", "1"]
    monkeypatch.setattr(local_gpus, "_DEVICES", tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    (smi := tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: X (UUID: GPU-1)'\necho '  MIG 1g'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert devices({}) == ["0"]
    smi.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices({}) == []


def test_what_is_no_ticket_holds_up_nobody(here: Site, caplog: pytest.LogCaptureFixture) -> None:
    here.submit("first", HOLD, gpus=3)
    here.running("first")
    (folder,) = (here.home / "gpus").iterdir()
    strays = [folder / name for name in ("abc.ticket", "1.ticket", f"{0:020d}.ticket", f"{1:020d}.ticket")]
    for path, text in zip(strays, ("", "", "{half", '{"owner": 1}'), strict=True):
        path.write_text(text)
    here.submit("second", "echo $CUDA_VISIBLE_DEVICES", gpus=1)
    assert here.ended("second").status is Status.SUCCEEDED
    assert here.logs("second") == ["3"]
    assert here.backend.nodes()[0].allocated_gpus == 3
    for path in strays:
        assert str(path) in caplog.text
        assert path.exists()
    assert "delete" not in caplog.text
    for name in ("first", "second"):
        assert (here.folder(name).path / "supervisor.log").read_text() == ""  # else it would be told as its failure


def test_more_gpus_than_there_can_be() -> None:
    for text in ("1025", "99999999999", "\u0663", "-1", ""):
        with pytest.raises(ConfigError, match=r"HASTEN_GPUS=.* is not a number of GPUs, up to 1024"):
            devices({"HASTEN_GPUS": text})
