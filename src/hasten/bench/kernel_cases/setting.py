"""What all cases have in common: a model's sizes, types, and a device."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hasten import ops
from hasten.core.dtypes import CacheDType, DTypeName
from hasten.core.errors import ConfigError
from hasten.core.model_config import AttentionConfig, ExpertsConfig, ModelConfig
from hasten.ops import (
    CacheScales,
)

_BLOOM = {  # hidden size, heads, layers
    "bloom-560m": (1024, 16, 24),
    "bloom-1b1": (1536, 16, 24),
    "bloom-1b7": (2048, 16, 24),
    "bloom-3b": (2560, 32, 30),
    "bloom-7b1": (4096, 32, 30),
    "bloom": (14_336, 112, 70),
}
_SHAPES = {
    "llama-3-8b": ModelConfig(
        architecture="LlamaForCausalLM",
        num_layers=32,
        hidden_size=4096,
        intermediate_size=14_336,
        vocab_size=128_256,
        attention=AttentionConfig(num_heads=32, num_kv_heads=8, head_size=128),
    ),
    "qwen3-30b-a3b": ModelConfig(
        architecture="Qwen3MoeForCausalLM",
        num_layers=48,
        hidden_size=2048,
        intermediate_size=6144,
        vocab_size=151_936,
        attention=AttentionConfig(num_heads=32, num_kv_heads=4, head_size=128),
        experts=ExpertsConfig(num_experts=128, top_k=8, inner_size=768, normalized=True),
    ),
}
BLOCK_SIZE = 16
_RANDOM_STEPS, _LARGEST_STEP = 32.0, 127.0
"""Of random numbers in a cache of 8 bits: what 1 is stored as, and the largest that is."""


@dataclass(frozen=True)
class Setting:
    """What all cases share."""

    model: ModelConfig
    dtype: torch.dtype
    device: torch.device
    quantization: str | None = None
    """Scheme of the weights of linear layers."""
    cache_dtype: CacheDType | None = None
    """Type of 8 bits of the key/value cache; None: that of the rest."""

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal random numbers."""
        return torch.randn(shape, dtype=self.dtype, device=self.device).mul_(scale)

    def draw_ids(self, *shape: int) -> Tensor:
        """Random tokens."""
        return torch.randint(self.model.vocab_size, shape, dtype=torch.int32, device=self.device)

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, head size."""
        attention = self.model.attention
        return attention.num_heads, attention.num_kv_heads, attention.head_size

    @property
    def cache_itemsize(self) -> int:
        """Bytes of a number of the cache."""
        return self.itemsize if self.cache_dtype is None else ops.CACHE_DTYPES[self.cache_dtype].itemsize

    def caches(self, slots: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values of random numbers, at least that number of slots."""
        _, kv_heads, size = self.heads
        keys, values = self.draw(2, -(-slots // BLOCK_SIZE), BLOCK_SIZE, kv_heads, size)
        if self.cache_dtype is not None:
            dtype = ops.CACHE_DTYPES[self.cache_dtype]
            keys, values = (
                cache.mul_(_RANDOM_STEPS).clamp_(-_LARGEST_STEP, _LARGEST_STEP).to(dtype) for cache in (keys, values)
            )
        return keys, values

    def scales(self) -> CacheScales | None:
        """Those of a cache of 8 bits."""
        if self.cache_dtype is None:
            return None
        ranges = torch.full((2, self.heads[1]), _LARGEST_STEP / _RANDOM_STEPS, device=self.device)
        return CacheScales(ranges / _LARGEST_STEP, _LARGEST_STEP / ranges)


def model_shape(name: str) -> ModelConfig:
    """A model by the name of its size, or that of a folder."""
    if name in _SHAPES:
        return _SHAPES[name]
    if name in _BLOOM:
        hidden, heads, layers = _BLOOM[name]
        return ModelConfig(
            architecture="BloomForCausalLM",
            num_layers=layers,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            vocab_size=250_880,
            attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, head_size=hidden // heads),
        )
    if not Path(name).is_dir():
        raise ConfigError(f"{name} is no folder of a model, and none of {', '.join((*_BLOOM, *_SHAPES))}")
    from hasten.checkpoint.hugging_face import read_hf_config

    return read_hf_config(Path(name))


def gpu_setting(model: ModelConfig, dtype: DTypeName) -> Setting:
    """On the first GPU; ConfigError where there is none."""
    if not torch.cuda.is_available():
        raise ConfigError("kernels are measured on a GPU, and torch finds none here")
    return Setting(model, ops.TORCH_DTYPES[dtype], torch.device("cuda", 0))


def cache_text(setting: Setting) -> str:
    """The type of the cache, as it is shown."""
    return "" if setting.cache_dtype is None else f", {setting.cache_dtype} cache"


def cache_dtypes(setting: Setting) -> Iterator[CacheDType]:
    """Types of 8 bits that the device's kernels read."""
    yield from (name for name, dtype in ops.CACHE_DTYPES.items() if ops.multiplies(dtype, setting.device))
