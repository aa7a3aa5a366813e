"""`hasten bench embed`: vectors of many texts per second."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from hasten.cli.bench.common import add_model, add_output, require_writable, write, write_plot
from hasten.cli.options import Parser, add_engine_options, engine_options, positive
from hasten.core.errors import ConfigError

if TYPE_CHECKING:
    from hasten.bench.embed import Embedder
    from hasten.engine.llm import LLM

_SKIP = frozenset({"seed"})
"""Nothing is drawn."""


def add_parser(benches: "argparse._SubParsersAction[Parser]") -> None:
    """Add the benchmark `embed`."""
    parser = benches.add_parser(
        "embed",
        help="vectors of texts per second",
        description="Texts and tokens per second when vectors of many texts of random token ids are computed at once, "
        "also compared with transformers, and with sentence-transformers where it is installed, in sorted, padded "
        "batches, and on a GPU with vLLM.",
    )
    add_model(
        parser, compare="measure transformers, sentence-transformers and vLLM too, alternating, and compare vectors"
    )
    parser.add_argument("--num-texts", type=positive, default=256, metavar="N", help="texts (default: 256)")
    parser.add_argument("--min-tokens", type=positive, default=8, metavar="N", help="shortest text (default: 8)")
    parser.add_argument("--max-tokens", type=positive, default=256, metavar="N", help="longest text (default: 256)")
    parser.add_argument(
        "--hf-batch-size", type=positive, default=32, metavar="N", help="texts in a batch of the others (default: 32)"
    )
    parser.add_argument("--repetitions", type=positive, default=3, metavar="N", help="times to run it (default: 3)")
    add_output(parser, plot="texts and tokens per second")
    add_engine_options(parser, skip=_SKIP)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, and compare if asked."""
    from hasten.bench import embed, report
    from hasten.bench.embed_plot import pictures
    from hasten.engine.llm import LLM, run_worker
    from hasten.parallel.threads import limit_threads

    if args.min_tokens > args.max_tokens:
        raise ConfigError(f"min_tokens is {args.min_tokens}, above max_tokens, {args.max_tokens}")
    require_writable(args)
    options, threads = engine_options(args, skip=_SKIP), limit_threads()
    if run_worker(args.model, **options):
        return 0
    with LLM(args.model, **options) as llm:
        if args.max_tokens > llm.engine.max_model_len:
            raise ConfigError(f"max_tokens is {args.max_tokens}; the model takes at most {llm.engine.max_model_len}")
        prompts = embed.texts(args.num_texts, args.min_tokens, args.max_tokens, llm.config.vocab_size)
        engines = [*(_others(args, llm, options, threads) if args.compare else ()), embed.HastenEmbedder(llm)]
        results, agreement = embed.measure(engines, prompts, repetitions=args.repetitions)
        environment = report.environment(llm.device, llm.dtype)
    found = {"results": results, "agreement": agreement, "speedups": embed.speedups(results)}
    write(args, {"environment": environment, **found})
    if not args.json:
        embed.show(results, agreement)
    write_plot(args, f"{args.model}: {args.num_texts} texts", pictures(results), columns=1)
    return 0


def _others(args: argparse.Namespace, llm: "LLM", options: dict[str, Any], threads: int) -> "list[Embedder]":
    from hasten.bench.embed_others import (
        SentenceTransformersEmbedder,
        TransformersEmbedder,
        has_sentence_transformers,
        vllm_embedder,
    )
    from hasten.bench.peers import NotMeasured
    from hasten.checkpoint.hub import resolve_engine
    from hasten.core.config import EngineConfig

    pooler = llm.engine.worker.pooler
    if pooler is None or "embed" not in pooler.tasks:
        raise ConfigError(f"{llm.config.architecture} gives no vectors")
    engine = resolve_engine(EngineConfig.create(args.hf_model or args.model, **options))
    common: dict[str, Any] = {
        "device": llm.device,
        "dtype": llm.dtype,
        "batch_size": args.hf_batch_size,
        "threads": threads,
    }
    dummy = engine.load_format == "dummy"
    embedders: list[Embedder] = [
        TransformersEmbedder(engine.model, pooler.pooling, load_format=engine.load_format, **common)
    ]
    if has_sentence_transformers() and not dummy:
        embedders.append(SentenceTransformersEmbedder(engine.model, **common))
    if llm.device.type == "cuda":
        own = {"device": llm.device, "dtype": llm.dtype, "load_format": engine.load_format}
        theirs = vllm_embedder(engine.model, max_len=llm.engine.max_model_len, **own)
        if isinstance(theirs, NotMeasured):
            print(theirs.line, file=sys.stderr)
        else:
            embedders.append(theirs)
    return embedders
