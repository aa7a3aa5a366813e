"""Writers of quantized checkpoints, from the layouts that their formats document, written apart from hasten.

A weight [o, h] is rounded here once, to whole numbers with scales and zero points of groups; each format then packs the
same numbers in its own way. Shapes: g groups of input features.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tests.quantization.definition import QUANTIZED, TRANSPOSED
from torch import Tensor

Arrays = dict[str, Tensor]


@dataclass(frozen=True)
class Rounded:
    """A weight of whole numbers without sign."""

    numbers_oh: Tensor
    scales_og: Tensor
    """In fp16."""
    zeros_og: Tensor
    groups_h: Tensor

    def values(self) -> Tensor:
        """What it stands for, in fp32: [o, h]."""
        zeros, scales = (each.float()[:, self.groups_h] for each in (self.zeros_og, self.scales_og))
        return (self.numbers_oh.float() - zeros) * scales


def rounded(weight_oh: Tensor, bits: int, size: int, *, symmetric: bool, shuffled: bool = False) -> Rounded:
    """Each group of input features to `2 ** bits` steps; `size` -1: they are one; `shuffled`: not neighbours."""
    width = weight_oh.shape[1]
    groups_h = torch.arange(width) // (width if size == -1 else size)
    if shuffled:
        groups_h = groups_h[torch.randperm(width, generator=torch.Generator().manual_seed(width))]
    scales, zeros = [], []
    for group in range(int(groups_h.max()) + 1):
        part = weight_oh[:, groups_h == group].float()
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            scale = torch.maximum(-low, high) / (2 ** (bits - 1) - 1)
            zeros.append(torch.full_like(scale, 2 ** (bits - 1)))
        else:
            scale = (high - low) / (2**bits - 1)
            zeros.append((-low / scale).round().clamp(1, 2**bits - 1))  # the first GPTQ cannot say 0
        scales.append(scale.half())
    scales_og, zeros_og = torch.stack(scales, 1), torch.stack(zeros, 1)
    numbers = (weight_oh.float() / scales_og.float()[:, groups_h]).round() + zeros_og[:, groups_h]
    return Rounded(numbers.clamp(0, 2**bits - 1).int(), scales_og, zeros_og.int(), groups_h)


def words(numbers: Tensor, bits: int, axis: int) -> Tensor:
    """Numbers along an axis in int32, the first in the lowest bits."""
    per = 32 // bits
    moved = np.moveaxis(numbers.numpy().astype(np.uint32), axis, 0)
    packed = np.zeros((moved.shape[0] // per, *moved.shape[1:]), np.uint32)
    for index in range(per):
        packed |= moved[index::per] << np.uint32(bits * index)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(packed, 0, axis)).view(np.int32))


@dataclass(frozen=True)
class Case:
    """A format with its settings."""

    config: dict[str, Any]
    """`quantization_config`."""
    pack: Callable[["Case", Rounded], Arrays]
    bits: int = 4
    size: int = 16
    symmetric: bool = True
    shuffled: bool = False

    def rounded(self, weight_oh: Tensor) -> Rounded:
        """A weight as this case has it."""
        return rounded(weight_oh, self.bits, self.size, symmetric=self.symmetric, shuffled=self.shuffled)


def _gptq(case: Case, made: Rounded) -> Arrays:
    zeros = made.zeros_og.T - (0 if case.config.get("checkpoint_format") == "gptq_v2" else 1)
    return {
        "qweight": words(made.numbers_oh.T, case.bits, 0),
        "qzeros": words(zeros, case.bits, 1),
        "scales": made.scales_og.T.contiguous(),
        "g_idx": made.groups_h.int(),
    }


def gptq(bits: int, size: int, *, symmetric: bool = True, shuffled: bool = False, version: int = 1) -> Case:
    """GPTQ of either version of zero points."""
    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric, "desc_act": shuffled}
    named = {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    return Case({**config, **named}, _gptq, bits, size, symmetric, shuffled)


_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _awq(_case: Case, made: Rounded) -> Arrays:
    def packed(numbers: Tensor) -> Tensor:
        eights = numbers.reshape(numbers.shape[0], -1, 8)
        return words(eights[:, :, _AWQ_ORDER].reshape(numbers.shape), 4, 1)

    return {
        "qweight": packed(made.numbers_oh.T),
        "qzeros": packed(made.zeros_og.T),
        "scales": made.scales_og.T.contiguous(),
    }


def awq(size: int) -> Case:
    """AWQ's gemm."""
    config = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
    return Case(config, _awq, 4, size, symmetric=False)


def _pack_quantized(case: Case, made: Rounded) -> Arrays:
    arrays = {
        "weight_packed": words(made.numbers_oh, case.bits, 1),
        "weight_scale": made.scales_og.contiguous(),
        "weight_shape": torch.tensor(made.numbers_oh.shape),
    }
    if not case.symmetric:
        arrays["weight_zero_point"] = words(made.zeros_og, case.bits, 0)
    if case.shuffled:
        arrays["weight_g_idx"] = made.groups_h.int()
    return arrays


def pack_quantized(bits: int, size: int, *, symmetric: bool = True, shuffled: bool = False) -> Case:
    """compressed-tensors' weight-only format, of groups or (-1) of output features."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "strategy": "channel" if size == -1 else "group",
        "group_size": None if size == -1 else size,
        "symmetric": symmetric,
        "actorder": "group" if shuffled else None,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }
    return Case(config, _pack_quantized, bits, size, symmetric, shuffled)


def is_quantized(name: str, weight: Tensor) -> bool:
    """Whether a tensor of a full-precision checkpoint is the weight of a linear layer other than the head."""
    return weight.dim() == 2 and QUANTIZED.search(name) is not None


def write(folder: Path, target: Path, case: Case) -> tuple[Path, Path]:
    """Two copies of a checkpoint: quantized, and with the values that this stands for in fp32."""
    quantized, full = (Path(shutil.copytree(folder, target / name)) for name in ("quantized", "full"))
    packed: Arrays = {}
    values: Arrays = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not is_quantized(name, weight):
            packed[name] = values[name] = weight
            continue
        turned = TRANSPOSED.search(name) is not None
        result = case.rounded(weight.T if turned else weight)
        values[name] = (result.values().T if turned else result.values()).contiguous()
        module = name.removesuffix(".weight")
        packed |= {f"{module}.{kind}": tensor for kind, tensor in case.pack(case, result).items()}
    for index, state in ((quantized, packed), (full, values)):
        save_file(state, index / "model.safetensors", metadata={"format": "pt"})
    set_config(quantized, quantization_config=case.config)
    return quantized, full


def set_config(folder: Path, **entries: Any) -> None:
    """Change entries of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
