"""`hasten bench suite`: what peers are measured with."""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hasten.cli.bench.common import (
    ENGINE_DEFAULTS,
    add_model,
    add_output,
    hf_options,
    options_of,
    require_writable,
    text_model_of,
    write_plot,
)
from hasten.cli.options import Parser, add_engine_options, engine_options, positive
from hasten.core.errors import ConfigError

if TYPE_CHECKING:
    from hasten.bench.suite import Plan

_TESTS = "lat,fixed,lambada,tput"
_DEFAULTS: Mapping[str, Any] = {
    **ENGINE_DEFAULTS,
    "max_model_len": 2048,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
}


def add_parser(benches: "argparse._SubParsersAction[Parser]") -> None:
    """Add the benchmark `suite`."""
    parser = benches.add_parser(
        "suite",
        help="standard workloads of other engines' benchmarks, in one process",
        description="Standard workloads of other engines' benchmarks, one after the other on one engine: lat (one "
        "request), fixed (batches; both 128 tokens in and out), lambada (many short requests) and tput (many of mixed "
        "lengths); long (8 requests of 16384 tokens in and 64 out) where --tests names it. With --output-path the "
        "results so far are written after each. Sequences have at most 2048 tokens (16448 with long) and steps at "
        "most 8192 unless an option says otherwise.",
    )
    add_model(parser, compare="measure Hugging Face after it, on all but tput and long")
    parser.add_argument(
        "--tests",
        default=_TESTS,
        metavar="NAMES",
        help=f"which, in this order (default: {_TESTS}, less what is longer than positions that the model has learned)",
    )
    parser.add_argument(
        "--batch-sizes", type=positive, nargs="+", default=[16, 64, 256], metavar="N", help="fixed (default: 16 64 256)"
    )
    parser.add_argument(
        "--hf-max-batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="leave Hugging Face out of larger batches of fixed (default: 64)",
    )
    parser.add_argument(
        "--num-requests", type=positive, metavar="N", help="requests (default: lambada 5153, tput 1000)"
    )
    parser.add_argument(
        "--repetitions", type=positive, default=3, metavar="N", help="lat, fixed and long: the best of N (default: 3)"
    )
    add_output(parser, plot="its figures by workload")
    add_engine_options(parser, defaults=_DEFAULTS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure what peers are measured on; a workload that fails is reported and makes the status 1."""
    from hasten.bench import plots, report, suite
    from hasten.bench.workloads import long
    from hasten.parallel.threads import limit_threads

    require_writable(args)
    tests = tuple(args.tests.split(","))
    lengths = {"max_model_len": long().max_len} if "long" in tests else {}
    options = engine_options(args, defaults={**_DEFAULTS, **lengths})
    plan = suite.Plan(
        tests=tests,
        batch_sizes=tuple(args.batch_sizes),
        num_requests=args.num_requests,
        repetitions=args.repetitions,
        max_model_len=options["max_model_len"],
        max_num_seqs=options["max_num_seqs"],
    )
    learned = text_model_of(args, args.model, options).learned_positions
    left_out: list[str] = []
    if "max_model_len" not in engine_options(args):
        plan, left_out = suite.fitting(plan, learned)
        options["max_model_len"] = plan.max_model_len
    _explain_left_out(args, plan, left_out, learned)
    threads = limit_threads()
    results = _of_hasten(args, options, plan, left_out)
    if results is None:
        return 0
    if args.compare:
        _of_hf(args, {**options, "dtype": results["environment"].dtype}, threads, plan, results)
    if args.json:
        report.print_json(results)
    else:
        suite.show(results)
    write_plot(args, f"{results['model']}: {', '.join(plan.tests)}", plots.suites(results), columns=2)
    failed = suite.errors(results)
    for name, text in failed.items():
        print(f"hasten: {name}: {text}", file=sys.stderr)
    return 1 if failed else 0


def _explain_left_out(args: argparse.Namespace, plan: "Plan", left_out: Sequence[str], learned: int | None) -> None:
    """Say what does not fit the model; ConfigError where it was named, or nothing is left."""
    if not left_out:
        return
    why = f"longer sequences than the {learned} positions that the model has learned"
    if not plan.tests:
        raise ConfigError(
            f"all of the suite has {why}; `hasten bench latency` measures shorter ones (--prompt-length, "
            "--output-length)"
        )
    if args.tests != _TESTS:
        raise ConfigError(f"{', '.join(left_out)}: {why}; say --tests {','.join(plan.tests)}")
    print(f"hasten: left out: {', '.join(left_out)} ({why})", file=sys.stderr)


def _of_hasten(
    args: argparse.Namespace, options: Mapping[str, Any], plan: "Plan", left_out: Sequence[str]
) -> dict[str, Any] | None:
    """The report of hasten; None on ranks but the first. The engine is gone when this returns."""
    from hasten.bench import report, schema, suite
    from hasten.bench.engines import HastenEngine, clock
    from hasten.checkpoint.hub import model_name
    from hasten.engine.llm import LLM, run_worker

    start = time.perf_counter()
    if run_worker(args.model, **options):
        return None
    with LLM(args.model, **options) as llm:
        results: dict[str, Any] = {
            **schema.head("suite"),
            "engine": HastenEngine.label,
            "model": model_name(args.model),
            "init_s": clock(llm.device) - start,
            "vocab_size": llm.config.vocab_size,
            "options": {**options, **options_of(args)},
            "environment": report.environment(llm.device, llm.dtype),
            **({"left_out": left_out} if left_out else {}),
        }
        for entries in suite.measure(HastenEngine(llm), plan, llm.config.vocab_size):
            results |= entries
            _emit(args, results)
    return results


def _of_hf(
    args: argparse.Namespace, options: Mapping[str, Any], threads: int, plan: "Plan", results: dict[str, Any]
) -> None:
    """Add to hasten's report what Hugging Face does, and how many times as fast hasten is."""
    import gc

    import torch

    from hasten.bench import suite

    # hasten's engine is closed; what it had on the GPU is free only once cycles of objects are collected
    gc.collect()
    torch.cuda.empty_cache()
    plan, left_out = suite.hf_plan(plan, args.hf_max_batch_size)
    results["hf"] = {"left_out": left_out}
    for entries in _hf_entries(args, options, threads, plan, results["vocab_size"]):
        results["hf"] |= entries
        results["speedup"] = suite.speedups(results, results["hf"])
        _emit(args, results)


def _hf_entries(
    args: argparse.Namespace, options: Mapping[str, Any], threads: int, plan: "Plan", vocab_size: int
) -> Iterator[dict[str, Any]]:
    from hasten.bench import suite
    from hasten.bench.engines import HuggingFaceEngine, clock

    if not plan.tests:
        yield {}
        return
    start = time.perf_counter()
    try:
        engine = HuggingFaceEngine(args.hf_model or args.model, **hf_options(options), threads=threads)
    except suite.FAILURES as error:
        yield {"init_error": suite.describe(error)}
        return
    ready = {"init_s": clock(engine.device) - start}
    for entries in suite.measure(engine, plan, vocab_size):
        yield ready | entries


def _emit(args: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """Write the results so far: what comes next may take long, or end the process."""
    from hasten.bench import report

    if args.output_path is not None:
        report.write_json(args.output_path, results)
