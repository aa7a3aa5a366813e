"""`hasten cluster`: what Arena does, on this machine or on Kubernetes."""

import argparse

from hasten import __version__
from hasten.cli.cluster import completion, data, jobs, serve
from hasten.cli.cluster.backend import add_backend_options, open_backend, print_lines
from hasten.cli.cluster.parser import VerbParser
from hasten.cli.options import Parser


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `cluster`."""
    parser = commands.add_parser(
        "cluster",
        help="run jobs and servers, on this machine or on Kubernetes",
        description="Run training jobs and servers, on this machine or on Kubernetes, with Arena's commands: "
        '`alias arena="hasten cluster"` runs what was written for Arena.',
    )
    add_backend_options(parser)
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=VerbParser)
    jobs.add_parsers(verbs)
    serve.add_parser(verbs)
    data.add_parsers(verbs)
    for name, run, words in (
        ("whoami", run_whoami, "print the user as the backend knows them"),
        ("version", run_version, "print the versions of hasten and of the backend"),
    ):
        verb = verbs.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.")
        add_backend_options(verb)
        verb.set_defaults(run=run)
    completion.add_parser(verbs)


def run_whoami(args: argparse.Namespace) -> int:
    """Print who asks."""
    return print_lines([open_backend(args).whoami()])


def run_version(args: argparse.Namespace) -> int:
    """Print the versions; hasten's own also where the backend does not answer."""
    print(f"hasten: {__version__}", flush=True)
    backend = open_backend(args)
    return print_lines([f"{backend.name}: {backend.version()}"])
