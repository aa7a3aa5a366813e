"""Architectures by their Hugging Face name; a model's module is imported when it is asked for."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hasten.core.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from hasten.models.base import CausalLM

MODELS: dict[str, str] = {
    "BloomForCausalLM": "hasten.models.bloom:BloomForCausalLM",
    "BloomModel": "hasten.models.bloom:BloomForCausalLM",
}


_MODEL_TYPES: dict[str, str] = {"bloom": "BloomForCausalLM"}
"""Architectures by `model_type`, for a config.json that names no architecture."""


def architecture_of(raw: Mapping[str, Any]) -> str:
    """The architecture that a config.json names, or its `model_type` stands for.

    ConfigError where it names none, UnsupportedError where hasten has no such model.
    """
    named, model_type = raw.get("architectures"), raw.get("model_type")
    if named:
        if not isinstance(named, list):
            raise ConfigError(f"architectures {named!r} is not a list of names")
        return _known("architecture", str(named[0]), MODELS)
    if not model_type:
        raise ConfigError(
            f'names no architecture; add "architectures": [NAME], where NAME is one of {", ".join(sorted(MODELS))}'
        )
    return _MODEL_TYPES[_known("model type", str(model_type), _MODEL_TYPES)]


def _known(what: str, name: str, table: Mapping[str, str]) -> str:
    if name not in table:
        raise UnsupportedError(
            f"{what} {name!r} is not supported; supported are {', '.join(sorted(table))} "
            "(docs/adding-a-model.md says how to add another)"
        )
    return name


def model_class(architecture: str) -> "type[CausalLM]":
    """The class for an architecture of Hugging Face; UnsupportedError where hasten has none."""
    _known("architecture", architecture, MODELS)
    module, name = MODELS[architecture].split(":")
    found: type[CausalLM] = getattr(import_module(module), name)
    return found
