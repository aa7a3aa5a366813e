"""Names of data types: of weights and computation, of quantized weights, of the key/value cache."""

import typing
from typing import Literal

from hasten.core.errors import ConfigError

DTypeName = Literal["fp32", "fp16", "bf16"]
"""Names of the data types, as FasterTransformer writes them in config.ini."""

DTYPES: tuple[DTypeName, ...] = ("fp32", "fp16", "bf16")
_DTYPE_ALIASES: dict[str, DTypeName] = {
    "fp32": "fp32",
    "float32": "fp32",
    "float": "fp32",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
}

Quantization = Literal["int8", "w8a8", "fp8", "int4"]
"""Schemes of quantization that weights may be loaded with."""
QUANTIZATIONS: tuple[Quantization, ...] = typing.get_args(Quantization)


KVCacheDType = Literal["auto", "fp8", "fp8_e4m3", "int8"]
"""Types of the key/value cache: `auto` is the type that the model computes in, `fp8` is e4m3."""
KV_CACHE_DTYPES: tuple[KVCacheDType, ...] = typing.get_args(KVCacheDType)
CacheDType = Literal["fp8", "int8"]
"""Those of 8 bits."""


def dtype_name(text: str) -> DTypeName:
    """Short name of a data type given as `fp16`, `float16`, `torch.float16` or `half`; ConfigError for others."""
    name = _DTYPE_ALIASES.get(text.removeprefix("torch."))
    if name is None:
        raise ConfigError(f"data type {text!r} is not known; use one of {', '.join(DTYPES)}")
    return name
