"""What compressed-tensors says of the weights or the activations of a group of modules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hasten.core.errors import ConfigError
from hasten.models import hf_config


@dataclass(frozen=True)
class Arguments:
    """`weights` or `input_activations` of a group in `config_groups`."""

    key: str
    """Where they stand, for messages."""
    num_bits: int
    type: str
    """int or float."""
    strategy: str
    """tensor, channel, group, block or token."""
    group_size: int | None
    symmetric: bool
    dynamic: bool
    block_structure: tuple[int, ...] | None

    @classmethod
    def of(cls, raw: object, key: str) -> "Arguments":
        """Those of config.json; ConfigError names the key that is missing or of the wrong kind."""
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{key} is not an object")
        try:
            return cls._of(raw, key)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from error

    @classmethod
    def _of(cls, raw: Mapping[str, Any], key: str) -> "Arguments":
        group_size = None if raw.get("group_size") in (None, -1) else hf_config.count(raw, "group_size")
        block = raw.get("block_structure")
        if block is not None and not (isinstance(block, list) and all(type(each) is int for each in block)):
            raise ConfigError(f"block_structure {block!r} is not a list of sizes")
        strategy = raw.get("strategy") or ("tensor" if group_size is None else "group")
        return cls(
            key=key,
            num_bits=hf_config.count(raw, "num_bits", default=8),
            type=str(raw.get("type") or "int"),
            strategy=str(strategy),
            group_size=group_size,
            symmetric=hf_config.flag(raw, "symmetric", True),
            dynamic=bool(raw.get("dynamic")),
            block_structure=None if block is None else tuple(block),
        )
