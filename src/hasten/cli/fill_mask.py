"""`hasten fill-mask`: words for the masks of texts."""

import argparse
from dataclasses import asdict

from hasten.cli import ahead
from hasten.cli.options import Parser, engine_options
from hasten.cli.texts import ENGINE_SKIP, add_text_options, pooling_params, print_lines, read_texts
from hasten.core.text import from_command_line


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `fill-mask`."""
    parser = commands.add_parser(
        "fill-mask",
        help="most probable words for the masks of texts",
        description="Print a JSON line for each text. Its `masks` list the most probable words of each mask with "
        "score, token, token_str and sequence (the text with the word), as transformers' pipeline does. Write masks "
        "as the tokenizer does: [MASK] for BERT, <mask> for RoBERTa.",
    )
    add_text_options(parser, skip=frozenset({"dimensions", "normalize"}))
    parser.add_argument("--top-k", type=int, default=5, metavar="N", help="words of each mask (default: 5)")
    parser.add_argument(
        "--target",
        dest="targets",
        action="append",
        default=[],
        metavar="WORD",
        help="candidate word, of a single token; may be given more than once (default: all words)",
    )
    parser.add_argument("--logits", action="store_true", help="print logits instead of probabilities")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fill masks and print."""
    entries = read_texts(args)
    params = pooling_params(args, task="fill_mask", activation=not args.logits, targets=())
    targets = [from_command_line(word) for word in args.targets] or None

    options = engine_options(args, skip=ENGINE_SKIP)
    ahead.begin(args.model, options)

    from hasten.engine.llm import LLM, run_worker

    if not run_worker(args.model, **options):
        with LLM(args.model, **options) as llm:
            texts = [entry.text for entry in entries]
            outputs = llm.fill_mask(texts, top_k=args.top_k, targets=targets, pooling_params=params)
            found = ([[asdict(word) for word in words] for words in each.outputs.candidates] for each in outputs)
            print_lines(entries, ({"masks": masks} for masks in found))
    return 0
