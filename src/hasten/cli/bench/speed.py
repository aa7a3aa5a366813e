"""`hasten bench throughput` and `latency`: tokens a second, and time to a token."""

import argparse

from hasten.cli.bench.common import (
    ENGINE_DEFAULTS,
    add_model,
    add_output,
    add_peers,
    add_sampling,
    engines_of,
    show_not_measured,
    write_measured,
    write_plot,
)
from hasten.cli.options import Parser, add_engine_options, positive


def add_parsers(benches: "argparse._SubParsersAction[Parser]") -> None:
    """Add the benchmarks `throughput` and `latency`."""
    _add_throughput(benches)
    _add_latency(benches)


def _add_throughput(benches: "argparse._SubParsersAction[Parser]") -> None:
    parser = benches.add_parser(
        "throughput",
        help="tokens per second on many requests",
        description="Tokens per second on many requests that arrive at once, with prompts of random token ids.",
    )
    add_model(parser)
    add_peers(parser)
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
        "--batch-size", type=positive, metavar="N", help="requests that hasten gets at once (default: all of them)"
    )
    parser.add_argument(
        "--hf-batch-size",
        type=positive,
        default=16,
        metavar="N",
        help="requests in a batch of Hugging Face (default: 16)",
    )
    parser.add_argument("--repetitions", type=positive, default=1, metavar="N", help="times to run it (default: 1)")
    add_output(parser, plot="rates by engine")
    add_sampling(parser)
    add_engine_options(parser, defaults=ENGINE_DEFAULTS)
    parser.set_defaults(run=run_throughput)


def _add_latency(benches: "argparse._SubParsersAction[Parser]") -> None:
    parser = benches.add_parser(
        "latency",
        help="time to the first token and time per output token",
        description="Time to the first token and time per output token of batches of equal requests.",
    )
    add_model(parser)
    add_peers(parser)
    parser.add_argument(
        "--batch-sizes", type=positive, nargs="+", default=[1, 16, 64], metavar="N", help="batches (default: 1 16 64)"
    )
    parser.add_argument("--prompt-length", type=positive, default=128, metavar="N", help="tokens (default: 128)")
    parser.add_argument("--output-length", type=positive, default=128, metavar="N", help="tokens (default: 128)")
    parser.add_argument("--repetitions", type=positive, default=3, metavar="N", help="times to run it (default: 3)")
    add_output(parser, plot="latencies by engine and batch size")
    add_sampling(parser)
    add_engine_options(parser, defaults=ENGINE_DEFAULTS)
    parser.set_defaults(run=run_latency)


def run_throughput(args: argparse.Namespace) -> int:
    """Measure tokens a second."""
    from hasten.bench import plots, throughput
    from hasten.bench.workloads import WORKLOADS

    workload = WORKLOADS[args.workload](args.num_requests)
    sizes = {"batch_size": args.batch_size, "hf_batch_size": args.hf_batch_size}
    shorter = [f"--workload {name}" for name, make in WORKLOADS.items() if make(None).max_len < workload.max_len]
    advice = f"choose {' or '.join(shorter)}" if shorter else "`hasten bench latency` measures shorter ones"
    with engines_of(args, f"workload {args.workload}", workload.max_len, advice=advice, **sizes) as measured:
        if not measured.engines:
            return 0
        results = throughput.measure(measured.engines, workload, measured.vocab_size, repetitions=args.repetitions)
    speedup, compared_with = throughput.speedup(results)
    summary = {"results": results, "speedup": speedup, "compared_with": compared_with}
    write_measured(args, measured, summary)
    first = results[0]
    title = f"{args.model}, {first.workload}: {first.requests} requests, {first.prompt_tokens} tokens in, "
    if not args.json:
        throughput.show(results)
    write_plot(args, f"{title}{first.output_tokens} out", plots.throughputs(results))
    return show_not_measured(args, measured)


def run_latency(args: argparse.Namespace) -> int:
    """Measure time to the first token and time a token."""
    from hasten.bench import latency, plots
    from hasten.bench.workloads import fixed

    workloads = [fixed(size, args.prompt_length, args.output_length) for size in args.batch_sizes]
    lengths, advice = args.prompt_length + args.output_length, "lower --prompt-length or --output-length"
    with engines_of(args, args.parser.prog, lengths, advice=advice) as measured:
        if not measured.engines:
            return 0
        results = [
            result
            for workload in workloads
            for result in latency.measure(measured.engines, workload, measured.vocab_size, repetitions=args.repetitions)
        ]
    write_measured(args, measured, {"results": results, "speedups": latency.speedups(results)})
    title = f"{args.model}: {args.prompt_length} tokens in, {args.output_length} out"
    if not args.json:
        latency.show(results)
    write_plot(args, title, plots.latencies(results), columns=len(args.batch_sizes))
    return show_not_measured(args, measured)
