"""Extras as pyproject.toml has them, and what the rooms of the source import."""

import ast
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, cast

import pytest

from hasten.core.errors import ConfigError
from hasten.core.extras import EXTRAS, require_extra

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCE = ROOT / "src" / "hasten"
SERVED = {"bench/served.py", "bench/serving.py", "bench/load/codec.py", "bench/load/grpc.py", "bench/load/http.py"}
SERVED |= {"bench/load/target.py", "bench/evaluation/store.py"}
"""Benchmarks of servers, which need the extra `serve`."""
CORE_ROOMS = ("core", "ops", "parallel", "layers", "models", "checkpoint", "engine", "bench")
OPTIONAL = {
    "triton",
    "numba",
    "llvmlite",
    "pynvml",
    "llguidance",
    "uvloop",
    "huggingface_hub",
    "opentelemetry",
    "vllm",
    "lm_eval",
    "font_roboto",
    "resvg_py",
}
"""Imported only where they are there (transformers brings huggingface_hub), or behind `require_extra`."""


def distribution(requirement: str) -> str:
    found = re.match(r"[\w-]+", requirement)
    assert found is not None
    return found[0].lower()


def distributions(requirements: list[str]) -> set[str]:
    return {distribution(requirement) for requirement in requirements}


class _WithoutTypeChecking(ast.NodeTransformer):
    """What only type checkers import (`_typeshed`, which no package brings) is not needed to run."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node.orelse
        return self.generic_visit(node)


def imports(*rooms: str) -> dict[str, set[str]]:
    """Modules of other packages that the files of some rooms import when they run, wherever in the file."""
    found: dict[str, set[str]] = {}
    for file in (file for room in rooms for file in (SOURCE / room).rglob("*.py")):
        for node in ast.walk(_WithoutTypeChecking().visit(ast.parse(file.read_text()))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
                names.append(node.module)
            for name in names:
                top = name.partition(".")[0]
                if top not in sys.stdlib_module_names and top not in ("hasten", *OPTIONAL):
                    found.setdefault(str(file.relative_to(SOURCE)), set()).add(top)
    return found


known_packages = cache(packages_distributions)


def undeclared(modules: set[str], declared: set[str]) -> set[str]:
    """Modules of which no declared package is one that brings them: several may have parts of one (google)."""
    return {module for module in modules if not declared & {name.lower() for name in known_packages()[module]}}


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_packages_of_an_extra_are_those_of_pyproject(extra: str) -> None:
    declared = PROJECT["optional-dependencies"][extra]
    assert distributions(list(EXTRAS[extra].values())) <= distributions(declared)
    for module, package in EXTRAS[extra].items():
        assert distribution(package) in {name.lower() for name in known_packages()[module.partition(".")[0]]}
    require_extra(extra, "a test")


def test_the_engine_needs_the_dependencies_alone() -> None:
    declared = distributions(PROJECT["dependencies"])
    for file, modules in imports(*CORE_ROOMS).items():
        if file not in SERVED:
            assert not undeclared(modules, declared), file


def test_the_server_needs_the_extra_serve() -> None:
    declared = distributions([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["serve"]])
    for file, modules in {**imports("server"), **{file: imports("bench")[file] for file in SERVED}}.items():
        # in a real Triton its own module is there
        assert not undeclared(modules - {"triton_python_backend_utils"}, declared), file


def test_batches_need_the_extra_batch() -> None:
    for file, modules in imports("batch").items():
        extra = {"batch/parquet.py": "parquet", "batch/on_ray.py": "ray"}.get(file, "batch")
        declared = distributions([*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]])
        assert not undeclared(modules, declared), file


def test_the_cluster_needs_the_extra_cluster() -> None:
    declared = distributions(PROJECT["optional-dependencies"]["cluster"])
    for file, modules in imports("cluster").items():
        assert not undeclared(modules, declared), file


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    message = r"^a schema needs llguidance, which is not installed; run: pip install 'hasten\[grammar\]'$"
    with pytest.raises(ConfigError, match=message):
        require_extra("grammar", "a schema")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    with pytest.raises(ConfigError, match=r"needs opentelemetry-sdk, which is not installed; .*'hasten\[otel\]'$"):
        require_extra("otel", "a trace")
    monkeypatch.setitem(cast(dict[str, Any], EXTRAS), "parts", {"no_such_package.part": "no-such-package"})
    with pytest.raises(ConfigError, match="a part needs no-such-package, which is not installed"):
        require_extra("parts", "a part")
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(ConfigError, match="needs kubernetes, pyyaml, which are not installed"):
        require_extra("cluster", "a job")
