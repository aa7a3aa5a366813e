from pathlib import Path
from typing import Any

import pytest

from hasten.cluster.local.plan import Source, job_plan, server_plan
from hasten.cluster.spec import TrainingJob, TritonServer
from hasten.core.errors import ConfigError

RECORD = Path("/home/jobs/default/job")


def planned(command: str, folder: Path, **options: Any) -> Any:
    (folder / "model").mkdir(exist_ok=True)
    sources = {"vol": Source(str(folder), False), "deep": Source(str(folder / "model"), True)}
    return job_plan(TrainingJob(name="job", command=command, map_paths=True, **options), sources, RECORD)


@pytest.mark.parametrize(
    ("command", "mapped"),
    [
        ("cat /mnt/model/x /mnt", "cat F/model/x F"),
        ("cat '/mnt/a b' \"/mnt\" (/mnt) -i=/mnt/x", "cat 'F/a b' \"F\" (F) -i=F/x"),
        ("PATH=/bin:/mnt/bin,/mnt;/mnt", "PATH=/bin:F/bin,F;F"),
        (
            "/mnt2 /mnt-a /mnt.b /data/mnt x/mnt -I/mnt ~/mnt $A/mnt",
            "/mnt2 /mnt-a /mnt.b /data/mnt x/mnt -I/mnt ~/mnt $A/mnt",
        ),
        ("/mnt\n/mnt\t/mnt", "F\nF\tF"),
        ("/mnt/deep/x /mnt/deeper", "F/model/x F/deeper"),
    ],
)
def test_paths_are_mapped(tmp_path: Path, command: str, mapped: str) -> None:
    plan = planned(command, tmp_path, data=("vol:/mnt", "deep:/mnt/deep"), env=(f"X={command}",))
    expected = mapped.replace("F", str(tmp_path))
    assert plan.launch.command == ["sh", "-c", expected]
    assert plan.launch.env == {"X": expected}
    assert plan.launch.mounts == []


def test_a_folder_that_a_shell_would_read_is_not_mapped(tmp_path: Path) -> None:
    (folder := tmp_path / "a b").mkdir()
    with pytest.raises(ConfigError, match="has characters that shells read"):
        planned("cat /mnt", folder, data=("vol:/mnt",))


def test_working_folders_lie_where_they_are_mapped(tmp_path: Path) -> None:
    plan = planned("true", tmp_path, data=("vol:/mnt",), working_dir="/mnt/model")
    assert plan.launch.working_dir == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ("vol:/",)}, "would hide the whole file system: give a folder in it"),
        ({"data": ("vol:/mnt", "deep:/mnt")}, "/mnt is given for two mounts"),
        ({"data_dir": ("/etc:relative",)}, "is not /FROM:/PATH or /PATH"),
    ],
)
def test_mounts_that_cannot_be_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned("true", tmp_path, **options)


def test_a_folder_at_its_own_path_needs_no_mount(tmp_path: Path) -> None:
    job = TrainingJob(name="job", command="true", data_dir=(str(tmp_path), f"{tmp_path}:/x"))
    assert job_plan(job, {}, RECORD).launch.mounts == [(str(tmp_path), "/x", False)]


def test_a_server_is_hasten_serve(tmp_path: Path) -> None:
    options: dict[str, Any] = {"name": "s", "version": "1", "model_repository": str(tmp_path)}
    plan = server_plan(TritonServer(**options), {}, RECORD)
    assert plan.launch.command[1:] == [
        *("-P", "-m", "hasten", "serve", "--model-repository", str(tmp_path)),
        *("--http-address", "127.0.0.1", "--grpc-address", "127.0.0.1"),
        *("--allow-metrics", "false", "--exit-timeout-secs", "30"),
    ]
    assert plan.ports == {"http": 8000, "grpc": 8001}
    more: dict[str, Any] = {
        "allow_metrics": True,
        "expose_service": True,
        "load_model": ("a", "b"),
        "extend_command": "--id $X",
    }
    plan = server_plan(TritonServer(**options, **more), {}, RECORD)
    assert plan.launch.command[:4] == ["sh", "-c", 'exec "$@" --id $X', "sh"]
    assert plan.launch.command[-6:] == ["--model-control-mode", "explicit", "--load-model", "a", "--load-model", "b"]
    assert plan.launch.command.count("0.0.0.0") == 2
    assert plan.ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    with pytest.raises(ConfigError, match="--model-repository /no/such is not a folder of this machine"):
        server_plan(TritonServer(**{**options, "model_repository": "/no/such"}), {}, RECORD)
