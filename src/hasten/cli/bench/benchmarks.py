"""`hasten bench`: accuracy and speed, beside Hugging Face."""

import argparse

from hasten.cli.bench import embed, kernels, lambada, load, schema, serving, speed, startup, suite
from hasten.cli.options import Parser


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `bench` and its own subcommands."""
    parser = commands.add_parser(
        "bench",
        help="measure accuracy and speed",
        description="Measure accuracy and speed, also compared with Hugging Face.",
    )
    benches = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    lambada.add_parser(benches)
    speed.add_parsers(benches)
    embed.add_parser(benches)
    suite.add_parser(benches)
    startup.add_parser(benches)
    serving.add_parser(benches)
    load.add_parser(benches)
    kernels.add_parser(benches)
    schema.add_parser(benches)
