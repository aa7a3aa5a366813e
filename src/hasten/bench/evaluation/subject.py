"""The subject of a report: an engine, its model and device, and the texts that it is measured with."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from hasten.bench.engines import text_model
from hasten.bench.evaluation.options import ReportOptions
from hasten.bench.lambada import Sample, read_samples
from hasten.checkpoint.hub import resolve_engine, resolve_model
from hasten.checkpoint.hugging_face import read_format
from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError, UnsupportedError
from hasten.core.model_config import ModelConfig
from hasten.engine.model_loading import compute_dtype
from hasten.engine.planning.plan import Setup, setup_of
from hasten.engine.rank_device import rank_device
from hasten.engine.text import Tokenizer
from hasten.parallel.groups import TensorGroup
from hasten.parallel.threads import limit_threads


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What all sections of a report share."""

    options: ReportOptions
    """As they were given, no longer than the model's sequences may be."""
    engine: EngineConfig
    model: ModelConfig
    device: torch.device
    gpus: list[str]
    """UUIDs of the GPUs that the ranks compute on; none on a CPU."""
    setup: Setup
    tokenizer: Tokenizer
    samples: list[Sample]
    threads: int

    @classmethod
    def of(cls, options: ReportOptions) -> "Subject":
        """ConfigError or UnsupportedError for a model or options that cannot be reported on."""
        threads = limit_threads()
        engine = resolve_engine(EngineConfig.create(options.model, **options.engine))
        model = text_model(engine, "hasten report")
        if model.encoder is not None:
            raise UnsupportedError(f"{model.architecture} is no decoder that continues texts; use hasten bench")
        engine.parallel.validate(model)
        engine.scheduler.validate(model)
        if options.hf_model is not None and options.against.engines:
            resolve_model(options.hf_model)
        limit = _longest_sequence(engine, model)
        device = rank_device(engine, TensorGroup(), 1)
        tokenizer = Tokenizer.from_folder(engine.tokenizer or engine.model)
        return cls(
            options=dataclasses.replace(options, scale=options.scale.within(limit)),
            engine=engine,
            model=model,
            device=device,
            gpus=_gpu_ids(device, engine.parallel.ranks),
            setup=setup_of(engine, compute_dtype(engine.dtype, model, device), device.type),
            tokenizer=tokenizer,
            samples=_read_samples(options, tokenizer, limit),
            threads=threads,
        )

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence that the engines of the report's own process are given."""
        longest = max(len(sample.prompt_ids) + len(sample.target_ids) for sample in self.samples) + 1
        return max(longest, 2 * self.options.scale.latency_length)

    @property
    def concurrencies(self) -> list[int]:
        """Requests in flight at which the served model is measured."""
        most = self.engine.scheduler.max_num_seqs
        return [each for each in self.options.scale.concurrencies if each <= most] or [most]

    @property
    def samples_hash(self) -> str:
        """A hash of the texts."""
        return sha256("\n".join(sample.prompt + sample.target for sample in self.samples).encode()).hexdigest()

    @property
    def stored_format(self) -> str | None:
        """The name of the format of a checkpoint whose weights stay quantized as they are; None for any other."""
        folder = Path(self.engine.model)
        stored = read_format(folder) if (folder / "config.json").is_file() else None
        return stored.name if stored is not None and stored.is_held else None

    @property
    def start_options(self) -> dict[str, Any]:
        """Options of an engine that a process of its own starts."""
        options = {name: value for name, value in self.options.engine.items() if name != "revision"}
        if self.engine.tokenizer is not None:
            options["tokenizer"] = self.engine.tokenizer
        return options


def tenths(say: Callable[[str], None], total: int, what: str) -> Callable[[int], None]:
    """A function of amounts done that says each further tenth of the total."""
    done, said = 0, 0

    def advance(amount: int) -> None:
        nonlocal done, said
        done += amount
        if done * 10 // total > said:
            said = done * 10 // total
            say(f"{done} of {total} {what}")

    return advance


def _longest_sequence(engine: EngineConfig, model: ModelConfig) -> int | None:
    """Tokens of the longest sequence that options or learned positions allow; None: any."""
    learned = model.learned_positions
    return engine.scheduler.max_model_len or learned


def _read_samples(options: ReportOptions, tokenizer: Tokenizer, limit: int | None) -> list[Sample]:
    """The texts that fit, or as many of them, evenly spread, as the scale has."""
    found = read_samples(options.dataset, tokenizer)
    samples = [each for each in found if limit is None or len(each.prompt_ids) + len(each.target_ids) < limit]
    if not samples:
        raise ConfigError(f"{options.dataset} has no text of less than {limit} tokens, the model's longest")
    most = options.scale.samples
    if most is None or len(samples) <= most:
        return samples
    return [samples[number * len(samples) // most] for number in range(most)]


def _gpu_ids(device: torch.device, ranks: int) -> list[str]:
    if device.type != "cuda":
        return []
    numbers: Sequence[int] = range(ranks) if ranks > 1 else [device.index or 0]
    return [f"GPU-{torch.cuda.get_device_properties(number).uuid}" for number in numbers]
