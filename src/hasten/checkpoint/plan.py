"""From a folder to the tensors of one rank: map, source and number of ranks."""

import logging
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hasten.checkpoint.faster_transformer.ini import CONFIG_INI
from hasten.checkpoint.files import read_json
from hasten.checkpoint.hugging_face import NOT_APPLIED, UNKNOWN
from hasten.checkpoint.model_files import TOKENIZER_ALONE
from hasten.checkpoint.pooling import PoolingConfig, read_pooling
from hasten.checkpoint.source import Source, known_tokens
from hasten.checkpoint.sources import open_dummy, open_source
from hasten.core.dtypes import Quantization
from hasten.core.errors import CheckpointError
from hasten.core.model_config import ModelConfig
from hasten.core.parallel_config import ParallelConfig
from hasten.models import generation_config
from hasten.models.weight_map import WeightSpec
from hasten.ops import Weight
from hasten.parallel.shard import by_expert

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: what the model is, and where its tensors come from."""

    path: Path
    config: ModelConfig
    """As the weights say, with the end tokens of generation_config.json where there is one."""
    tokenizer_folder: Path | None
    """Where the tokenizer's files lie: the folder itself, or OUT for OUT/N-gpu."""
    source: Source
    quantization: Quantization | None = None
    """What the checkpoint asks to be quantized with while it is loaded."""
    stored_quantization: str | None = None
    """How the files hold quantized weights, None for full precision."""
    pooling: PoolingConfig | None = None
    """How vectors are made of hidden states; None where the model generates."""
    verify: bool = True
    """Whether `rank_tensors` compares the files that it reads with the manifest, where there is one."""


def side_folder(source: Source) -> Path:
    """The folder with config.json and the tokenizer's files: a rank folder's own, if it has them, or its parent."""
    folder = source.folder
    if source.label == "HF" or any((folder / name).is_file() for name in ("config.json", *TOKENIZER_ALONE)):
        return folder
    parent = folder.resolve().parent
    return parent if folder.name.endswith("-gpu") and (parent / "config.json").is_file() else folder


def open_checkpoint(
    path: str | Path, ranks: int = 1, verify: bool = True, dummy: torch.device | None = None
) -> Checkpoint:
    """Open a Hugging Face folder, OUT or OUT/N-gpu for `ranks` ranks; `dummy`: config.json alone, random weights.

    CheckpointError, ConfigError and UnsupportedError say what is wrong and what to do.
    """
    path = Path(path)
    source = open_dummy(path, dummy) if dummy is not None else open_source(path, ranks)
    side = side_folder(source)
    if verify and source.manifest is not None and CONFIG_INI in source.manifest.files:
        source.manifest.verify(source.folder, [CONFIG_INI])
    ends = generation_eos(source)
    _warn_of_settings(side, source.config)
    return Checkpoint(
        path=path,
        config=replace(source.config, eos_token_ids=ends) if ends is not None else source.config,
        tokenizer_folder=side if any((side / name).is_file() for name in TOKENIZER_ALONE) else None,
        source=source,
        quantization=source.quantization,
        stored_quantization=source.stored_quantization,
        pooling=None if source.config.task == "generate" else read_pooling(side, source.config),
        verify=verify,
    )


def stored_config(path: Path, ranks: int, *, dummy: bool) -> ModelConfig:
    """A model's configuration alone, without a look at its weights; errors are those of `open_checkpoint`."""
    return (open_dummy(path, torch.device("cpu")) if dummy else open_source(path, ranks)).config


def generation_eos(source: Source) -> tuple[int, ...] | None:
    """The end tokens that generation_config.json sets, now or when the checkpoint was converted; None: it sets none."""
    path = side_folder(source) / "generation_config.json"
    if not path.is_file():
        return source.generation_eos
    found = read_json(path).get("eos_token_id")
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(end) is int for end in ends):
        raise CheckpointError(f"{path}: eos_token_id {found!r} is not a token id or a list of them")
    if not ends:
        return source.generation_eos
    return known_tokens(tuple(ends), source.config.vocab_size, f"{path}: eos_token_id")


def _warn_of_settings(folder: Path, config: ModelConfig) -> None:
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    raw = read_json(path)
    if settings := generation_config.not_applied(raw, has_encoder=config.encoder is not None):
        _log.warning(NOT_APPLIED, path, ", ".join(settings))
    if unknown := generation_config.unknown(raw):
        _log.warning(UNKNOWN, path, ", ".join(unknown))


def rank_tensors(
    checkpoint: Checkpoint,
    rank: int,
    size: int,
    dtype: torch.dtype,
    *,
    expert_parallel: bool = False,
    names: Container[str] | None = None,
) -> Iterator[tuple[str, Weight]]:
    """Every parameter's name with rank `rank`'s shard of it, file by file: quantized where it is stored so.

    All others are in `dtype`. With `expert_parallel`, ranks get whole experts. With `names`, only parameters of these
    names come; a tied head that is among them gets the embedding's values. A tensor is contiguous and may be a view of
    a mapped file, so copy it before changing it. The files that this rank reads, and no others, are first compared with
    the manifest. ConfigError if `size` does not divide the model, ChecksumError for a changed file.
    """
    source = checkpoint.source
    ParallelConfig(tensor_parallel_size=size, expert_parallel=expert_parallel).validate(source.config)

    def divided(spec: WeightSpec) -> WeightSpec:
        return replace(spec, split=by_expert(spec.split)) if expert_parallel else spec

    tie = source.weight_map.head_tie

    def names_of(spec: WeightSpec) -> list[str]:
        """The parameters that get these values."""
        if names is None:
            return [spec.name]
        tied = [tie.spec.name] if tie is not None and spec.name == tie.to.name else []
        return [name for name in (spec.name, *tied) if name in names]

    if checkpoint.verify and source.manifest is not None:
        needed = [divided(spec) for spec in source.specs if names_of(spec)]
        source.manifest.verify(source.folder, {name for spec in needed for name in source.files_for(spec, rank, size)})
    for specs in source.batches():
        for spec in specs:
            for name in names_of(spec):
                yield name, source.weight(divided(spec), rank, size, dtype)
        source.release()
