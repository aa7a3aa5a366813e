"""Architectures by their Hugging Face name; a model's module is imported when it is asked for."""

from importlib import import_module

from hasten.core.errors import UnsupportedError
from hasten.models.base import CausalLM

MODELS: dict[str, str] = {
    "BloomForCausalLM": "hasten.models.bloom:BloomForCausalLM",
    "BloomModel": "hasten.models.bloom:BloomForCausalLM",
}


_MODEL_TYPES: dict[str, str] = {"bloom": "BloomForCausalLM"}
"""Architectures by `model_type`, for a config.json that names no architecture."""


def default_architecture(model_type: str) -> str:
    """The architecture of a `model_type`; UnsupportedError where hasten has none."""
    if model_type not in _MODEL_TYPES:
        raise UnsupportedError(
            f"model type {model_type!r} is not supported; supported are {', '.join(sorted(_MODEL_TYPES))} "
            "(docs/adding-a-model.md says how to add another)"
        )
    return _MODEL_TYPES[model_type]


def model_class(architecture: str) -> type[CausalLM]:
    """The class for an architecture of Hugging Face; UnsupportedError where hasten has none."""
    if architecture not in MODELS:
        raise UnsupportedError(
            f"architecture {architecture!r} is not supported; supported are {', '.join(sorted(MODELS))} "
            "(docs/adding-a-model.md says how to add another)"
        )
    module, name = MODELS[architecture].split(":")
    found: type[CausalLM] = getattr(import_module(module), name)
    return found
