"""GPTQ's checkpoints, as AutoGPTQ and GPTQModel write them.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023.
Shapes: o output features, h input features, g groups of input features.
"""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import ConfigError, UnsupportedError
from hasten.models import hf_config
from hasten.quantization.formats.base import Module, find, groups_of, unpacked
from hasten.quantization.stored import StoredWeight, pack_groups

_LAYOUTS = ("gptq", "gptq_v2")


@dataclass(frozen=True)
class _Settings:
    """How one module is quantized."""

    bits: int
    group_size: int | None
    """None: all input features are one group."""
    symmetric: bool

    @classmethod
    def of(cls, raw: Mapping[str, Any], default: "_Settings | None" = None) -> "_Settings":
        """Those of a configuration, or of what it overrides for some modules."""
        bits = hf_config.count(raw, "bits", default=None if default is None else default.bits)
        if bits not in (4, 8):
            raise UnsupportedError(f"bits {bits} is not supported for gptq; 4 and 8 are")
        group_size = raw.get("group_size", -1) if default is None else raw.get("group_size", default.group_size or -1)
        if type(group_size) is not int or (group_size < 1 and group_size != -1):
            raise ConfigError(f"group_size {group_size!r} is not a whole number above 0, or -1")
        symmetric = hf_config.flag(raw, "sym", True if default is None else default.symmetric)
        return cls(bits, None if group_size == -1 else group_size, symmetric)


class GPTQ:
    """`quant_method` gptq: 4 or 8 bits, with any order of activations."""

    name = "gptq"
    is_held = True
    cache_dtype = None

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.settings = _Settings.of(raw)
        layout = raw.get("checkpoint_format") or raw.get("format") or "gptq"
        if layout not in _LAYOUTS:
            raise UnsupportedError(
                f"checkpoint_format {layout!r} is not supported for gptq; supported are {' and '.join(_LAYOUTS)}"
            )
        self.offset = 1 if layout == "gptq" else 0
        """Of zero points: the first version stores them less 1."""
        dynamic = raw.get("dynamic") or {}
        if not isinstance(dynamic, Mapping) or not all(isinstance(each, Mapping) for each in dynamic.values()):
            raise ConfigError("dynamic is not an object of rules")
        self.rules = [
            (_pattern(rule), _Settings.of(changes, self.settings))
            for rule, changes in dynamic.items()
            if not rule.startswith("-:")
        ]

    def find(self, module: str, names: Container[str]) -> Mapping[str, str] | None:
        """See `Format.find`."""
        return find(module, names, ("qweight", "qzeros", "scales"), ("g_idx",), self.name)

    def is_leftover(self, name: str) -> bool:
        """Old files have a bias for each linear layer, zero where the model has none."""
        return name.endswith(".bias")

    def read(self, module: Module) -> StoredWeight:
        """See `Format.read`."""
        settings = next((found for pattern, found in self.rules if pattern.match(module.name)), self.settings)
        out_features, in_features = module.shape
        bits, per_word = settings.bits, 32 // settings.bits
        if in_features % per_word or out_features % per_word:
            raise module.fail("qweight", f"is of {out_features} x {in_features} features, no multiples of {per_word}")
        groups = 1 if settings.group_size is None else -(-in_features // settings.group_size)
        of_bits, of_groups = f"bits {bits}", f"group_size {settings.group_size or -1}"
        qweight = module.tensor("qweight", (in_features // per_word, out_features), (torch.int32,), of_bits)
        qzeros = module.tensor("qzeros", (groups, out_features // per_word), (torch.int32,), of_groups)
        zeros = (unpacked(qzeros, bits).flatten(1) + self.offset) & (1 << bits) - 1
        middle = 1 << (bits - 1)
        if settings.symmetric and not bool((zeros == middle).all()):
            raise module.fail("qzeros", f"has zero points other than {middle}, but sym is true: {self._advice()}")
        return StoredWeight(
            values=unpacked(qweight, bits).permute(1, 0, 2).flatten(1),
            scales=module.scales("scales", (groups, out_features), of_groups).t(),
            zeros=zeros.t(),
            groups_h=self._groups(module, groups, settings.group_size),
            middle=middle,
            pack=pack_groups,
        )

    def _advice(self) -> str:
        other = _LAYOUTS[self.offset]
        return f"if these are files of {other}, say so in checkpoint_format; else sym is false"

    def _groups(self, module: Module, groups: int, group_size: int | None) -> Tensor:
        in_features = module.shape[1]
        if "g_idx" not in module.tensors:
            return groups_of(in_features, group_size)
        found = module.tensor("g_idx", (in_features,), (torch.int32, torch.int64), "desc_act").long()
        if not bool(((found >= 0) & (found < groups)).all()):
            raise module.fail("g_idx", f"has numbers of groups outside 0 to {groups - 1}")
        return found


def _pattern(rule: str) -> re.Pattern[str]:
    try:
        return re.compile(rule.removeprefix("+:"))
    except re.error as error:
        raise ConfigError(f"dynamic has {rule!r}, which is no regular expression ({error})") from error
