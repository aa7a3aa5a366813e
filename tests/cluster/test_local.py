import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.local_site import Site, alive, python, site
from tests.waiting import eventually

from hasten.cluster.backend import Status
from hasten.cluster.local.backend import LocalBackend, _new_state
from hasten.cluster.local.state import create
from hasten.cluster.local.supervisor import start
from hasten.cluster.spec import TrainingJob
from hasten.core.errors import ClusterError, ConfigError, ExistsError, NotFoundError, UnsupportedError

SUBMIT = """
import sys
from pathlib import Path
from hasten.cluster.local.backend import LocalBackend
from hasten.cluster.spec import TrainingJob
LocalBackend(Path(sys.argv[1])).submit(TrainingJob(name=sys.argv[2], command=sys.argv[3]))
print("submitted", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path / "home") as result:
        yield result


@pytest.mark.parametrize(
    "words",
    [
        ["two  spaces", "single ' double \" both"],
        ["line\nline\n", "\ttab", "back\\slash"],
        ["$HOME ${HOME} `id` $(id) !x *", "; exit 3 #"],
        ["é 漢字 🙂", "", "-n", "%s\\n"],
    ],
)
def test_a_command_arrives_as_it_was_given(here: Site, words: list[str], tmp_path: Path) -> None:
    import shlex

    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    lines = here.run("quote", shlex.join([sys.executable, "-c", show, *words]))
    assert json.loads(lines[0]) == words


def test_shell_variables_are_the_jobs_own(here: Site, tmp_path: Path) -> None:
    (folder := tmp_path / "a folder").mkdir()
    env = ("GREETING=hello  'you'", "EMPTY=", "EQUAL=a=b", "HASTEN_X=$GREETING")
    command = 'printf \'%s|\' "$GREETING" "$EMPTY" "$EQUAL" "$HASTEN_X"\nfor i in 1 2; do printf $i; done; echo; pwd'
    lines = here.run("shell", command, env=env, working_dir=str(folder))
    assert lines == ["hello  'you'||a=b|$GREETING|12", str(folder)]
    lines = here.run("bash", "echo $0 ${BASH_VERSION:+bash} $CUDA_VISIBLE_DEVICES.", shell="bash")
    assert lines == ["bash bash ."]


def test_a_job_is_told_from_its_start_to_its_end(here: Site, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        here.submit("told", "echo one; sleep 30 & echo two; kill $!; exit 3", image="some:image", memory="1Mi")
    assert caplog.messages == [
        "--image some:image is not used: here the command runs as a process",
        "--memory 1Mi is a request: it was checked, and nothing enforces it here",
    ]
    with pytest.raises(ExistsError, match="job told exists in namespace default: take another name, or delete it"):
        here.submit("told", "true")
    job = here.ended("told")
    assert (job.status, job.reason, job.gpus) == (Status.FAILED, "told-master-0 ended with exit code 3", 0)
    (instance,) = job.instances
    assert (instance.name, instance.is_chief, instance.node) == ("told-master-0", True, "127.0.0.1")
    assert (instance.status, instance.reason) == (Status.FAILED, "ended with exit code 3")
    assert instance.ended is not None
    assert job.ended is not None
    assert job.started is not None
    assert job.created <= job.started <= job.ended
    kinds = [(event.kind, event.reason, event.source) for event in job.events]
    assert kinds == [
        ("Warning", "ImageNotUsed", "job/told"),
        ("Warning", "LimitsNotEnforced", "job/told"),
        ("Normal", "Started", "instance/told-master-0"),
        ("Warning", "Failed", "instance/told-master-0"),
        ("Warning", "Failed", "job/told"),
    ]
    assert here.logs("told") == ["one", "two"]
    here.submit("later", "true")
    assert [(job.name, job.events) for job in here.backend.jobs(None)] == [("later", ()), ("told", ())]
    assert here.backend.jobs("other") == []


def test_a_killed_job_says_what_killed_it(here: Site) -> None:
    here.submit("killed", "kill -KILL $$")
    assert here.ended("killed").reason == "killed-master-0 was killed by SIGKILL, as by a lack of memory"


def test_a_job_goes_on_when_its_terminal_closes(here: Site) -> None:
    """The command that submitted it dies with its whole session, as when a terminal closes."""
    command = "trap '' TERM; sleep 0.6; echo still here"
    submitter = python(SUBMIT, str(here.home), "goes-on", command, stdin=subprocess.PIPE, start_new_session=True)
    assert submitter.stdout is not None
    assert submitter.stdout.readline() == "submitted\n"
    os.killpg(submitter.pid, signal.SIGHUP)
    os.killpg(submitter.pid, signal.SIGKILL)
    submitter.communicate()
    assert here.ended("goes-on").status is Status.SUCCEEDED
    assert here.logs("goes-on") == ["still here"]


def test_the_end_is_known_when_the_supervisor_was_killed(here: Site, tmp_path: Path) -> None:
    """Its processes are found and ended: those of its session, and those that left it."""
    command = f"setsid sleep 601 & echo $! > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; sleep 602 & sleep 603"
    here.submit("orphan", command)
    here.running("orphan")
    eventually((tmp_path / "pid").exists, lambda: "the job does not begin")
    pids = [pid for pid in here.processes() if pid != os.getpid()]
    state = here.state("orphan")
    assert state.pid is not None
    left = [state.instances[0].pid, int((tmp_path / "pid").read_text())]
    os.kill(state.pid, signal.SIGKILL)
    eventually(lambda: not alive(state.pid or 0), lambda: "the supervisor lives")
    assert all(pid is not None and alive(pid) for pid in left)
    job = here.job("orphan")
    assert (job.status, job.reason) == (Status.FAILED, "its supervisor was killed")
    assert (job.instances[0].status, job.instances[0].reason) == (Status.FAILED, "its supervisor was killed")
    assert job.events[-1].message.endswith("of its processes were ended")
    assert not any(alive(pid) for pid in pids)
    assert not any(pid is not None and alive(pid) for pid in left)
    assert here.job("orphan") == job


def test_a_job_from_before_a_restart_of_the_machine_has_failed(here: Site) -> None:
    here.submit("before", "sleep 600")
    here.running("before")
    state = here.state("before")
    assert state.pid is not None
    os.kill(state.pid, signal.SIGKILL)
    eventually(lambda: not alive(state.pid or 0), lambda: "the supervisor lives")
    # what another run of the kernel would have left: its boot id, and numbers of processes that are now others'
    bystander = subprocess.Popen(["sleep", "600"])
    leader = state.instances[0].pid
    state.boot, state.instances[0].pid = "another", bystander.pid
    here.folder("before").write_state(state)
    job = here.job("before")
    assert (job.status, job.reason) == (Status.FAILED, "the machine was started anew while it ran")
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    assert leader is not None
    os.killpg(leader, signal.SIGKILL)


def test_what_dies_while_it_submits_leaves_a_job_that_failed(here: Site) -> None:
    """A command that is killed between the record and the supervisor."""
    (spec,) = here.backend.plan_job(TrainingJob(name="half", command="true"))
    code = """
import json, os, signal, sys
from pathlib import Path
from hasten.cluster.local import state as local_state
from hasten.cluster.local import backend as local
folder = local_state.Folder(Path(sys.argv[1]) / "jobs/default/half")
local_state.create(folder, json.loads(sys.argv[2]), local._new_state(1.0), {}, what="job", advice="")
os.kill(os.getpid(), signal.SIGKILL)
"""
    with python(code, str(here.home), json.dumps(spec)) as submitter:
        assert submitter.communicate() == ("", "")
    assert submitter.returncode == -signal.SIGKILL
    job = here.job("half")
    assert (job.status, job.reason) == (Status.FAILED, "its supervisor was killed before it began")


def test_a_supervisor_that_fails_says_why(here: Site) -> None:
    folder = here.folder("wrong")
    start(*create(folder, {"plan": {}}, _new_state(time.time()), {}, what="job wrong", advice=""))
    job = here.ended("wrong")
    assert job.status is Status.FAILED
    assert job.reason is not None
    assert job.reason.startswith("its supervisor failed: ")
    assert "it is of another version of hasten ('launch')" in job.reason


def test_delete_ends_all_processes_and_removes_all_files(here: Site, tmp_path: Path) -> None:
    here.submit("gone", "sleep 600 & setsid sleep 600 & nohup sleep 600 & sleep 0.3; echo begun; wait", workers=2)
    for instance in ("gone-master-0", "gone-worker-0"):
        eventually(lambda name=instance: "begun" in here.logs("gone", instance=name))  # type: ignore[misc]
    pids = [pid for pid in here.processes() if pid != os.getpid()]
    assert len(pids) > 6
    os.kill(here.state("gone").instances[0].pid or 0, signal.SIGUSR1)  # ends the master, which ends the rest
    here.backend.delete_job("gone", "default")
    assert not any(alive(pid) for pid in pids)
    assert [path for path in here.home.rglob("*") if "gone" in path.name] == []
    assert list((here.home / "scratch").iterdir()) == []
    for verb in (here.job, here.logs, lambda name: here.backend.delete_job(name, "default")):
        with pytest.raises(NotFoundError, match="there is no job gone in namespace default"):
            verb("gone")


def test_delete_when_the_supervisor_does_not_answer(here: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.cluster.local import end as local_end

    here.submit("hangs", "sleep 600")
    here.running("hangs")
    pids = [pid for pid in here.processes() if pid != os.getpid()]
    os.kill(here.state("hangs").pid or 0, signal.SIGSTOP)
    monkeypatch.setattr(local_end, "_SLACK_S", 0.1)
    local_end.end_and_remove(here.folder("hangs"), 0.1)
    assert not any(alive(pid) for pid in pids)
    assert here.backend.jobs(None) == []


def test_delete_while_the_supervisor_ends(here: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was there a moment ago, and is gone when the signal is to be sent."""
    from hasten.cluster.local import supervisor as local_supervisor

    here.submit("ends", "sleep 600")
    here.running("ends")
    pid = here.state("ends").pid or 0

    def dies(found: int | None, start: int | None) -> bool:
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not alive(pid))
        return True

    monkeypatch.setattr(local_supervisor, "lives", dies)
    here.backend.delete_job("ends", "default")
    assert here.backend.jobs(None) == []


def test_delete_of_a_job_that_does_not_hear(here: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither it nor what it started minds SIGTERM; the supervisor is still in the middle of its patience."""
    from hasten.cluster.local import end as local_end

    deaf = f"trap '' TERM; (trap '' TERM; while :; do sleep 1; done) & echo $! > {tmp_path}/pid; wait"
    here.submit("deaf", deaf)
    eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
    pids = [pid for pid in here.processes() if pid != os.getpid()]
    monkeypatch.setattr(local_end, "_SLACK_S", 0.3)
    local_end.end_and_remove(here.folder("deaf"), 0.1)
    assert not any(alive(pid) for pid in [*pids, int((tmp_path / "pid").read_text())])
    assert here.backend.jobs(None) == []


def test_a_supervisor_that_is_told_to_end_says_so(here: Site) -> None:
    here.submit("signalled", "sleep 600")
    here.running("signalled")
    os.kill(here.state("signalled").pid or 0, signal.SIGTERM)
    assert here.ended("signalled").reason == "its supervisor was signalled to end"


@pytest.mark.any_python
def test_a_hundred_jobs_are_submitted_and_none_is_lost(here: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """From four processes at once. Every fifth job fails."""
    code = """
import sys
from pathlib import Path
from hasten.cluster.local.backend import LocalBackend
from hasten.cluster.spec import TrainingJob
backend, part = LocalBackend(Path(sys.argv[1])), int(sys.argv[2])
for number in range(part, 100, 4):
    backend.submit(TrainingJob(name=f"job-{number}", command=f"echo this is {number}; exit $(( {number} % 5 == 0 ))"))
"""
    begun = time.monotonic()
    submitters = [python(code, str(here.home), str(part)) for part in range(4)]
    for submitter in submitters:
        assert submitter.communicate() == ("", "")
    submitted = time.monotonic() - begun
    eventually(lambda: all(job.status.ended for job in here.backend.jobs(None)), lambda: f"{here.backend.jobs(None)}")
    took = time.monotonic() - begun
    jobs = {job.name: job for job in here.backend.jobs(None)}
    assert set(jobs) == {f"job-{number}" for number in range(100)}
    for number in range(100):
        expected = Status.SUCCEEDED if number % 5 else Status.FAILED
        assert jobs[f"job-{number}"].status is expected, jobs[f"job-{number}"]
        assert here.logs(f"job-{number}") == [f"this is {number}"]
    with capsys.disabled():
        sys.stdout.write(f"\n100 local jobs: submitted in {submitted:.1f} s, all ended after {took:.1f} s\n")


def test_a_record_that_cannot_be_read_hides_no_other(here: Site, caplog: pytest.LogCaptureFixture) -> None:
    here.submit("good", "true")
    here.submit("bad", "true")
    here.ended("good")
    here.ended("bad")
    here.over("bad")
    record = here.folder("bad").path / "state.json"
    whole = record.read_text()
    record.write_text(whole[:50])
    assert [job.name for job in here.backend.jobs(None)] == ["good"]
    assert f"the record {record} cannot be read" in caplog.text
    with pytest.raises(ClusterError, match="cannot be read"):
        here.job("bad")
    record.write_text(whole)


def test_attach_runs_a_command_with_the_environment_of_an_instance(
    here: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    here.submit("open", "sleep 600", env=("COLOUR=blue",), workers=2, working_dir=str(tmp_path))
    here.running("open")
    attach = here.backend.attach_job
    show = ["sh", "-c", "echo $COLOUR $RANK $PWD; exit 7"]
    assert attach("open", "default", "open-worker-0", None, show) == 7
    assert capfd.readouterr().out == f"blue 1 {tmp_path}\n"
    assert attach("open", "default", None, None, ["sh", "-c", "kill -TERM $$"]) == 128 + signal.SIGTERM
    with pytest.raises(ClusterError, match="cannot run nothing-like-it: No such file"):
        attach("open", "default", None, None, ["nothing-like-it"])
    with pytest.raises(NotFoundError, match="no instance open-x; there are: open-master-0, open-worker-0"):
        attach("open", "default", "open-x", None, [])
    with pytest.raises(UnsupportedError, match="no containers"):
        attach("open", "default", None, "sidecar", [])
    here.backend.delete_job("open", "default")
    here.submit("over", "true")
    here.ended("over")
    with pytest.raises(ClusterError, match=r"over-master-0 does not run \(succeeded\)"):
        attach("over", "default", None, None, [])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"selector": ("a=b",), "rdma": True},
            UnsupportedError,
            "the local backend cannot do --selector, --rdma; leave",
        ),
        ({"priority": "high", "scheduler": "s"}, UnsupportedError, "--priority, --scheduler"),
        ({"host_network": True}, UnsupportedError, "--hostNetwork"),
        ({"toleration": ("all",)}, UnsupportedError, "--toleration"),
        ({"image_pull_policy": "Always"}, UnsupportedError, "--image-pull-policy"),
        ({"tensorboard": True}, UnsupportedError, "--tensorboard"),
        ({"api": "trainer"}, UnsupportedError, "--api"),
        ({"queue": "q", "device": ("amd.com/gpu=1",)}, UnsupportedError, "--device, --queue"),
        ({"sync_mode": "git", "sync_source": "x"}, UnsupportedError, "--sync-mode, --sync-source"),
        ({"shell": "no-such-shell"}, ConfigError, "--shell 'no-such-shell' is not a program of this machine"),
        ({"working_dir": "/no/such"}, ConfigError, "--working-dir /no/such is not a folder"),
        ({"memory": "900Ti"}, ConfigError, r"--memory 900Ti of 1 instances is more than this machine's \d"),
        ({"cpu": "1", "workers": 5000}, ConfigError, "--cpu 1 of 5000 instances is more than the"),
        ({"share_memory": "900Ti"}, ConfigError, "--share-memory 900Ti is more than this machine's /dev/shm"),
        ({"data": ("nowhere:/mnt",)}, NotFoundError, r"no volume nowhere in .*create it with `data create nowhere"),
        ({"data_dir": ("/no/such:/mnt",)}, ConfigError, "/no/such, which is to be mounted at /mnt, does not exist"),
        ({"config_file": ("/no/such:/mnt/x",)}, ConfigError, "--config-file /no/such is not a file"),
        ({"command": "a\0b"}, ConfigError, "null character"),
    ],
)
def test_what_cannot_be_done_is_refused(
    tmp_path: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    backend = LocalBackend(tmp_path / "home")
    with pytest.raises(error, match=message):
        backend.submit(TrainingJob(**{"name": "job", "command": "true", **options}))  # type: ignore[arg-type]
    assert backend.jobs(None) == []


def test_a_dry_run_shows_the_record_and_touches_nothing(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path / "home")
    (plan,) = backend.plan_job(TrainingJob(name="job", command="echo $X", workers=3, env=("X=1",), shell="bash"))
    assert plan["plan"]["names"] == ["job-master-0", "job-worker-0", "job-worker-1"]
    assert plan["plan"]["launch"]["command"] == ["bash", "-c", "echo $X"]
    assert plan["plan"]["launch"]["env"] == {"X": "1"}
    assert not (tmp_path / "home").exists()


def test_the_backend_knows_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("HASTEN_GPUS", "3")
    backend = LocalBackend()
    assert backend.home == tmp_path / "elsewhere"
    (node,) = backend.nodes()
    assert (node.address, node.status, node.gpus, node.allocated_gpus) == ("127.0.0.1", "Ready", 3, 0)
    assert f"uid {os.getuid()}" in backend.whoami()
    assert backend.version().startswith("hasten ")
    assert backend.default_namespace() == "default"


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, hasten.cluster.local.backend;"
        "print(sorted({'torch', 'kubernetes', 'yaml', 'psutil'} & set(sys.modules)))"
    )
    assert python(code).communicate()[0] == "[]\n"
