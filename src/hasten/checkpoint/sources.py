"""Checkpoints of any kind, opened behind one small class: Hugging Face, FasterTransformer, ranked safetensors, random.

Files are memory-mapped: opening reads headers alone, and a shard costs the pages that it touches.
"""

import re
from pathlib import Path

import torch

from hasten.checkpoint.faster_transformer.ini import CONFIG_INI
from hasten.checkpoint.hugging_face import HF_FILES, open_hugging_face, read_format, read_hf_config
from hasten.checkpoint.manifest import MANIFEST
from hasten.checkpoint.model_files import ADAPTER
from hasten.checkpoint.ranked import RankedSafetensorsSource, is_ranked
from hasten.checkpoint.source import DummySource, Source
from hasten.core.errors import CheckpointError, UnsupportedError
from hasten.models.registry import model_class

RANK_FOLDER = re.compile(r"([1-9]\d*)-gpu")
"""Name of the folder that holds the files of a number of ranks."""


def is_rank_folder(folder: Path) -> bool:
    """Whether `folder` looks like an `N-gpu` that a converter wrote."""
    return folder.is_dir() and any(((folder / CONFIG_INI).is_file(), (folder / MANIFEST).is_file(), is_ranked(folder)))


def rank_folders(folder: Path) -> dict[int, Path]:
    """The `N-gpu` folders inside `folder`, by N."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := RANK_FOLDER.fullmatch(path.name))}
    return {ranks: path for ranks, path in sorted(found.items()) if is_rank_folder(path)}


def _not_a_folder(path: Path) -> str:
    if not path.exists():
        return f"there is no folder {path}; give the folder of a checkpoint"
    if path.suffix.lower() == ".gguf":
        return f"{path}: GGUF is not supported; give a folder with config.json and safetensors or .bin files"
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        return f"{path} has weights alone; give its folder, which must also hold config.json"
    return f"{path} is a file; give the folder of a checkpoint"


def open_source(path: Path, ranks: int = 1) -> Source:
    """Open a checkpoint folder of any kind; inside OUT, `N-gpu` with N = `ranks` is preferred.

    CheckpointError names the file, the tensor and what to do.
    """
    if not path.is_dir():
        raise CheckpointError(_not_a_folder(path))
    if (path / ADAPTER).is_file():
        raise UnsupportedError(
            f"{path / ADAPTER}: adapters are not supported; merge it into its base model and save that (PEFT's "
            "merge_and_unload)"
        )
    if is_ranked(path):
        return RankedSafetensorsSource(path)
    if (path / CONFIG_INI).is_file():
        # with all that its families need: a start on Hugging Face's files does without
        from hasten.checkpoint.faster_transformer.source import open_faster_transformer

        return open_faster_transformer(path)
    if any((path / name).exists() for name in HF_FILES):
        return open_hugging_face(path)
    inside = rank_folders(path)
    if inside:
        return open_source(inside.get(ranks) or next(iter(inside.values())), ranks)
    if not (path / "config.json").is_file() and (gguf := min(path.glob("*.gguf"), default=None)) is not None:
        raise CheckpointError(_not_a_folder(gguf))
    read_hf_config(path)
    raise CheckpointError(f"{path} has no weights: none of {', '.join(HF_FILES)}, and no N-gpu folder")


def open_dummy(path: Path, device: torch.device) -> DummySource:
    """Random weights, made on `device`, for the model that config.json of `path` describes."""
    config = read_hf_config(path)
    if (stored := read_format(path)) is not None and stored.is_held:
        raise UnsupportedError(
            f"{path / 'config.json'} has quantized weights, but random ones are in full precision: remove its "
            "quantization_config; --quantization quantizes them"
        )
    source = DummySource(path, config, model_class(config.architecture).weight_map(config))
    source.device = device
    return source
