"""Some verbs by the command, with the processes of this machine."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cli.memory_backend import cluster
from tests.waiting import attempts, eventually

from hasten.cluster.local.backend import LocalBackend

COMMANDS = {
    "quotes": """printf '%s|' 'a  b' "c 'd'" "\\$HOME" \\"e\\" "$(echo f)" "${NOTHING:-g h}" && echo""",
    "lines": "cat <<'END'\nfirst $x\n  'second'\n\nEND\n# a comment\necho '#' third; exit 3",
    "shell": "for n in 1 2; do echo $n; done | tr '12' 'ab' & wait; echo \"$WORD\" >&2",
}
WRITTEN = {
    "quotes": """a  b|c 'd'|$HOME|"e"|f|g h|\n""",
    "lines": "first $x\n  'second'\n\n# third\n",
    "shell": "a\nb\ntwo  words\n",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The local backend's own folder; jobs that a test leaves are ended."""
    folder = tmp_path / "home"
    monkeypatch.setenv("HASTEN_HOME", str(folder))
    monkeypatch.delenv("HASTEN_CLUSTER", raising=False)
    yield folder
    backend = LocalBackend(folder)
    for job in backend.jobs(None):
        backend.delete_job(job.name, job.namespace)


def wait_for(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    eventually(lambda: status_of(name, capsys) in ("SUCCEEDED", "FAILED"), lambda: status_of(name, capsys))
    return status_of(name, capsys)


def status_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cluster("get", name, "-o", "json") == 0
    return str(json.loads(capsys.readouterr().out)["status"])


def test_commands_run_as_they_are_given(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in COMMANDS.items():
        assert cluster("submit", "pytorchjob", "--name", name, "--env", "WORD=two  words", command) == 0
    assert [wait_for(name, capsys) for name in COMMANDS] == ["SUCCEEDED", "FAILED", "SUCCEEDED"]
    for name, written in WRITTEN.items():
        assert cluster("logs", name) == 0
        assert capsys.readouterr().out == written
    assert cluster("get", "lines") == 0
    assert "Reason: " in capsys.readouterr().out
    assert cluster("delete", *COMMANDS) == 0
    assert cluster("list", "-o", "json") == 0
    assert capsys.readouterr().out.endswith("[]\n")


def test_a_dry_run_leaves_no_trace(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster("submit", "pytorchjob", "--name", "x", "--dry-run", "run  this") == 0
    assert "run  this" in capsys.readouterr().out
    assert not home.exists()


def test_what_this_machine_cannot_do(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster("submit", "pytorchjob", "--name", "x", "--priority", "high", "--toleration", "all", "run") == 2
    assert "cannot do --toleration, --priority" in capsys.readouterr().err
    assert cluster("submit", "pytorchjob", "--name", "x", "--data", "no-volume:/mnt", "run") == 1
    assert "no-volume" in capsys.readouterr().err


def many_jobs(home: Path, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """One that ran, and copies of all that was noted of it."""
    assert cluster("submit", "pytorchjob", "--name", "job-0", "true") == 0
    assert wait_for("job-0", capsys) == "SUCCEEDED"
    first = home / "jobs" / "default" / "job-0"
    eventually(lambda: json.loads((first / "state.json").read_text())["done"])  # a moment after its success is told
    noted = {name: (first / name).read_text() for name in ("spec.json", "state.json", "lock")}
    for number in range(1, count):
        copy = first.with_name(f"job-{number}")
        copy.mkdir()
        for name, text in noted.items():
            (copy / name).write_text(text.replace("job-0", copy.name))


def test_a_thousand_jobs_are_listed_as_fast_as_they_are_read(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many_jobs(home, 1000, capsys)
    backend = LocalBackend(home)
    reading, listing, starting = list[float](), list[float](), list[float]()
    for _ in attempts("a list that costs little more than reading it"):
        began = time.process_time()
        assert len(backend.jobs("default")) == 1000
        reading.append(time.process_time() - began)
        for times, namespace, lines in ((starting, "empty", 1), (listing, "default", 1001)):
            capsys.readouterr()
            began = time.process_time()
            assert cluster("list", "-n", namespace) == 0
            times.append(time.process_time() - began)
            assert len(capsys.readouterr().out.splitlines()) == lines
        if min(listing) - min(starting) < min(1, 1.5 * min(reading)):
            break
    shutil.rmtree(home)


@pytest.mark.parametrize(
    "argv",
    [
        ("get", "../default/e1"),
        ("logs", ""),
        ("delete", "."),
        ("attach", "E1", "true"),
        ("data", "delete", "../x"),
        ("data", "create", "..", "--path", "/tmp"),
        ("serve", "get", "a/b"),
        ("serve", "delete", "x", "--version", "../1"),
        ("list", "-n", "../jobs"),
    ],
)
def test_a_name_that_is_none(home: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]) -> None:
    assert cluster(*argv) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert "must have" in captured.err
    assert not home.exists()


def test_a_name_cannot_reach_another_namespace(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster("submit", "pytorchjob", "--name", "e1", "true") == 0
    assert wait_for("e1", capsys) == "SUCCEEDED"
    capsys.readouterr()
    assert cluster("delete", "-n", "other", "../default/e1", "gone") == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert [entry.name for entry in (home / "jobs").iterdir()] == ["default"]
    assert cluster("get", "e1") == 0
