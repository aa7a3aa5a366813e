"""`hasten convert`: a Hugging Face checkpoint to FasterTransformer's format, or to one file a rank."""

import argparse
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.cli.interrupts import cleaned_up_when_terminated
from hasten.cli.options import Parser, path
from hasten.core.dtypes import DTYPES
from hasten.core.progress import ProgressBar, progress_bar

if TYPE_CHECKING:
    from hasten.checkpoint.convert import Opened, Wrote

FORMATS = ("fastertransformer", "safetensors")
_LOGGED = ("input_dir", "output_dir", "tensor_para_size", "data_type", "processes", "verbose", "by_shard")


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `convert`."""
    parser = commands.add_parser(
        "convert",
        help="convert a checkpoint",
        description="Convert a checkpoint for N ranks, into DIR/N-gpu. The input may be a Hugging Face folder, "
        "or one that this command or FasterTransformer wrote, for any number of ranks.",
    )
    parser.add_argument(
        "-i",
        "--input-dir",
        type=path,
        metavar="DIR",
        required=True,
        help="folder of the checkpoint, or its Hugging Face id",
    )
    parser.add_argument(
        "-o", "--output-dir", type=path, metavar="DIR", required=True, help="folder to write N-gpu into"
    )
    parser.add_argument(
        "-tp",
        "--tensor-para-size",
        "--tensor-parallel-size",
        metavar="N",
        type=int,
        default=1,
        help="ranks to split over (default: 1)",
    )
    parser.add_argument(
        "-dt",
        "--data-type",
        "--dtype",
        choices=DTYPES,
        default="fp32",
        help="type of the weights written (default: fp32)",
    )
    parser.add_argument(
        "-p", "--processes", metavar="N", type=int, default=1, help="workers that convert at once (default: 1)"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="print a line per tensor")
    parser.add_argument(
        "-s", "--by-shard", action="store_true", help="one input file at a time, for checkpoints larger than memory"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="fastertransformer: one file per tensor, for models that FasterTransformer could compute; safetensors: "
        "one file per rank, for every model, which hasten loads fastest (default: fastertransformer where it can be)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, with FasterTransformer's log on standard output."""
    from hasten.checkpoint.convert import Conversion, convert

    start = time.perf_counter()
    job = Conversion(
        input_dir=args.input_dir,
        output_dir=args.output_dir,
        ranks=args.tensor_para_size,
        dtype=args.data_type,
        format=args.format,
        workers=args.processes,
        by_shard=args.by_shard,
    )
    with _Log(args) as log, cleaned_up_when_terminated():
        convert(job, log)
    elapsed = time.perf_counter() - start
    if log.replaced is not None:
        print(f"replaced {log.replaced}")
    print(f"Checkpoint conversion ({log.label}) has done (elapsed time: {elapsed:.2f} sec)")
    return 0


def _print_arguments(args: argparse.Namespace, output_format: str) -> None:
    print("\n" + "=" * 23 + " Arguments " + "=" * 23)
    shown = {name: getattr(args, name) for name in _LOGGED}
    # FasterTransformer's own log has no such line
    for name, value in shown.items() if output_format == FORMATS[0] else (*shown.items(), ("format", output_format)):
        print(f" - {name.ljust(20, '.')}: {value}")
    print("=" * 57, flush=True)


class _Log:
    """Lines as FasterTransformer's converter prints them, the first once the input is found good; on a terminal, a bar
    unless each tensor has its line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._shown = ExitStack()
        self._bar = ProgressBar()
        self.label = ""
        self.replaced: Path | None = None

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.close()

    def __call__(self, event: "Opened | Wrote") -> None:
        from hasten.checkpoint.convert import Opened

        if isinstance(event, Opened):
            self.label, self.replaced = event.label, event.replaced
            _print_arguments(self._args, event.format)
            print(f"loading from {event.source.kind} format")
            print(f"model file num: {len(event.source.files)}", flush=True)
            bar = progress_bar("Converting", event.nbytes, unit="bytes", show=not self._args.verbose)
            self._bar = self._shown.enter_context(bar)
            return
        self._bar.advance(event.part.nbytes)
        if self._args.verbose:
            print(_line(event), flush=True)


def _line(event: "Wrote") -> str:
    part = event.part
    start, shape = f" - {part.name.ljust(48, '.')}: shape {part.shape!s:16s}", f"| saved at {event.path}"
    return f"{start} s {shape} ({part.rank}/{part.size})" if part.split else f"{start}   {shape}"
