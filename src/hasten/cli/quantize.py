"""`hasten quantize`: a checkpoint with weights of 4 or 8 bits, which hasten and vLLM load as it is."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.cli.interrupts import cleaned_up_when_terminated
from hasten.cli.options import Parser, path, positive
from hasten.core.errors import ConfigError
from hasten.core.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hasten.bench.quality import Text
    from hasten.checkpoint.quantize import Summary

_SCHEMES = ("int4", "int8", "w8a8", "fp8")
_NUM_SAMPLES, _SEQUENCE_LENGTH, _NUM_EVALUATED = 256, 512, 256
_OF_CALIBRATION = ("num_samples", "sequence_length", "dampening", "evaluate", "device")
_METHODS = ("rtn", "gptq", "awq", "smoothquant", "awq+gptq", "smoothquant+gptq")


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `quantize`."""
    parser = commands.add_parser(
        "quantize",
        help="write a checkpoint with quantized weights",
        description="Quantize the linear layers of a checkpoint and write it in compressed-tensors' format. Embedding, "
        "head, biases and experts stay as they are; so do norms, unless scales are moved out of them.",
    )
    parser.add_argument("model", metavar="MODEL", type=path, help="Hugging Face folder, or id on the hub")
    parser.add_argument("output", metavar="OUT", type=path, help="folder to write, new or empty")
    parser.add_argument(
        "--scheme",
        choices=_SCHEMES,
        required=True,
        help="int4: 4 bits, a scale for each group of 128 inputs; int8: 8 bits, a scale for each output column; w8a8 "
        "and fp8: 8 bits (int8, e4m3) for weights and for activations, which get a scale for each token",
    )
    parser.add_argument(
        "--method",
        choices=_METHODS,
        help="rtn: round to nearest; gptq: let weights compensate each other's errors; awq (int4, int8) and "
        "smoothquant (w8a8, fp8): move scales from norms into weights, then round to nearest or by gptq (default: rtn "
        "without --calibration; with it awq+gptq or smoothquant+gptq)",
    )
    parser.add_argument(
        "--calibration",
        type=path,
        metavar="FILE",
        help='representative texts: JSON lines, each an object with "text", or any text file',
    )
    parser.add_argument(
        "--num-samples", type=positive, metavar="N", help=f"texts to calibrate with (default: {_NUM_SAMPLES})"
    )
    parser.add_argument(
        "--sequence-length", type=positive, metavar="N", help=f"maximum tokens of a text (default: {_SEQUENCE_LENGTH})"
    )
    parser.add_argument(
        "--dampening",
        type=float,
        metavar="D",
        help="of gptq: larger values keep weights closer to the originals (default: 0.01)",
    )
    parser.add_argument(
        "--evaluate",
        type=int,
        metavar="N",
        help=f"further texts of FILE to compare the model on, before and after; 0: none (default: {_NUM_EVALUATED})",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Quantize, print one line of what was written, and with calibration a table of the model before and after."""
    from hasten.engine.calibration.quantize import QuantizeOptions, check_method, quantize

    if args.calibration is None:
        options = QuantizeOptions(args.scheme, args.method)
        check_method(args.scheme, options.chosen, calibrates=False)
        for name in _OF_CALIBRATION:
            if getattr(args, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option} is for calibration: give --calibration as well, or leave it out")
        with progress_bar("Quantizing weights", None, unit="bytes") as bar, cleaned_up_when_terminated():
            _say(args, quantize(str(args.model), Path(args.output), options, bar.advance))
        return 0
    if args.method is not None:
        check_method(args.scheme, args.method, calibrates=True)
    count = _NUM_EVALUATED if args.evaluate is None else args.evaluate
    if count < 0:
        raise ConfigError(f"evaluate must be 0 or more, got {count}")
    device = args.device or "auto"
    texts, others, layers = _texts(args)
    options = QuantizeOptions(args.scheme, args.method, [text.token_ids for text in texts], args.dampening, device)
    with progress_bar("Quantizing layers", layers) as bar, cleaned_up_when_terminated():
        _say(args, quantize(str(args.model), Path(args.output), options, advance=bar.advance))
    if count > 0:
        _compare(args, others[:count] or texts[:count], device, are_others=bool(others))
    return 0


def _texts(args: argparse.Namespace) -> "tuple[Sequence[Text], Sequence[Text], int]":
    """Texts to calibrate with, others, and how many layers the model has."""
    from hasten.bench.quality import divided, read_texts
    from hasten.checkpoint.hub import resolve_model
    from hasten.checkpoint.quantize import open_unquantized
    from hasten.engine.text import Tokenizer

    source = open_unquantized(str(args.model))
    longest = source.config.max_position_embeddings
    length = args.sequence_length or _SEQUENCE_LENGTH
    length = length if longest is None else min(length, longest - 1)
    if length < 2:
        raise ConfigError(f"sequence_length must be at least 2, got {length}")
    tokenizer = Tokenizer.from_folder(resolve_model(str(args.model)))
    texts = read_texts(str(args.calibration), tokenizer, length)
    return *divided(texts, args.num_samples or _NUM_SAMPLES), source.config.num_layers


def _say(args: argparse.Namespace, summary: "Summary") -> None:
    kept = "; the experts of the mixture stay in full precision" if summary.kept_experts else ""
    print(
        f"{args.output}: {summary.tensors} weights in {args.scheme}, {summary.bytes_after / 1e9:.3f} GB instead of "
        f"{summary.bytes_before / 1e9:.3f} GB; {summary.error}{kept}"
    )


def _compare(args: argparse.Namespace, texts: "Sequence[Text]", device: str, *, are_others: bool) -> None:
    from hasten.bench.quality import measured
    from hasten.bench.report import print_table

    before, after = (measured(str(model), texts, device=device) for model in (args.model, args.output))
    rows = [("perplexity", f"{before.perplexity:.4f}", f"{after.perplexity:.4f}")]
    if before.accuracy is not None and after.accuracy is not None:
        rows.append(("last words right", f"{before.accuracy:.2f}%", f"{after.accuracy:.2f}%"))
    which = "other texts of the file" if are_others else "of the calibration texts themselves: there are no others"
    print_table(f"The model on {len(texts)} {which}", ("", "before", "after"), rows)
