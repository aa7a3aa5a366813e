"""`hasten bench load`: a served model under an open-loop load."""

import argparse
import json
import math
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hasten.cli.bench.common import SAMPLING_DEFAULTS, add_output, options_of
from hasten.cli.options import (
    Parser,
    add_engine_options,
    add_sampling_options,
    engine_options,
    given,
    path,
    positive,
    sampling_params,
)
from hasten.core.errors import ConfigError
from hasten.core.extras import require_extra
from hasten.core.types import SamplingParams

if TYPE_CHECKING:
    from hasten.bench.load.client import ClientOptions
    from hasten.bench.load.measure import LoadOptions
    from hasten.bench.load.metrics import LoadResult
    from hasten.bench.load.prompts import PromptWriter
    from hasten.bench.load.target import Target
    from hasten.bench.load.workload import Workload, WorkloadOptions

_NOT_SENT = frozenset({"n", "max_tokens", "seed", "beam_width", "length_penalty", "early_stopping", "prompt_logprobs"})
_NOT_SENT |= {"beam_search_diversity_rate"}
"""Sampling parameters that no request of a load has: each is one stream, as long as its schedule says."""
_TOKENIZER_OPTIONS = {"tokenizer", "download_dir", "progress_bars"}
"""Engine options that have a meaning for a server that runs already."""
_KEY = "OPENAI_API_KEY"
_APIS = ("openai", "openai-chat", "triton-grpc", "triton-generate")
_MOST_PROCESSES = 4

Value = TypeVar("Value")


def add_parser(benches: "argparse._SubParsersAction[Parser]") -> None:
    """Add the benchmark `load`."""
    parser = benches.add_parser(
        "load",
        help="latencies and throughput of a served model, by request rate",
        description="Send streamed requests to a server at given rates, each when it is due, whatever became of those "
        "before it, and measure the time to the first token (ttft), per output token (tpot), between events (itl) and "
        "of whole requests (e2el), throughput and goodput. The server is one that runs at --url, or one that is "
        "started for MODEL with the engine options below. docs/performance.md describes what is measured and how.",
    )
    parser.add_argument(
        "model", type=path, metavar="MODEL", nargs="?", help="folder of the checkpoint, or its Hugging Face id"
    )
    _add_server(parser)
    _add_arrivals(parser)
    _add_requests(parser)
    _add_results(parser)
    add_sampling_options(parser, defaults=SAMPLING_DEFAULTS, skip=_NOT_SENT)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def _add_server(parser: Parser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--url", metavar="URL", help="a server that runs, such as http://HOST:8000 or grpc://HOST:8001")
    group.add_argument(
        "--api",
        choices=_APIS,
        default="openai",
        help="completions or chats of OpenAI's API, ModelStreamInfer over gRPC, or generate_stream (default: openai)",
    )
    group.add_argument(
        "--served-model-name", metavar="NAME", help="model of the server (default: its first, or the only one for text)"
    )
    group.add_argument(
        "--header",
        action="append",
        default=[],
        type=_typed(_header),
        metavar="NAME:VALUE",
        help="header, or metadata of gRPC, of each request; may be given more than once. The environment variable "
        f"{_KEY} is sent as the key of OpenAI's API",
    )
    group.add_argument(
        "--extra-body",
        type=_typed(_json_object),
        default={},
        metavar="JSON",
        help="fields that the body of each request over HTTP has in addition, or instead of those of the same name; "
        "null removes one",
    )
    group.add_argument(
        "--timeout", type=_typed(_seconds), default=600.0, metavar="SECS", help="per request (default: 600)"
    )


def _add_arrivals(parser: Parser) -> None:
    group = parser.add_argument_group("arrivals")
    group.add_argument(
        "--request-rate",
        type=_typed(_rate),
        nargs="+",
        metavar="R",
        help="requests (with --turns: conversations) per second, each measured in a run of its own; inf: all at once "
        "(default: inf; for a trace, the times that it has)",
    )
    group.add_argument(
        "--arrivals",
        choices=("poisson", "constant"),
        default="poisson",
        help="time between two requests: exponentially distributed, or always the same (default: poisson)",
    )
    group.add_argument(
        "--max-concurrency", type=positive, metavar="N", help="maximum requests in flight (default: any)"
    )
    group.add_argument(
        "--num-prompts",
        type=positive,
        metavar="N",
        help="requests, or conversations, per run (default: 100; all of a trace; as many as --duration has)",
    )
    group.add_argument(
        "--duration", type=_typed(_seconds), metavar="SECS", help="seconds of a run in which requests become due"
    )
    group.add_argument(
        "--num-warmups",
        type=_typed(_count),
        default=1,
        metavar="N",
        help="requests before the first run, one after the other and not measured (default: 1)",
    )
    group.add_argument(
        "--processes", type=positive, metavar="N", help="client processes (default: a quarter of the CPUs, 1 to 4)"
    )


def _add_requests(parser: Parser) -> None:
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--dataset",
        choices=("random", "sharegpt", "prompts", "trace"),
        default="random",
        help="random prompts; conversations in ShareGPT's form; JSON lines with `prompt`; JSON lines with `timestamp` "
        "(default: random)",
    )
    group.add_argument("--dataset-path", type=path, metavar="FILE", help="file of the dataset")
    forms = "N, LOW:HIGH, or lognormal:MEAN,STDDEV[,MAX]"
    group.add_argument(
        "--prompt-length",
        type=_typed(_lengths),
        metavar="L",
        help=f"tokens of random prompts: {forms} (default: 128)",
    )
    group.add_argument(
        "--output-length",
        type=_typed(_lengths),
        metavar="L",
        help=f"maximum new tokens: {forms} (default: 128; what a dataset says); with --ignore-eos, exactly so many",
    )
    group.add_argument(
        "--shared-prefix", type=_typed(_count), default=0, metavar="N", help="tokens that all random prompts begin with"
    )
    group.add_argument(
        "--turns",
        type=_typed(_lengths),
        metavar="T",
        help="turns per conversation, each sent with those before it and their answers: N or LOW:HIGH (default: 1)",
    )
    group.add_argument(
        "--think-time",
        type=_typed(_seconds_or_none),
        default=0.0,
        metavar="SECS",
        help="between an answer and the next turn (default: 0)",
    )
    group.add_argument(
        "--workload-seed", type=int, default=0, metavar="N", help="of prompts, lengths and arrivals (default: 0)"
    )
    group.add_argument(
        "--vocab-size", type=positive, metavar="N", help="token ids of random prompts, where there is no tokenizer"
    )


def _add_results(parser: Parser) -> None:
    group = parser.add_argument_group("results")
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="count the requests per second within these limits of ttft, tpot and e2el, such as ttft:200 tpot:15",
    )
    group.add_argument("--plot", type=path, metavar="FILE", help="write an SVG of the latencies by request rate")
    add_output(parser)


def _typed(read: Callable[[str], Value]) -> Callable[[str], Value]:
    """The `type` of an option that a function reads which raises ConfigError."""

    def typed(text: str) -> Value:
        try:
            return read(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


def _rate(text: str) -> str:
    from hasten.bench.load.arrivals import rate_of

    rate_of(text)
    return text


def _lengths(text: str) -> str:
    from hasten.bench.load.lengths import Lengths

    Lengths.parse(text)
    return text


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not (colon and name.strip() and text.isprintable() and text.isascii()):
        raise ConfigError("a header is NAME:VALUE in printable ASCII")
    return name.strip(), value.strip()


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{text!r:.80} is not a JSON object")
    return value


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _seconds_or_none(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ConfigError(f"{text!r} is not a number of seconds")
    return value


def _seconds(text: str) -> float:
    value = _seconds_or_none(text)
    if value == 0:
        raise ConfigError("seconds must be above 0")
    return value


def run(args: argparse.Namespace) -> int:
    """Measure a served model under each rate."""
    require_extra("serve", "hasten bench load")
    from hasten.bench import report
    from hasten.bench.load.measure import measure
    from hasten.bench.load.plot import write_plot
    from hasten.bench.load.report import notes, show

    for file in (args.output_path, args.plot):
        report.require_writable(file)
    options, workload = _load_options(args), _workload_options(args)
    results: list[LoadResult] = []
    full: dict[str, Any] = {}
    with _server(args) as (target, writer):
        for result in measure(_client_options(args, target), _workload(args, workload, writer), writer, options):
            results.append(result)
            full = _report(args, target, results)
            if args.output_path is not None:
                report.write_json(args.output_path, full)
    title = f"{args.api} at {target.address}, model {target.options.model}"
    if args.plot is not None:
        write_plot(args.plot, title, results)
    if args.json:
        report.print_json(full)
        return 0
    show(title, results)
    for line in notes(results):
        print(line)
    return 0


def _load_options(args: argparse.Namespace) -> "LoadOptions":
    from hasten.bench.load.arrivals import rate_of
    from hasten.bench.load.measure import LoadOptions
    from hasten.bench.load.metrics import Objectives
    from hasten.bench.load.workload import Schedule
    from hasten.core.cpus import available_cpus

    given_rates = args.request_rate or (["inf"] if args.dataset != "trace" else [])
    schedules = [
        Schedule(rate=rate, process=args.arrivals, num_prompts=args.num_prompts, duration=args.duration)
        for rate in (map(rate_of, given_rates) if given_rates else [None])
    ]
    return LoadOptions(
        schedules=schedules,
        processes=args.processes or min(_MOST_PROCESSES, max(1, available_cpus() // 4)),
        warm_ups=args.num_warmups,
        objectives=Objectives.parse(args.goodput),
        show_progress=getattr(args, "progress_bars", True),
    )


def _workload_options(args: argparse.Namespace) -> "WorkloadOptions":
    from hasten.bench.load.lengths import Lengths
    from hasten.bench.load.workload import WorkloadOptions

    lengths = {
        name: Lengths.parse(text)
        for name in ("prompt_length", "output_length", "turns")
        if (text := getattr(args, name)) is not None
    }
    return WorkloadOptions(
        dataset=args.dataset,
        path=args.dataset_path,
        shared_prefix=args.shared_prefix,
        seed=args.workload_seed,
        **lengths,
    )


def _workload(args: argparse.Namespace, options: "WorkloadOptions", writer: "PromptWriter") -> "Workload":
    from hasten.bench.load.workload import Workload

    return Workload(options, writer, takes_ids=args.api == "openai")


def _client_options(args: argparse.Namespace, target: "Target") -> "ClientOptions":
    from hasten.bench.load.client import ClientOptions

    return ClientOptions(
        target=target, max_concurrency=args.max_concurrency, think_time=args.think_time, timeout=args.timeout
    )


def _report(args: argparse.Namespace, target: "Target", results: "list[LoadResult]") -> dict[str, Any]:
    """What goes into a file; of headers, which may hold keys, the names alone."""
    from hasten import __version__
    from hasten.core.cpus import available_cpus

    options = {**options_of(args), "header": [name for name, _ in args.header]}
    client = {"hasten": __version__, "python": platform.python_version(), "cpus": available_cpus()}
    server = {"api": args.api, "url": str(target.address), "model": target.options.model}
    return {"options": options, "client": client, "server": server, "results": results}


@contextmanager
def _server(args: argparse.Namespace) -> "Iterator[tuple[Target, PromptWriter]]":
    """The server that is measured, and what writes its prompts."""
    if (args.model is None) == (args.url is None):
        raise ConfigError("give a MODEL, for which a server is started, or the --url of a server that runs")
    options = engine_options(args)
    with _started(args, options) if args.model is not None else _running(args, options) as server:
        yield server


@contextmanager
def _running(args: argparse.Namespace, options: Mapping[str, Any]) -> "Iterator[tuple[Target, PromptWriter]]":
    from hasten.bench.load.prompts import PromptWriter
    from hasten.checkpoint.hub import resolve_model
    from hasten.engine.text import Tokenizer

    for name in options.keys() - _TOKENIZER_OPTIONS:
        raise ConfigError(f"{name} is an option of a server that is started for a MODEL, and not of one at --url")
    tokenizer = None
    if "tokenizer" in options:
        folder = resolve_model(options["tokenizer"], part="tokenizer", download_dir=options.get("download_dir"))
        tokenizer = Tokenizer.from_folder(folder)
    writer = PromptWriter(tokenizer, args.vocab_size)
    yield _target(args, args.url, args.served_model_name), writer


@contextmanager
def _started(args: argparse.Namespace, options: Mapping[str, Any]) -> "Iterator[tuple[Target, PromptWriter]]":
    from hasten.bench.load.prompts import PromptWriter
    from hasten.bench.served import HOST, TEXT_MODEL, TOKEN_MODEL, served
    from hasten.checkpoint.hub import resolve_engine
    from hasten.core.config import EngineConfig
    from hasten.engine.text import Tokenizer
    from hasten.server.create import has_tokenizer

    if args.served_model_name is not None:
        raise ConfigError("--served-model-name is of a server at --url; one that is started has names of its own")
    engine = resolve_engine(EngineConfig.create(args.model, **options))
    tokenizer = Tokenizer.from_folder(engine.tokenizer or engine.model) if has_tokenizer(engine) else None
    writer = PromptWriter(tokenizer, args.vocab_size or (None if tokenizer else _vocab_size(engine.model)))
    with tempfile.TemporaryDirectory() as folder, served(engine, Path(folder, "log")) as server:
        url = server.address if args.api == "triton-grpc" else f"http://{HOST}:{server.http_port}"
        yield _target(args, url, TEXT_MODEL if args.api.startswith("triton") else TOKEN_MODEL), writer


def _vocab_size(model: str) -> int | None:
    """The vocabulary's size by the model's config.json, where there is one."""
    file = Path(model, "config.json")
    size = _json_object(file.read_text(encoding="utf-8")).get("vocab_size") if file.is_file() else None
    return size if isinstance(size, int) else None


def _target(args: argparse.Namespace, url: str, model: str | None) -> "Target":
    from hasten.bench.load.target import find_target

    sampling_params(args, defaults=SAMPLING_DEFAULTS, skip=_NOT_SENT)  # refuses wrong values before they are sent
    sampling = {**SAMPLING_DEFAULTS, **given(args, SamplingParams, _NOT_SENT)}
    headers = dict(args.header)
    if args.api.startswith("openai") and os.environ.get(_KEY):
        headers = {"Authorization": f"Bearer {os.environ[_KEY]}", **headers}
    return find_target(args.api, url, model, headers, sampling, args.extra_body)
