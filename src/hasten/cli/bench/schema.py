"""`hasten bench schema`: the form of what a benchmark writes."""

import argparse
import json

from hasten.cli.options import Parser


def add_parser(benches: "argparse._SubParsersAction[Parser]") -> None:
    """Add `schema`, which measures nothing."""
    parser = benches.add_parser(
        "schema",
        help="JSON schema of what a benchmark writes",
        description="Print the JSON schema of what a benchmark writes with --json and --output-path.",
    )
    parser.add_argument("benchmark", metavar="BENCHMARK", help="its name, such as latency")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a schema."""
    from hasten.bench import schema
    from hasten.core.extras import require_extra

    if args.benchmark in ("load", "serving"):
        require_extra("serve", f"the schema of {args.benchmark}")
    print(json.dumps(schema.schema(args.benchmark), indent=1))
    return 0
