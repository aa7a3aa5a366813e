"""Expected seconds of a step, from the bytes that it moves and the operations that it computes.

The shares of a device's limits that steps reach, and what each layer takes besides, are those of one H200, where
BLOOM-7B1, LLaMA-3-8B and Qwen3-30B-A3B were measured, and of two CPU cores with the demo model and 12 layers of LLaMA
and of BLOOM (docs/performance-log.md).
"""

import math
from dataclasses import dataclass

from hasten.core.model_config import ModelConfig
from hasten.engine.planning.footprint import Footprint
from hasten.engine.planning.hardware import Device


@dataclass(frozen=True)
class _Rates:
    """Shares of a device's limits that are reached, and fixed times."""

    single_row: float
    """Of the read rate: weights for one row."""
    rows: float
    """Weights for several rows."""
    quantized_single_row: float
    quantized_rows: float
    """The same of quantized weights."""
    keys: float
    """Keys and values."""
    decode_flops: float
    """Of the operations per second: products of few rows."""
    expert_flops: float
    """Products of experts, of whole tiles."""
    prompt_flops: float
    """Products of many rows."""
    scores_flops: float
    """Attention of prompts."""
    layer_s: float
    """What a layer takes besides: the beginnings and ends of its kernels."""
    mixture_s: float
    """What the router of a mixture takes."""
    step_s: float
    """What a step takes on the host that the device does not hide."""
    row_s: float
    """The same, for each of its sequences."""
    expert_tile: int
    """Rows that an expert computes together, filled or not."""


_GPU = _Rates(0.93, 0.85, 0.66, 0.55, 0.93, 0.7, 0.42, 0.63, 0.4, 16e-6, 10e-6, 0.0, 0.0, 64)
_CPU = _Rates(0.9, 0.9, 0.9, 0.9, 0.5, 0.6, 0.4, 0.6, 0.4, 60e-6, 60e-6, 2e-3, 125e-6, 1)
_CPU_KERNELS = _Rates(0.8, 0.8, 0.8, 0.8, 0.6, 1.0, 0.4, 0.82, 0.4, 20e-6, 60e-6, 70e-6, 45e-6, 1)
"""Of a CPU with compiled kernels, whose steps of single tokens are recorded and replayed."""
_MOST_NARROW_ROWS = {"int8": 256, "int4": 256}
"""Rows that are multiplied by quantized weights as they are on a GPU; for more these are widened before."""
_EXCHANGE_S, _EXCHANGE_BYTES_PER_S = 5e-6, 300e9
"""A sum over ranks, of which a layer has two: GPUs of one host that reach each other's memory."""


@dataclass(frozen=True)
class Step:
    """A step's expected time, and what it consists of."""

    tokens: int
    """That it brings."""
    seconds: float
    limits: dict[str, float]
    """Seconds of each limit, by its name; they overlap."""
    read_bytes: float
    """Of weights, keys and values, read on each rank."""
    operations: float
    """Multiplications and additions of each rank."""

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.tokens / self.seconds

    @property
    def limit(self) -> str:
        """What takes most of the time."""
        return max(self.limits, key=lambda name: self.limits[name])


WEIGHTS, KEYS, COMPUTE, LAUNCH, HOST, EXCHANGE = (
    "memory bandwidth (weights)",
    "memory bandwidth (keys and values)",
    "compute",
    "fixed time per layer",
    "Python on the host",
    "sums over ranks",
)


def decode_step(
    model: ModelConfig, rank: Footprint, device: Device, batch: int, context: int, *, ranks: int = 1
) -> Step:
    """A step of `batch` single tokens behind `context` tokens each."""
    rates = _rates(device)
    experts = _experts(model, rank, batch)
    key_bytes = batch * _seen(model, context) * rank.kv_bytes_per_token
    rate = _read_rate(device, _weight_bytes(rank, device, batch, experts) + key_bytes)
    weights = _weights_s(rank, device, rates, batch, experts, rate)
    keys = key_bytes / (rate * rates.keys)
    operations: float = 2 * batch * (rank.layer_products + rank.head_products)
    compute = operations / (device.flops * rates.decode_flops)
    if model.experts is not None:
        rows = _expert_rows(model, rank, batch)
        operations += 2 * rows * rank.expert_products
        rows = max(rows, experts * rates.expert_tile) if batch > 1 else rows
        compute += 2 * rows * rank.expert_products / (device.flops * rates.expert_flops)
    limits = {WEIGHTS: weights, KEYS: keys, COMPUTE: compute, HOST: rates.step_s + batch * rates.row_s}
    read = _weight_bytes(rank, device, batch, experts) + key_bytes
    return _step(model, rates, batch, ranks, limits, read, operations)


def prompt_step(
    model: ModelConfig, rank: Footprint, device: Device, tokens: int, length: int, *, ranks: int = 1
) -> Step:
    """A step with `tokens` of prompts that have `length` tokens each."""
    rates = _rates(device)
    experts = _experts(model, rank, tokens)
    weights = _weights_s(rank, device, rates, tokens, experts, device.bytes_per_second)
    width = model.attention.num_heads * model.attention.head_size * model.num_layers / ranks
    # a token sees half of its prompt on the average, and multiplies both keys and values
    scores = tokens * _seen(model, length) * width
    dense = tokens * rank.layer_products + tokens / length * rank.head_products
    compute = 2 * (dense / rates.prompt_flops + scores / rates.scores_flops) / device.flops
    operations = 2 * (dense + scores)
    if model.experts is not None:
        products = _expert_rows(model, rank, tokens) * rank.expert_products
        operations += 2 * products
        compute += 2 * products / (device.flops * rates.expert_flops)
    read = _weight_bytes(rank, device, tokens, experts)
    return _step(model, rates, tokens, ranks, {WEIGHTS: weights, COMPUTE: compute}, read, operations)


def _rates(device: Device) -> _Rates:
    return _GPU if device.is_gpu else _CPU_KERNELS if device.has_kernels else _CPU


def _read_rate(device: Device, nbytes: float) -> float:
    """Bytes per second of what every step reads anew: from a CPU's last cache as far as it is there still.

    All of it is where half of the cache is enough, and nothing where all of it is not.
    """
    if not device.cache_bytes:
        return device.bytes_per_second
    cached = min(1.0, max(0.0, 2 - 2 * nbytes / device.cache_bytes))
    return 1 / (cached / device.cached_bytes_per_second + (1 - cached) / device.bytes_per_second)


def _weights_s(rank: Footprint, device: Device, rates: _Rates, rows: int, experts: float, rate: float) -> float:
    """Seconds of reading the weights of a step at a rate."""
    single, several = rates.single_row, rates.rows
    if rank.quantization in _MOST_NARROW_ROWS and not _widened(rank, device, rows):
        single, several = rates.quantized_single_row, rates.quantized_rows
    nbytes = _weight_bytes(rank, device, rows, experts)
    return nbytes / (rate * (single if rows == 1 else several))


def _weight_bytes(rank: Footprint, device: Device, rows: int, experts: float) -> float:
    """Bytes of weights that a step moves."""
    nbytes = rank.read_bytes + experts * rank.expert_bytes
    # written, and read by the product
    return nbytes + 2 * rank.widened_bytes if _widened(rank, device, rows) else nbytes


def _widened(rank: Footprint, device: Device, rows: int) -> bool:
    """Whether quantized weights are widened before this number of rows is multiplied by them."""
    return device.is_gpu and rows > _MOST_NARROW_ROWS.get(rank.quantization or "", rows)


def _step(
    model: ModelConfig,
    rates: _Rates,
    tokens: int,
    ranks: int,
    limits: dict[str, float],
    read_bytes: float,
    operations: float,
) -> Step:
    """Weights are read while products are computed; all else follows one another."""
    mixture = 0.0 if model.experts is None else rates.mixture_s
    limits[LAUNCH] = model.num_layers * (rates.layer_s + mixture)
    if ranks > 1:
        row_bytes = 2 * model.hidden_size
        limits[EXCHANGE] = 2 * model.num_layers * (_EXCHANGE_S + tokens * row_bytes / _EXCHANGE_BYTES_PER_S)
    others = sum(seconds for name, seconds in limits.items() if name not in (WEIGHTS, COMPUTE))
    seconds = math.hypot(limits[WEIGHTS], limits[COMPUTE]) + others
    return Step(tokens, seconds, limits, read_bytes, operations)


def _experts(model: ModelConfig, rank: Footprint, tokens: int) -> float:
    """Experts of each mixture on this rank that at least one of the tokens chooses, if all are equally likely."""
    if model.experts is None:
        return 0.0
    return rank.experts * (1 - (1 - model.experts.top_k / model.experts.num_experts) ** tokens)


def _expert_rows(model: ModelConfig, rank: Footprint, tokens: int) -> float:
    """Rows that this rank's experts of each mixture compute, together."""
    assert model.experts is not None
    return tokens * model.experts.top_k * rank.experts / model.experts.num_experts


def _seen(model: ModelConfig, context: int) -> float:
    """Tokens whose keys a token reads, on the average of all layers."""
    windows = (model.attention_of(layer).window for layer in range(model.num_layers))
    return sum(context if window is None else min(window, context) for window in windows) / model.num_layers
