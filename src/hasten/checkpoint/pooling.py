"""Poolings of a checkpoint, from the files that sentence-transformers writes next to a model, or their defaults."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from hasten.checkpoint.files import read_json, read_json_list, read_tensors
from hasten.checkpoint.hugging_face import MODULES
from hasten.core.errors import CheckpointError, UnsupportedError
from hasten.core.model_config import ModelConfig, Pooling, TextConfig

_log = logging.getLogger(__name__)

_PROMPTS = "config_sentence_transformers.json"
_BERT = "sentence_bert_config.json"
_MODES: tuple[tuple[str, Pooling], ...] = (
    ("pooling_mode_cls_token", "cls"),
    ("pooling_mode_max_tokens", "max"),
    ("pooling_mode_mean_tokens", "mean"),
    ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len"),
    ("pooling_mode_weightedmean_tokens", "weightedmean"),
    ("pooling_mode_lasttoken", "last"),
)
"""Keys of a pooling's config.json; several vectors are put one behind the other, in this order."""
_NAMES: dict[str, Pooling] = {"lasttoken": "last"}
"""Modes of `pooling_mode`, which newer files have instead, where they are not called as here."""
_ACTIVATIONS = {"Tanh": "tanh", "Identity": None, "ReLU": "relu", "GELU": "gelu"}


@dataclass(frozen=True)
class DenseModule:
    """A linear layer behind the pooling."""

    weight: Tensor
    """[out, in]"""
    bias: Tensor | None
    activation: str | None
    """tanh, relu, gelu, or none."""


@dataclass(frozen=True, kw_only=True)
class PoolingConfig:
    """From hidden states to a vector."""

    modes: tuple[Pooling, ...]
    normalize: bool = False
    """Whether vectors have length 1."""
    dense: tuple[DenseModule, ...] = ()
    texts: TextConfig = field(default_factory=TextConfig)
    """How texts become tokens."""
    dimensions: tuple[int, ...] | None = None
    """Lengths that vectors may be cut to (Matryoshka), none of them: to any; None: they may not be cut."""


def read_pooling(folder: Path, model: ModelConfig) -> PoolingConfig:
    """The pooling that `modules.json` of a folder describes, and else that of a model without one.

    That is the mean of an encoder's hidden states, as in sentence-transformers, and the last of a decoder's.
    CheckpointError and UnsupportedError name the file and what is wrong.
    """
    max_length, lowercase = _limits(folder)
    prompts, default = _prompts(folder)
    texts = TextConfig(max_length=max_length, lowercase=lowercase, prompts=prompts, default_prompt=default)
    dimensions = _dimensions(folder)
    if not (folder / MODULES).is_file():
        mode: Pooling = "last" if model.attention.causal else "mean"
        if model.task == "embed":
            _log.warning("%s has no %s: vectors are computed by %s pooling", folder, MODULES, mode)
        return PoolingConfig(modes=(mode,), texts=texts, dimensions=dimensions)
    modes: tuple[Pooling, ...] = ()
    dense: list[DenseModule] = []
    normalize = False
    for index, (kind, path) in enumerate(_modules(folder)):
        if kind == "Transformer" and index == 0 and path == folder:
            continue
        if kind == "Pooling" and not modes:
            modes, include_prompt = _pooling(path / "config.json")
            texts = replace(texts, include_prompt=include_prompt)
        elif kind == "Dense" and modes and not normalize:
            dense.append(_dense(path))
        elif kind == "Normalize" and modes:
            normalize = True
        else:
            raise UnsupportedError(
                f"{folder / MODULES}: module {index}, {kind!r}, is not supported there; supported are a Transformer of "
                "this folder, a Pooling, then Dense modules and Normalize"
            )
    if not modes:
        raise UnsupportedError(f"{folder / MODULES} has no Pooling: the model gives no vectors of texts")
    return PoolingConfig(modes=modes, normalize=normalize, dense=tuple(dense), texts=texts, dimensions=dimensions)


def _modules(folder: Path) -> Iterator[tuple[str, Path]]:
    """Class and folder of each module."""
    file = folder / MODULES
    modules = read_json_list(file)
    for module in modules:
        if not isinstance(module, dict) or not isinstance(module.get("type"), str):
            raise CheckpointError(f"{file} has a module without a type: {module!r:.80}")
        path = module.get("path", "")
        if not isinstance(path, str) or Path(path).is_absolute() or ".." in Path(path).parts:
            raise CheckpointError(f"{file} has a module whose path is not a folder below it: {path!r:.80}")
        yield module["type"].rpartition(".")[2], folder / path


def _pooling(file: Path) -> tuple[tuple[Pooling, ...], bool]:
    """Ways of pooling, and whether a prompt counts."""
    raw = read_json(file)
    modes = tuple(mode for key, mode in _MODES if raw.get(key))
    named = raw.get("pooling_mode")
    if named is not None:
        names = [named] if isinstance(named, str) else named
        known = {mode: mode for _, mode in _MODES} | _NAMES
        if not isinstance(names, list) or not all(name in known for name in names):
            raise UnsupportedError(f"{file}: pooling_mode {named!r} is not supported; supported are {', '.join(known)}")
        modes = tuple(known[name] for name in names)
    unknown = [key for key in raw if key.startswith("pooling_mode_") and key not in dict(_MODES) and raw[key]]
    if unknown:
        raise UnsupportedError(f"{file}: {unknown[0]} is not supported; supported are {', '.join(dict(_MODES))}")
    if not modes:
        raise CheckpointError(f"{file} names no way of pooling; supported are {', '.join(dict(_MODES))}")
    if len(modes) > 1 and "cls" in modes and not raw.get("include_prompt", True):
        raise UnsupportedError(f"{file}: include_prompt false is not supported with the first token and others")
    return modes, bool(raw.get("include_prompt", True))


def _dense(folder: Path) -> DenseModule:
    raw = read_json(folder / "config.json")
    named = str(raw.get("activation_function", "torch.nn.modules.activation.Tanh"))
    name = named.rpartition(".")[2]
    if not named.startswith("torch.") or name not in _ACTIVATIONS:
        raise UnsupportedError(
            f"{folder / 'config.json'}: activation_function {named!r} is not supported; supported are torch's "
            f"{', '.join(sorted(_ACTIVATIONS))}"
        )
    tensors = read_tensors(folder)
    shape = (raw.get("out_features"), raw.get("in_features"))
    weight, bias = tensors.get("linear.weight"), tensors.get("linear.bias")
    wanted = {"linear.weight", "linear.bias"} if raw.get("bias", True) else {"linear.weight"}
    if weight is None or tuple(weight.shape) != shape or tensors.keys() != wanted:
        raise CheckpointError(f"{folder}: its weights are not those of a linear layer of {shape} (config.json)")
    return DenseModule(weight.to(torch.float32), None if bias is None else bias.float(), _ACTIVATIONS[name])


def _limits(folder: Path) -> tuple[int | None, bool]:
    """Most tokens of a text, and whether texts are tokenized in lower case."""
    file = folder / _BERT
    raw = read_json(file) if file.is_file() else {}
    most = raw.get("max_seq_length")
    if most is not None and (type(most) is not int or most < 1):
        raise CheckpointError(f"{file}: max_seq_length {most!r:.80} is not a whole number above 0")
    return most, bool(raw.get("do_lower_case", False))


def _dimensions(folder: Path) -> tuple[int, ...] | None:
    """Lengths that vectors may be cut to, none of them: to any; None where config.json does not say that they may."""
    file = folder / "config.json"
    raw = read_json(file) if file.is_file() else {}
    lengths = raw.get("matryoshka_dimensions")
    if lengths is None:
        return () if raw.get("is_matryoshka") is True else None
    if not isinstance(lengths, list) or not all(type(length) is int and length > 0 for length in lengths):
        raise CheckpointError(f"{file}: matryoshka_dimensions {lengths!r:.80} is not a list of whole numbers above 0")
    return tuple(lengths)


def _prompts(folder: Path) -> tuple[dict[str, str], str | None]:
    """Prompts by name, and the name of the default."""
    file = folder / _PROMPTS
    raw = read_json(file) if file.is_file() else {}
    prompts, default = raw.get("prompts") or {}, raw.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise CheckpointError(f"{file}: prompts {prompts!r:.80} is not an object of texts")
    if default is not None and default not in prompts:
        raise CheckpointError(f"{file}: default_prompt_name {default!r} is none of its prompts: {', '.join(prompts)}")
    return prompts, default
