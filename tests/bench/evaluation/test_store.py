from pathlib import Path

import pytest

from hasten.bench.evaluation.form import Knee
from hasten.bench.evaluation.store import SectionStore


class Measured:
    def __init__(self, value: int | None) -> None:
        self.value, self.count = value, 0

    def __call__(self) -> Knee:
        self.count += 1
        return Knee("hasten", self.value)


def store(folder: Path, identity: str = "model", *, fresh: bool = False) -> SectionStore:
    return SectionStore(folder, {"model": identity}, fresh=fresh, say=lambda _: None)


def test_a_section_is_measured_once_for_all_that_it_depends_on(tmp_path: Path) -> None:
    first = Measured(4)
    assert store(tmp_path).section("a b", Knee, {"n": 1}, first) == Knee("hasten", 4)
    assert store(tmp_path).section("a b", Knee, {"n": 1}, Measured(5)) == Knee("hasten", 4)
    for other in (
        store(tmp_path).section("a b", Knee, {"n": 2}, Measured(5)),
        store(tmp_path).section("b", Knee, {"n": 1}, Measured(5)),
        store(tmp_path, "changed").section("a b", Knee, {"n": 1}, Measured(5)),
        store(tmp_path, fresh=True).section("a b", Knee, {"n": 1}, Measured(5)),
    ):
        assert other == Knee("hasten", 5)
    assert first.count == 1


@pytest.mark.parametrize("damage", [b"", b"{", b'{"label": 3}', b"\xff"])
def test_a_damaged_section_is_measured_again(tmp_path: Path, damage: bytes) -> None:
    store(tmp_path).section("a", Knee, {}, Measured(1))
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage)
    assert store(tmp_path).section("a", Knee, {}, Measured(2)) == Knee("hasten", 2)


def test_a_section_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> Knee:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "work").section("a", Knee, {}, fail)
    assert not (tmp_path / "work").exists()
