"""Checkpoints of compressed-tensors, as llm-compressor writes them: which modules are quantized, and how.

How the tensors of a module are packed is a `Packing`, of which there is one file each.
"""

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hasten.core.errors import CheckpointError, ConfigError, UnsupportedError
from hasten.quantization.formats.base import Module, find
from hasten.quantization.formats.eight_bit import FLOAT_QUANTIZED, INT_QUANTIZED
from hasten.quantization.formats.pack_quantized import PackQuantized
from hasten.quantization.formats.scheme import Arguments
from hasten.quantization.stored import StoredWeight


class Packing(Protocol):
    """A value of `format`: the tensors of a module, and what they mean."""

    @property
    def required(self) -> Sequence[str]:
        """What its tensors are called behind the module's name."""
        ...

    @property
    def optional(self) -> Sequence[str]:
        """Tensors that may be there as well."""
        ...

    def check(self, weights: Arguments, activations: Arguments | None) -> None:
        """UnsupportedError names the key of `config_groups` that is not supported."""
        ...

    def read(self, module: Module, weights: Arguments, activations: Arguments | None) -> StoredWeight:
        """See `Format.read`."""
        ...


PACKINGS: Mapping[str, Packing] = {
    "pack-quantized": PackQuantized(),
    "int-quantized": INT_QUANTIZED,
    "float-quantized": FLOAT_QUANTIZED,
}
_LINEAR = "Linear"
_CACHE_BITS = 8
_OF_CACHE = re.compile(r".*\.([kvq]_(scale|zero_point)|[kv]_proj\.output_scale)")


@dataclass(frozen=True)
class _Group:
    """Modules that are quantized alike."""

    name: str
    targets: tuple[str, ...]
    weights: Arguments
    activations: Arguments | None
    packing: Packing


class CompressedTensors:
    """`quant_method` compressed-tensors."""

    name = "compressed-tensors"
    is_held = True

    def __init__(self, raw: Mapping[str, Any]) -> None:
        if (sparsity := raw.get("sparsity_config")) and sparsity.get("format") not in (None, "dense"):
            raise UnsupportedError(f"sparsity_config ({sparsity.get('format')}): sparse weights are not supported")
        if raw.get("transform_config"):
            raise UnsupportedError("transform_config: rotated weights are not supported")
        groups = raw.get("config_groups")
        if not isinstance(groups, Mapping) or not all(isinstance(each, Mapping) for each in groups.values()):
            raise ConfigError("config_groups is not an object of groups")
        self.groups = [self._group(name, each, str(raw.get("format"))) for name, each in groups.items()]
        self._cache_scheme = raw.get("kv_cache_scheme")

    def _group(self, name: str, raw: Mapping[str, Any], packed: str) -> _Group:
        packed = str(raw.get("format") or packed)
        if packed not in PACKINGS:
            raise UnsupportedError(f"format {packed!r} is not supported; supported are {', '.join(PACKINGS)}")
        if raw.get("output_activations"):
            raise UnsupportedError(f"config_groups.{name}.output_activations is not supported")
        packing, inputs = PACKINGS[packed], raw.get("input_activations")
        weights = Arguments.of(raw.get("weights"), f"config_groups.{name}.weights")
        activations = Arguments.of(inputs, f"config_groups.{name}.input_activations") if inputs else None
        packing.check(weights, activations)
        targets = raw.get("targets")
        if not isinstance(targets, list) or not all(isinstance(each, str) for each in targets):
            raise ConfigError(f"config_groups.{name}.targets is not a list of names")
        return _Group(name, tuple(targets), weights, activations, packing)

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """See `Format.cache_dtype`; files without a scheme whose scales are there are of fp8."""
        if self._cache_scheme is None:
            return torch.float8_e4m3fn
        scheme = Arguments.of(self._cache_scheme, "kv_cache_scheme")
        if scheme.num_bits != _CACHE_BITS or not scheme.symmetric:
            raise UnsupportedError("kv_cache_scheme: num_bits 8 and symmetric true are supported")
        return torch.int8 if scheme.type == "int" else torch.float8_e4m3fn

    def find(self, module: str, names: Container[str]) -> Mapping[str, str] | None:
        """See `Format.find`; modules without a scale are those that `ignore` names."""
        for packing in {id(group.packing): group.packing for group in self.groups}.values():
            if found := find(module, names, packing.required, packing.optional, self.name):
                return found
        return None

    def is_leftover(self, name: str) -> bool:
        """Scales of the key/value cache."""
        return _OF_CACHE.fullmatch(name) is not None

    def read(self, module: Module) -> StoredWeight:
        """See `Format.read`."""
        group = self._group_of(module.name)
        return group.packing.read(module, group.weights, group.activations)

    def _group_of(self, name: str) -> _Group:
        for matches in (_is_named, _is_linear):
            for group in self.groups:
                if any(matches(name, target) for target in group.targets):
                    return group
        raise CheckpointError(f"'{name}' is quantized, but no targets of config_groups name it")


def _is_named(name: str, target: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else name == target


def _is_linear(_name: str, target: str) -> bool:
    return target == _LINEAR
