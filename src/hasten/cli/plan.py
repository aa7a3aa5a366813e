"""`hasten plan`: does a model fit, how, and how fast will it be."""

import argparse
import dataclasses
import shlex
from typing import TYPE_CHECKING, Any

from hasten.cli.options import (
    HOST_OPTIONS,
    Parser,
    add_engine_options,
    engine_options,
    option_words,
    path,
    positive,
    typed,
)
from hasten.core.errors import ConfigError, UnsupportedError
from hasten.core.option_fields import parse_size

if TYPE_CHECKING:
    from hasten.engine.planning.hardware import Device
    from hasten.engine.planning.plan import Fit, Planner, Setup

NO_FIT = 1
_SKIP = frozenset({"device", "load_format", "verify_checksums", "progress_bars", "seed", "enforce_eager", "itl_target"})
_SKIP_MORE = frozenset({"kv_cache_memory", "overlap_steps", "max_grammar_seconds", "max_grammar_memory", "tokenizer"})
_SKIP_MOST = frozenset({"enable_prefix_caching", "deterministic", "pipeline_parallel_size", "pipeline_layers"})
SKIP = _SKIP | _SKIP_MORE | _SKIP_MOST | HOST_OPTIONS
"""Options of an engine that change nothing of a plan, or that it does not know: pipeline stages."""


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `plan`."""
    parser = commands.add_parser(
        "plan",
        help="whether a model fits, with which options, and how fast it will be",
        description="Predict from a config.json what a model needs on a device: weights by part, cache per token, "
        "sequences that fit, numbers of ranks, and the tokens per second that memory bandwidth and arithmetic allow. "
        "No weights are read or downloaded.",
        epilog="Exit status: 0 if the model fits, 1 if not, 2 for bad input.",
    )
    parser.add_argument("model", type=path, metavar="MODEL", help="folder with a config.json, or a Hugging Face id")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpu", metavar="NAME", help="GPU to plan for, such as H100 or L40S (default: this machine's)")
    where.add_argument("--cpu", action="store_true", help="plan for this machine's CPU, which is measured in a moment")
    parser.add_argument("--gpus", type=positive, metavar="N", help="GPUs of a host (default: this machine's, or 8)")
    parser.add_argument(
        "--gpu-memory",
        type=typed(parse_size),
        metavar="SIZE",
        help="memory of a GPU, such as 40GiB (default: that of its model)",
    )
    parser.add_argument(
        "--context", type=positive, default=1024, metavar="N", help="tokens of a sequence while it decodes, and of "
        "prompts (default: 1024)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    add_engine_options(parser, skip=SKIP)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan, and print."""
    from hasten.bench import report
    from hasten.checkpoint.hub import resolve_model
    from hasten.checkpoint.hugging_face import read_format, read_hf_config
    from hasten.core.config import EngineConfig
    from hasten.core.dtypes import dtype_name
    from hasten.engine.planning.plan import Planner, setup_of

    given = engine_options(args, skip=SKIP)
    engine = EngineConfig.create(args.model, **given)
    device, most = _device(args)
    options = {"revision": engine.revision, "download_dir": engine.download_dir}
    folder = resolve_model(engine.model, part="config", show_progress=False, **options)
    model = read_hf_config(folder)
    engine.parallel.validate(model)
    engine.scheduler.validate(model)
    if model.task != "generate":
        raise UnsupportedError(f"{model.architecture} generates no text, and holds no cache that could be planned")
    if model.encoder is not None:
        raise UnsupportedError(f"{model.architecture} has an encoder, whose cache and time a plan does not know")
    if (stored := read_format(folder)) is not None and stored.is_held:
        raise UnsupportedError(
            f"{args.model} has weights in the format {stored.name}, whose bytes a plan does not know; plan the model "
            "in full precision that it was quantized from, with --quantization"
        )
    default = model.dtype if device.is_gpu else "fp32"
    dtype = default if engine.dtype == "auto" else dtype_name(engine.dtype)
    setup = setup_of(engine, dtype, "cuda" if device.is_gpu else "cpu")
    planner = Planner(model, device)
    fits = [
        planner.fit(dataclasses.replace(setup, ranks=size)) for size in planner.sizes(setup, max(most, setup.ranks))
    ]
    chosen = planner.fit(setup)
    if not chosen.fits and "tensor_parallel_size" not in given:
        chosen = next((fit for fit in fits if fit.fits), chosen)
        setup = dataclasses.replace(setup, ranks=chosen.ranks)
    plan = _Plan(args.model, given, planner, setup, chosen, fits, most, args.context)
    if args.json:
        report.print_json(plan.as_json())
    else:
        plan.show()
    return 0 if chosen.fits else NO_FIT


def _device(args: argparse.Namespace) -> "tuple[Device, int]":
    """The device, and how many there are."""
    from hasten.engine.planning import hardware

    if args.cpu:
        if args.gpus is not None or args.gpu_memory is not None:
            raise ConfigError("--gpus and --gpu-memory are of GPUs; leave them or --cpu out")
        return hardware.this_cpu(), 1
    if args.gpu is not None:
        device, most = hardware.gpu(args.gpu), args.gpus or 8
    else:
        import torch

        found = hardware.this_gpu()
        if found is None:
            if args.gpus is not None or args.gpu_memory is not None:
                raise ConfigError(f"there is no GPU here; give --gpu, one of {', '.join(hardware.GPUS)}")
            return hardware.this_cpu(), 1
        device, most = found, args.gpus or torch.cuda.device_count()
    return (device if args.gpu_memory is None else dataclasses.replace(device, memory=args.gpu_memory)), most


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is printed."""

    name: str
    options: dict[str, Any]
    """Of the engine, as they were given."""
    planner: "Planner"
    setup: "Setup"
    chosen: "Fit"
    fits: "list[Fit]"
    most: int
    context: int

    def as_json(self) -> dict[str, Any]:
        rank = self.planner.rank(self.setup)
        ways = [] if self.chosen.fits else self.planner.alternatives(self.setup, self.most)
        report: dict[str, Any] = {
            "model": self.name,
            "architecture": self.planner.model.architecture,
            "device": self.planner.device,
            "setup": self.setup,
            "weights": rank.parts,
            "weight_bytes": rank.weight_bytes,
            "kv_bytes_per_token": rank.kv_bytes_per_token,
            "fits": self.chosen.fits,
            "fit": self.chosen,
            "by_ranks": self.fits,
            "what_fits": ways,
            "command": self.command() if self.chosen.fits else None,
        }
        if self.chosen.fits:
            steps = self.planner.decode(self.setup, self.context)
            prompts = self.planner.prompts(self.setup, self.context)
            report["decode"] = [
                {"batch": step.tokens, "tokens_per_second": step.tokens_per_second, "limit": step.limit}
                for step in steps
            ]
            report["prompts"] = {"tokens_per_second": prompts.tokens_per_second, "limit": prompts.limit}
        return report

    def command(self) -> str:
        """What serves the model like this."""
        ranks = {"tensor_parallel_size": self.setup.ranks if self.setup.ranks > 1 else None}
        return shlex.join(["hasten", "serve", self.name, *option_words({**self.options, **ranks})])

    def show(self) -> None:
        from hasten.bench.report import print_table

        model, device, rank = self.planner.model, self.planner.device, self.planner.rank(self.setup)
        parts = ", ".join(f"{part} {nbytes / 1e9:.3f}" for part, nbytes in rank.parts.items())
        devices = f"{self.setup.ranks} x {device.name}" if self.setup.ranks > 1 else device.name
        types = self.setup.quantization or self.setup.dtype
        print(f"{self.name}: {model.architecture}, {types}, on {devices}")
        print(f"weights  {rank.weight_bytes / 1e9:.3f} GB on each rank ({parts})")
        print(
            f"cache    {rank.kv_bytes_per_token / 1024:.1f} KiB per token, {self.setup.cache_dtype or self.setup.dtype}"
        )
        rows = [
            (
                str(fit.ranks),
                "yes" if fit.fits else "no",
                f"{fit.weight_bytes / 1e9:.2f}",
                f"{fit.cache_bytes / 1e9:.2f}",
                f"{fit.cache_tokens}",
                f"{fit.sequences} of {fit.max_model_len}",
            )
            for fit in self.fits
        ]
        title = f"memory of a rank, {device.memory / 1e9:.1f} GB"
        print_table(title, ("ranks", "fits", "weights GB", "cache GB", "cache tokens", "sequences"), rows)
        if self.chosen.fits:
            self._show_speed()
            print(f"options: {self.command()}")
            return
        ways = [shlex.join(option_words(options)) for options in self.planner.alternatives(self.setup, self.most)]
        print("it does not fit; " + (f"what fits: {', or '.join(ways)}" if ways else "no option here makes it fit"))

    def _show_speed(self) -> None:
        from hasten.bench.report import print_table

        rows = [
            (f"decode, batch {step.tokens}", f"{step.tokens_per_second:.0f}", f"{step.seconds * 1e3:.2f}", step.limit)
            for step in self.planner.decode(self.setup, self.context)
            if step.tokens <= self.setup.max_num_seqs
        ]
        step = self.planner.prompts(self.setup, self.context)
        rows.append(("prompts", f"{step.tokens_per_second:.0f}", f"{step.seconds * 1e3:.2f}", step.limit))
        title = f"expected, with {self.context} tokens of context"
        print_table(title, ("step", "tokens/s", "ms", "limited by"), rows)
