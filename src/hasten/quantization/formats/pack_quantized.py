"""compressed-tensors' pack-quantized: whole numbers of 4 or 8 bits in words of 32, activations as they are.

Shapes: o output features, h input features, g groups of input features.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.core.errors import UnsupportedError
from hasten.quantization.formats.base import Module, groups_of, unpacked
from hasten.quantization.formats.scheme import Arguments
from hasten.quantization.stored import StoredWeight, pack_groups

_WORDS = (torch.int32,)


class PackQuantized:
    """W4A16 and W8A16, with scales of groups, of output features or of the whole weight."""

    required: Sequence[str] = ("weight_packed", "weight_scale")
    optional: Sequence[str] = ("weight_shape", "weight_zero_point", "weight_g_idx")

    def check(self, weights: Arguments, activations: Arguments | None) -> None:
        """See `Packing.check`."""
        if weights.type != "int" or weights.num_bits not in (4, 8):
            raise UnsupportedError(
                f"{weights.key}: {weights.type} of num_bits {weights.num_bits}; int of 4 or 8 is supported"
            )
        if weights.strategy not in ("tensor", "channel", "group"):
            raise UnsupportedError(
                f"{weights.key}: strategy {weights.strategy!r}; tensor, channel and group are supported"
            )
        if activations is not None:
            raise UnsupportedError(f"{activations.key}: activations stay as they are in pack-quantized")

    def read(self, module: Module, weights: Arguments, activations: Arguments | None) -> StoredWeight:
        """See `Packing.read`."""
        out_features, in_features = module.shape
        bits, per_word = weights.num_bits, 32 // weights.num_bits
        packed = module.tensor(
            "weight_packed", (out_features, -(-in_features // per_word)), _WORDS, f"{weights.key}.num_bits {bits}"
        )
        groups, key = _groups(weights, in_features)
        shape = (1,) if weights.strategy == "tensor" else (out_features, groups)
        scales = module.scales("weight_scale", shape, key).expand(out_features, groups)
        if "weight_shape" in module.tensors and module.tensors["weight_shape"].tolist() != [out_features, in_features]:
            stored = module.tensors["weight_shape"].tolist()
            raise module.fail("weight_shape", f"is {stored}, but config.json asks for {[out_features, in_features]}")
        return StoredWeight(
            values=unpacked(packed, bits).flatten(1)[:, :in_features],
            scales=scales,
            zeros=None if weights.symmetric else _zeros(module, bits, groups, weights.key),
            groups_h=_order(module, groups, groups_of(in_features, weights.group_size if groups > 1 else None)),
            middle=1 << (bits - 1),
            pack=pack_groups,
        )


def words(values: Tensor, bits: int) -> Tensor:
    """Values of 4 or 8 bits [o, h] in words of 32 along the rows, the first in the lowest bits, zeros at the end."""
    octets = values if bits == 8 else F.pad(values, (0, values.shape[1] % 2)).unflatten(1, (-1, 2))
    octets = octets if bits == 8 else octets[:, :, 0] | (octets[:, :, 1] << 4)
    return F.pad(octets, (0, -octets.shape[1] % 4)).contiguous().view(torch.int32)


def _groups(weights: Arguments, in_features: int) -> tuple[int, str]:
    """How many there are, and the key that says so."""
    if weights.strategy != "group":
        return 1, f"{weights.key}.strategy {weights.strategy}"
    size = weights.group_size or in_features
    return -(-in_features // size), f"{weights.key}.group_size {size}"


def _zeros(module: Module, bits: int, groups: int, key: str) -> Tensor:
    """Zero points [o, g], packed along output features."""
    out_features, per_word = module.shape[0], 32 // bits
    if "weight_zero_point" not in module.tensors:
        raise module.fail("weight_zero_point", f"is missing, but {key}.symmetric is false")
    shape = (-(-out_features // per_word), groups)
    words = module.tensor("weight_zero_point", shape, _WORDS, f"{key}.symmetric false")
    return unpacked(words, bits).permute(0, 2, 1).flatten(0, 1)[:out_features]


def _order(module: Module, groups: int, default: Tensor) -> Tensor:
    """The group of each input feature, as actorder has them; -1 stands for no order."""
    if "weight_g_idx" not in module.tensors:
        return default
    found = module.tensor("weight_g_idx", default.shape, (torch.int32, torch.int64), "actorder").long()
    if bool((found < 0).all()):
        return default
    if not bool(((found >= 0) & (found < groups)).all()):
        raise module.fail("weight_g_idx", f"has numbers of groups outside 0 to {groups - 1}")
    return found
