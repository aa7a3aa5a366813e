"""The files of the local backend: damaged ones, and folders that cannot be used."""

import dataclasses
import errno
import fcntl
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.local_site import Site, alive, site
from tests.waiting import await_idle, eventually

from hasten.cluster.backend import Backend, ServerUpdate, Status
from hasten.cluster.local.backend import LocalBackend
from hasten.cluster.local.state import Folder, home_folder
from hasten.cluster.spec import TrainingJob, TritonServer, Volume
from hasten.core.errors import ClusterError, ConfigError, NotFoundError
from hasten.core.ports import free_port


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path / "home") as result:
        yield result


def test_a_volume_whose_record_is_damaged(here: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The advice concerns that record alone, and following it loses no other volume."""
    for name in ("good", "bad", "old"):
        here.backend.create_volume(Volume(name=name, path=str(tmp_path)))
    folder = here.home / "volumes" / "default"
    (folder / "bad.json").write_text("{half")
    (folder / "old.json").write_text("{}")
    assert [volume.name for volume in here.backend.volumes("default")] == ["good"]
    for name in ("bad", "old"):
        record = folder / f"{name}.json"
        assert f"the record {record} cannot be read" in caplog.text
        assert f"or move {record} elsewhere" in caplog.text
        with pytest.raises(ClusterError, match=f"{record} cannot be read: .*or move {record} elsewhere"):
            here.submit("job", "true", data=(f"{name}:/mnt",))
        record.rename(tmp_path / record.name)
        here.backend.create_volume(Volume(name=name, path=str(tmp_path)))
    assert [volume.name for volume in here.backend.volumes("default")] == ["bad", "good", "old"]
    assert "delete" not in caplog.text


def test_a_job_whose_record_is_damaged(here: Site, tmp_path: Path) -> None:
    """Its folder, with its logs, is moved elsewhere as a whole; then its name is free."""
    for name in ("good", "bad"):
        here.run(name, "echo done", map_paths=True)
        here.over(name)
    folder = here.folder("bad").path
    for text in ("{half", "[]", '{"instances": []}'):
        (folder / "state.json").write_text(text)
        with pytest.raises(ClusterError, match=f"{folder}/state.json cannot be read: .*or move {folder} elsewhere"):
            here.job("bad")
        with pytest.raises(ClusterError, match="cannot be read"):
            here.backend.delete_job("bad", "default")
    folder.rename(tmp_path / "bad")
    assert here.run("bad", "echo again") == ["again"]
    assert here.logs("good") == ["done"]


@pytest.mark.parametrize("part", ["asked", "plan"])
def test_a_server_whose_record_is_of_another_version(
    part: str, here: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named with what to do, and stands in the way of no other server."""
    backend = here.backend
    for name in ("good", "bad"):
        backend.serve(server(name, str(tmp_path)))
    folder = here.home / "servers" / "default" / "bad@1"
    record = json.loads((folder / "spec.json").read_text())
    later = {**record, part: {**record[part], "later": 1}}
    (folder / "spec.json").write_text(json.dumps(later))
    unreadable = (
        f"the record {folder}/spec.json cannot be read: it is of another version of hasten .*later.*move {folder}"
    )
    if part == "asked":
        with pytest.raises(ClusterError, match=unreadable):
            backend.update_server("bad", None, "default", ServerUpdate(replicas=0))
    else:
        assert [each.name for each in backend.servers(None)] == ["good"]
        assert f"the record {folder}/spec.json cannot be read" in caplog.text
        for verb in (backend.server, backend.delete_server):
            with pytest.raises(ClusterError, match=unreadable):
                verb("bad", None, "default")
    backend.serve(server("third", str(tmp_path)))
    backend.update_server("good", None, "default", ServerUpdate(env=("A=1",)))
    assert {"good", "third"} <= {each.name for each in backend.servers(None)}
    (folder / "spec.json").write_text(json.dumps(record))
    assert {each.name for each in backend.servers(None)} == {"bad", "good", "third"}


def server(name: str, repository: str) -> TritonServer:
    ports: dict[str, Any] = {"http_port": free_port(), "grpc_port": free_port()}
    return TritonServer(name=name, version="1", model_repository=repository, replicas=0, **ports)


def test_an_update_from_another_folder_changes_only_what_it_names(
    here: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, other = tmp_path / "served", tmp_path / "other"
    for folder in (served, other):
        (folder / "models").mkdir(parents=True)
    (served / "c.txt").write_text("settings")
    monkeypatch.chdir(served)
    relative = dataclasses.replace(server("s", "models"), config_file=["c.txt:/etc/c.txt"])
    here.backend.serve(relative)
    record = here.home / "servers" / "default" / "s@1" / "spec.json"
    before = json.loads(record.read_text())
    (served / "c.txt").unlink()  # its copy is in the record
    monkeypatch.chdir(other)
    here.backend.update_server("s", None, "default", ServerUpdate(label=("a=b",)))
    after = json.loads(record.read_text())
    assert after["plan"]["launch"] == before["plan"]["launch"]
    assert after["asked"] == {**before["asked"], "label": ["a=b"]}
    assert before["asked"]["model_repository"] == str(served / "models")


def test_what_others_keep_in_the_home_stays(here: Site, tmp_path: Path) -> None:
    """HASTEN_HOME may be set to a folder that is used for other things."""
    theirs = here.home / "scratch" / "results" / "model.bin"
    dead = here.home / "scratch" / "hasten-temporary-1" / "spec.json"
    for path in (theirs, dead):
        path.parent.mkdir(parents=True)
        path.touch()
        for each in (path, path.parent):
            os.utime(each, (0, 0))
    here.run("good", "true")
    here.over("good")
    here.backend.delete_job("good", "default")
    assert theirs.exists()
    assert not dead.exists()


def test_files_that_are_no_records(here: Site) -> None:
    here.run("good", "true")
    (here.home / "jobs" / "README").touch()
    (here.home / "jobs" / "default" / "notes.txt").touch()
    (here.home / "servers" / "default").mkdir(parents=True)
    (here.home / "servers" / "default" / "notes.txt").touch()
    assert [job.name for job in here.backend.jobs(None)] == ["good"]
    assert here.backend.servers(None) == []


WRITES: dict[str, Callable[[Backend, str], object]] = {
    "submit": lambda backend, folder: backend.submit(TrainingJob(name="x", command="true")),
    "serve": lambda backend, folder: backend.serve(TritonServer(name="x", version="1", model_repository=folder)),
    "data create": lambda backend, folder: backend.create_volume(Volume(name="x", path=folder)),
    "top node": lambda backend, folder: backend.nodes(),
}


def test_a_home_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    with pytest.raises(ConfigError, match=r"home is not a folder: .* set HASTEN_HOME"):
        LocalBackend(tmp_path / "home")


@pytest.mark.parametrize("verb", WRITES)
def test_a_home_that_is_no_folder_any_more(tmp_path: Path, verb: str) -> None:
    backend = LocalBackend(tmp_path / "home")
    (tmp_path / "home").touch()
    with pytest.raises(ConfigError, match=r"cannot use .*\(Not a directory\).* HASTEN_HOME, default"):
        WRITES[verb](backend, str(tmp_path))


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("verb", WRITES)
def test_a_home_that_is_full_or_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, code: int
) -> None:
    home = tmp_path / "home"
    backend = LocalBackend(home)
    _refuse_writes(monkeypatch, home, code)
    with pytest.raises(ConfigError, match=rf"cannot use {home}.*\({os.strerror(code)}\): .* HASTEN_HOME, default"):
        WRITES[verb](backend, str(tmp_path))
    assert not home.exists()


def _refuse_writes(monkeypatch: pytest.MonkeyPatch, home: Path, code: int) -> None:
    """What the kernel answers to whatever would be made under a folder."""

    def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            flags = arguments[0] if arguments and real is os_open else os.O_CREAT
            there = os.path.lexists(path)
            if not there and Path(os.fspath(path)).is_relative_to(home) and flags & os.O_CREAT:
                raise OSError(code, os.strerror(code), os.fspath(path))
            return real(path, *arguments, **options)

        return call

    os_open = os.open
    monkeypatch.setattr(os, "open", refusing(os_open))
    monkeypatch.setattr(os, "mkdir", refusing(os.mkdir))


def test_a_disk_that_fills_up_leaves_nothing_half(here: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here.backend.create_volume(Volume(name="v", path=str(tmp_path)))
    here.run("good", "true")
    here.over("good")
    before = sorted(here.home.rglob("*"))
    with monkeypatch.context() as patch:
        _refuse_writes(patch, here.home, errno.ENOSPC)
        for verb in ("submit", "serve", "data create"):
            with pytest.raises(ConfigError, match="No space left on device"):
                WRITES[verb](here.backend, str(tmp_path))
        assert sorted(here.home.rglob("*")) == before
        assert [job.name for job in here.backend.jobs(None)] == ["good"]
        assert [volume.name for volume in here.backend.volumes(None)] == ["v"]
        here.backend.delete_job("good", "default")  # which makes room
    assert not here.folder("good").path.exists()
    assert list((here.home / "scratch").iterdir()) == []


def test_a_job_that_died_on_a_full_disk_is_told_and_can_be_deleted(
    here: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here.submit("died", "exec sleep 600")
    here.running("died")
    supervisor = here.state("died").pid or 0
    os.kill(supervisor, signal.SIGKILL)
    eventually(lambda: not alive(supervisor), lambda: "it lives")
    _refuse_writes(monkeypatch, here.home, errno.ENOSPC)
    (job,) = here.backend.jobs(None)
    assert (job.status, job.reason) == (Status.FAILED, "its supervisor was killed")
    assert "No space left on device" in caplog.text
    here.backend.delete_job("died", "default")
    assert here.backend.jobs(None) == []


def _limit_files(pid: int, size: int) -> None:
    """Let a process write no file beyond a size, as on a full disk."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize(("code", "status"), [(0, Status.SUCCEEDED), (3, Status.FAILED)])
def test_a_job_whose_disk_is_full_goes_on_and_its_true_end_is_recorded_later(
    here: Site, tmp_path: Path, code: int, status: Status
) -> None:
    go = tmp_path / "go"
    here.submit("late", f"echo first; until [ -e {go} ]; do sleep 0.05; done; echo second; exit {code}")
    here.running("late")
    eventually(lambda: here.logs("late") == ["first"])
    state = here.state("late")
    supervisor, instance = state.pid or 0, state.instances[0].pid or 0
    _limit_files(supervisor, 0)
    go.touch()
    eventually(lambda: not alive(instance), lambda: "it runs")
    await_idle(supervisor)
    assert here.job("late").status is Status.RUNNING
    _limit_files(supervisor, resource.RLIM_INFINITY)
    job = here.ended("late")
    how = f"ended with exit code {code}; 7 bytes of its output were lost: File too large"
    assert (job.status, job.reason) == (status, None if code == 0 else f"late-master-0 {how}")
    assert how in [event.message for event in job.events]
    (warning,) = [event.message for event in job.events if event.reason == "Unwritable"]
    assert warning == "the record could not be written: File too large"
    here.over("late")
    assert here.logs("late") == ["first"]


def test_a_job_that_has_ended_on_a_full_disk_is_deleted_at_once(here: Site) -> None:
    here.submit("ends", "exec sleep 600")
    here.running("ends")
    state = here.state("ends")
    supervisor, instance = state.pid or 0, state.instances[0].pid or 0
    _limit_files(supervisor, 0)
    os.kill(instance, signal.SIGKILL)
    await_idle(supervisor)
    assert alive(supervisor)
    here.backend.delete_job("ends", "default")
    assert not alive(supervisor)
    assert here.backend.jobs(None) == []


def test_gpus_are_given_once_there_is_room_to_note_it(here: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_GPUS", "1")
    here.submit("first", "exec sleep 600", gpus=1)
    here.running("first")
    here.submit("second", "echo $CUDA_VISIBLE_DEVICES", gpus=1)
    eventually(lambda: "waits for 1 GPU" in str(here.job("second").reason))
    supervisor = here.state("second").pid or 0
    _limit_files(supervisor, 0)
    here.backend.delete_job("first", "default")
    await_idle(supervisor)
    assert here.job("second").status is Status.PENDING
    _limit_files(supervisor, resource.RLIM_INFINITY)
    job = here.ended("second")
    assert (job.status, here.logs("second")) == (Status.SUCCEEDED, ["0"])
    waits = [event.message for event in job.events if event.reason == "Waiting"]
    assert any(message.startswith("cannot use ") and "(File too large)" in message for message in waits), waits


@pytest.mark.parametrize("followed", [False, True])
def test_a_folder_that_goes_while_its_lock_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, followed: bool
) -> None:
    """Its lock is no hold on another folder of that name."""
    folder = Folder(tmp_path / "jobs" / "default" / "x")
    folder.path.mkdir(parents=True)
    flock = fcntl.flock

    def late(descriptor: int, kind: int) -> None:
        folder.path.rename(tmp_path / "gone")
        if followed:
            folder.path.mkdir()
            (folder.path / "lock").touch()
        flock(descriptor, kind)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        with pytest.raises(NotFoundError, match="there is no x in namespace default"):
            folder.try_lock()
    lock = Folder(tmp_path / "gone").try_lock()
    assert lock is not None
    os.close(lock)


def test_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HASTEN_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does where it finds no home
    with pytest.raises(ConfigError, match="there is no home directory; set HASTEN_HOME to a folder"):
        LocalBackend()
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path))
    assert home_folder(None) == tmp_path


def test_a_server_that_is_not_there_needs_no_home(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path / "home")
    with pytest.raises(ClusterError, match="there is no server x"):
        backend.update_server("x", None, "default", ServerUpdate(replicas=1))
    assert not (tmp_path / "home").exists()
