"""`hasten tune`: the options of a server that keeps an objective at the highest throughput."""

import argparse
import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.cli.bench.common import add_output, require_writable, write, write_plot
from hasten.cli.options import HOST_OPTIONS, Parser, add_engine_options, engine_options, option_words, path, positive
from hasten.cli.progress import progress_lines
from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError
from hasten.core.extras import require_extra

if TYPE_CHECKING:
    from hasten.bench.sweep import Server
    from hasten.bench.tune import Tuned

_SKIP = HOST_OPTIONS | {"progress_bars"}


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `tune`."""
    parser = commands.add_parser(
        "tune",
        help="server options that keep an objective at the highest throughput",
        description="Find the --itl-target and the largest number of requests in flight that keep an objective at the "
        "95th percentile, by measuring servers on this machine, and print the command that serves the model so.",
        epilog="Exit status: 0 if an objective can be kept, 1 if not, 2 for bad input.",
    )
    parser.add_argument("model", type=path, metavar="MODEL", help="folder of the checkpoint, or its Hugging Face id")
    parser.add_argument(
        "--slo",
        required=True,
        metavar="LIMITS",
        help="limits of ttft, itl, tpot or e2el at the 95th percentile, such as ttft=300ms,itl=40ms or "
        "'ttft:300 itl:40' (ms)",
    )
    parser.add_argument(
        "-o",
        "--options-file",
        type=path,
        metavar="FILE",
        help="write the options, one per line: `hasten serve MODEL @FILE` reads them",
    )
    parser.add_argument(
        "--prompt-length", type=positive, default=128, metavar="N", help="tokens per prompt (default: 128)"
    )
    parser.add_argument(
        "--output-length", type=positive, default=128, metavar="N", help="tokens per output (default: 128)"
    )
    parser.add_argument(
        "--max-concurrency", type=positive, metavar="N", help="maximum requests in flight (default: --max-num-seqs)"
    )
    add_output(parser, plot="all users' tokens per second over each user's")
    add_engine_options(parser, skip=_SKIP, chats=True)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Search, and print the command."""
    require_extra("serve", "hasten tune")
    from hasten.bench.engines import text_model
    from hasten.bench.evaluation.pictures import pareto
    from hasten.bench.slo import Slo
    from hasten.bench.sweep import SweepOptions
    from hasten.bench.tune import candidates, described, tune
    from hasten.checkpoint.hub import model_name, resolve_engine
    from hasten.engine.memory import DEFAULT_MODEL_LEN
    from hasten.parallel.rank import rank_from_environment

    slo = Slo.parse(args.slo)
    require_writable(args)
    if rank_from_environment() is not None:
        raise ConfigError("hasten tune starts servers of its own; run it without torchrun and mpirun")
    options = engine_options(args, skip=_SKIP)
    engine = resolve_engine(EngineConfig.create(args.model, **options))
    model = text_model(engine, "hasten tune")
    engine.parallel.validate(model)
    engine.scheduler.validate(model)
    longest = engine.scheduler.max_model_len or model.max_position_embeddings or DEFAULT_MODEL_LEN
    if args.prompt_length + args.output_length > longest:
        raise ConfigError(
            f"--prompt-length {args.prompt_length} and --output-length {args.output_length} are more than the longest "
            f"sequence, {longest} tokens (max_model_len)"
        )
    most = min(args.max_concurrency or engine.scheduler.max_num_seqs, engine.scheduler.max_num_seqs)
    load = SweepOptions(prompt_length=args.prompt_length, output_length=args.output_length)

    @contextmanager
    def start(more: Mapping[str, Any]) -> "Iterator[Server]":
        from hasten.bench.sweep import started

        scheduler = dataclasses.replace(engine.scheduler, **more)
        with started(dataclasses.replace(engine, scheduler=scheduler)) as server:
            yield server

    tuned = tune(start, candidates(slo, options), slo, most, load, progress_lines())
    words = option_words({**options, **tuned.options})
    command = shlex.join(["hasten", "serve", args.model, *words])
    write(args, {"model": model_name(args.model), "slo": str(slo), "command": command, "tuned": tuned})
    if not args.json:
        print(f"{described(tuned.point)}\n{command}")
    if args.options_file is not None:
        _write_options(args, tuned, words)
    lines = [(_label(setting.options), setting.points) for setting in tuned.settings]
    write_plot(args, f"{args.model}: {slo}", [pareto(lines, slo)])
    return 0


def _label(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items()) or "defaults"


def _write_options(args: argparse.Namespace, tuned: "Tuned", words: list[str]) -> None:
    from hasten.bench.tune import described
    from hasten.core.files import write_text

    head = [f"# for hasten serve {shlex.quote(args.model)} @{args.options_file}", f"# {args.slo}"]
    head.append(f"# {described(tuned.point)}")
    write_text(Path(args.options_file), "\n".join([*head, *words]) + "\n")
