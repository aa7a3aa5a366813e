import resource
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.cluster.local_site import Site, site

from hasten.cluster.backend import LogOptions
from hasten.cluster.local.logs import LogReader, LogWriter
from hasten.core.errors import NotFoundError


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path / "home") as result:
        yield result


def lines(folder: Path, **options: object) -> list[str]:
    return list(LogReader(folder, "one", lambda: True).lines(LogOptions(**options)))  # type: ignore[arg-type]


def test_every_byte_is_kept(here: Site) -> None:
    """More than a pipe holds, without an end of line at the end, and no text at all."""
    code = "import os; data = bytes(range(256)) * 2000; [os.write(1, data[i:i + 7919]) for i in range(0, 512000, 7919)]"
    here.run("bytes", f"{sys.executable} -c '{code}'; printf 'the end' >&2")
    kept = (here.folder("bytes").logs / "bytes-master-0.log").read_bytes()
    assert kept == bytes(range(256)) * 2000 + b"the end"
    shown = here.logs("bytes")
    assert len(shown) == 2001
    assert shown[-1].endswith("the end")
    assert "\ufffd" in shown[-1]


def test_lines_come_while_they_are_written(here: Site, tmp_path: Path) -> None:
    """The job goes on once its first line has been read."""
    wait = f"while [ ! -e {tmp_path}/read ]; do sleep 0.02; done"
    here.submit("follow", f"echo first; {wait}; printf second; sleep 0.2; echo ' half'; printf last")
    lines = here.backend.job_logs("follow", "default", LogOptions(follow=True))
    assert next(lines) == "first"
    (tmp_path / "read").touch()
    assert list(lines) == ["second half", "last"]


def test_following_ends_when_the_job_is_deleted(here: Site) -> None:
    here.submit("deleted", "echo begun; sleep 600")
    following = here.backend.job_logs("deleted", "default", LogOptions(follow=True))
    assert next(following) == "begun"
    here.backend.delete_job("deleted", "default")
    assert list(following) == []


def test_logs_of_an_instance_that_there_is_not(here: Site) -> None:
    here.run("one", "true")
    with pytest.raises(NotFoundError, match="job one has no instance two; there are: one-master-0"):
        here.logs("one", instance="two")


def test_lines_can_be_chosen_by_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line has the time of its first byte."""
    moment = [1_700_000_000_000_000_000]
    monkeypatch.setattr(time, "time_ns", lambda: moment[0])
    monkeypatch.setattr(time, "time", lambda: 1_700_000_010.0)
    writer = LogWriter(tmp_path, "one")
    for data in (b"a\nb\nc", b"c", b"c\nd\ne", b"\n", b"f\n"):
        writer.write(data)
        moment[0] += 10**9
    writer.close()
    assert lines(tmp_path, timestamps=True) == [
        "2023-11-14T22:13:20.000000000Z a",
        "2023-11-14T22:13:20.000000000Z b",
        "2023-11-14T22:13:20.000000000Z ccc",
        "2023-11-14T22:13:22.000000000Z d",
        "2023-11-14T22:13:22.000000000Z e",
        "2023-11-14T22:13:24.000000000Z f",
    ]
    assert lines(tmp_path, since=8.0) == ["d", "e", "f"]
    assert lines(tmp_path, since=7.9) == ["f"]
    assert lines(tmp_path, since=5.0) == []
    begun = datetime.fromtimestamp(1_700_000_000, UTC)
    assert lines(tmp_path, since_time=begun + timedelta(seconds=1)) == ["d", "e", "f"]
    assert lines(tmp_path, since_time=begun, since=7.9) == ["f"]
    assert lines(tmp_path, since_time=begun, tail=2) == ["e", "f"]
    assert lines(tmp_path, since=7.9, tail=4) == ["f"]


@pytest.mark.parametrize("last", [b"", b"unfinished"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5000, 30_000, 99_999])
def test_last_lines(tmp_path: Path, count: int, last: bytes) -> None:
    writer = LogWriter(tmp_path, "one")
    writer.write(b"".join(b"line %d\n" % number for number in range(20_000)) + last)
    writer.close()
    whole = [f"line {number}" for number in range(20_000)] + ([last.decode()] if last else [])
    assert lines(tmp_path, tail=count) == (whole[-count:] if count else [])


def test_a_log_goes_on_after_a_start_anew(tmp_path: Path) -> None:
    for data in (b"first\nunfinished", b" business\nsecond\n"):
        writer = LogWriter(tmp_path, "one")
        writer.write(data)
        writer.close()
    assert lines(tmp_path) == ["first", "unfinished business", "second"]
    assert [line.partition("Z ")[2] for line in lines(tmp_path, timestamps=True)] == lines(tmp_path)


def test_what_a_full_disk_does_not_take_is_counted(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, "one")
    writer.write(b"one\ntwo\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (24, before[1]))
    try:
        writer.write(b"three\n")  # of whose time there is room for the half
        assert writer.lost == 0
        writer.write(b"a line that is cut\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (writer.lost, writer.error) == (9, "File too large")
    writer.write(b"\nfour\n")
    writer.close()
    found = [line.partition(" ") for line in lines(tmp_path, timestamps=True)]
    assert [text for _, _, text in found] == ["one", "two", "three", "a line tha", "four"]
    assert found[0][0] == found[2][0] < found[4][0]
    assert (tmp_path / "one.times").stat().st_size == 32


def test_a_log_that_takes_nothing_is_no_error(tmp_path: Path) -> None:
    for file in ("one.log", "one.times"):
        (tmp_path / file).symlink_to("/dev/full")
    writer = LogWriter(tmp_path, "one")
    writer.write(b"one\n")
    writer.write(b"two\n")
    writer.close()
    assert (writer.lost, writer.error) == (8, "No space left on device")
