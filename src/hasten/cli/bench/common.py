"""What benchmarks have in common: options, the engines that are measured, and where results go."""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hasten.cli.options import Parser, add_sampling_options, engine_options, path, sampling_params
from hasten.core.structured_outputs import CONSTRAINTS

if TYPE_CHECKING:
    from hasten.bench.engines import Engine

# Hugging Face has no cache between calls; with it on, the untimed batch would also pay for a timed one
ENGINE_DEFAULTS: Mapping[str, Any] = {"enable_prefix_caching": False}
# Hugging Face's model must find room on the same GPU
COMPARED_DEFAULTS: Mapping[str, Any] = {**ENGINE_DEFAULTS, "gpu_memory_utilization": 0.5}
COMPARED_HELP = "; hasten then takes half of a GPU's memory by default"

SAMPLING_DEFAULTS: Mapping[str, Any] = {"temperature": 0.0}
# lengths are the workload's, each request is one sequence, and without a seed of their own requests have the engine's
NOT_MEASURED = frozenset(
    {"max_tokens", "min_tokens", "n", "ignore_eos", "seed", "stop", "stop_token_ids", "include_stop_str_in_output"}
    | {"skip_special_tokens", "beam_width", "length_penalty", "early_stopping", "beam_search_diversity_rate"}
    | {"stop_words_ids", *CONSTRAINTS}
)
"""Sampling parameters that a measurement of speed does not take."""


def add_sampling(parser: Parser) -> None:
    """Add how tokens are chosen."""
    add_sampling_options(parser, defaults=SAMPLING_DEFAULTS, skip=NOT_MEASURED)


def add_model(parser: Parser, compare: str = f"measure Hugging Face too, alternating{COMPARED_HELP}") -> None:
    """Add what names the models."""
    parser.add_argument("model", type=path, metavar="MODEL", help="folder of the checkpoint, or its Hugging Face id")
    parser.add_argument("--compare", action="store_true", help=compare)
    parser.add_argument("--hf-model", type=path, metavar="PATH", help="what Hugging Face runs (default: MODEL)")


def add_output(parser: Parser, words: str = "print the results as JSON") -> None:
    """Add where the results go."""
    parser.add_argument("--json", action="store_true", help=words)
    parser.add_argument("--output-path", type=path, metavar="FILE", help="write the results to a file, as JSON")


@contextmanager
def engines_of(
    args: argparse.Namespace, max_len: int, *, batch_size: int | None = None, hf_batch_size: int | None = None
) -> "Iterator[tuple[list[Engine], int]]":
    """The engines to measure, Hugging Face first, and the size of their vocabulary; none on ranks but the first."""
    from hasten.bench import report
    from hasten.bench.engines import HastenEngine, HuggingFaceEngine, require_comparable
    from hasten.engine.llm import LLM, run_worker
    from hasten.parallel.threads import limit_threads

    report.require_writable(args.output_path)
    sampling = sampling_params(args, defaults=SAMPLING_DEFAULTS, skip=NOT_MEASURED)
    if args.compare:
        require_comparable(sampling)
    defaults = COMPARED_DEFAULTS if args.compare else ENGINE_DEFAULTS
    options = engine_options(args, defaults={**defaults, "max_model_len": max_len})
    threads = limit_threads()
    if run_worker(args.model, **options):
        yield [], 0
        return
    with LLM(args.model, **options) as llm:
        engines: list[Engine] = [HastenEngine(llm, sampling, batch_size=batch_size)]
        if args.compare:
            options["dtype"] = str(engines[0].dtype)
            hf = HuggingFaceEngine(
                args.hf_model or args.model,
                **hf_options(options),
                sampling=sampling,
                batch_size=hf_batch_size,
                threads=threads,
            )
            engines.insert(0, hf)
        yield engines, llm.config.vocab_size


def hf_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of an engine's options that Hugging Face takes too."""
    return {
        name: options[name]
        for name in ("dtype", "device", "load_format", "revision", "download_dir")
        if name in options
    }


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a benchmark was asked for, by the names of its options."""
    return {name: value for name, value in vars(args).items() if name not in ("run", "parser")}


def benchmark_of(args: argparse.Namespace) -> str:
    """The name of the benchmark that was asked for."""
    return str(args.parser.prog.rpartition(" ")[2])


def write_measured(args: argparse.Namespace, engine: "Engine", results: Mapping[str, Any]) -> None:
    """Write results of engines, with what they were measured on."""
    from hasten.bench import report

    write(args, {"environment": report.environment(engine.device, engine.dtype), **results})


def write(args: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """Write results, with what was asked for, as JSON to wherever that was."""
    from hasten.bench import report, schema

    full = {**schema.head(benchmark_of(args)), "options": options_of(args), **results}
    if args.output_path is not None:
        report.write_json(args.output_path, full)
    if args.json:
        report.print_json(full)
