import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.local_site import PYTHON, Site, site
from tests.waiting import LIMIT_S

import hasten
from hasten.cluster.backend import Status
from hasten.cluster.local.mounts import FAILED, mount_command
from hasten.cluster.spec import TrainingJob, Volume
from hasten.core.errors import ClusterError, ConfigError, ExistsError, NotFoundError

NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
ALONE = "give --map-paths, which puts folders' own paths into the command instead"


def mounted(
    mounts: list[tuple[str, str, bool]], script: str, *, prefix: list[str] | None = None, start: str = "/"
) -> "subprocess.CompletedProcess[str]":
    command = [*(prefix or []), *mount_command(["sh", "-c", script], mounts, start)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S, cwd="/")


def _refusal(prefix: list[str]) -> str | None:
    try:
        result = mounted([], "true", prefix=prefix)
    except FileNotFoundError as error:
        return str(error)
    return result.stderr or None if result.returncode else None


@pytest.fixture(params=["as it is", "without privileges"])
def prefix(request: pytest.FixtureRequest) -> list[str]:
    """How to run a command: as this user, and as one that may mount in a user namespace of its own alone."""
    if request.param == "without privileges" and os.geteuid() != 0:
        pytest.skip("this user has no privileges already")
    result = NOBODY if request.param == "without privileges" else []
    if (refusal := _refusal(result)) is not None:
        pytest.skip(f"no mounts here: {refusal}")
    return result


@pytest.fixture
def volume() -> Iterator[Path]:
    """A folder that anybody may write."""
    result = Path(tempfile.mkdtemp())
    result.chmod(0o777)
    (result / "sub").mkdir()
    (result / "sub" / "file").write_text("inside\n")
    yield result
    shutil.rmtree(result)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path / "home") as result:
        yield result


@pytest.mark.parametrize("path", ["/mnt", "/no-such/folder", "/mnt/deep/er", "/usr/share/no-such", "/tmp/no-such/x"])
def test_a_folder_is_seen_at_a_path(prefix: list[str], volume: Path, path: str) -> None:
    entries = sorted(entry.name for entry in Path("/").iterdir())
    script = (
        f"cat {path}/sub/file; echo new > {path}/new; id -u; pwd; ls {volume}/sub; [ -c /dev/null ] && ls -A / | wc -l"
    )
    result = mounted([(str(volume), path, False)], script, prefix=prefix, start=f"{path}/sub")
    user = 65534 if prefix else os.geteuid()
    count = len(entries) + path.startswith("/no-such")
    assert result.stdout.splitlines() == ["inside", str(user), f"{path}/sub", "file", str(count)], result.stderr
    assert (volume / "new").read_text() == "new\n"
    assert (volume / "new").stat().st_uid == user
    assert sorted(entry.name for entry in Path("/").iterdir()) == entries  # no trace on the machine
    assert not Path(path, "sub").exists()


def test_what_is_for_reading_only_cannot_be_written(prefix: list[str], volume: Path) -> None:
    inner = str(volume / "sub")
    script = "cat /mnt/sub/file; echo x > /mnt/new; echo x > /mnt/inner/new"
    result = mounted(
        [(str(volume), "/mnt", True), (inner, "/mnt/sub", True)], script.replace("inner", "sub"), prefix=prefix
    )
    assert result.stdout == "inside\n"
    assert result.stderr.count("Read-only file system") == 2


def test_nothing_is_created_where_it_would_vanish(prefix: list[str], volume: Path) -> None:
    result = mounted(
        [(str(volume), "/no-such/folder", False)], "echo x > /no-such/other; echo x > /other", prefix=prefix
    )
    assert result.stderr.count("Read-only file system") == 2


def test_a_mount_in_a_mount(prefix: list[str], volume: Path) -> None:
    """A path that the outer one lacks is made in it, as container engines do."""
    other = str(volume / "sub")
    script = "cat /mnt/a/b/file; echo x > /mnt/top"
    result = mounted([(other, "/mnt/a/b", False), (str(volume), "/mnt", False)], script, prefix=prefix)
    assert (result.stdout, result.stderr) == ("inside\n", "")
    assert (volume / "a" / "b").is_dir()
    assert (volume / "top").exists()


VANISHING = """
import os, sys
from hasten.cluster.local import mounts
folder, source = sys.argv[1:]
real = os.open
def vanishing(path, *arguments, **options):
    if path.endswith("/early"):
        os.rmdir(path)
    opened = real(path, *arguments, **options)
    if path.endswith("/late"):
        os.rmdir(path)
    return opened
mounts.enter_namespace()
os.open = vanishing
mounter = mounts.Mounter()
mounter.add(source, f"{folder}/new", False)
mounter.finish()
print(*sorted(os.listdir(folder)), *os.listdir(f"{folder}/new/sub"))
"""


def test_what_others_delete_meanwhile_is_left_out(prefix: list[str], volume: Path) -> None:
    """As in /tmp, where a job may have a mount."""
    folder = volume / "busy"
    for name in ("early", "late", "stays"):
        (folder / name).mkdir(parents=True)
    for each in (folder, *folder.iterdir()):
        each.chmod(0o777)
    command = [*prefix, PYTHON, "-c", VANISHING, str(folder), str(volume)]
    env = {**os.environ, "PYTHONPATH": str(Path(hasten.__file__).parents[1])}
    completed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S, cwd="/", env=env)
    assert (completed.stdout, completed.stderr) == ("new stays file\n", "")


def test_files_and_links(prefix: list[str], volume: Path) -> None:
    file = str(volume / "sub" / "file")
    for path in ("/etc/passwd", "/etc/no-such/conf"):
        assert mounted([(file, path, True)], f"cat {path}; ls -d /bin", prefix=prefix).stdout == "inside\n/bin\n"
    result = mounted([(file, "/mnt", True)], "true", prefix=prefix)
    assert result.returncode == FAILED
    assert "cannot mount" in result.stderr
    assert "one is a folder and the other is not" in result.stderr


def test_a_command_that_cannot_be_run(prefix: list[str], volume: Path) -> None:
    result = mounted([], "true", prefix=prefix, start="/no/such")
    assert (result.returncode, result.stderr) == (
        FAILED,
        "hasten: error: cannot start in /no/such: No such file or directory\n",
    )
    command = [*prefix, *mount_command(["no-such-program"], [], "/")]
    path = {"PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=path)
    assert (result.returncode, result.stderr) == (
        FAILED,
        "hasten: error: cannot run no-such-program: No such file or directory\n",
    )


def test_where_the_kernel_forbids_it_another_way_is_named(volume: Path) -> None:
    """In a user namespace whose limit of namespaces is 0, without capabilities."""
    script = 'echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --bounding-set=-all --inh-caps=-all "$@"'
    prefix = ["unshare", "--user", "--map-root-user", "sh", "-c", script, "sh"]
    try:
        result = mounted([(str(volume), "/mnt", False)], "true", prefix=prefix)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if "unshare" in result.stderr:
        pytest.skip(result.stderr)
    assert result.returncode == FAILED
    assert result.stderr == (
        "hasten: error: the kernel does not let this user create a mount namespace "
        f"(the limit user.max_user_namespaces); {ALONE}\n"
    )


JOB = """
import sys, time
from pathlib import Path
from hasten.cluster.local.backend import LocalBackend
from hasten.cluster.backend import LogOptions
from hasten.cluster.spec import TrainingJob, Volume
backend = LocalBackend(Path(sys.argv[1]))
backend.create_volume(Volume(name="vol", path=sys.argv[2]))
command = "cat /mnt/sub/file /no-such/file; id -u"
backend.submit(TrainingJob(name="job", command=command, data=("vol:/mnt",), data_dir=(sys.argv[2] + "/sub:/no-such",)))
print(*backend.job_logs("job", "default", LogOptions(follow=True)))
while not backend.jobs(None)[0].status.ended:
    time.sleep(0.02)
print(backend.jobs(None)[0].status)
backend.delete_job("job", "default")
"""


def _interpreter(prefix: list[str], env: dict[str, str]) -> str:
    """A Python that the user of `prefix` may start: this one may lie in a folder that is closed to others."""
    again = "import subprocess, sys;"
    again += "sys.exit(subprocess.call([sys.executable, '-c', 'import hasten.cluster.local.backend']))"
    for python in (PYTHON, "/usr/bin/python3"):
        if Path(python).exists():
            completed = subprocess.run(
                [*prefix, python, "-c", again], capture_output=True, check=False, cwd="/", env=env
            )
            if completed.returncode == 0:
                return python
    pytest.skip("this user may start no Python that has hasten")


def test_a_job_of_a_user_without_privileges(prefix: list[str], volume: Path) -> None:
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(hasten.__file__).parents[1])}
    command = [*prefix, _interpreter(prefix, env), "-c", JOB, str(volume / "home"), str(volume)]
    completed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S, cwd="/", env=env)
    user = 65534 if prefix else os.geteuid()
    assert (completed.stdout, completed.stderr) == (f"inside inside {user}\nSUCCEEDED\n", "")


def test_volumes_are_known_by_name(here: Site, volume: Path) -> None:
    backend = here.backend
    backend.create_volume(Volume(name="vol", path=str(volume)))
    backend.create_volume(Volume(name="fixed", path=str(volume), read_only=True, description="tales"))
    with pytest.raises(ExistsError, match="volume vol exists in namespace default"):
        backend.create_volume(Volume(name="vol", path=str(volume)))
    seen = [(item.name, item.access_mode, item.description) for item in backend.volumes(None)]
    assert seen == [("fixed", "ReadOnlyMany", "tales"), ("vol", "ReadWriteMany", str(volume))]
    assert backend.volumes("other") == []
    backend.delete_volume("vol", "default")
    with pytest.raises(NotFoundError, match="there is no volume vol in namespace default"):
        backend.delete_volume("vol", "default")
    assert (volume / "sub" / "file").exists()
    with pytest.raises(ConfigError, match="--path /no/such is not a folder"):
        backend.create_volume(Volume(name="no", path="/no/such"))
    assert backend.plan_volume(Volume(name="new", path=str(volume)))[0]["path"] == str(volume)


def test_jobs_and_those_who_attach_see_the_same(
    here: Site, volume: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if (refusal := _refusal([])) is not None:
        pytest.skip(f"no mounts here: {refusal}")
    here.backend.create_volume(Volume(name="vol", path=str(volume)))
    (config := tmp_path / "conf").write_text("as submitted\n")
    here.submit(
        "job",
        "cat file; cat /etc/hasten-no-such/conf; exec sleep 600",
        data=("vol:/mnt",),
        config_file=(f"{config}:/etc/hasten-no-such/conf",),
        working_dir="/mnt/sub",
    )
    here.reaches("job", lambda job: len(here.logs("job")) == 2)
    config.write_text("changed since\n")
    assert here.logs("job") == ["inside", "as submitted"]
    show = ["sh", "-c", "pwd; cat /etc/hasten-no-such/conf"]
    assert here.backend.attach_job("job", "default", None, None, show) == 0
    assert capfd.readouterr().out == "/mnt/sub\nas submitted\n"
    with pytest.raises(ClusterError, match=r"cannot mount .*: one is a folder and the other is not"):
        here.submit("other", "true", data=("vol:/etc/passwd",))
    assert [job.name for job in here.backend.jobs(None)] == ["job"]


def test_mapped_paths_need_no_mount(here: Site, volume: Path) -> None:
    here.backend.create_volume(Volume(name="vol", path=str(volume)))
    lines = here.run("job", "cat /mnt/sub/file; echo $X", data=("vol:/mnt",), env=("X=/mnt",), map_paths=True)
    assert lines == ["inside", str(volume)]
    assert here.folder("job").job_plan().launch.mounts == []


def test_records_are_for_their_user_alone(here: Site) -> None:
    here.run("job", "true")
    assert here.job("job").status is Status.SUCCEEDED
    for path in (here.folder("job").path, here.folder("job").path / "spec.json", here.folder("job").path.parent):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert TrainingJob(name="x", command="true").map_paths is False
