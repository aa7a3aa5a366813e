"""The measurements of a report, section by section."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hasten.bench import lambada, latency, startup
from hasten.bench.engines import HastenEngine
from hasten.bench.evaluation.accuracy import Accuracy, accuracy
from hasten.bench.evaluation.engines import Engines
from hasten.bench.evaluation.form import Knee, Latencies, ModelReport, Starts
from hasten.bench.evaluation.headline import headline
from hasten.bench.evaluation.limits import Plan, cost, plan, roofline
from hasten.bench.evaluation.options import ReportOptions
from hasten.bench.evaluation.provenance import file_hashes, provenance
from hasten.bench.evaluation.store import SectionStore
from hasten.bench.lambada import Sample
from hasten.bench.load.prompts import PromptWriter
from hasten.bench.report import environment
from hasten.bench.slo import Slo
from hasten.bench.sweep import Sweep, knee, running, started, sweep
from hasten.bench.workloads import fixed
from hasten.checkpoint.hub import model_name, resolve_engine
from hasten.checkpoint.hugging_face import read_format
from hasten.checkpoint.plan import open_checkpoint
from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError, HastenError, UnsupportedError
from hasten.core.model_config import ModelConfig
from hasten.engine.model_loading import compute_dtype
from hasten.engine.planning import hardware
from hasten.engine.planning.plan import Setup, setup_of
from hasten.engine.rank_device import rank_device
from hasten.engine.text import Tokenizer
from hasten.ops import TORCH_DTYPES
from hasten.parallel.groups import TensorGroup
from hasten.parallel.threads import limit_threads


class Evaluation:
    """One report: its sections, each from the store or measured.

    ConfigError or UnsupportedError, before anything is measured, for a model or options that cannot be reported on.
    """

    def __init__(self, options: ReportOptions, folder: Path, *, fresh: bool, say: Callable[[str], None]) -> None:
        self._say = say
        self._threads = limit_threads()
        self._engine = resolve_engine(EngineConfig.create(options.model, **options.engine))
        self._model = open_checkpoint(self._engine.model, dummy=torch.device("cpu")).config
        if self._model.task != "generate" or self._model.encoder is not None:
            raise UnsupportedError(f"{self._model.architecture} is no decoder that continues texts; use hasten bench")
        self._engine.parallel.validate(self._model)
        self._engine.scheduler.validate(self._model)
        limit = _longest_sequence(self._engine, self._model)
        self._options = dataclasses.replace(options, scale=options.scale.within(limit))
        self._device = rank_device(self._engine, TensorGroup(), 1)
        self._setup = self._setup_of_engine()
        self._tokenizer = Tokenizer.from_folder(self._engine.tokenizer or self._engine.model)
        self._samples = self._read_samples(limit)
        say("hashes of the files …")
        self._files = file_hashes(Path(self._engine.model))
        self._gpus = _gpu_ids(self._device, self._engine.parallel.ranks)
        self._provenance = provenance(
            options.command, f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", self._files, self._gpus
        )
        identity = {
            "model": self._provenance.model_sha256,
            "packages": self._provenance.packages,
            "device": environment(self._device, TORCH_DTYPES[self._setup.dtype]).device,
            "gpus": self._provenance.gpus,
            "threads": self._threads,
            "engine": dict(options.engine),
        }
        self._store = SectionStore(folder, identity, fresh=fresh, say=say)

    def report(self) -> ModelReport:
        """Measure what is missing, and put all sections together."""
        options, notes = self._options, list[str]()
        planned = self._plan(notes)
        starts = self._store.section("start", Starts, {"repetitions": options.scale.starts}, self._starts)
        sweeps = [self._sweep(), *(self._sweep_of(url) for url in options.against.urls)]
        with ExitStack() as stack:
            engines = Engines(stack, options, self._engine, self._max_len(), self._threads)
            found = self._accuracy(engines)
            latencies = self._latencies(engines)
        own = [each for each in latencies.results if each.engine == HastenEngine.label]
        notes += [each.line for each in dict.fromkeys([*found.not_measured, *latencies.not_measured])]
        best = knee(sweeps[0].points, options.slo)
        price = options.price_per_hour
        report = ModelReport(
            model=model_name(options.model),
            headline="",
            slo=str(options.slo),
            provenance=dataclasses.replace(
                self._provenance, environment=environment(self._device, TORCH_DTYPES[self._setup.dtype])
            ),
            accuracy=found,
            latency=latencies,
            serving=sweeps,
            knees=[_knee(each, options.slo) for each in sweeps],
            cost=None if price is None or best is None else cost(price, sweeps[0], best),
            plan=planned,
            roofline=None if planned is None else roofline(self._model, planned.device, self._setup, own),
            startup=starts,
            notes=notes,
        )
        report["headline"] = headline(report)
        return report

    def _max_len(self) -> int:
        longest = max(len(sample.prompt_ids) + len(sample.target_ids) for sample in self._samples) + 1
        return max(longest, 2 * self._options.scale.latency_length)

    def _setup_of_engine(self) -> Setup:
        dtype = compute_dtype(self._engine.dtype, self._model, self._device)
        return setup_of(self._engine, dtype, self._device.type)

    def _read_samples(self, limit: int | None) -> list[Sample]:
        found = lambada.read_samples(self._options.dataset, self._tokenizer)
        samples = [each for each in found if limit is None or len(each.prompt_ids) + len(each.target_ids) < limit]
        if not samples:
            raise ConfigError(f"{self._options.dataset} has no text of less than {limit} tokens, the model's longest")
        most = self._options.scale.samples
        if most is None or len(samples) <= most:
            return samples
        return [samples[number * len(samples) // most] for number in range(most)]

    def _plan(self, notes: list[str]) -> Plan | None:
        """Device and memory; None, with a note, for models that a plan does not know."""
        if self._engine.parallel.pipeline_parallel_size > 1:
            notes.append("no memory plan and no roofline: they do not know pipeline stages")
            return None
        if (stored := self._stored_format()) is not None:
            notes.append(f"no memory plan and no roofline: they do not know the bytes of weights in {stored}")
            return None
        try:
            gpu = hardware.this_gpu() if self._device.type == "cuda" else None
            return self._store.section(
                "memory plan",
                Plan,
                {"setup": self._setup},
                lambda: plan(self._model, gpu or hardware.this_cpu(), self._setup),
            )
        except HastenError as error:
            notes.append(f"no memory plan and no roofline: {error}")
            return None

    def _stored_format(self) -> str | None:
        """The name of the format of a checkpoint whose weights stay quantized as they are; None for any other."""
        folder = Path(self._engine.model)
        stored = read_format(folder) if (folder / "config.json").is_file() else None
        return stored.name if stored is not None and stored.is_held else None

    def _starts(self) -> Starts:
        options = {name: value for name, value in self._options.engine.items() if name != "revision"}
        if self._engine.tokenizer is not None:
            options["tokenizer"] = self._engine.tokenizer
        measured = startup.measure(self._engine.model, options, repetitions=self._options.scale.starts)
        return Starts(measured.starts)

    def _sweep(self) -> Sweep:
        def measure() -> Sweep:
            with started(self._engine, self._gpus) as server:
                return sweep(server, self._concurrencies(), self._options.scale.load, self._say)

        return self._store.section("served model", Sweep, self._sweep_options(), measure)

    def _sweep_of(self, url: str) -> Sweep:
        def measure() -> Sweep:
            server = running(url, PromptWriter(self._tokenizer))
            return sweep(server, self._concurrencies(), self._options.scale.load, self._say)

        return self._store.section(f"server at {url}", Sweep, {"url": url, **self._sweep_options()}, measure)

    def _sweep_options(self) -> dict[str, Any]:
        return {"concurrencies": self._concurrencies(), "load": self._options.scale.load}

    def _concurrencies(self) -> list[int]:
        most = self._engine.scheduler.max_num_seqs
        return [each for each in self._options.scale.concurrencies if each <= most] or [most]

    def _accuracy(self, engines: Engines) -> Accuracy:
        options = self._options
        scale = options.scale

        def measure() -> Accuracy:
            results = lambada.run(
                engines.all,
                self._samples,
                self._tokenizer,
                batch_size=options.batch_size,
                repetitions=scale.accuracy_repetitions,
                advance=_tenths(self._say, len(self._samples) * scale.accuracy_repetitions, "texts"),
            )
            name = Path(options.dataset).name
            return accuracy(
                results,
                engines.llm,
                self._tokenizer,
                dataset=name,
                batch_size=options.batch_size,
                not_measured=engines.not_measured,
            )

        known = {
            **self._engine_options(),
            "texts": hash_of(self._samples),
            "repetitions": scale.accuracy_repetitions,
            "batch_size": options.batch_size,
        }
        return self._store.section("accuracy", Accuracy, known, measure)

    def _latencies(self, engines: Engines) -> Latencies:
        scale = self._options.scale

        def measure() -> Latencies:
            results = []
            for size in scale.batch_sizes:
                self._say(f"latency, batch {size}")
                workload = fixed(size, scale.latency_length, scale.latency_length)
                results += latency.measure(
                    engines.all, workload, engines.llm.config.vocab_size, repetitions=scale.repetitions
                )
            return Latencies(results, engines.not_measured)

        known = {
            **self._engine_options(),
            "batch_sizes": scale.batch_sizes,
            "length": scale.latency_length,
            "repetitions": scale.repetitions,
        }
        return self._store.section("latency", Latencies, known, measure)

    def _engine_options(self) -> dict[str, Any]:
        return {"against": self._options.against.engines, "hf_model": self._options.hf_model}


def hash_of(samples: Sequence[Sample]) -> str:
    """A hash of texts."""
    from hashlib import sha256

    return sha256("\n".join(sample.prompt + sample.target for sample in samples).encode()).hexdigest()


def _longest_sequence(engine: EngineConfig, model: ModelConfig) -> int | None:
    """Tokens of the longest sequence that options or learned positions allow; None: any."""
    learned = model.max_position_embeddings if model.num_positions else None
    return engine.scheduler.max_model_len or learned


def _knee(measured: Sweep, slo: Slo) -> Knee:
    found = knee(measured.points, slo)
    return Knee(measured.label, None if found is None else found.concurrency)


def _gpu_ids(device: torch.device, ranks: int) -> list[str]:
    """UUIDs of the GPUs that the ranks compute on; none on a CPU."""
    if device.type != "cuda":
        return []
    numbers = range(ranks) if ranks > 1 else [device.index or 0]
    return [f"GPU-{torch.cuda.get_device_properties(number).uuid}" for number in numbers]


def _tenths(say: Callable[[str], None], total: int, what: str) -> Callable[[int], None]:
    """A function of amounts done that says each further tenth of the total."""
    done, said = 0, 0

    def advance(amount: int) -> None:
        nonlocal done, said
        done += amount
        if done * 10 // total > said:
            said = done * 10 // total
            say(f"{done} of {total} {what}")

    return advance
