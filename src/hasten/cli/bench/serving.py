"""`hasten bench serving`: a server beside its engine."""

import argparse
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hasten.cli.bench.common import (
    ENGINE_DEFAULTS,
    add_output,
    require_room,
    require_writable,
    text_model_of,
    write,
    write_plot,
)
from hasten.cli.options import Parser, add_engine_options, engine_options, path, positive
from hasten.core.extras import require_extra

# the server's engine and that of this process share a GPU
_DEFAULTS: Mapping[str, Any] = {**ENGINE_DEFAULTS, "gpu_memory_utilization": 0.4}


def add_parser(benches: "argparse._SubParsersAction[Parser]") -> None:
    """Add the benchmark `serving`."""
    parser = benches.add_parser(
        "serving",
        help="overhead of a server over direct engine calls",
        description="Start `hasten serve`, and compare requests to it over gRPC with the same requests to an engine "
        "in this process: one after the other, many at once, and many streams. All must give the same tokens. On a GPU "
        "each takes 40% of its memory by default.",
    )
    parser.add_argument("model", type=path, metavar="MODEL", help="folder of the checkpoint, or its Hugging Face id")
    parser.add_argument("--concurrency", type=positive, default=64, metavar="N", help="requests at once (default: 64)")
    parser.add_argument("--prompt-length", type=positive, default=16, metavar="N", help="tokens (default: 16)")
    parser.add_argument("--output-length", type=positive, default=32, metavar="N", help="tokens (default: 32)")
    parser.add_argument("--requests", type=positive, default=50, metavar="N", help="single requests (default: 50)")
    parser.add_argument(
        "--rounds", type=positive, default=7, metavar="N", help="times that requests come at once (default: 7)"
    )
    parser.add_argument(
        "--peer",
        metavar="HOST:PORT",
        help="gRPC address of another server, such as Triton, that serves MODEL as `fastertransformer`; it is measured "
        "on requests at once, in turns with the others",
    )
    add_output(parser, plot="its measures")
    add_engine_options(parser, defaults=_DEFAULTS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure a server beside an engine in this process."""
    require_extra("serve", "hasten bench serving")
    import tempfile

    from hasten.bench import plots, report, serving
    from hasten.bench.served import served
    from hasten.checkpoint.hub import resolve_engine
    from hasten.core.config import EngineConfig
    from hasten.engine.llm import LLM

    require_writable(args)
    options = engine_options(args, defaults=_DEFAULTS)
    longest, advice = args.prompt_length + args.output_length, "lower --prompt-length or --output-length"
    require_room(text_model_of(args, args.model, options), args.parser.prog, longest, advice)
    load = serving.Load(args.concurrency, args.prompt_length, args.output_length, args.requests, args.rounds)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        engine = resolve_engine(EngineConfig.create(args.model, **options))
        server = stack.enter_context(served(engine, Path(folder, "log")))
        llm = stack.enter_context(LLM(engine.model, **options))
        turns = serving.measure(llm, server, load, args.peer)
        environment = report.environment(llm.device, llm.dtype)
    write(args, {"environment": environment, "start_s": server.start_s, "results": turns})
    if not args.json:
        title = f"{load.prompt_length} tokens in, {load.output_length} out, {environment.dtype} on {environment.device}"
        serving.show(title, server.start_s, turns)
    write_plot(args, f"{args.model}: a server and its engine", plots.turns(turns))
    return 0
