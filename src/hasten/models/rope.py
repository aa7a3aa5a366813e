"""Rotary position embeddings as Hugging Face's config.json describes them, under the keys of old and new versions."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from hasten.core.errors import ConfigError, UnsupportedError
from hasten.core.model_config import RopeConfig, RopeKind
from hasten.models import hf_config
from hasten.models.hf_config import Raw

_KINDS = get_args(RopeKind)
_KEYS = frozenset(
    """
    rope_type type rope_theta factor original_max_position_embeddings low_freq_factor high_freq_factor beta_fast
    beta_slow attention_factor mscale mscale_all_dim truncate partial_rotary_factor short_factor long_factor
    """.split()
)
_ORIGINAL, _TRUNCATE = "original_max_position_embeddings", "truncate"
ROPE_ALIASES: Mapping[str, RopeKind] = {"su": "longrope"}
"""Old names of kinds."""
_WITH_FACTOR = ("linear", "dynamic", "llama3", "yarn")


def rope_from_hf(
    raw: Raw,
    head_size: int,
    max_position: int,
    aliases: Mapping[str, RopeKind] = ROPE_ALIASES,
    *,
    theta: float = 10_000.0,
    partial: float | None = None,
    interleaved: bool = False,
) -> RopeConfig:
    """The rope of a model: `rope_parameters`, or `rope_theta` and `rope_scaling` of older versions.

    `aliases`: names of kinds under which a family knows others; `theta` and `partial`: what a config.json stands for
    that names no theta, or not the part of each head that turns. Without `partial` all of it does: transformers turns
    whole heads in such families, whatever config.json says. ConfigError and UnsupportedError name the key.
    """
    key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    values: dict[str, Any] = {} if raw.get(key) is None else raw[key]
    if not isinstance(values, dict):
        raise ConfigError(f"{key} {values!r} is not an object")
    if unknown := sorted(name for name in values if name not in _KEYS):
        raise UnsupportedError(f"{key}.{unknown[0]} is not supported")
    kind: Any = values.get("rope_type") or values.get("type") or "default"
    kind = aliases.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in _KINDS:
        raise UnsupportedError(f"{key}.rope_type {kind!r} is not supported; supported are {', '.join(_KINDS)}")
    try:
        values = _with_outer(values, raw)
        width = int(head_size * _turning(values, partial))
        turns = _Turns(width, hf_config.number(values, "rope_theta", theta), interleaved)
        return _rope(kind, values, turns, max_position)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def rope_of_kind(ropes: Mapping[str, Any], kind: str) -> Any:
    """What `rope_parameters` says of the layers of one kind, whose names are its keys; None where it says nothing.

    transformers reads YaRN's `truncate` beside those names, and not under them.
    """
    own = ropes.get(kind)
    return {**own, _TRUNCATE: ropes.get(_TRUNCATE, True)} if isinstance(own, Mapping) and own else own


def _turning(values: dict[str, Any], partial: float | None) -> float:
    """The part of each head that turns; UnsupportedError where a family has whole heads alone."""
    found = hf_config.number(values, "partial_rotary_factor", partial or 1.0)
    if partial is None and found != 1:
        raise UnsupportedError(f"partial_rotary_factor {found} is not supported in this family; supported is 1")
    return found


class _Turns(NamedTuple):
    """What turns, and how fast, before any change of frequencies."""

    width: int
    theta: float
    interleaved: bool


def _with_outer(values: dict[str, Any], raw: Raw) -> dict[str, Any]:
    """With the keys that older versions have beside the object; an original length there wins."""
    outer = {name: raw.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    whole = {name: value for name, value in outer.items() if value is not None} | values
    original = raw.get(_ORIGINAL)
    return whole if original is None else whole | {_ORIGINAL: original}


def _rope(kind: RopeKind, values: dict[str, Any], turns: _Turns, max_position: int) -> RopeConfig:
    if kind in _WITH_FACTOR and values.get("factor") is None:
        raise ConfigError(f"{kind} lacks 'factor'")
    factor = hf_config.number(values, "factor", 1.0)
    original = None if kind in ("default", "linear") else max_position
    if kind in ("llama3", "yarn", "longrope"):
        original = hf_config.count(values, _ORIGINAL, default=max_position)
    return RopeConfig(
        **turns._asdict(),
        kind=kind,
        factor=factor if kind in _WITH_FACTOR else 1.0,
        original_max_position=original,
        low_freq_factor=hf_config.number(values, "low_freq_factor", 1.0),
        high_freq_factor=hf_config.number(values, "high_freq_factor", 4.0),
        beta_fast=hf_config.number(values, "beta_fast", 32.0),
        beta_slow=hf_config.number(values, "beta_slow", 1.0),
        truncate=hf_config.flag(values, _TRUNCATE, False) if _TRUNCATE in values else True,  # null is false there
        short_factor=_factors(values, "short_factor") if kind == "longrope" else (),
        long_factor=_factors(values, "long_factor") if kind == "longrope" else (),
        attention_factor=_attention_factor(kind, values, max_position / (original or max_position)),
    )


def _factors(values: dict[str, Any], name: str) -> tuple[float, ...]:
    found = values.get(name)
    if not isinstance(found, list):
        raise ConfigError(f"longrope lacks {name!r}" if found is None else f"{name} {found!r} is not a list of numbers")
    return tuple(hf_config.number({name: value}, name, 1.0) for value in found)


def _attention_factor(kind: RopeKind, values: dict[str, Any], stretched: float) -> float:
    """What cosines and sines are multiplied by; `stretched`: the model's length in original lengths."""
    if kind not in ("yarn", "longrope"):
        return 1.0
    if values.get("attention_factor") is not None:
        return hf_config.number(values, "attention_factor", 1.0)
    if kind == "longrope":
        factor = hf_config.number(values, "factor", stretched)
        original = hf_config.count(values, _ORIGINAL, default=2)
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    factor = hf_config.number(values, "factor", 1.0)

    def scaled(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if values.get("mscale") and values.get("mscale_all_dim"):
        return scaled(hf_config.number(values, "mscale", 1)) / scaled(hf_config.number(values, "mscale_all_dim", 1))
    return scaled(1.0)
