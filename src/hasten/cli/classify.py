"""`hasten classify`: labels of texts, or of their tokens."""

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hasten.cli import ahead
from hasten.cli.options import Parser, engine_options
from hasten.cli.texts import ENGINE_SKIP, add_text_options, pooling_params, print_lines, read_texts

if TYPE_CHECKING:
    from hasten.engine.llm import LLM


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `classify`."""
    parser = commands.add_parser(
        "classify",
        help="labels of texts, or of their tokens",
        description="Print a JSON line for each text, with its label and the scores of all labels; with a model that "
        "classifies tokens, with the tokens and the label of each.",
    )
    add_text_options(parser, skip=frozenset({"dimensions", "normalize"}))
    parser.add_argument("--logits", action="store_true", help="print logits instead of probabilities")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Classify and print."""
    entries = read_texts(args)
    options = engine_options(args, skip=ENGINE_SKIP)
    ahead.begin(args.model, options)

    from hasten.engine.llm import LLM, run_worker

    if not run_worker(args.model, **options):
        with LLM(args.model, **options) as llm:
            texts = [entry.text for entry in entries]
            print_lines(
                entries, list((_of_tokens if llm.config.task == "token_classify" else _of_texts)(llm, texts, args))
            )
    return 0


def _of_texts(llm: "LLM", texts: Sequence[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    params = pooling_params(args, task="classify", activation=not args.logits)
    for output in llm.classify(texts, pooling_params=params):
        scores = dict(zip(llm.labels, output.outputs.probs, strict=True))
        yield {"label": max(scores, key=lambda label: scores[label]), "scores": scores}


def _of_tokens(llm: "LLM", texts: Sequence[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    params = pooling_params(args, task="token_classify", activation=not args.logits)
    for output in llm.encode(texts, pooling_params=params):
        tokens = llm.tokenizer.tokens(output.prompt_token_ids)
        best = output.outputs.data.max(-1)
        rows = zip(tokens, best.indices.tolist(), best.values.tolist(), strict=True)
        yield {"tokens": [{"token": token, "label": llm.labels[label], "score": score} for token, label, score in rows]}
