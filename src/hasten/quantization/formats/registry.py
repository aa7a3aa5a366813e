"""The format of a checkpoint, from its configuration; what is not read is refused by name, with what to do."""

from collections.abc import Callable, Mapping
from typing import Any

from hasten.core.errors import ConfigError, HastenError, UnsupportedError
from hasten.quantization.formats.base import Format
from hasten.quantization.formats.files import METHODS

_MODEL_TYPES = {"mxfp4": "gpt_oss"}
"""Methods that are read for one `model_type` alone."""
KEYS = ("quantization_config", "compression_config")
"""Of config.json, the second in old files of compressed-tensors."""
_AT_LOAD = ("load_in_4bit", "load_in_8bit")
"""Keys of bitsandbytes, which once had no name."""
_LOAD_TIME = "give the full-precision checkpoint, which --quantization quantizes while it loads"
_ADVICE = {
    "bitsandbytes": _LOAD_TIME,
    "torchao": f"export it as compressed-tensors, or {_LOAD_TIME}",
    "mxfp4": "give it in bf16",
    "modelopt": f"export it as compressed-tensors, or {_LOAD_TIME}",
}


def _formats() -> Mapping[str, Callable[[Mapping[str, Any]], Format]]:
    """By their `quant_method`; imported for a checkpoint that has one alone."""
    from hasten.quantization.formats.awq import AWQ
    from hasten.quantization.formats.compressed_tensors import CompressedTensors
    from hasten.quantization.formats.eight_bit import FP8
    from hasten.quantization.formats.gptq import GPTQ
    from hasten.quantization.formats.mxfp4 import MXFP4

    return {"gptq": GPTQ, "awq": AWQ, "compressed-tensors": CompressedTensors, "fp8": FP8, "mxfp4": MXFP4}


def format_of(raw: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]] | None = None) -> Format | None:
    """The format that config.json asks for, or one of `files` next to it by their names; None: full precision.

    UnsupportedError and ConfigError name the key and what to do.
    """
    if raw.get("sparsity_config"):
        raise UnsupportedError("sparsity_config: sparse weights are not supported; give the dense checkpoint")
    for key in KEYS:
        if raw.get(key):
            return _opened(key, raw[key], None, raw.get("model_type"))
    for name, method in METHODS.items():
        if files and name in files:
            return _opened(name, files[name], method, raw.get("model_type"))
    return None


def _opened(where: str, raw: object, method: str | None, model_type: object) -> Format:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where} is not an object")
    default = "compressed-tensors" if where == "compression_config" else method
    if any(raw.get(key) for key in _AT_LOAD):
        default = "bitsandbytes"
    name = str(raw.get("quant_method") or default)
    formats = {each: opened for each, opened in _formats().items() if _MODEL_TYPES.get(each, model_type) == model_type}
    if name not in formats:
        advice = _ADVICE.get(name, _LOAD_TIME)
        raise UnsupportedError(
            f"{where} ({name}): quantized weights of this kind are not supported, those of {', '.join(formats)} are; "
            f"{advice}"
        )
    try:
        return formats[name](raw)
    except HastenError as error:
        raise type(error)(f"{where} ({name}): {error}") from error
