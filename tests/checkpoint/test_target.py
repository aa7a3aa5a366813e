import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from hasten.checkpoint import target as target_module
from hasten.checkpoint.manifest import Manifest, PieceHasher, pieces_of
from hasten.checkpoint.target import Target, exchange, swap
from hasten.core.errors import CheckpointError, ChecksumError


def _folder(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text, encoding="utf-8")
    return path


def _out(path: Path, text: str, ranks: int = 2) -> Path:
    _folder(path / f"{ranks}-gpu", **{"config.ini": text})
    (path / "config.json").write_text('{"a": 1}', encoding="utf-8")
    return path


def _fill(target: Target, text: str, fail: bool = False) -> None:
    with target.prepare() as new:
        (new / target.name / "config.ini").write_text(text, encoding="utf-8")
        (new / "config.json").write_text('{"a": 1}', encoding="utf-8")
        if fail:
            raise KeyboardInterrupt


def _text(out: Path, ranks: int = 2) -> str:
    return (out / f"{ranks}-gpu" / "config.ini").read_text(encoding="utf-8")


def test_exchange_is_one_step(tmp_path: Path) -> None:
    first, other = _folder(tmp_path / "one", a="1"), _folder(tmp_path / "other", b="2")
    if not exchange(first, other):
        pytest.skip("this file system cannot exchange two folders")
    assert (first / "b").exists()
    assert (other / "a").exists()
    with pytest.raises(FileNotFoundError):
        exchange(first, tmp_path / "nothing")


@pytest.mark.parametrize("atomic", [True, False])
def test_swap_with_and_without_the_kernels_help(atomic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not atomic:
        monkeypatch.setattr(target_module, "exchange", lambda one, other: False)
    for old in ({}, {"a": "old"}):
        there = _folder(tmp_path / f"there{len(old)}", **old)
        swap(_folder(tmp_path / "new", a="new"), there, tmp_path / "spare")
        assert (there / "a").read_text(encoding="utf-8") == "new"
        if (tmp_path / "new").exists():
            (tmp_path / "new").rename(tmp_path / "gone")
    swap(tmp_path / "there0", tmp_path / "fresh", tmp_path / "spare")
    assert (tmp_path / "fresh" / "a").exists()


@pytest.mark.parametrize("others", [False, True])
def test_a_failed_run_changes_nothing(others: bool, tmp_path: Path) -> None:
    out = _out(tmp_path / "out", "old")
    if others:
        _out(tmp_path / "out4", "old", 4).joinpath("4-gpu").rename(out / "4-gpu")
    target = Target(out, 2)
    assert target.whole == (not others)
    with pytest.raises(KeyboardInterrupt):
        _fill(target, "new", fail=True)
    assert _text(out) == "old"
    assert not [path for folder in (tmp_path, out) for path in folder.iterdir() if path.name.startswith(".")]
    _fill(target, "new")
    assert _text(out) == "new"
    assert (out / "4-gpu").exists() == others


@pytest.mark.parametrize("moved_away", [False, True])
def test_what_a_dead_run_left_is_cleaned_and_a_live_run_is_not(moved_away: bool, tmp_path: Path) -> None:
    out = _out(tmp_path / "out", "old")
    dead = _folder(tmp_path / ".out.hasten-dead", **{".lock": ""})
    _folder(dead / "new", half="written")
    if moved_away:
        # it died between the two renames that stand in for an exchange
        (dead / "old").mkdir()
        out.rename(dead / "old" / "out")
    alive = _folder(tmp_path / ".out.hasten-alive", **{".lock": ""})
    with (alive / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(KeyboardInterrupt):
            _fill(Target(out, 2), "new", fail=True)
    assert _text(out) == "old"
    assert alive.exists()
    assert not dead.exists()


def test_a_run_that_is_taken_for_a_dead_one_before_it_has_its_lock_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Path] = []
    flock = fcntl.flock

    def late(file: IO[str], kind: int) -> None:
        if not taken:
            taken.extend(tmp_path.glob(".out.hasten-*"))
            shutil.rmtree(taken[0])
        flock(file, kind)

    target = Target(_out(tmp_path / "out", "old"), 2)
    monkeypatch.setattr(fcntl, "flock", late)
    _fill(target, "new")
    assert len(taken) == 1
    assert _text(tmp_path / "out") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folders_that_must_not_be_replaced(tmp_path: Path) -> None:
    out = _out(tmp_path / "out", "old")
    (out / "4-gpu").mkdir()
    with pytest.raises(CheckpointError, match="not written by a converter"):
        Target(out, 4)
    (out / "2-gpu" / "deep").mkdir()
    with pytest.raises(CheckpointError, match="would be lost"):
        Target(out, 2)
    (out / "2-gpu" / "deep").rmdir()
    with pytest.raises(CheckpointError, match="another model"):
        Target(out, 2).check_model({"a": 2})
    Target(out, 2).check_model({"a": 1, "transformers_version": "9"})


def test_a_manifest_finds_what_changed(tmp_path: Path) -> None:
    data = os.urandom(10_000)
    hasher = PieceHasher(limit=3000)
    for start in range(0, len(data), 777):
        hasher.update(memoryview(data)[start : start + 777])
    assert [piece.size for piece in hasher.pieces()] == [3000, 3000, 3000, 1000]
    assert [piece.size for piece in pieces_of(b"")] == [0]
    Manifest("safetensors", 1, "fp32", {"a": hasher.pieces(), "empty": pieces_of(b"")}).write(tmp_path)
    manifest = Manifest.read(tmp_path)
    assert manifest is not None
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "empty").write_bytes(b"")
    manifest.verify(tmp_path, manifest.files)
    changes: list[tuple[str, Callable[[], object]]] = [
        ("checksum differs", lambda: (tmp_path / "a").write_bytes(data[:7000] + bytes([data[7000] ^ 1]) + data[7001:])),
        ("10001 bytes", lambda: (tmp_path / "a").write_bytes(data + b"x")),
        ("is missing", lambda: (tmp_path / "a").unlink()),
    ]
    for message, change in changes:
        change()
        with pytest.raises(CheckpointError, match=message):
            manifest.verify(tmp_path, manifest.files)
    with pytest.raises(ChecksumError, match="does not belong"):
        manifest.verify(tmp_path, ["stranger"])
