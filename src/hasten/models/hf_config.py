"""Values of Hugging Face's config.json, each read as what it must be; ConfigError names the key that is wrong."""

from collections.abc import Mapping
from typing import Any

from hasten.core.config import DTypeName, dtype_name
from hasten.core.errors import ConfigError

Raw = Mapping[str, Any]


def _require(condition: bool, name: str, value: Any, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"{name} has a value of the wrong kind: {value!r} is not {wanted}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def count(raw: Raw, *names: str) -> int:
    """A whole number above 0, under the first of its names that is there; the last name is today's."""
    name = next((name for name in names if raw.get(name) is not None), None)
    if name is None:
        raise ConfigError(f"config.json lacks {names[-1]!r}")
    _require(_is_whole(raw[name]) and raw[name] > 0, name, raw[name], "a whole number above 0")
    return int(raw[name])


def fraction(raw: Raw, name: str, default: float) -> float:
    """A number between 0 and 1."""
    value = raw.get(name, default)
    _require(isinstance(value, float) and 0 < value < 1, name, value, "a number between 0 and 1")
    return float(value)


def flag(raw: Raw, name: str, default: bool) -> bool:
    """True or false."""
    value = default if raw.get(name) is None else raw[name]
    _require(isinstance(value, bool), name, value, "true or false")
    return bool(value)


def token(raw: Raw, name: str, default: int | None = None) -> int | None:
    """A token id, or none."""
    value = raw.get(name, default)
    _require(value is None or _is_whole(value), name, value, "a token id")
    return value


def tokens(raw: Raw, name: str, default: int) -> tuple[int, ...]:
    """Token ids, given as one, a list or none."""
    value = raw.get(name, default)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    _require(all(map(_is_whole, ids)), name, value, "a token id or a list of them")
    return tuple(ids)


def dtype(raw: Raw) -> DTypeName:
    """Type of the weights, fp32 where it is not said; `torch_dtype` is the key's old name."""
    name = "dtype" if raw.get("dtype") else "torch_dtype"
    try:
        return dtype_name(str(raw.get(name) or "fp32"))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
