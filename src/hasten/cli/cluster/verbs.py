"""`hasten cluster`: what Arena does, on this machine or on Kubernetes."""

import argparse

from hasten import __version__
from hasten.cli.cluster import completion, data, jobs, serve
from hasten.cli.cluster.parser import VerbParser
from hasten.cli.cluster.place import add_place_options, open_place, print_lines
from hasten.cli.options import Parser


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `cluster`."""
    parser = commands.add_parser(
        "cluster",
        help="run jobs and servers, on this machine or on Kubernetes",
        description="Run training jobs and servers, on this machine or on Kubernetes, with Arena's commands: "
        '`alias arena="hasten cluster"` runs what was written for Arena.',
    )
    add_place_options(parser)
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=VerbParser)
    jobs.add_parsers(verbs)
    serve.add_parser(verbs)
    data.add_parsers(verbs)
    for name, run, words in (
        ("whoami", run_whoami, "say as whom the place knows the user"),
        ("version", run_version, "print the versions of hasten and of the place"),
    ):
        verb = verbs.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.")
        add_place_options(verb)
        verb.set_defaults(run=run)
    completion.add_parser(verbs)


def run_whoami(args: argparse.Namespace) -> int:
    """Print who asks."""
    return print_lines([open_place(args).whoami()])


def run_version(args: argparse.Namespace) -> int:
    """Print the versions; hasten's own also where the place does not answer."""
    print(f"hasten: {__version__}", flush=True)
    place = open_place(args)
    return print_lines([f"{place.name}: {place.version()}"])
