"""Architectures by their Hugging Face name; a model's module is imported when it is asked for."""

from importlib import import_module

from hasten.core.errors import UnsupportedError
from hasten.models.base import CausalLM

MODELS: dict[str, str] = {
    "BloomForCausalLM": "hasten.models.bloom:BloomForCausalLM",
    "BloomModel": "hasten.models.bloom:BloomForCausalLM",
}


def model_class(architecture: str) -> type[CausalLM]:
    """The class for an architecture of Hugging Face; UnsupportedError where hasten has none."""
    if architecture not in MODELS:
        raise UnsupportedError(
            f"architecture {architecture!r} is not supported; supported are {', '.join(sorted(MODELS))}"
        )
    module, name = MODELS[architecture].split(":")
    found: type[CausalLM] = getattr(import_module(module), name)
    return found
