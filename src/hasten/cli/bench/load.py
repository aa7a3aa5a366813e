"""`hasten bench load`: a served model under an open-loop load."""

import argparse
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.cli.bench.common import SAMPLING_DEFAULTS, options_of
from hasten.cli.bench.load_options import KEY, NOT_SENT, add_options, json_object
from hasten.cli.options import Parser, engine_options, given, sampling_params
from hasten.core.errors import ConfigError
from hasten.core.extras import require_extra
from hasten.core.structured_outputs import structured
from hasten.core.types import SamplingParams

if TYPE_CHECKING:
    from hasten.bench.load.client import ClientOptions
    from hasten.bench.load.measure import LoadOptions
    from hasten.bench.load.metrics import LoadResult
    from hasten.bench.load.prompts import PromptWriter
    from hasten.bench.load.target import Target
    from hasten.bench.load.workload import Workload, WorkloadOptions

_TOKENIZER_OPTIONS = {"tokenizer", "download_dir", "progress_bars"}
"""Engine options that have a meaning for a server that runs already."""
_MOST_PROCESSES = 4


def add_parser(benches: "argparse._SubParsersAction[Parser]") -> None:
    """Add the benchmark `load`."""
    parser = benches.add_parser(
        "load",
        help="latencies and throughput of a served model, by request rate",
        description="Send streamed requests to a server at given rates, each when it is due, independent of those "
        "before it, and measure the time to the first token (ttft), per output token (tpot), between events (itl) and "
        "of whole requests (e2el), throughput and goodput. The server runs at --url already, or is started for MODEL "
        "with the engine options below. docs/performance.md describes what is measured and how.",
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure a served model under each rate."""
    require_extra("serve", "hasten bench load")
    from hasten.bench import png, report
    from hasten.bench.load.measure import measure
    from hasten.bench.load.plot import write_plot
    from hasten.bench.load.report import notes, show

    report.require_writable(args.output_path, args.plot)
    png.require_picture(args.plot)
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
    if args.json:
        report.print_json(full)
    else:
        show(title, results)
        for line in notes(results):
            print(line)
    if args.plot is not None:
        write_plot(args.plot, title, results)
    return 0


def _load_options(args: argparse.Namespace) -> "LoadOptions":
    from hasten.bench.load.arrivals import rate_of
    from hasten.bench.load.measure import LoadOptions
    from hasten.bench.load.workload import Schedule
    from hasten.bench.slo import REQUEST_NAMES, Slo
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
        slo=Slo.parse(" ".join(args.goodput), REQUEST_NAMES) if args.goodput else Slo(),
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
    from hasten.bench import schema
    from hasten.core.cpus import available_cpus

    options = {**options_of(args), "header": [name for name, _ in args.header]}
    client = {"hasten": __version__, "python": platform.python_version(), "cpus": available_cpus()}
    server = {"api": args.api, "url": str(target.address), "model": target.options.model}
    return {**schema.head("load"), "options": options, "client": client, "server": server, "results": results}


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
    size = json_object(file.read_text(encoding="utf-8")).get("vocab_size") if file.is_file() else None
    return size if isinstance(size, int) else None


def _target(args: argparse.Namespace, url: str, model: str | None) -> "Target":
    from hasten.bench.load.target import find_target

    sampling_params(args, defaults=SAMPLING_DEFAULTS, skip=NOT_SENT)  # refuses wrong values before they are sent
    sampling = {**SAMPLING_DEFAULTS, **structured(given(args, SamplingParams, NOT_SENT))}
    headers = dict(args.header)
    if args.api.startswith("openai") and os.environ.get(KEY):
        headers = {"Authorization": f"Bearer {os.environ[KEY]}", **headers}
    return find_target(args.api, url, model, headers, sampling, args.extra_body)
