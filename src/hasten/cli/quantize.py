"""`hasten quantize`: a checkpoint with weights of 4 or 8 bits, which hasten and vLLM load as it is."""

import argparse
from pathlib import Path

from hasten.cli.options import Parser, path
from hasten.core.progress import progress_bar

_SCHEMES = ("int4", "int8")


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `quantize`."""
    parser = commands.add_parser(
        "quantize",
        help="write a checkpoint with quantized weights",
        description="Round the weights of a checkpoint's linear layers to nearest and write them in the format of "
        "compressed-tensors (pack-quantized). Embedding, head, norms, biases and experts stay as they are.",
    )
    parser.add_argument("model", metavar="MODEL", type=path, help="Hugging Face folder, or id on the hub")
    parser.add_argument("output", metavar="OUT", type=path, help="folder to write, new or empty")
    parser.add_argument(
        "--scheme",
        choices=_SCHEMES,
        required=True,
        help="int4: 4 bits, a scale for each group of 128 inputs; int8: 8 bits, a scale for each output column",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Quantize, and print one line of what was written."""
    from hasten.checkpoint.quantize import quantize

    with progress_bar("Quantizing weights", None, unit="bytes") as bar:
        made = quantize(str(args.model), Path(args.output), args.scheme, bar.advance)
    print(
        f"{args.output}: {made.tensors} weights in {args.scheme}, {made.bytes_after / 1e9:.3f} GB instead of "
        f"{made.bytes_before / 1e9:.3f} GB; rounding error {made.error:.2%} of the weights' root mean square"
    )
    return 0
