"""Shared by all benchmarks: options, the engines that are measured, and the output of results."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hasten.cli.options import Parser, add_sampling_options, engine_options, path, sampling_params
from hasten.core.errors import ConfigError, UnsupportedError
from hasten.core.structured_outputs import CONSTRAINTS

if TYPE_CHECKING:
    from hasten.bench.charts import Picture
    from hasten.bench.engines import Engine
    from hasten.bench.peers import NotMeasured
    from hasten.core.model_config import ModelConfig
    from hasten.core.types import SamplingParams

# Hugging Face has no cache between calls; with it on, the untimed batch would also pay for a timed one
ENGINE_DEFAULTS: Mapping[str, Any] = {"enable_prefix_caching": False}
# Hugging Face's model must find room on the same GPU
COMPARED_DEFAULTS: Mapping[str, Any] = {**ENGINE_DEFAULTS, "gpu_memory_utilization": 0.5}
COMPARED_HELP = "; hasten then takes half of a GPU's memory by default"

SAMPLING_DEFAULTS: Mapping[str, Any] = {"temperature": 0.0}
# lengths are the workload's, each request is one sequence, and without a seed of their own requests have the engine's
NOT_MEASURED = frozenset(
    {"max_tokens", "min_tokens", "n", "ignore_eos", "seed", "stop", "stop_token_ids", "include_stop_str_in_output"}
    | {"skip_special_tokens", "beam_width", "length_penalty", "early_stopping", "beam_search_diversity_rate"}
    | {"stop_words_ids", *CONSTRAINTS}
)
"""Sampling parameters that a measurement of speed does not take."""


def add_sampling(parser: Parser) -> None:
    """Add how tokens are chosen."""
    add_sampling_options(parser, defaults=SAMPLING_DEFAULTS, skip=NOT_MEASURED)


def add_model(parser: Parser, compare: str = f"measure Hugging Face too, alternating{COMPARED_HELP}") -> None:
    """Add what names the models."""
    parser.add_argument("model", type=path, metavar="MODEL", help="folder of the checkpoint, or its Hugging Face id")
    parser.add_argument("--compare", action="store_true", help=compare)
    parser.add_argument("--hf-model", type=path, metavar="PATH", help="what Hugging Face runs (default: MODEL)")


def add_peers(parser: Parser) -> None:
    """Add what hasten is compared with."""
    parser.add_argument(
        "--hf-engine",
        choices=("generate", "generate_batch"),
        help="how Hugging Face runs: padded batches, or continuous batching (default: both, of which the faster is "
        "quoted)",
    )
    parser.add_argument(
        "--compare-with",
        nargs="+",
        choices=("ctranslate2", "ctranslate2-int8"),
        default=[],
        metavar="ENGINE",
        help="measure these too, where they are installed: ctranslate2, in the data type of hasten; ctranslate2-int8",
    )


@dataclass(frozen=True)
class Measured:
    """The engines of a benchmark."""

    engines: "list[Engine]"
    """Others first, hasten last; none on ranks but the first."""
    vocab_size: int = 0
    unsupported: "list[NotMeasured]" = field(default_factory=list)
    """Engines that do not support the model."""

    @property
    def not_measured(self) -> "list[NotMeasured]":
        """Engines that do not support the model, and those that failed."""
        from hasten.bench.peers import failed

        return [*self.unsupported, *failed(self.engines)]


def add_output(parser: Parser, words: str = "print the results as JSON", plot: str = "") -> None:
    """Add where the results go; `plot`: what a picture of them shows, where there is one."""
    parser.add_argument("--json", action="store_true", help=words)
    parser.add_argument("--output-path", type=path, metavar="FILE", help="write the results to a file, as JSON")
    if plot:
        parser.add_argument("--plot", type=path, metavar="FILE", help=f"draw {plot}: an SVG, or a PNG for FILE.png")


def require_writable(args: argparse.Namespace) -> None:
    """ConfigError if the results or their picture could not be written."""
    from hasten.bench import png, report

    plot = getattr(args, "plot", None)
    report.require_writable(args.output_path, plot, getattr(args, "options_file", None))
    png.require_picture(plot)


def write_plot(args: argparse.Namespace, title: str, pictures: "Sequence[Picture]", columns: int = 3) -> None:
    """Write the picture of the results where one is wanted."""
    if args.plot is not None:
        from hasten.bench.charts import write_sheet

        write_sheet(args.plot, title, pictures, columns)


def compares(args: argparse.Namespace) -> bool:
    """Whether hasten is compared with anything; ConfigError for a peer that cannot be."""
    if args.hf_engine is not None and not args.compare:
        raise ConfigError("--hf-engine needs --compare")
    if args.compare_with:
        from hasten.bench.converted import require_ctranslate2

        require_ctranslate2()
    return bool(args.compare or args.compare_with)


def peers_of(
    args: argparse.Namespace,
    model: str,
    hasten: "Engine",
    options: Mapping[str, Any],
    sampling: "SamplingParams",
    *,
    threads: int,
    batch_size: int | None = None,
) -> Measured:
    """The engines to measure: those that hasten is compared with, which run `model`, and hasten."""
    from hasten.bench.converted import CTranslate2Engine
    from hasten.bench.peers import Peer
    from hasten.checkpoint.hub import resolve_engine
    from hasten.core.config import EngineConfig

    chosen = hf_options({**options, "dtype": str(hasten.dtype)})
    found = hugging_face(args, model, chosen, sampling, threads, batch_size) if args.compare else Measured([])
    peers: list[Engine] = [*found.engines]
    if args.compare_with:
        chosen.pop("dtype")
        folder = resolve_engine(EngineConfig.create(model, **chosen)).model
        peers += [
            CTranslate2Engine(
                label,
                folder,
                dtype=hasten.dtype,
                device=hasten.device,
                threads=threads,
                sampling=sampling,
                batch_size=batch_size,
            )
            for label in args.compare_with
        ]
    engines: list[Engine] = [Peer(peer) for peer in peers]
    return Measured([*engines, hasten], unsupported=found.unsupported)


def hugging_face(
    args: argparse.Namespace,
    model: str,
    options: Mapping[str, Any],
    sampling: "SamplingParams",
    threads: int,
    batch_size: int | None = None,
) -> Measured:
    """Hugging Face's engines, as --hf-engine chooses; UnsupportedError if the only one does not support the model."""
    from hasten.bench.continuous import ContinuousEngine
    from hasten.bench.engines import HuggingFaceEngine
    from hasten.bench.peers import NotMeasured

    padded = HuggingFaceEngine(model, **options, sampling=sampling, batch_size=batch_size, threads=threads)
    if args.hf_engine == "generate":
        return Measured([padded])
    try:
        continuous = ContinuousEngine(padded, sampling)
    except UnsupportedError as error:
        if args.hf_engine is not None:
            raise UnsupportedError(f"--hf-engine {args.hf_engine} cannot run {model}: {error}") from None
        return Measured([padded], unsupported=[NotMeasured(ContinuousEngine.label, str(error))])
    return Measured([continuous] if args.hf_engine is not None else [padded, continuous])


def text_model_of(args: argparse.Namespace, model: str, options: Mapping[str, Any]) -> "ModelConfig":
    """The configuration of a model that is to be measured; UnsupportedError if it generates no text."""
    from hasten.bench.engines import text_model
    from hasten.checkpoint.hub import resolve_engine
    from hasten.core.config import EngineConfig

    return text_model(resolve_engine(EngineConfig.create(model, **options)), args.parser.prog)


def require_room(model: "ModelConfig", what: str, max_len: int, advice: str) -> None:
    """ConfigError, with advice, if sequences of a workload are longer than the positions that a model has learned."""
    learned = model.learned_positions
    if learned is not None and max_len > learned:
        raise ConfigError(
            f"{what} has sequences of {max_len} tokens, but the model has learned {learned} positions; {advice}"
        )


@contextmanager
def engines_of(
    args: argparse.Namespace,
    what: str,
    max_len: int,
    *,
    advice: str,
    batch_size: int | None = None,
    hf_batch_size: int | None = None,
) -> "Iterator[Measured]":
    """The engines to measure on a workload of sequences of up to `max_len` tokens.

    `what` names it, and `advice` says what to do where it does not fit the model.
    """
    from hasten.bench.engines import HastenEngine, require_comparable
    from hasten.engine.llm import LLM, run_worker
    from hasten.parallel.threads import limit_threads

    require_writable(args)
    sampling = sampling_params(args, defaults=SAMPLING_DEFAULTS, skip=NOT_MEASURED)
    comparing = compares(args)
    if comparing:
        require_comparable(sampling)
    defaults = COMPARED_DEFAULTS if comparing else ENGINE_DEFAULTS
    options = engine_options(args, defaults=defaults)
    model_config = text_model_of(args, args.model, options)
    if options.get("max_model_len") is None:
        require_room(model_config, what, max_len, advice)
        options["max_model_len"] = max_len
    threads = limit_threads()
    if run_worker(args.model, **options):
        yield Measured([])
        return
    with LLM(args.model, **options) as llm:
        hasten = HastenEngine(llm, sampling, batch_size=batch_size)
        model = args.hf_model or args.model
        measured = peers_of(args, model, hasten, options, sampling, threads=threads, batch_size=hf_batch_size)
        yield replace(measured, vocab_size=llm.config.vocab_size)


def hf_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of an engine's options that Hugging Face takes too."""
    return {
        name: options[name]
        for name in ("dtype", "device", "load_format", "revision", "download_dir")
        if name in options
    }


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a benchmark was asked for, by the names of its options."""
    return {name: value for name, value in vars(args).items() if name not in ("run", "parser")}


def benchmark_of(args: argparse.Namespace) -> str:
    """The name of the benchmark that was asked for."""
    return str(args.parser.prog.rpartition(" ")[2])


def write_measured(args: argparse.Namespace, measured: Measured, results: Mapping[str, Any]) -> None:
    """Write results of engines, with what they were measured on, and the engines that were not."""
    from hasten.bench import report

    engine = measured.engines[-1]
    where = {"environment": report.environment(engine.device, engine.dtype)}
    write(args, {**where, **results, "not_measured": measured.not_measured})


def show_not_measured(args: argparse.Namespace, measured: Measured) -> int:
    """Print which engines were not measured, and return the status: 1 where a comparison has hasten alone."""
    from hasten.bench.peers import has_failed

    if not args.json:
        for each in measured.not_measured:
            print(each.line)
    *others, _ = measured.engines
    if others and all(map(has_failed, others)):
        print("hasten: no other engine could be measured", file=sys.stderr)
        return 1
    return 0


def write(args: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """Write results, with what was asked for, as JSON to wherever that was."""
    from hasten.bench import report, schema

    full = {**schema.head(benchmark_of(args)), "options": options_of(args), **results}
    if args.output_path is not None:
        report.write_json(args.output_path, full)
    if args.json:
        report.print_json(full)
