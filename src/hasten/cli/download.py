"""`hasten download`: bring a model from the Hugging Face hub."""

import argparse

from hasten.cli.options import Parser, path


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `download`."""
    parser = commands.add_parser(
        "download",
        help="download a model from the Hugging Face hub",
        description="Download the files that hasten reads of a model on the Hugging Face hub, at its newest commit, "
        "and print the folder. Every command that takes MODEL also takes its id, and downloads what is not there.",
    )
    parser.add_argument("model", metavar="MODEL", help="id of the model, such as bigscience/bloom-560m")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit (default: main)")
    parser.add_argument(
        "--output-dir",
        type=path,
        metavar="DIR",
        help="folder to put the files into (default: the Hugging Face cache, see HF_HOME)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Download, and print the folder."""
    from hasten.checkpoint.hub import download_model

    print(download_model(args.model, revision=args.revision, output_dir=args.output_dir))
    return 0
