import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.local_site import Site, alive, site
from tests.waiting import eventually

from hasten.cluster.backend import Status
from hasten.cluster.local.supervisor import back_off
from hasten.core.errors import NotFoundError

GLOO = """
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
one = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(one)
print("sum", one.item(), "of", dist.get_world_size())
dist.destroy_process_group()
"""


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path / "home") as result:
        yield result


def test_instances_are_told_their_ranks(here: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("PET_NNODES", "9")
    names = "MASTER_ADDR MASTER_PORT WORLD_SIZE RANK LOCAL_RANK LOCAL_WORLD_SIZE"
    more = "PET_NNODES PET_NODE_RANK PET_MASTER_ADDR PET_MASTER_PORT PET_NPROC_PER_NODE PYTHONUNBUFFERED"
    show = f"for name in {names} {more}; do eval echo \\${{$name-unset}}; done"
    here.submit("ranks", show, workers=3, nproc_per_node="2")
    job = here.ended("ranks")
    assert [(each.name, each.is_chief) for each in job.instances] == [
        ("ranks-master-0", True),
        ("ranks-worker-0", False),
        ("ranks-worker-1", False),
    ]
    ports = set()
    for rank, instance in enumerate(job.instances):
        seen = here.logs("ranks", instance=instance.name)
        ports |= {seen[1], seen[9]}
        assert seen[:1] + seen[2:9] + seen[10:] == [
            *("localhost", "6", str(rank), "0", "1"),
            *("3", str(rank), "localhost", "2", "1"),
        ]
    assert len(ports) == 1
    alone = here.run("alone", show, nproc_per_node="gpu")
    assert alone[:1] + alone[2:9] + alone[10:] == ["localhost", "1", "0", "0", "1", "1", "0", "localhost", "gpu", "1"]


def test_two_instances_meet(here: Site, tmp_path: Path) -> None:
    script = tmp_path / "meet.py"
    script.write_text(GLOO)
    here.run("meet", f"{sys.executable} {script}", workers=2)
    for instance in ("meet-master-0", "meet-worker-0"):
        assert here.logs("meet", instance=instance) == ["sum 3.0 of 2"]


def test_a_job_is_tried_again(here: Site, tmp_path: Path) -> None:
    count = f"echo x >> {tmp_path}/count; n=$(wc -l < {tmp_path}/count); echo attempt $n"
    assert here.run("again", f"{count}; [ $n -eq 3 ]", retry=3) == ["attempt 1", "attempt 2", "attempt 3"]
    job = here.job("again")
    assert job.instances[0].restarts == 2
    messages = [event.message for event in job.events if event.reason == "Restarting"]
    assert messages == [f"again-master-0 ended with exit code 1; attempt {number} of 4 follows" for number in (2, 3)]
    here.submit("never", "exit 5", retry=1)
    job = here.ended("never")
    assert (job.status, job.instances[0].restarts) == (Status.FAILED, 1)
    assert job.reason == "never-master-0 ended with exit code 5"


def test_the_failure_of_one_ends_the_others(here: Site, tmp_path: Path) -> None:
    mark = tmp_path / "tried"
    command = f"[ $RANK = 1 ] && exit 9; [ -e {mark} ] && exec sleep 600; touch {mark}; exec sleep 600"
    here.submit("together", command, workers=3, retry=1)
    job = here.ended("together")
    assert job.reason == "together-worker-0 ended with exit code 9"
    reasons = [each.reason for each in job.instances]
    assert reasons == [
        "was ended: together-worker-0 ended with exit code 9",
        "ended with exit code 9",
        "was ended: together-worker-0 ended with exit code 9",
    ]
    assert all(each.status is Status.FAILED and each.restarts == 1 for each in job.instances)


@pytest.mark.parametrize(("policy", "left"), [("Running", 2), ("All", 0)])
def test_a_job_ends_with_its_master(here: Site, policy: str, left: int) -> None:
    here.submit("master", "[ $RANK = 0 ] || exec sleep 600", workers=2, clean_task_policy=policy)
    job = here.ended("master")
    assert job.status is Status.SUCCEEDED
    assert [each.reason for each in job.instances][1:] == ["was ended: the job has succeeded"][: left // 2]
    if not left:
        with pytest.raises(NotFoundError, match="job master has no instance; there are: none"):
            here.logs("master")


def test_instances_may_be_left_running(here: Site, tmp_path: Path) -> None:
    wait = f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done"
    here.submit("left", f"[ $RANK = 0 ] || {{ {wait}; echo last words; }}", workers=2, clean_task_policy="None")
    job = here.ended("left")
    assert [each.status for each in job.instances] == [Status.SUCCEEDED, Status.RUNNING]
    (tmp_path / "go").touch()
    assert here.logs("left", instance="left-worker-0", follow=True) == ["last words"]
    assert here.job("left").instances[1].status is Status.SUCCEEDED


def test_a_job_that_runs_too_long_is_ended(here: Site) -> None:
    here.submit("long", "sleep 600", running_timeout="600ms", retry=5)
    job = here.ended("long")
    assert (job.status, job.reason) == (Status.FAILED, "it ran longer than --running-timeout, 0.6 s")
    assert job.ended is not None
    assert job.started is not None
    assert 0.5 < (job.ended - job.started).total_seconds() < 600


def test_a_job_is_deleted_when_its_time_to_live_is_over(here: Site, tmp_path: Path) -> None:
    here.submit("short", f"touch {tmp_path}/ran", ttl_after_finished="500ms")
    eventually(lambda: not here.folder("short").path.exists(), lambda: "it stays")  # nobody asks for it
    assert (tmp_path / "ran").exists()
    here.submit("short", "true", ttl_after_finished="7d")
    here.ended("short")
    here.over("short")  # no process waits for days
    state = here.state("short")
    state.expires = time.time() - 1
    here.folder("short").write_state(state)
    with pytest.raises(NotFoundError, match="no job short"):
        here.job("short")
    assert not here.folder("short").path.exists()


def test_what_cannot_be_started_is_told(here: Site, tmp_path: Path) -> None:
    (shell := tmp_path / "shell").write_text("no program")
    shell.chmod(0o755)
    here.submit("broken", "true", shell=str(shell))
    reason = here.ended("broken").reason or ""
    assert reason.startswith("broken-master-0 could not be started: ")
    assert "Exec format error" in reason


def test_hasten_s_own_programs_are_found(here: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert here.run("find", "command -v hasten") == [str(Path(sys.executable).with_name("hasten"))]


FORGETS = "env -i PATH=$PATH RANK=$RANK setsid sh -c 'echo $$ > {file}.new; mv {file}.new {file}; exec sleep 600' &"
"""Starts a process that has neither its environment nor its session any more."""


def forgetful(here: Site, tmp_path: Path, name: str, rest: str, **options: Any) -> int:
    """The process id of one whose job goes on with `rest`."""
    here.submit(name, f"{FORGETS.format(file=tmp_path / name)} {rest}", **options)
    eventually((tmp_path / name).exists, lambda: f"{here.job(name)}")
    return int((tmp_path / name).read_text())


def test_what_left_its_environment_and_session_ends_with_its_job(here: Site, tmp_path: Path) -> None:
    wait = f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done"
    ends = forgetful(here, tmp_path, "ends", wait)
    deleted = forgetful(here, tmp_path, "deleted", "wait")
    assert alive(ends)
    (tmp_path / "go").touch()
    assert here.ended("ends").status is Status.SUCCEEDED
    assert not alive(ends)
    assert alive(deleted)
    here.backend.delete_job("deleted", "default")
    assert not alive(deleted)


def test_it_ends_too_when_its_job_lost_the_supervisor(here: Site, tmp_path: Path) -> None:
    left = forgetful(here, tmp_path, "lost", "wait")
    supervisor = here.state("lost").pid or 0
    os.kill(supervisor, signal.SIGKILL)
    eventually(lambda: not alive(supervisor), lambda: "the supervisor lives")
    assert alive(left)
    assert here.job("lost").reason == "its supervisor was killed"
    assert not alive(left)


def test_the_end_of_one_instance_leaves_those_of_others(here: Site, tmp_path: Path) -> None:
    """The orphans of an instance that runs are its own."""
    start = FORGETS.format(file=f"{tmp_path}/$RANK")
    go = f"while [ ! -e {tmp_path}/go-$RANK ]; do sleep 0.05; done"
    here.submit("several", f"(({start})); {go}", workers=3)
    eventually(lambda: all((tmp_path / str(rank)).exists() for rank in range(3)), lambda: f"{here.job('several')}")
    pids = [int((tmp_path / str(rank)).read_text()) for rank in range(3)]
    (tmp_path / "go-1").touch()
    eventually(lambda: not alive(pids[1]), lambda: f"{here.job('several')}")
    assert alive(pids[0])
    assert alive(pids[2])
    (tmp_path / "go-0").touch()
    assert here.ended("several").status is Status.SUCCEEDED
    assert not any(map(alive, pids))


def test_a_long_limit_of_time(here: Site) -> None:
    """The kernel waits for some weeks at most."""
    assert here.run("weeks", "sleep 0.2; echo done", running_timeout="3650d") == ["done"]


def test_the_pauses_between_attempts_have_an_end() -> None:
    assert [back_off(failures) for failures in (0, 1, 6, 7, 100_000)] == [0.5, 1, 32, 60, 60]
