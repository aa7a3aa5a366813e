"""`hasten bench lambada`: the last word of each text."""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from hasten.cli.bench.common import (
    COMPARED_DEFAULTS,
    COMPARED_HELP,
    ENGINE_DEFAULTS,
    Measured,
    add_output,
    add_peers,
    compares,
    hf_options,
    hugging_face,
    peers_of,
    require_writable,
    show_not_measured,
    text_model_of,
    write_measured,
    write_plot,
)
from hasten.cli.options import Parser, add_engine_options, engine_options, path, positive, typed
from hasten.core.errors import ConfigError, UnsupportedError
from hasten.core.types import SamplingParams

if TYPE_CHECKING:
    from hasten.bench.engines import Engine
    from hasten.bench.lambada import LambadaResult, Sample
    from hasten.engine.text import Tokenizer

_NOT_OFFERED = frozenset({"tokenizer", "load_format"})


def add_parser(benches: "argparse._SubParsersAction[Parser]") -> None:
    """Add the benchmark `lambada`."""
    parser = benches.add_parser(
        "lambada",
        help="predict the last word of each text",
        description="Predict the last word of each text of a dataset, and time it.",
    )
    parser.add_argument(
        "--tokenizer-path",
        "--tokenizer",
        type=path,
        required=True,
        metavar="PATH",
        help="folder of the model in Hugging Face's format, or its Hugging Face id",
    )
    parser.add_argument(
        "--dataset-path", type=path, required=True, metavar="FILE", help='JSON lines, each an object with "text"'
    )
    parser.add_argument(
        "--checkpoint-path",
        type=path,
        metavar="PATH",
        help="checkpoint that hasten runs (default: the model at --tokenizer-path)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--test-hf", action="store_true", help="run Hugging Face instead of hasten")
    which.add_argument(
        "--compare", action="store_true", help=f"run both on the same texts, batch by batch{COMPARED_HELP}"
    )
    add_peers(parser)
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="texts in a batch (default: 8)")
    parser.add_argument(
        "--repetitions", type=positive, default=1, metavar="N", help="times to run all texts; the time is the median"
    )
    parser.add_argument(
        "--acc-threshold", type=typed(_percent), metavar="PERCENT", help="fail if the accuracy is lower"
    )
    parser.add_argument("--show-progress", action="store_true", help="show a progress bar on standard error")
    parser.add_argument("--top-k", type=int, default=1, metavar="K", help="1 is greedy (default: 1)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="see `hasten generate` (default: 1)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="see `hasten generate` (default: 1)"
    )
    parser.add_argument(
        "--beam-width", type=positive, default=1, metavar="N", help="beams of a search; 1: no search (default: 1)"
    )
    parser.add_argument(
        "--lib-path",
        metavar="FILE",
        help="accepted for compatibility with FasterTransformer's script, and not read",
    )
    add_output(parser, plot="accuracy and time by engine")
    add_engine_options(parser, defaults=ENGINE_DEFAULTS, skip=_NOT_OFFERED)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run LAMBADA with hasten, with Hugging Face, or with both in turns."""
    sampling = _sampling(args)
    if args.lib_path is not None:
        print(f"hasten: --lib-path {args.lib_path} is not read: hasten has kernels of its own", file=sys.stderr)
    from hasten.bench import lambada
    from hasten.bench.engines import HastenEngine
    from hasten.checkpoint.hub import resolve_model
    from hasten.core.config import EngineConfig
    from hasten.engine.text import Tokenizer
    from hasten.parallel.rank import rank_info
    from hasten.parallel.threads import limit_threads

    if args.test_hf and args.compare_with:
        raise ConfigError("--test-hf runs Hugging Face alone: leave --compare-with out, or say --compare")
    defaults = COMPARED_DEFAULTS if not args.test_hf and compares(args) else ENGINE_DEFAULTS
    options = engine_options(args, defaults=defaults, skip=_NOT_OFFERED)
    rank = rank_info(EngineConfig.create(args.checkpoint_path or args.tokenizer_path, **options).parallel)
    if args.test_hf and rank is not None and rank.rank > 0:
        return 0  # Hugging Face runs in one process, whatever started this one
    require_writable(args)
    hub = {name: options[name] for name in ("revision", "download_dir") if name in options}
    tokenizer = Tokenizer.from_folder(resolve_model(args.tokenizer_path, part="tokenizer", **hub))
    samples = lambada.read_samples(args.dataset_path, tokenizer)
    threads = limit_threads()
    with ExitStack() as stack:
        if args.test_hf:
            args.hf_engine = args.hf_engine or "generate"
            measured = hugging_face(args, args.tokenizer_path, hf_options(options), sampling, threads)
        else:
            from hasten.engine.llm import LLM, run_worker

            model = args.checkpoint_path or args.tokenizer_path
            options["tokenizer"] = args.tokenizer_path
            if text_model_of(args, model, options).encoder is not None:
                raise UnsupportedError(f"{model} has an encoder, and does not continue texts")
            if run_worker(model, **options):
                return 0
            llm = stack.enter_context(LLM(model, **options))
            hasten = HastenEngine(llm, sampling)
            measured = peers_of(args, args.tokenizer_path, hasten, options, sampling, threads=threads)
        results = _measure(args, measured.engines, samples, tokenizer)
    _report(args, measured, results)
    return show_not_measured(args, measured) or _check_accuracy(results, args.acc_threshold)


def _sampling(args: argparse.Namespace) -> SamplingParams:
    if args.beam_width > 1:
        if (args.top_k, args.top_p, args.temperature) != (1, 1.0, 1.0):
            raise ConfigError(
                "--beam-width above 1 searches and draws nothing: leave --top-k, --top-p, --temperature out"
            )
        return SamplingParams(beam_width=args.beam_width)
    sampling = SamplingParams(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    return SamplingParams(temperature=0, top_p=args.top_p) if args.top_k == 1 else sampling


def _percent(text: str) -> float:
    """A number that an accuracy can be compared with; ConfigError for NaN, which no accuracy is below."""
    try:
        percent = float(text)
    except ValueError:
        percent = math.nan
    if not math.isfinite(percent):
        raise ConfigError(f"{text!r} is not a number of per cent")
    return percent


def _measure(
    args: argparse.Namespace, engines: "Sequence[Engine]", samples: "Sequence[Sample]", tokenizer: "Tokenizer"
) -> "list[LambadaResult]":
    from hasten.bench import lambada

    with _progress(args.show_progress, len(samples) * args.repetitions) as advance:
        return lambada.run(
            engines,
            samples,
            tokenizer,
            batch_size=args.batch_size,
            repetitions=args.repetitions,
            advance=advance,
        )


def _report(args: argparse.Namespace, measured: Measured, results: "Sequence[LambadaResult]") -> None:
    from hasten.bench import lambada, plots

    summary: dict[str, Any] = {"results": results}
    lines = [result.line for result in results]
    compared = lambada.comparisons(results)
    if compared:
        quoted = compared[-1]
        summary |= {"speedup": quoted.speedup, "differing_samples": quoted.differing_samples}
        summary |= {"compared_with": quoted.engine, "comparisons": compared}
        width = max(len(result.engine) for result in results)
        lines = [f"{result.engine:<{width}} {result.line}" for result in results]
    lines += [
        f"hasten is {each.speedup:.2f} times as fast as {each.engine}; the answers differ on {each.differing_samples} "
        f"of {results[-1].total} samples"
        for each in compared
    ]
    write_measured(args, measured, summary)
    if not args.json:
        print("\n".join(lines))
    title = f"{args.checkpoint_path or args.tokenizer_path}: {args.dataset_path}, batches of {args.batch_size}"
    write_plot(args, title, plots.accuracies(results))


def _check_accuracy(results: "Sequence[LambadaResult]", threshold: float | None) -> int:
    low = [result for result in results if threshold is not None and result.accuracy < threshold]
    for result in low:
        print(
            f"hasten: accuracy of {result.engine} is {result.accuracy:.4f}%, below the threshold of {threshold}%",
            file=sys.stderr,
        )
    return 1 if low else 0


@contextmanager
def _progress(wanted: bool, total: int) -> Iterator[Callable[[int], object]]:
    """What to call with the number of samples done; draws a bar if that is wanted."""
    if not wanted:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("LAMBADA", total=total)
        yield lambda done: bar.advance(task, done)
