"""Which files make a model, in a folder here and in a repository on the hub."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from hasten.core.errors import CheckpointError
from hasten.core.text import from_json
from hasten.quantization.formats.files import METHODS

Part = Literal["model", "config", "tokenizer"]
"""What of a model is needed: everything, what describes it, or its tokenizer."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a tokenizer that may lie beside the weights."""
TOKENIZER_ALONE = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Those of which one makes a tokenizer."""
ADAPTER = "adapter_config.json"
"""What PEFT puts beside an adapter, which transformers then applies to its base model."""
POOLING_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
"""What sentence-transformers writes next to a model, for all its modules."""
_SIDE_FILES = ("config.json", "generation_config.json", *METHODS, *TOKENIZER_FILES, *POOLING_FILES, ADAPTER)
OF_MODULE = re.compile(r"\d+_\w+/(config\.json|model\.safetensors|pytorch_model\.bin)")
"""Files of such a module, which are small."""
_WEIGHTS = (
    re.compile(r"model[^/]*\.safetensors(\.index\.json)?"),
    re.compile(r"pytorch_model[^/]*\.bin(\.index\.json)?"),
)
"""Weights at the top of a repository: the first kind that it has is downloaded."""
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def has_part(folder: Path, part: Part) -> bool:
    """Whether a snapshot has what is needed; downloads that were cut off leave some out."""
    if part == "tokenizer":
        return any((folder / name).is_file() for name in TOKENIZER_ALONE)
    return (folder / "config.json").is_file() and (part == "config" or _has_weights(folder))


def _has_weights(folder: Path) -> bool:
    if any((folder / name).is_file() for name in _WEIGHT_FILES):
        return True
    for name in _WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                files = set(from_json(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, AttributeError, TypeError):
                return False
            return all((folder / str(file)).is_file() for file in files)
    return False


def needed_files(model: str, part: Part, names: Sequence[str]) -> list[str]:
    """Those of a repository's files that `part` of a model needs; CheckpointError, with its id, where it has none."""
    side = [name for name in names if name in _SIDE_FILES or OF_MODULE.fullmatch(name)]
    if part != "model":
        return side
    if "config.json" not in side:
        gguf = "; GGUF is not supported" if any(name.endswith(".gguf") for name in names) else ""
        raise CheckpointError(f"{model} has no config.json, so it is not a model of transformers{gguf}")
    for kind in _WEIGHTS:
        if weights := [name for name in names if kind.fullmatch(name)]:
            return side + weights
    raise CheckpointError(
        f"{model} has no weights that hasten reads, model*.safetensors or pytorch_model*.bin, at its top"
    )
