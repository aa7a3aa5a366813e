import codecs
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from hasten.core.errors import ConfigError
from hasten.core.files import expand_home, file_in_the_way, reading, removed_on_failure, write_bytes, write_text


def test_an_error_names_the_file_whether_it_comes_at_opening_or_at_writing(tmp_path: Path) -> None:
    write_text(tmp_path / "café", "é")
    assert (tmp_path / "café").read_bytes() == "é".encode()
    with pytest.raises(OSError, match="/dev/full") as caught:
        write_text(Path("/dev/full"), "x")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")
    with pytest.raises(OSError, match="nowhere"):
        write_text(tmp_path / "nowhere" / "x", "x")


@pytest.mark.parametrize("before", [None, b"what was there"])
def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path: Path, before: bytes | None) -> None:
    file = tmp_path / "results.json"
    if before is not None:
        file.write_bytes(before)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: .*/results\.json'$") as caught:
            write_bytes(file, bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(file))
    assert (file.read_bytes() if file.exists() else None) == before
    assert list(tmp_path.iterdir()) == ([file] if before is not None else [])


def test_a_file_is_replaced_with_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    write_text(file, "new", sync=True)
    file.chmod(0o640)
    write_text(file, "newer")
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("newer", 0o640)
    assert list(tmp_path.iterdir()) == [file]


def test_links_pipes_and_long_names_are_written_in_place(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for text in ("first", "second"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "file").read_text() == text
    assert (tmp_path / "link").is_symlink()
    write_text(tmp_path / ("n" * 255), "long")
    code = "from pathlib import Path; from hasten.core.files import write_text; write_text(Path('/dev/stdout'), 'x')"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout == b"x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_a_file_in_a_folder_that_takes_no_others_is_written_in_place(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.touch()
    tmp_path.chmod(0o500)
    try:
        write_text(file, "new")
    finally:
        tmp_path.chmod(0o700)
    assert file.read_text() == "new"


def test_a_file_where_a_folder_is_needed_is_named(tmp_path: Path) -> None:
    (file := tmp_path / "file").touch()
    for made in (file, file / "folder", file / "folder" / "below"):
        with pytest.raises((FileExistsError, NotADirectoryError)) as caught:
            made.mkdir(parents=True)
        assert file_in_the_way(caught.value) == str(file)
    with pytest.raises(FileNotFoundError) as missing:
        (tmp_path / "no" / "folder").mkdir()
    assert file_in_the_way(missing.value) is None


def test_an_error_of_reading_names_the_file_once() -> None:
    with pytest.raises(ConfigError) as caught, reading("prompts from /nowhere"):
        Path("/nowhere").read_text(encoding="utf-8")
    assert str(caught.value) == "cannot read prompts from /nowhere: No such file or directory"


def test_a_text_in_another_encoding_is_called_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "list"
    for content, message in (
        (b"caf\xe9", "it is not UTF-8, with the byte 0xe9 at position 3"),
        ("list".encode("utf-16"), "it is UTF-16"),
        (codecs.BOM_UTF16_BE + "list".encode("utf-16-be"), "it is UTF-16"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigError) as caught, reading("the list"):
            file.read_text(encoding="utf-8")
        assert str(caught.value) == f"cannot read the list: {message}; save it as UTF-8"


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
    with pytest.raises(ConfigError, match=r"there is no user nobody-of-that-name; write the path in full$"):
        expand_home(Path("~nobody-of-that-name/m"), "set THAT")
