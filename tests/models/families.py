"""What the tests of `test_families.py` are run on: models of every family, and what must show in their logits."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from hasten.core.model_config import AttentionConfig, ModelConfig

Model = tuple[str, dict[str, Any]]
"""A family, as transformers' classes are called, and its configuration."""
Change = Callable[[ModelConfig], ModelConfig]


@dataclass(frozen=True, kw_only=True)
class Cases:
    """Those of families that are built alike."""

    models: dict[str, Model]
    controls: dict[str, tuple[str, Change]]
    """A model and a configuration that leaves something out, or has it otherwise."""
    weights: dict[str, tuple[str, str]]
    """A model and a tensor of its file."""
    served: list[str]
    """Models whose tokens are compared, with and without a prefix cache, and with too small a cache."""
    ranks: list[tuple[str, int]]
    """Models and numbers of ranks that compute them together."""
    converted: list[tuple[str, int]]
    """Models and numbers of ranks that they are converted for."""
    whole_experts: list[tuple[str, int]] = field(default_factory=list)
    """Models and numbers of ranks that hold whole experts of them."""
    leftovers: dict[str, list[str]] = field(default_factory=dict)
    """Models and names of tensors that old checkpoints hold, and nobody needs."""


def with_attention(config: ModelConfig, **changes: Any) -> ModelConfig:
    """The configuration with other fields of the attention of all layers."""
    layers = tuple(replace(layer, **changes) for layer in config.layer_attention)
    return replace(config, attention=replace(config.attention, **changes), layer_attention=layers)


def with_rope(config: ModelConfig, **changes: Any) -> ModelConfig:
    """The configuration with other fields of the rope of all layers."""
    assert config.attention.rope is not None
    return with_attention(config, rope=replace(config.attention.rope, **changes))


def with_window(config: ModelConfig, more: int) -> ModelConfig:
    """The configuration with windows of that many tokens more."""

    def moved(attention: AttentionConfig) -> AttentionConfig:
        return attention if attention.window is None else replace(attention, window=attention.window + more)

    layers = tuple(map(moved, config.layer_attention))
    return replace(config, attention=moved(config.attention), layer_attention=layers)
