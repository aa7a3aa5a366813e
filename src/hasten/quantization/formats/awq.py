"""AWQ's checkpoints, as AutoAWQ writes them.

Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2024.
Shapes: o output features, h input features, g groups of input features.
"""

from collections.abc import Container, Mapping
from typing import Any

import torch

from hasten.core.errors import UnsupportedError
from hasten.models import hf_config
from hasten.quantization.formats.base import Module, find, groups_of, unpacked
from hasten.quantization.stored import StoredWeight, pack_groups

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where the output features of a word lie in it."""
_DOWN = ("dense_4h_to_h", "c_proj", "fc_out", "down_proj")
_ACTIVATIONS = ("gelu_impl", "act")
_INPUT = "input"
_BITS = 4


class AWQ:
    """`quant_method` awq in its version gemm: 4 bits, with a zero point for each group."""

    name = "awq"
    is_held = True
    cache_dtype = None

    def __init__(self, raw: Mapping[str, Any]) -> None:
        bits = hf_config.count(raw, "w_bit", "bits")
        if bits != _BITS:
            raise UnsupportedError(f"bits {bits} is not supported for awq; 4 is")
        version = str(raw.get("version") or "gemm").lower()
        if version != "gemm":
            raise UnsupportedError(f"version {version!r} is not supported for awq; gemm is")
        if (backend := raw.get("backend", "autoawq")) != "autoawq":
            raise UnsupportedError(f"backend {backend!r} is not supported for awq; autoawq is")
        if not hf_config.flag(raw, "zero_point", True):
            raise UnsupportedError("zero_point false is not supported for awq")
        given = raw.get("group_size", raw.get("q_group_size"))
        self.group_size = None if given == -1 else hf_config.count(raw, "q_group_size", "group_size")

    def find(self, module: str, names: Container[str]) -> Mapping[str, str] | None:
        """See `Format.find`; the tensor behind an activation is the input's of the product that follows it."""
        found = find(module, names, ("qweight", "qzeros", "scales"), (), self.name)
        parent, _, own = module.rpartition(".")
        if found is None or own not in _DOWN:
            return found
        scaled = (f"{parent}.{activation}.scales" for activation in _ACTIVATIONS)
        scales = next((name for name in scaled if name in names), None)
        return found if scales is None else {**found, _INPUT: scales}

    def is_leftover(self, name: str) -> bool:
        """There are none."""
        return False

    def read(self, module: Module) -> StoredWeight:
        """See `Format.read`."""
        out_features, in_features = module.shape
        words, in_words = out_features // 8, f"bits {_BITS}"
        if out_features % 8:
            raise module.fail("qweight", f"is of {out_features} output features, no multiple of 8")
        groups = 1 if self.group_size is None else -(-in_features // self.group_size)
        of_groups = f"group_size {self.group_size or -1}"
        qweight = module.tensor("qweight", (in_features, words), (torch.int32,), in_words)
        qzeros = module.tensor("qzeros", (groups, words), (torch.int32,), of_groups)
        values_ho, zeros_go = (unpacked(each, _BITS)[..., _ORDER].flatten(1) for each in (qweight, qzeros))
        input_scales = None
        if _INPUT in module.tensors:
            input_scales = module.scales(_INPUT, (in_features,), "the activation before it").float().reciprocal()
        return StoredWeight(
            values=values_ho.t(),
            scales=module.scales("scales", (groups, out_features), of_groups).t(),
            zeros=zeros_go.t(),
            groups_h=groups_of(in_features, self.group_size),
            middle=8,
            input_scales=input_scales,
            pack=pack_groups,
        )
