import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.cli.conftest import Hasten

CONFIG = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": 32, "n_layer": 2, "n_head": 4}


def test_requests_of_all_kinds_need_a_config_alone(hasten_here: "Hasten", tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 64}))
    done = hasten_here("warm", tmp_path, "--device", "cpu", "--kv-cache-memory", "1M", "--max-num-seqs", "32")
    assert (done.status, done.err) == (0, "")
    pattern = (
        r"started in \d+\.\d s, computed 375 requests of all kinds in \d+\.\d s on the CPU, which compiles no kern"
    )
    assert re.match(pattern, done.out)
