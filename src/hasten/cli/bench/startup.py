"""`hasten bench startup`: seconds from nothing to the first token."""

import argparse

from hasten.cli.bench.common import add_output, require_writable, write, write_plot
from hasten.cli.options import Parser, add_engine_options, engine_options, path, positive


def add_parser(benches: "argparse._SubParsersAction[Parser]") -> None:
    """Add the benchmark `startup`."""
    parser = benches.add_parser(
        "startup",
        help="seconds from the start of a process to its first token, by phase",
        description="Seconds from the start of a process to its first token, by phase: cold, without compiled kernels "
        "and without the weights in the system's file cache, and warm, right after that.",
    )
    parser.add_argument("model", type=path, metavar="MODEL", help="folder of the checkpoint, or its Hugging Face id")
    parser.add_argument("--repetitions", type=positive, default=3, metavar="N", help="starts of each kind (default: 3)")
    parser.add_argument(
        "--cold", action=argparse.BooleanOptionalAction, default=True, help="measure cold starts too (default: yes)"
    )
    add_output(parser, plot="its phases")
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure starts."""
    from hasten.bench import plots, startup
    from hasten.bench.engines import text_model
    from hasten.checkpoint.hub import resolve_engine
    from hasten.core.config import EngineConfig

    require_writable(args)
    options = engine_options(args)
    engine = resolve_engine(EngineConfig.create(args.model, **options))
    text_model(engine, args.parser.prog)
    if engine.tokenizer is not None:
        options["tokenizer"] = engine.tokenizer
    options.pop("revision", None)
    measured = startup.measure(engine.model, options, repetitions=args.repetitions, cold=args.cold)
    write(args, {"environment": measured.environment, "results": measured.starts})
    if not args.json:
        startup.show(measured)
    write_plot(args, f"{args.model}: medians of {args.repetitions}", [plots.starts(measured.starts)])
    return 0
