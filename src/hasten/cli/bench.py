"""`hasten bench`: accuracy and speed, beside Hugging Face."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.cli.options import Parser, add_engine_options, engine_options, positive
from hasten.core.errors import UnsupportedError
from hasten.core.types import SamplingParams

if TYPE_CHECKING:
    from hasten.bench.engines import Engine
    from hasten.bench.lambada import LambadaResult, Sample
    from hasten.bench.suite import Plan
    from hasten.engine.llm import LLM
    from hasten.engine.text import Tokenizer

# Hugging Face has no cache between calls; with it on, the untimed batch would also pay for a timed one
ENGINE_DEFAULTS: Mapping[str, Any] = {"enable_prefix_cache": False}
# Hugging Face's model must find room on the same GPU
COMPARED_DEFAULTS: Mapping[str, Any] = {**ENGINE_DEFAULTS, "memory_utilization": 0.5}
# the server's engine and that of this process share a GPU
SERVING_DEFAULTS: Mapping[str, Any] = {**ENGINE_DEFAULTS, "memory_utilization": 0.4}
# what peers are measured with
SUITE_DEFAULTS: Mapping[str, Any] = {
    **ENGINE_DEFAULTS,
    "max_model_len": 2048,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
}
COMPARED_HELP = "; hasten then takes half of a GPU's memory by default"
LAMBADA_SKIP = frozenset({"tokenizer", "load_format"})


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `bench` and its own subcommands."""
    parser = commands.add_parser(
        "bench", help="measure accuracy and speed", description="Measure accuracy and speed, beside Hugging Face."
    )
    benches = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    _add_lambada(benches)
    _add_throughput(benches)
    _add_latency(benches)
    _add_suite(benches)
    _add_serving(benches)
    _add_kernels(benches)


def _add_lambada(benches: "argparse._SubParsersAction[Parser]") -> None:
    parser = benches.add_parser(
        "lambada",
        help="predict the last word of each text",
        description="Predict the last word of each text of a dataset, and time it.",
    )
    parser.add_argument("--tokenizer-path", required=True, metavar="PATH", help="Hugging Face folder of the model")
    parser.add_argument("--dataset-path", required=True, metavar="FILE", help='JSON lines, each an object with "text"')
    parser.add_argument(
        "--checkpoint-path", metavar="PATH", help="checkpoint that hasten runs (default: the model at --tokenizer-path)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--test-hf", action="store_true", help="run Hugging Face instead of hasten")
    which.add_argument(
        "--compare", action="store_true", help=f"run both on the same texts, batch by batch{COMPARED_HELP}"
    )
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="texts in a batch (default: 8)")
    parser.add_argument(
        "--repetitions", type=positive, default=1, metavar="N", help="times to run all texts; the time is the median"
    )
    parser.add_argument("--acc-threshold", type=float, metavar="PERCENT", help="fail if the accuracy is lower")
    parser.add_argument("--show-progress", action="store_true", help="show a progress bar on standard error")
    parser.add_argument("--top-k", type=int, default=1, metavar="K", help="1 is greedy (default: 1)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="see `hasten generate` (default: 1)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="see `hasten generate` (default: 1)"
    )
    parser.add_argument("--beam-width", type=int, default=1, metavar="N", help="only 1 is supported (default: 1)")
    _add_output(parser)
    add_engine_options(parser, defaults=ENGINE_DEFAULTS, skip=LAMBADA_SKIP)
    parser.set_defaults(run=run_lambada)


def _add_throughput(benches: "argparse._SubParsersAction[Parser]") -> None:
    parser = benches.add_parser(
        "throughput",
        help="tokens a second on many requests",
        description="Tokens a second on many requests that arrive at once, with prompts of random token ids.",
    )
    _add_model(parser)
    parser.add_argument(
        "--workload",
        choices=("mixed", "tput", "lambada"),
        default="mixed",
        help="mixed: 16 to 256 tokens in and out; tput: 100 to 1024 in and out; lambada: about 87 in, 4 out",
    )
    parser.add_argument(
        "--num-requests", type=positive, metavar="N", help="requests (default: mixed 64, tput 1000, lambada 5153)"
    )
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="hand hasten so many requests at once (default: all of them)"
    )
    parser.add_argument(
        "--hf-batch-size",
        type=positive,
        default=16,
        metavar="N",
        help="requests in a batch of Hugging Face (default: 16)",
    )
    parser.add_argument("--repetitions", type=positive, default=1, metavar="N", help="times to run it (default: 1)")
    _add_output(parser)
    add_engine_options(parser, defaults=ENGINE_DEFAULTS)
    parser.set_defaults(run=run_throughput)


def _add_latency(benches: "argparse._SubParsersAction[Parser]") -> None:
    parser = benches.add_parser(
        "latency",
        help="time to the first token and time a token",
        description="Time to the first token and time a token of batches of equal requests.",
    )
    _add_model(parser)
    parser.add_argument(
        "--batch-sizes", type=positive, nargs="+", default=[1, 16, 64], metavar="N", help="batches (default: 1 16 64)"
    )
    parser.add_argument("--prompt-length", type=positive, default=128, metavar="N", help="tokens (default: 128)")
    parser.add_argument("--output-length", type=positive, default=128, metavar="N", help="tokens (default: 128)")
    parser.add_argument("--repetitions", type=positive, default=3, metavar="N", help="times to run it (default: 3)")
    _add_output(parser)
    add_engine_options(parser, defaults=ENGINE_DEFAULTS)
    parser.set_defaults(run=run_latency)


def _add_suite(benches: "argparse._SubParsersAction[Parser]") -> None:
    parser = benches.add_parser(
        "suite",
        help="the workloads that peers are measured with, in one process",
        description="The workloads that peers are measured with, one after the other on one engine: lat (one request), "
        "fixed (batches; both 128 tokens in and out), lambada (many short requests) and tput (many of mixed lengths). "
        "Prints a JSON object after each, with all results so far. Sequences of at most 2048 tokens, steps of at most "
        "8192, unless asked otherwise.",
    )
    _add_model(parser, compare="measure Hugging Face after it, on all but tput")
    parser.add_argument(
        "--tests", default="lat,fixed,lambada,tput", metavar="NAMES", help="which, in this order (default: all four)"
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
        "--repetitions", type=positive, default=3, metavar="N", help="lat and fixed: the best of so many (default: 3)"
    )
    _add_output(parser, words="print no table after the JSON")
    add_engine_options(parser, defaults=SUITE_DEFAULTS)
    parser.set_defaults(run=run_suite)


def _add_serving(benches: "argparse._SubParsersAction[Parser]") -> None:
    parser = benches.add_parser(
        "serving",
        help="requests to a server over gRPC, beside the engine called directly",
        description="Start `hasten serve`, and measure requests to it over gRPC beside the same requests to an engine "
        "in this process: one after the other, many at once, and many streams. All must give the same tokens. On a GPU "
        "each takes 40% of its memory by default.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of the checkpoint")
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
    _add_output(parser)
    add_engine_options(parser, defaults=SERVING_DEFAULTS)
    parser.set_defaults(run=run_serving)


def _add_kernels(benches: "argparse._SubParsersAction[Parser]") -> None:
    parser = benches.add_parser(
        "kernels",
        help="each kernel on a GPU, and how close it comes to what the GPU can do",
        description="Time each kernel at the sizes of a model, beside the same in plain torch and beside the most that "
        "the GPU moves and computes, and compare their results. An error above the tolerance is status 1.",
    )
    parser.add_argument(
        "--model-shape",
        default="bloom-7b1",
        metavar="MODEL",
        help="a size of BLOOM (bloom-560m to bloom-7b1, bloom) or the folder of a model (default: bloom-7b1)",
    )
    parser.add_argument("--dtype", choices=("fp16", "bf16"), default="fp16", help="type to compute in (default: fp16)")
    parser.add_argument("--only", metavar="NAME", help="kernels whose name contains this, as the table writes it")
    _add_output(parser)
    parser.set_defaults(run=run_kernels)


def _add_model(parser: Parser, compare: str = f"measure Hugging Face beside it, in turns{COMPARED_HELP}") -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of the checkpoint")
    parser.add_argument("--compare", action="store_true", help=compare)
    parser.add_argument("--hf-model", metavar="PATH", help="what Hugging Face runs (default: MODEL)")


def _add_output(parser: Parser, words: str = "print the results as JSON") -> None:
    parser.add_argument("--json", action="store_true", help=words)
    parser.add_argument("--output-path", metavar="FILE", help="write the results to a file, as JSON")


def run_lambada(args: argparse.Namespace) -> int:
    """Run LAMBADA with hasten, with Hugging Face, or with both in turns."""
    if args.beam_width != 1:
        raise UnsupportedError(f"--beam-width {args.beam_width}: beam search is not supported; use 1")
    sampling = _lambada_sampling(args)
    import torch

    from hasten.bench import lambada, report
    from hasten.bench.engines import HastenEngine, HuggingFaceEngine
    from hasten.engine.text import Tokenizer
    from hasten.parallel.place import place_from_environment

    place = place_from_environment()
    if args.test_hf and place is not None and place.rank > 0:
        return 0  # Hugging Face runs in one process, whatever started this one
    report.require_writable(args.output_path)
    tokenizer = Tokenizer.from_folder(args.tokenizer_path)
    samples = lambada.read_samples(args.dataset_path, tokenizer)
    defaults = COMPARED_DEFAULTS if args.compare else ENGINE_DEFAULTS
    options = engine_options(args, defaults=defaults, skip=LAMBADA_SKIP)
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        engines: list[Engine] = []
        if not args.test_hf:
            llm = stack.enter_context(_lambada_llm(args, options))
            if not llm.is_driver:
                return 0
            engines.append(HastenEngine(llm, sampling))
            options["dtype"] = str(engines[0].dtype)
        if args.test_hf or args.compare:
            hf = HuggingFaceEngine(args.tokenizer_path, **_hf_options(options), sampling=sampling, threads=threads)
            engines.insert(0, hf)
        results = _run_lambada(args, engines, samples, tokenizer)
    _report_lambada(args, engines[-1], results)
    return _check_accuracy(results, args.acc_threshold)


def _lambada_llm(args: argparse.Namespace, options: Mapping[str, Any]) -> "LLM":
    from hasten.engine.llm import LLM

    return LLM(args.checkpoint_path or args.tokenizer_path, tokenizer=args.tokenizer_path, **options)


def _lambada_sampling(args: argparse.Namespace) -> SamplingParams:
    if args.top_k == 1:
        return SamplingParams(temperature=0, top_p=args.top_p)
    return SamplingParams(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)


def _run_lambada(
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


def _report_lambada(args: argparse.Namespace, engine: "Engine", results: "Sequence[LambadaResult]") -> None:
    from hasten.bench import lambada

    summary: dict[str, Any] = {"results": results}
    lines = [result.line for result in results]
    if args.compare:
        hf, ours = results
        speedup, differ = hf.seconds / ours.seconds, lambada.differing(hf, ours)
        summary |= {"speedup": speedup, "differing_samples": differ}
        lines = [f"{result.engine:<7} {result.line}" for result in results]
        lines.append(f"hasten is {speedup:.2f} times as fast; the answers differ on {differ} of {ours.total} samples")
    _write(args, engine, summary)
    if not args.json:
        print("\n".join(lines))


def _check_accuracy(results: "Sequence[LambadaResult]", threshold: float | None) -> int:
    low = [result for result in results if threshold is not None and result.accuracy < threshold]
    for result in low:
        print(
            f"hasten: accuracy of {result.engine} is {result.accuracy:.4f}%, below the threshold of {threshold}%",
            file=sys.stderr,
        )
    return 1 if low else 0


def run_throughput(args: argparse.Namespace) -> int:
    """Measure tokens a second."""
    from hasten.bench import throughput
    from hasten.bench.workloads import WORKLOADS

    workload = WORKLOADS[args.workload](args.num_requests)
    with _engines(args, workload.max_len, batch_size=args.batch_size, hf_batch_size=args.hf_batch_size) as (
        engines,
        vocab_size,
    ):
        if not engines:
            return 0
        results = throughput.measure(engines, workload, vocab_size, repetitions=args.repetitions)
    _write(args, engines[-1], {"results": results, "speedup": throughput.speedup(results)})
    if not args.json:
        throughput.show(results)
    return 0


def run_latency(args: argparse.Namespace) -> int:
    """Measure time to the first token and time a token."""
    from hasten.bench import latency
    from hasten.bench.workloads import fixed

    workloads = [fixed(size, args.prompt_length, args.output_length) for size in args.batch_sizes]
    with _engines(args, args.prompt_length + args.output_length) as (engines, vocab_size):
        if not engines:
            return 0
        results = [
            result
            for workload in workloads
            for result in latency.measure(engines, workload, vocab_size, repetitions=args.repetitions)
        ]
    _write(args, engines[-1], {"results": results, "speedups": latency.speedups(results)})
    if not args.json:
        latency.show(results)
    return 0


def run_suite(args: argparse.Namespace) -> int:
    """Measure what peers are measured on; a workload that fails is told and makes the status 1."""
    import torch

    from hasten.bench import report, suite

    report.require_writable(args.output_path)
    options = engine_options(args, defaults=SUITE_DEFAULTS)
    threads = torch.get_num_threads()
    plan = suite.Plan(
        tests=tuple(args.tests.split(",")),
        batch_sizes=tuple(args.batch_sizes),
        num_requests=args.num_requests,
        repetitions=args.repetitions,
        max_model_len=options["max_model_len"],
        max_num_seqs=options["max_num_seqs"],
    )
    results = _suite_of_hasten(args, options, plan)
    if results is None:
        return 0
    if args.compare:
        _suite_of_hf(args, {**options, "dtype": results["environment"].dtype}, threads, plan, results)
    if not args.json:
        suite.show(results)
    failed = suite.errors(results)
    for name, text in failed.items():
        print(f"hasten: {name}: {text}", file=sys.stderr)
    return 1 if failed else 0


def run_serving(args: argparse.Namespace) -> int:
    """Measure a server beside an engine in this process."""
    import tempfile

    from hasten.bench import report, serving
    from hasten.bench.served import served
    from hasten.core.config import EngineConfig
    from hasten.engine.llm import LLM

    report.require_writable(args.output_path)
    options = engine_options(args, defaults=SERVING_DEFAULTS)
    load = serving.Load(args.concurrency, args.prompt_length, args.output_length, args.requests, args.rounds)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        server = stack.enter_context(served(EngineConfig.create(args.model, **options), Path(folder, "log")))
        llm = stack.enter_context(LLM(args.model, **options))
        turns = serving.measure(llm, server, load, args.peer)
        environment = report.environment(llm.device, llm.dtype)
    full = {"options": _options(args), "environment": environment, "start_s": server.start_s, "results": turns}
    if args.output_path is not None:
        report.write_json(args.output_path, full)
    if args.json:
        report.print_json(full)
    else:
        title = f"{load.prompt_length} tokens in, {load.output_length} out, {environment.dtype} on {environment.device}"
        serving.show(title, server.start_s, turns)
    return 0


def run_kernels(args: argparse.Namespace) -> int:
    """Measure kernels; one whose result is wrong makes the status 1."""
    import torch

    from hasten.bench import kernels, report

    report.require_writable(args.output_path)
    setting = kernels.gpu_setting(kernels.model_shape(args.model_shape), args.dtype)
    most, results = kernels.run(setting, args.only)
    device = torch.cuda.get_device_name(setting.device)
    full = {"options": _options(args), "device": device, "torch": torch.__version__, "most": most, "results": results}
    if args.output_path is not None:
        report.write_json(args.output_path, full)
    if args.json:
        report.print_json(full)
    else:
        kernels.show(f"{args.model_shape} in {args.dtype} on {device}", most, results)
    wrong = [result for result in results if not result.is_exact]
    for result in wrong:
        print(
            f"hasten: {result.op} {result.shape}: error {result.error:.1e}, above {result.tolerance:.1e}",
            file=sys.stderr,
        )
    return 1 if wrong else 0


def _suite_of_hasten(args: argparse.Namespace, options: Mapping[str, Any], plan: "Plan") -> dict[str, Any] | None:
    """The report of hasten; None on ranks but the first. The engine is gone when this returns."""
    from hasten.bench import report, suite
    from hasten.bench.engines import HastenEngine, clock
    from hasten.engine.llm import LLM

    start = time.perf_counter()
    with LLM(args.model, **options) as llm:
        if not llm.is_driver:
            return None
        results: dict[str, Any] = {
            "engine": HastenEngine.label,
            "model": Path(args.model).resolve().name,
            "init_s": clock(llm.device) - start,
            "vocab_size": llm.config.vocab_size,
            "options": {**options, **_options(args)},
            "environment": report.environment(llm.device, llm.dtype),
        }
        for entries in suite.measure(HastenEngine(llm), plan, llm.config.vocab_size):
            results |= entries
            _emit(args, results)
    return results


def _suite_of_hf(
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
        engine = HuggingFaceEngine(args.hf_model or args.model, **_hf_options(options), threads=threads)
    except suite.FAILURES as error:
        yield {"init_error": suite.describe(error)}
        return
    ready = {"init_s": clock(engine.device) - start}
    for entries in suite.measure(engine, plan, vocab_size):
        yield ready | entries


def _emit(args: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """Print and write the results so far: what comes next may take long, or end the process."""
    from hasten.bench import report

    report.print_json(results)
    sys.stdout.flush()
    if args.output_path is not None:
        report.write_json(args.output_path, results)


@contextmanager
def _engines(
    args: argparse.Namespace, max_len: int, *, batch_size: int | None = None, hf_batch_size: int | None = None
) -> "Iterator[tuple[list[Engine], int]]":
    """The engines to measure, Hugging Face first, and the size of their vocabulary; none on ranks but the first."""
    import torch

    from hasten.bench import report
    from hasten.bench.engines import HastenEngine, HuggingFaceEngine
    from hasten.engine.llm import LLM

    report.require_writable(args.output_path)
    defaults = COMPARED_DEFAULTS if args.compare else ENGINE_DEFAULTS
    options = engine_options(args, defaults={**defaults, "max_model_len": max_len})
    threads = torch.get_num_threads()
    with LLM(args.model, **options) as llm:
        if not llm.is_driver:
            yield [], 0
            return
        engines: list[Engine] = [HastenEngine(llm, batch_size=batch_size)]
        if args.compare:
            options["dtype"] = str(engines[0].dtype)
            hf = HuggingFaceEngine(
                args.hf_model or args.model, **_hf_options(options), batch_size=hf_batch_size, threads=threads
            )
            engines.insert(0, hf)
        yield engines, llm.config.vocab_size


def _hf_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("dtype", "device", "load_format") if name in options}


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name != "run"}


def _write(args: argparse.Namespace, engine: "Engine", results: Mapping[str, Any]) -> None:
    """Results with where and how they were measured, as JSON, to wherever they were asked for."""
    from hasten.bench import report

    full = {"options": _options(args), "environment": report.environment(engine.device, engine.dtype), **results}
    if args.output_path is not None:
        report.write_json(args.output_path, full)
    if args.json:
        report.print_json(full)


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
