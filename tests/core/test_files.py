import errno
from pathlib import Path

import pytest

from hasten.core.errors import ConfigError
from hasten.core.files import expand_home, reading, removed_on_failure, write_text


def test_an_error_names_the_file_whether_it_comes_at_opening_or_at_writing(tmp_path: Path) -> None:
    write_text(tmp_path / "café", "é")
    assert (tmp_path / "café").read_bytes() == "é".encode()
    with pytest.raises(OSError, match="/dev/full") as caught:
        write_text(Path("/dev/full"), "x")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")
    with pytest.raises(OSError, match="nowhere"):
        write_text(tmp_path / "nowhere" / "x", "x")


def test_an_error_of_reading_names_the_file_once(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError) as caught, reading("prompts from /nowhere"):
        Path("/nowhere").read_text(encoding="utf-8")
    assert str(caught.value) == "cannot read prompts from /nowhere: No such file or directory"
    with (
        pytest.raises(ConfigError, match="cannot read the list: 'utf-8' codec can't decode byte 0xe9"),
        reading("the list"),
    ):
        (tmp_path / "latin").read_text(encoding="utf-8")


def test_what_was_being_written_is_removed_on_failure(tmp_path: Path) -> None:
    kept, dropped = tmp_path / "kept", tmp_path / "dropped"
    with removed_on_failure([kept]):
        kept.mkdir()
    dropped.mkdir()
    with pytest.raises(KeyboardInterrupt), removed_on_failure([dropped, tmp_path / "not yet there"]):
        raise KeyboardInterrupt
    assert sorted(tmp_path.iterdir()) == [kept]


def test_a_home_directory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    assert expand_home(Path("~/m"), "") == Path("/home/anna/m")
    with pytest.raises(ConfigError, match=r"^~nobody-of-that-name/m cannot be expanded: .*; set THAT$"):
        expand_home(Path("~nobody-of-that-name/m"), "set THAT")
