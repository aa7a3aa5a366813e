"""`hasten warm`: compile the kernels that a model needs."""

import argparse
import time
from collections.abc import Mapping
from typing import Any

from hasten.cli import ahead
from hasten.cli.options import Parser, add_engine_options, engine_options, path
from hasten.core.errors import ConfigError

_DEFAULTS: Mapping[str, Any] = {"load_format": "dummy"}


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `warm`."""
    parser = commands.add_parser(
        "warm",
        help="compile the kernels that a model needs on this machine",
        description="Compile in advance the kernels that serving a model needs on this machine. Weights are random: "
        "only config.json is read or downloaded. Give the options that the model will be served with. Kernels of a "
        "GPU are cached in ~/.triton/cache or TRITON_CACHE_DIR, those of a CPU in ~/.cache/hasten/kernels or below "
        "XDG_CACHE_HOME; either may be part of an image or a volume.",
    )
    parser.add_argument("model", type=path, metavar="MODEL", help="folder with a config.json, or a Hugging Face id")
    add_engine_options(parser, defaults=_DEFAULTS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Start an engine and have it compute requests of all kinds."""
    options = engine_options(args, defaults=_DEFAULTS)
    ahead.begin(args.model, options)

    from hasten.engine.llm import LLM, run_worker
    from hasten.engine.warming import compute_all_kinds

    if run_worker(args.model, **options):
        return 0
    start = time.perf_counter()
    with LLM(args.model, **options) as llm:
        started = time.perf_counter() - start
        llm.engine.prepare()
        count = compute_all_kinds(llm)
        seconds = time.perf_counter() - start - started
        device = "the CPU" if llm.device.type == "cpu" else str(llm.device)
        print(f"started in {started:.1f} s, computed {count} requests of all kinds in {seconds:.1f} s on {device}")
        if llm.device.type == "cpu":
            print(_cpu_kernels())
    return 0


def _cpu_kernels() -> str:
    """Where the next start finds the kernels of a CPU; ConfigError where they could not be kept."""
    from hasten import ops

    if not ops.records():
        return "no kernels: numba is not installed, which compiles them; run: pip install 'hasten[cpu]'"
    if (folder := ops.kept_kernels()) is not None:
        return f"kernels in {folder}"
    from hasten.ops.native.compiled import kernel_folder, own_folder

    why = "other users can write to it" if own_folder("fp32") is None else "it cannot be written, or its disk is full"
    raise ConfigError(
        f"kernels were not kept in {kernel_folder()}: {why}; set XDG_CACHE_HOME to a folder of your own with room"
    )
