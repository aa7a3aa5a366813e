import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hasten.core.errors import ConfigError
from hasten.core.kernel_cache import check_kernel_cache, kernel_cache


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "above" / "cache"
    folder.mkdir(parents=True)
    (folder / "kernel").mkdir()
    return folder


def test_it_is_where_tritons_variables_say() -> None:
    assert kernel_cache({"TRITON_CACHE_DIR": "/a", "TRITON_HOME": "/b"}) == Path("/a")
    assert kernel_cache({"TRITON_HOME": "/b"}) == Path("/b/.triton/cache")
    assert kernel_cache({}) == Path.home() / ".triton" / "cache"


def test_a_folder_of_ones_own_is_taken_and_made(cache: Path) -> None:
    check_kernel_cache(cache)
    check_kernel_cache(cache / "new" / "cache")
    assert (cache / "new" / "cache").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("which", ["above", "above/cache", "above/cache/kernel"])
def test_what_others_can_write_is_refused_by_one_line(cache: Path, tmp_path: Path, which: str) -> None:
    (tmp_path / which).chmod(0o777)
    with pytest.raises(ConfigError, match="can be written to by all users, who could run code here") as error:
        check_kernel_cache(cache)
    assert str(tmp_path / which) in str(error.value)
    assert "TRITON_CACHE_DIR" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_sticky_folder_may_be_above_it_alone(cache: Path) -> None:
    cache.parent.chmod(0o1777)
    check_kernel_cache(cache)
    cache.chmod(0o1777)
    with pytest.raises(ConfigError, match="can be written to by all users"):
        check_kernel_cache(cache)


def test_what_another_user_owns_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 7)
    if own == 0:  # root's folders are taken from anybody
        os.chown(cache, 4321, -1)
    with pytest.raises(ConfigError, match=r"belongs to user \d+"):
        check_kernel_cache(cache)


def test_a_group_may_write_that_has_no_other_members(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.chmod(0o770)
    monkeypatch.setattr("grp.getgrgid", lambda number: (_ for _ in ()).throw(KeyError(number)))
    monkeypatch.setattr("pwd.getpwall", list)
    check_kernel_cache(cache)
    group = cache.stat().st_gid
    other = type("User", (), {"pw_gid": group, "pw_uid": 4321, "pw_name": "other"})
    monkeypatch.setattr("pwd.getpwall", lambda: [other])
    with pytest.raises(ConfigError, match=rf"by the members of group {group}"):
        check_kernel_cache(cache)


def test_what_another_process_removes_meanwhile_does_not_count(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    @contextlib.contextmanager
    def late(folder: Path) -> Iterator[list["os.DirEntry[str]"]]:
        with scan(folder) as entries:
            found = list(entries)
        (cache / "kernel").rmdir()
        yield found

    monkeypatch.setattr(os, "scandir", late)
    check_kernel_cache(cache)
    assert not (cache / "kernel").exists()


def test_a_folder_that_cannot_be_made_is_left_to_the_compiler(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_kernel_cache(tmp_path / "file" / "cache")
