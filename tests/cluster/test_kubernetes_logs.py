import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.cluster.api_server_logs import Log
from tests.cluster.kubernetes_fixtures import World, serving, training, world
from tests.waiting import LIMIT_S, eventually

from hasten.cluster.backend import LogOptions
from hasten.core.errors import ClusterError, NotFoundError

__all__ = ["world"]

POD = "convert-bloom-master-0"
NOON = int(datetime(2026, 11, 23, 12, tzinfo=UTC).timestamp()) * 10**9
SECOND = 10**9


@pytest.fixture
def log(world: World) -> Log:
    """Log of a running job's chief."""
    world.backend.submit(training(workers=2))
    world.run(world.train("convert-bloom", 1))
    world.run(world.train("convert-bloom", 0))
    return world.server.log("default", POD, "pytorch")


def read(world: World, **options: Any) -> list[str]:
    return list(world.backend.job_logs("convert-bloom", "default", LogOptions(**options)))


def end(world: World, phase: str = "Succeeded") -> None:
    world.run(world.object("Pod", POD), phase)


class Reader:
    """Follows a log in a thread."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.lines: list[str] = []
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._read, args=(lines,), daemon=True)
        self._thread.start()

    def _read(self, lines: Iterator[str]) -> None:
        try:
            for line in lines:
                self.lines.append(line)
        except Exception as error:
            self.error = error

    def until(self, count: int) -> None:
        """Wait for so many lines."""
        eventually(lambda: len(self.lines) >= count, lambda: f"only {self.lines}, {self.error}")

    def finish(self) -> list[str]:
        """Wait for the end."""
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()
        assert self.error is None
        return self.lines


def test_lines_as_they_were_written(world: World, log: Log) -> None:
    log.write("first", "", "  two\tcafé \r", "last")
    assert read(world) == ["first", "", "  two\tcafé \r", "last"]
    assert read(world, tail=2) == ["  two\tcafé \r", "last"]
    assert read(world, tail=0) == []


def test_lines_end_at_line_feeds_alone(world: World, log: Log) -> None:
    odd = "\x0b \x0c \x1c \x1e \x85 \u2028 \u2029 \r \x00"
    log.write(odd, "last")
    assert read(world) == [odd, "last"]
    assert list(world.backend.job_logs("convert-bloom", "default", LogOptions(tail=1))) == ["last"]


def test_lines_since(world: World, log: Log) -> None:
    log.write("old", at=time.time_ns() - 3600 * SECOND)
    log.write("new")
    assert read(world, since=60) == ["new"]
    assert read(world, since_time=datetime.now(UTC)) in ([], ["new"])
    assert read(world, since_time=datetime.fromtimestamp(time.time() - 60, UTC)) == ["new"]
    assert read(world, since=7200) == ["old", "new"]


def test_timestamps(world: World, log: Log) -> None:
    log.write("x", at=NOON + 120)
    assert read(world, timestamps=True) == ["2026-11-23T12:00:00.00000012Z x"]


def test_an_instance_and_a_container_by_name(world: World, log: Log) -> None:
    log.write("chief")
    world.server.log("default", "convert-bloom-worker-0", "pytorch").write("worker")
    assert read(world) == ["chief"]
    assert read(world, instance="convert-bloom-worker-0", container="pytorch") == ["worker"]
    with pytest.raises(NotFoundError, match=f"no instance x; it has {POD}, convert-bloom-worker-0"):
        read(world, instance="x")
    with pytest.raises(NotFoundError, match=f"{POD} has no container x; it has pytorch"):
        read(world, container="x")


def test_of_several_containers_the_main_one(world: World) -> None:
    world.backend.submit(training())
    spec = {"containers": [{"name": "istio"}, {"name": "pytorch"}], "initContainers": [{"name": "init"}]}
    labels = {"training.kubeflow.org/job-name": "convert-bloom", "training.kubeflow.org/replica-type": "master"}
    world.run(world.pod(POD, labels, spec, world.object("PyTorchJob", "convert-bloom")))
    world.server.log("default", POD, "pytorch").write("main")
    world.server.log("default", POD, "istio").write("proxy")
    assert read(world) == ["main"]
    assert read(world, container="istio") == ["proxy"]


def test_a_finished_pod_still_has_its_log(world: World, log: Log) -> None:
    log.write("done")
    end(world)
    assert read(world) == ["done"]
    assert read(world, follow=True) == ["done"]


def test_a_log_that_is_not_there_yet_says_why(world: World) -> None:
    world.backend.submit(training())
    with pytest.raises(NotFoundError, match="job convert-bloom has no pods"):
        read(world)
    waiting = {"name": "pytorch", "state": {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}}
    world.train("convert-bloom", containerStatuses=[waiting])
    with pytest.raises(ClusterError, match=f"{POD} has no log yet: ErrImagePull: no such image"):
        read(world)


def test_a_followed_log_ends_with_its_pod(world: World, log: Log) -> None:
    log.write("one")
    reader = Reader(world.backend.job_logs("convert-bloom", "default", LogOptions(follow=True)))
    reader.until(1)
    log.write("two")
    reader.until(2)
    log.write("three")
    end(world)
    assert reader.finish() == ["one", "two", "three"]


@pytest.mark.parametrize("abrupt", [True, False], ids=["broken", "ended"])
@pytest.mark.parametrize("timestamps", [True, False])
def test_a_followed_log_goes_on_where_it_was_cut(world: World, log: Log, abrupt: bool, timestamps: bool) -> None:
    now = time.time_ns() // SECOND * SECOND
    log.write("before", at=now - 5 * SECOND)
    log.write("a", "b", at=now)  # at the very same time
    options = LogOptions(follow=True, tail=2, timestamps=timestamps)
    reader = Reader(world.backend.job_logs("convert-bloom", "default", options))
    reader.until(2)
    for number in range(3):
        log.cut(abrupt=abrupt)
        log.write(f"c{number}", at=now if number == 0 else now + number)
        reader.until(3 + number)
    end(world)
    texts = [line.rpartition(" ")[2] for line in reader.finish()]
    assert texts == ["a", "b", "c0", "c1", "c2"]
    assert all(line.startswith("20") == timestamps for line in reader.lines)


def test_a_followed_log_survives_a_restart_of_its_container(world: World, log: Log) -> None:
    log.write("first try")
    reader = Reader(world.backend.job_logs("convert-bloom", "default", LogOptions(follow=True)))
    reader.until(1)
    pod = world.object("Pod", POD)
    waiting = {"name": "pytorch", "restartCount": 1, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}
    world.change(pod, {"status": {"containerStatuses": [waiting]}})
    log.write("second try")
    world.run(pod)
    reader.until(2)
    end(world, "Failed")
    assert reader.finish() == ["first try", "second try"]


def test_a_followed_log_waits_for_its_pod(world: World) -> None:
    world.backend.submit(training())
    reader = Reader(world.backend.job_logs("convert-bloom", "default", LogOptions(follow=True)))
    pod = world.train("convert-bloom")
    world.server.log("default", POD, "pytorch").write("at last")
    world.run(pod)
    reader.until(1)
    end(world)
    assert reader.finish() == ["at last"]


def test_a_followed_log_ends_when_its_pod_is_deleted(world: World, log: Log) -> None:
    log.write("one")
    reader = Reader(world.backend.job_logs("convert-bloom", "default", LogOptions(follow=True)))
    reader.until(1)
    world.backend.delete_job("convert-bloom", "default")
    assert reader.finish() == ["one"]


def test_a_reader_that_leaves_does_not_keep_the_connection(world: World, log: Log) -> None:
    log.write("one")
    lines = world.backend.job_logs("convert-bloom", "default", LogOptions(follow=True))
    assert next(lines) == "one"
    lines.close()  # type: ignore[attr-defined]
    assert world.backend.jobs("default")[0].name == "convert-bloom"


def test_the_right_to_read_logs(world: World, log: Log) -> None:
    world.server.rules.denied.add(("get", "pods/log"))
    with pytest.raises(ClusterError, match="admin may not get pods/log in namespace default"):
        read(world)


def test_a_server_has_logs_too(world: World) -> None:
    world.backend.serve(serving())
    name = "ft-triton-bloom-1-tritoninferenceserver"
    owner = world.object("Deployment", name)
    template = owner["spec"]["template"]
    world.run(world.pod(f"{name}-a", template["metadata"]["labels"], template["spec"], owner))
    world.server.log("default", f"{name}-a", "triton").write("Started GRPCInferenceService at 0.0.0.0:8001")
    lines = world.backend.server_logs("ft-triton-bloom", None, "default", LogOptions())
    assert list(lines) == ["Started GRPCInferenceService at 0.0.0.0:8001"]
