"""`hasten batch`: compute a file of requests."""

import argparse
from typing import TYPE_CHECKING, Any

from hasten.cli.options import Parser, add_engine_options, add_sampling_options, engine_options, given, path, positive
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
        "The same command goes on where it was killed.",
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
        help="another name that rows may give for the model; may be given more than once "
        "(always: MODEL and its last part)",
    )
    parser.add_argument(
        "--rows-per-shard", type=positive, default=10_000, metavar="N", help="rows of a file in OUT (default: 10000)"
    )
    parser.add_argument("--retry-errors", action="store_true", help="compute the rows among the errors again")
    add_sampling_options(parser, skip=NOT_DEFAULTS)
    add_engine_options(parser, skip=ENGINE_SKIP)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compute what is left of a batch, and print what came of it."""
    from hasten.core.extras import require_extra

    require_extra("batch", "hasten batch")
    options = engine_options(args, skip=ENGINE_SKIP)
    from hasten.core.config import EngineConfig
    from hasten.parallel.rank import rank_info

    rank = rank_info(EngineConfig.create(args.model, **options).parallel)
    if rank is not None and rank.rank > 0:
        from hasten.engine.llm import run_worker

        run_worker(args.model, **options)
        return 0
    from hasten.batch.job import BatchJob

    with BatchJob(
        args.input,
        args.output,
        model=args.model,
        names=args.served_model_name,
        defaults=_defaults(args),
        rows_per_shard=args.rows_per_shard,
        retry_errors=args.retry_errors,
    ) as job:
        # ranks that others started wait for this one
        summary = job.finish() if job.left == 0 and rank is None else _computed(job, args.model, options)
    _show(summary)
    return FAILED if summary.errors else 0


def _defaults(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters of rows without their own, by the names of the request's fields."""
    return structured(given(args, SamplingParams, NOT_DEFAULTS))


def _computed(job: "BatchJob", model: str, options: dict[str, Any]) -> "BatchSummary":
    from hasten.batch.engine import LLMEngine
    from hasten.engine.llm import LLM

    with LLM(model, **options) as llm:
        return job.run(LLMEngine(llm), show_progress=options.get("progress_bars", True))


def _show(summary: "BatchSummary") -> None:
    before = f", {summary.resumed} of them in earlier runs" if summary.resumed else ""
    print(f"{summary.rows} rows: {summary.results} results, {summary.errors} errors{before}")
    if summary.seconds:
        print(
            f"{summary.seconds:.1f} s: {summary.prompt_tokens} prompt tokens, {summary.completion_tokens} generated, "
            f"{summary.tokens_per_second:.1f} tokens/s"
        )
    print(f"in {summary.output}" + ("; the errors' reasons are in errors-*.jsonl" if summary.errors else ""))
