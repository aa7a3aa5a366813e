"""`hasten bench kernels`: each kernel on a GPU."""

import argparse
import sys

from hasten.cli.bench.common import add_output, write
from hasten.cli.options import Parser, path


def add_parser(benches: "argparse._SubParsersAction[Parser]") -> None:
    """Add the benchmark `kernels`."""
    parser = benches.add_parser(
        "kernels",
        help="each GPU kernel, compared with its PyTorch reference and the hardware peak",
        description="Time each GPU kernel at the sizes of a model, and compare time and result with its "
        "PyTorch reference and with the hardware peak (roofline). An error above the tolerance is status 1.",
    )
    parser.add_argument(
        "--model-shape",
        type=path,
        default="bloom-7b1",
        metavar="MODEL",
        help="a size of BLOOM (bloom-560m to bloom-7b1, bloom), llama-3-8b, qwen3-30b-a3b, or the folder of a "
        "model (default: bloom-7b1)",
    )
    parser.add_argument(
        "-dt",
        "--data-type",
        "--dtype",
        dest="dtype",
        choices=("fp16", "bf16"),
        default="fp16",
        help="type to compute in (default: fp16)",
    )
    parser.add_argument("--only", metavar="NAME", help="kernels whose name contains this, as the table writes it")
    add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure kernels; one whose result is wrong makes the status 1."""
    import torch

    from hasten.bench import kernels, report
    from hasten.bench.kernel_cases import gpu_setting, model_shape

    report.require_writable(args.output_path)
    setting = gpu_setting(model_shape(args.model_shape), args.dtype)
    most, results = kernels.run(setting, args.only)
    device = torch.cuda.get_device_name(setting.device)
    write(args, {"device": device, "torch": torch.__version__, "most": most, "results": results})
    if not args.json:
        kernels.show(f"{args.model_shape} in {args.dtype} on {device}", most, results)
    wrong = [result for result in results if not result.is_exact]
    for result in wrong:
        print(
            f"hasten: {result.op} {result.shape}: error {result.error:.1e}, above {result.tolerance:.1e}",
            file=sys.stderr,
        )
    return 1 if wrong else 0
