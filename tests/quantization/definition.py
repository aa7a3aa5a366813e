"""What weights of 8 bits stand for, written down apart from hasten: symmetric, by output column, rounded to nearest."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROW_SPLIT = re.compile(r"(dense|dense_4h_to_h|o_proj|down_proj|c_proj)\.weight")
"""Weights whose input features are divided over the ranks, each of which has scales of its own."""
TRANSPOSED = re.compile(r"(c_attn|c_proj|c_fc)\.weight")
"""GPT-2 stores them as [h, o]."""
QUANTIZED = re.compile(
    r"(query_key_value|dense|dense_h_to_4h|dense_4h_to_h|[qkvo]_proj|(gate|up|down)_proj|c_\w+)\.weight"
)


TYPES = {"int8": torch.int8, "w8a8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Of weights, by scheme."""


def rounded(weight_oh: Tensor, dtype: torch.dtype) -> Tensor:
    """Each row to the 255 multiples of its own step, or to the values of e4m3 times its scale, in fp32."""
    wide_oh = weight_oh.float()
    steps_o1 = wide_oh.abs().amax(1, keepdim=True) / (127 if dtype == torch.int8 else 448)
    ratios_oh = wide_oh / torch.where(steps_o1 == 0, 1, steps_o1)
    values_oh = torch.round(ratios_oh) if dtype == torch.int8 else ratios_oh.to(dtype).float()
    return (values_oh * steps_o1).to(weight_oh.dtype)


def _of_ranks(name: str, weight: Tensor, ranks: int, dtype: torch.dtype) -> Tensor:
    turned = TRANSPOSED.search(name) is not None
    weight_oh = weight.T if turned else weight
    parts = weight_oh.chunk(ranks, 1) if ROW_SPLIT.search(name) else (weight_oh,)
    joined = torch.cat([rounded(part, dtype) for part in parts], 1)
    return (joined.T if turned else joined).contiguous()


def changed_folder(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a Hugging Face folder with other tensors."""
    path = Path(shutil.copytree(folder, target))
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


def dequantized_folder(folder: Path, target: Path, head: str, ranks: int = 1, kind: str = "int8") -> Path:
    """A copy of a folder with the values that quantized weights stand for; `head`: name of the head's weight."""

    def dequantize(state: dict[str, Tensor]) -> None:
        for name, weight in state.items():
            if name == head:
                state[name] = _of_ranks(name, weight, ranks, torch.int8)
            elif QUANTIZED.search(name) and weight.dim() == 2:
                state[name] = _of_ranks(name, weight, ranks, TYPES[kind])

    return changed_folder(folder, target, dequantize)
