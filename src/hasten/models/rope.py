"""Rotary position embeddings as Hugging Face's config.json describes them, under the keys of old and new versions."""

import math
from typing import Any, get_args

from hasten.core.config import RopeConfig, RopeKind
from hasten.core.errors import ConfigError, UnsupportedError
from hasten.models import hf_config
from hasten.models.hf_config import Raw

_KINDS = get_args(RopeKind)
_KEYS = frozenset(
    """
    rope_type type rope_theta factor original_max_position_embeddings low_freq_factor high_freq_factor beta_fast
    beta_slow attention_factor mscale mscale_all_dim truncate partial_rotary_factor
    """.split()
)
_WITH_FACTOR = ("linear", "dynamic", "llama3", "yarn")


def rope_from_hf(raw: Raw, head_size: int, max_position: int) -> RopeConfig:
    """The rope of a model: `rope_parameters`, or `rope_theta` and `rope_scaling` of older versions.

    ConfigError and UnsupportedError name the key.
    """
    key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    values: dict[str, Any] = {} if raw.get(key) is None else raw[key]
    if not isinstance(values, dict):
        raise ConfigError(f"{key} {values!r} is not an object")
    if unknown := sorted(name for name in values if name not in _KEYS):
        raise UnsupportedError(f"{key}.{unknown[0]} is not supported")
    kind: Any = values.get("rope_type") or values.get("type") or "default"
    if kind not in _KINDS:
        raise UnsupportedError(f"{key}.rope_type {kind!r} is not supported; supported are {', '.join(_KINDS)}")
    try:
        return _rope(kind, _with_outer(values, raw), head_size, max_position)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def _with_outer(values: dict[str, Any], raw: Raw) -> dict[str, Any]:
    """With the keys that older versions have beside the object."""
    outer = {name: raw.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    return {name: value for name, value in outer.items() if value is not None} | values


def _rope(kind: RopeKind, values: dict[str, Any], head_size: int, max_position: int) -> RopeConfig:
    if kind in _WITH_FACTOR and values.get("factor") is None:
        raise ConfigError(f"{kind} lacks 'factor'")
    factor = hf_config.number(values, "factor", 1.0)
    original = None if kind in ("default", "linear") else max_position
    if kind in ("llama3", "yarn"):
        original = hf_config.count(values, "original_max_position_embeddings", default=max_position)
    return RopeConfig(
        width=int(head_size * hf_config.number(values, "partial_rotary_factor", 1.0)),
        theta=hf_config.number(values, "rope_theta", 10_000.0),
        kind=kind,
        factor=factor if kind in _WITH_FACTOR else 1.0,
        original_max_position=original,
        low_freq_factor=hf_config.number(values, "low_freq_factor", 1.0),
        high_freq_factor=hf_config.number(values, "high_freq_factor", 4.0),
        beta_fast=hf_config.number(values, "beta_fast", 32.0),
        beta_slow=hf_config.number(values, "beta_slow", 1.0),
        truncate=hf_config.flag(values, "truncate", True),
        attention_factor=_attention_factor(values, factor) if kind == "yarn" else 1.0,
    )


def _attention_factor(values: dict[str, Any], factor: float) -> float:
    """What yarn multiplies cosines and sines by."""

    def scaled(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if values.get("attention_factor") is not None:
        return hf_config.number(values, "attention_factor", 1.0)
    if values.get("mscale") and values.get("mscale_all_dim"):
        return scaled(hf_config.number(values, "mscale", 1)) / scaled(hf_config.number(values, "mscale_all_dim", 1))
    return scaled(1.0)
