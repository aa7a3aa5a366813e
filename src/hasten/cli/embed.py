"""`hasten embed`: vectors of texts."""

import argparse

from hasten.cli import ahead
from hasten.cli.options import Parser, engine_options
from hasten.cli.texts import ENGINE_SKIP, add_text_options, pooling_params, print_lines, read_texts
from hasten.core.text import from_command_line


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `embed`."""
    parser = commands.add_parser(
        "embed",
        help="vectors of texts",
        description="Print a JSON line for each text, with its vector as `embedding` and its number of tokens.",
    )
    add_text_options(parser)
    parser.add_argument("--prompt", help="text to prepend to each text, such as an instruction")
    parser.add_argument("--prompt-name", metavar="NAME", help="name of one of the model's own prompts to prepend")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Embed and print."""
    entries, params = read_texts(args), pooling_params(args)
    prompt = None if args.prompt is None else from_command_line(args.prompt)

    options = engine_options(args, skip=ENGINE_SKIP)
    ahead.begin(args.model, options)

    from hasten.engine.llm import LLM, run_worker

    if not run_worker(args.model, **options):
        with LLM(args.model, **options) as llm:
            texts = [entry.text for entry in entries]
            outputs = llm.embed(texts, pooling_params=params, prompt=prompt, prompt_name=args.prompt_name)
            found = (
                {"tokens": len(output.prompt_token_ids), "embedding": output.outputs.embedding} for output in outputs
            )
            print_lines(entries, found)
    return 0
