"""`hasten report`: accuracy, speed, cost and limits of a model on this machine, as one page."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from hasten.cli.options import HOST_OPTIONS, Parser, add_engine_options, engine_options, option_words, path, typed
from hasten.cli.progress import progress_lines
from hasten.core.errors import ConfigError
from hasten.core.extras import require_extra
from hasten.core.files import held

DEFAULT_SLO = "ttft=500ms,itl=50ms"
_OWN_OPTIONS = ("output", "dataset", "against", "hf_model", "slo", "price_per_hour")


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `report`."""
    parser = commands.add_parser(
        "report",
        help="accuracy, speed, cost and limits of a model on this machine, as one page",
        description="Measure a model on this machine, compared with Hugging Face and others, and write one HTML page "
        "that needs nothing else, with all figures as JSON and all pictures as PNG next to it: accuracy "
        "and answers that differ, latencies, "
        "throughput by requests in flight with the knee for an objective, price and energy per token, what the "
        "hardware allows, memory, starts, and what it was measured with. A run that was ended goes on where it was. "
        "docs/report.md describes the sections.",
    )
    parser.add_argument("model", type=path, metavar="MODEL", help="folder of the checkpoint, or its Hugging Face id")
    parser.add_argument(
        "-o", "--output", type=path, default="report.html", metavar="FILE", help="page to write (default: %(default)s)"
    )
    parser.add_argument(
        "--dataset",
        type=path,
        metavar="FILE",
        help='JSON lines, each an object with "text", whose last word is predicted (default: the demo\'s stories)',
    )
    parser.add_argument(
        "--against",
        default="hf",
        metavar="NAMES",
        help="engines to compare with, separated by commas: hf, vllm and ctranslate2 in this process, openai=URL for a "
        "server that has the same model, none (default: %(default)s)",
    )
    parser.add_argument("--hf-model", type=path, metavar="PATH", help="what the others run (default: MODEL)")
    parser.add_argument(
        "--slo",
        default=DEFAULT_SLO,
        metavar="LIMITS",
        help="limits of ttft, itl, tpot or e2el at the 95th percentile, such as %(default)s, the default, or "
        "'ttft:300 itl:40' (ms)",
    )
    parser.add_argument(
        "--price-per-hour", type=typed(_price), metavar="DOLLARS", help="of this machine, for the price of tokens"
    )
    parser.add_argument("--quick", action="store_true", help="fewer texts, requests and repetitions")
    parser.add_argument("--fresh", action="store_true", help="repeat what an earlier run has measured")
    add_engine_options(parser, skip=HOST_OPTIONS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, and write page and JSON."""
    require_extra("serve", "hasten report")
    from hasten.bench import report as files
    from hasten.bench.against import Against
    from hasten.bench.evaluation.options import FULL, QUICK, ReportOptions
    from hasten.bench.evaluation.page import write_page, write_picture
    from hasten.bench.evaluation.run import Evaluation
    from hasten.bench.slo import Slo
    from hasten.cli.demo import demo_file
    from hasten.parallel.rank import rank_from_environment

    page = Path(args.output)
    if not page.name:
        raise ConfigError(f"cannot write the page to {page}: it is a folder; give a file, such as report.html")
    data, picture, work = (page.with_suffix(ending) for ending in (".json", ".png", ".work"))
    if page in (data, picture):
        kind = "JSON is" if page == data else "PNG is"
        raise ConfigError(f"{page} is what the {kind} called; give the page another ending, such as .html")
    files.require_writable(*map(str, (page, data, picture)))
    if rank_from_environment() is not None:
        raise ConfigError("hasten report starts its own ranks; run it without torchrun and mpirun")
    options = ReportOptions(
        model=args.model,
        engine=engine_options(args, skip=HOST_OPTIONS),
        dataset=args.dataset or demo_file("test.jsonl"),
        hf_model=args.hf_model,
        against=Against.parse(args.against),
        slo=Slo.parse(args.slo),
        price_per_hour=args.price_per_hour,
        scale=QUICK if args.quick else FULL,
        command=_command(args),
    )
    evaluation = Evaluation(options, work, fresh=args.fresh, say=progress_lines())
    with held(work, "this report"):
        found = evaluation.report()
        full = {**_head(args), **found}
        files.write_json(str(data), full)
        write_page(page, found, full)
    print(f"{found['headline']}\n{page}  the report\n{data}  its figures")
    try:
        write_picture(picture, found)
        print(f"{picture}  its pictures")
    except ConfigError as error:
        print(f"no {picture.name}: {error}")
    return 0


def _head(args: argparse.Namespace) -> dict[str, Any]:
    from hasten.bench import schema
    from hasten.cli.bench.common import options_of

    return {**schema.head("report"), "options": options_of(args)}


def _command(args: argparse.Namespace) -> str:
    """The command line that gives the same report."""
    own = {name: getattr(args, name) for name in _OWN_OPTIONS} | ({"quick": True} if args.quick else {})
    options = option_words({**own, **engine_options(args, skip=HOST_OPTIONS)})
    return shlex.join(["hasten", "report", str(args.model), *options])


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = 0.0
    if not 0 < price < float("inf"):
        raise ConfigError(f"{text!r} is not a price above 0")
    return price
