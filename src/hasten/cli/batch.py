"""`hasten batch`: compute a file of requests."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.cli.options import Parser, add_engine_options, add_sampling_options, engine_options, given, path, positive
from hasten.core.errors import ConfigError
from hasten.core.structured_outputs import structured
from hasten.core.types import SamplingParams

if TYPE_CHECKING:
    from hasten.batch.job import BatchJob, BatchSummary

FAILED = 1
ENGINE_SKIP = frozenset({"model"})
NOT_DEFAULTS = frozenset(
    {"logprobs", "prompt_logprobs", "beam_width", "length_penalty", "early_stopping", "beam_search_diversity_rate"}
    | {"seed", "n"}
)
"""Sampling parameters that are a row's own: of completions and chats they have another form or another meaning."""


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `batch`."""
    parser = commands.add_parser(
        "batch",
        help="compute a file of requests, in any number of runs",
        description="Compute a file of requests: one JSON object per line, or the rows of a Parquet file, in the form "
        "of OpenAI's batches or a prompt with its sampling parameters. Results and errors go to shards in a folder. "
        "The same command resumes an earlier run.",
        epilog="Exit status: 0 once each row has a result, 1 where rows are among the errors or the engine failed, "
        "2 for bad input.",
    )
    parser.add_argument("input", type=path, metavar="IN", help="file of requests: JSON lines, or Parquet")
    parser.add_argument("output", type=path, metavar="OUT", help="folder for results and errors, created if missing")
    parser.add_argument(
        "--model", type=path, required=True, metavar="MODEL", help="folder of the checkpoint, or its Hugging Face id"
    )
    parser.add_argument(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="another name for the model in rows; may be given more than once (always: MODEL and its last part)",
    )
    parser.add_argument(
        "--rows-per-shard", type=positive, default=10_000, metavar="N", help="rows per file in OUT (default: 10000)"
    )
    parser.add_argument(
        "--part",
        default="0/1",
        metavar="INDEX/COUNT",
        help="compute every COUNT-th row from INDEX on, counted from 0, into a folder of its own in OUT: for several "
        "processes that see the same files, such as the pods of an Indexed Job",
    )
    parser.add_argument("--retry-errors", action="store_true", help="compute the rows among the errors again")
    _add_ray_options(parser)
    add_sampling_options(parser, skip=NOT_DEFAULTS)
    add_engine_options(parser, skip=ENGINE_SKIP, chats=True)
    parser.set_defaults(run=run)


def _add_ray_options(parser: Parser) -> None:
    group = parser.add_argument_group("several engines, on a Ray cluster")
    group.add_argument(
        "--on",
        choices=["ray"],
        help="where the engines run: each in an actor, on the cluster that RAY_ADDRESS names, or else on this machine",
    )
    group.add_argument("--engines", type=positive, metavar="N", help="maximum number of engines (default: 1)")
    group.add_argument(
        "--cpus-per-engine", type=positive, metavar="N", help="CPUs per engine, in a cluster without GPUs (default: 1)"
    )


def run(args: argparse.Namespace) -> int:
    """Compute what is left of a batch, and print what came of it."""
    from hasten.core.extras import require_extra

    require_extra("batch", "hasten batch")
    options = engine_options(args, skip=ENGINE_SKIP)
    if args.on == "ray":
        return _run_on_ray(args, options)
    if args.engines is not None or args.cpus_per_engine is not None:
        raise ConfigError(
            "--engines and --cpus-per-engine need --on ray; on one machine, several GPUs share a model by -tp"
        )
    from hasten.core.config import EngineConfig
    from hasten.parallel.rank import rank_info

    rank = rank_info(EngineConfig.create(args.model, **options).parallel)
    if rank is not None and rank.rank > 0:
        from hasten.engine.llm import run_worker

        run_worker(args.model, **options)
        return 0
    with _job(args) as job:
        # ranks that others started wait for this one
        summary = job.finish() if job.left == 0 and rank is None else _computed(job, args.model, options)
    return _show(summary)


def _run_on_ray(args: argparse.Namespace, options: dict[str, Any]) -> int:
    from hasten.core.config import EngineConfig
    from hasten.core.extras import require_extra

    require_extra("ray", "--on ray")
    from hasten.batch.on_ray import RayEngines

    parallel = EngineConfig.create(args.model, **options).parallel
    if parallel.nnodes not in (None, 1):
        raise ConfigError("--on ray has engines of one host each: leave out --nnodes, and give the number as --engines")
    show = options.pop("progress_bars", True)
    with _job(args) as job:
        if job.left == 0:
            return _show(job.finish())
        with RayEngines(
            args.model,
            options | {"progress_bars": False},
            engines=args.engines or 1,
            ranks=parallel.ranks,
            cpus=args.cpus_per_engine or 1,
        ) as engines:
            summary = job.run(engines, show_progress=show)
    return _show(summary)


def _job(args: argparse.Namespace) -> "BatchJob":
    from hasten.batch.job import BatchJob
    from hasten.batch.part import Part

    return BatchJob(
        args.input,
        args.output,
        model=args.model,
        names=args.served_model_name,
        defaults=_defaults(args),
        rows_per_shard=args.rows_per_shard,
        retry_errors=args.retry_errors,
        part=Part.parse(args.part),
    )


def _defaults(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters of rows without their own, by the names of the request's fields."""
    return structured(given(args, SamplingParams, NOT_DEFAULTS))


def _computed(job: "BatchJob", model: str, options: dict[str, Any]) -> "BatchSummary":
    from hasten.batch.engine import LLMEngine
    from hasten.engine.llm import LLM

    with LLM(model, **options) as llm:
        return job.run(LLMEngine(llm), show_progress=options.get("progress_bars", True))


def _show(summary: "BatchSummary") -> int:
    """Print what came of a batch; the exit status."""
    before = f", {summary.resumed} of them in earlier runs" if summary.resumed else ""
    counts = (_counted(summary.results, "result"), _counted(summary.errors, "error"))
    print(f"{_counted(summary.rows, 'row')}: {', '.join(counts)}{before}")
    if summary.seconds:
        print(
            f"{summary.seconds:.1f} s: {summary.prompt_tokens} prompt tokens, {summary.completion_tokens} generated, "
            f"{summary.tokens_per_second:.1f} tokens/s"
        )
    print(f"in {summary.output}" + (_first_reason(Path(summary.output)) if summary.errors else ""))
    return FAILED if summary.errors else 0


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _first_reason(output: Path) -> str:
    """Where the reasons of errors are, and the first of them."""
    file = min(file for file in output.glob("errors-*.jsonl") if file.stat().st_size)
    with file.open(encoding="utf-8") as lines:
        reason = json.loads(next(lines))["error"]["message"]
    return f"; the errors' reasons are in errors-*.jsonl, the first: {reason}"
