"""torch with parts that are imported when they are needed: each test in a process that has not imported it yet."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.core import torch_import

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
BEGIN = """
import json, sys, types
from hasten.core import torch_import

def waiting():
    return sorted(name for name in torch_import._PARTS if type(sys.modules.get(name)) is torch_import._Part)
"""


def printed(program: str) -> Any:
    """What a program prints as JSON."""
    code = BEGIN + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_installed_torch_is_one_that_this_was_tested_with() -> None:
    assert ".".join(torch.__version__.split(".")[:2]) in torch_import.VERSIONS
    assert not torch_import.postpone_parts()  # torch is there


def test_a_token_is_computed_without_the_parts() -> None:
    found = printed(f"""
        torch_import.begin()
        from hasten import LLM, SamplingParams
        with LLM({str(DEMO)!r}, device="cpu") as llm:
            output = llm.generate("The sea", SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)[0]
        print(json.dumps([waiting(), output.outputs[0].token_ids]))
    """)
    expected = printed(f"""
        from hasten import LLM, SamplingParams
        with LLM({str(DEMO)!r}, device="cpu") as llm:
            output = llm.generate("The sea", SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)[0]
        print(json.dumps(output.outputs[0].token_ids))
    """)
    assert found == [sorted(torch_import._PARTS), expected]


USES = {
    "a name in a part": "assert torch.export.Dim('n').__name__ == 'n'",
    "a module of a part": """
        from torch.utils.data.sampler import SequentialSampler
        assert SequentialSampler is torch.utils.data.SequentialSampler
        assert torch.utils.data.sampler is sys.modules["torch.utils.data.sampler"]
    """,
    "a module that needs a part": "import torch._dynamo; import torch._prims; assert torch._prims.__spec__.origin",
    "what imports such modules": "torch.use_deterministic_algorithms(True)",
    "another thread": """
        import threading
        start, found = threading.Barrier(8), []
        def use():
            start.wait()
            found.append(torch.distributions.Normal(0.0, 1.0).stddev.item())
        threads = [threading.Thread(target=use) for _ in range(8)]
        [each.start() for each in threads], [each.join() for each in threads]
        assert found == [1.0] * 8
    """,
}


@pytest.mark.parametrize("use", USES)
def test_all_parts_run_once_when_any_is_used(use: str) -> None:
    program = """
        runs, run = [], torch_import._PartLoader.run
        torch_import._PartLoader.run = lambda self, module: (runs.append(module.__name__), run(self, module))
        assert torch_import.postpone_parts()
        import torch
        with torch.device("meta"):
            assert torch.empty(2, 3).shape == (2, 3)
        assert waiting() == sorted(torch_import._PARTS)
        assert not hasattr(torch.quantization, "__wrapped__")
        assert not runs
    """
    rest = """
        assert sorted(runs) == sorted(torch_import._PARTS)
        assert all(type(sys.modules[name]) is types.ModuleType for name in torch_import._PARTS)
        with torch.device("meta"):
            shape = torch.ops.aten.linalg_cross(torch.empty(2, 3), torch.empty(2, 3)).shape
        print(json.dumps(list(shape)))
    """
    assert printed("\n".join(map(textwrap.dedent, (program, USES[use], rest)))) == [2, 3]


def test_random_numbers_are_drawn_without_the_parts() -> None:
    """And with them: torch 2.13 makes no generator before one of the parts has run."""
    found = printed("""
        torch_import.postpone_parts()
        import torch
        draw = lambda: torch.rand(3, generator=torch.Generator().manual_seed(5)).tolist()
        drawn = [draw(), waiting(), isinstance(torch.Generator(), torch.Generator)]
        for name in torch_import._PARTS:
            getattr(sys.modules[name], "nothing", None)
        print(json.dumps([*drawn, draw(), isinstance(torch.Generator(), torch.Generator)]))
    """)
    numbers = torch.rand(3, generator=torch.Generator().manual_seed(5)).tolist()
    assert found == [numbers, sorted(torch_import._PARTS), True, numbers, True]


@pytest.mark.parametrize("version", ["__version__ = '1.13.1'\n", "nothing"])
def test_another_version_of_torch_is_imported_whole(version: str, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("from torch import export\n")
    (tmp_path / "torch" / "export.py").write_text("there = True\n")
    (tmp_path / "torch" / "version.py").write_text(version)
    found = printed(f"""
        sys.path.insert(0, {str(tmp_path)!r})
        torch_import.begin()
        import torch
        print(json.dumps([torch_import.postpone_parts(), "there" in vars(torch.export)]))
    """)
    assert found == [False, True]
