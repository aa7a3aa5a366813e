"""What a command begins before torch is there."""

from pathlib import Path
from typing import Any

import pytest

from hasten.cli import ahead
from hasten.core import gpu_start
from hasten.core.errors import ConfigError


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Path | None]:
    """The folders whose weights are read ahead; torch is here already."""
    found: list[Path | None] = []
    monkeypatch.setattr(gpu_start, "begin", found.append)
    return found


@pytest.mark.parametrize(
    ("options", "reads"),
    [
        ({}, True),
        ({"device": "cuda", "dtype": "fp16", "quantization": "int8"}, True),
        ({"device": "cpu"}, False),
        ({"tensor_parallel_size": 2}, False),
        ({"load_format": "dummy"}, False),
    ],
    ids=str,
)
def test_a_gpu_reads_the_weights_of_a_command_that_computes_alone(
    options: dict[str, Any], reads: bool, tiny_bloom: Path, begun: list[Path | None]
) -> None:
    ahead.begin(tiny_bloom, options)
    assert begun == [tiny_bloom if reads else None]


def test_a_rank_of_several_reads_its_own_part(
    tiny_bloom: Path, begun: list[Path | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    ahead.begin(tiny_bloom, {})
    assert begun == [None]


def test_options_are_checked_first(tiny_bloom: Path, begun: list[Path | None]) -> None:
    with pytest.raises(ConfigError, match="fp99"):
        ahead.begin(tiny_bloom, {"dtype": "fp99"})
    assert not begun
