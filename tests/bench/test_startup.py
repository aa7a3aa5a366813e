from pathlib import Path

import pytest

from hasten.bench import startup
from hasten.core.errors import CheckpointError, ConfigError, EngineError


@pytest.mark.slow
def test_a_start_that_fails_raises_what_it_failed_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        startup.measure(str(tmp_path), {}, repetitions=1, cold=False)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(EngineError, match="ended with status 1: it said nothing"):
        startup.measure(str(tmp_path), {}, repetitions=1, cold=False)


def test_at_least_one_start() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        startup.measure("", {}, repetitions=0)
