"""From a full-precision checkpoint to a quantized one, by any method."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from hasten.checkpoint.quantize import (
    Report,
    Rounding,
    Summary,
    ToNearest,
    open_unquantized,
    scheme_for,
    write_quantized,
)
from hasten.core.config import EngineConfig
from hasten.core.dtypes import Quantization
from hasten.core.errors import CapacityError, ConfigError
from hasten.engine.calibration.calibrated import Calibrated
from hasten.engine.calibration.layer import Method
from hasten.engine.model_loading import compute_dtype
from hasten.engine.rank_device import rank_device
from hasten.ops import TORCH_DTYPES
from hasten.parallel.groups import ALONE

MethodName = Literal["rtn", "gptq", "awq", "smoothquant", "awq+gptq", "smoothquant+gptq"]
RTN: MethodName = "rtn"
METHODS: Mapping[MethodName, Method] = {
    "gptq": Method(compensates=True),
    "awq": Method(smooths=True),
    "smoothquant": Method(smooths=True),
    "awq+gptq": Method(smooths=True, compensates=True),
    "smoothquant+gptq": Method(smooths=True, compensates=True),
}
"""Methods that need samples."""
_FOR_WEIGHTS, _FOR_BOTH = ("int4", "int8"), ("w8a8", "fp8")
_BEST: Mapping[Quantization, MethodName] = {
    "int4": "awq+gptq",
    "int8": "awq+gptq",
    "w8a8": "smoothquant+gptq",
    "fp8": "smoothquant+gptq",
}
LEAST_SAMPLES = 16


@dataclass(frozen=True)
class QuantizeOptions:
    """How a checkpoint is quantized."""

    scheme: Quantization
    method: MethodName | None = None
    """None: rtn without samples, the most accurate one with them."""
    samples: Sequence[Sequence[int]] = ()
    """Token ids of the texts that it is calibrated with."""
    dampening: float | None = None
    """Of GPTQ; None: that of `Method`."""
    device: str = "auto"

    @property
    def chosen(self) -> MethodName:
        """The method, with a default for none."""
        return self.method or (_BEST[self.scheme] if self.samples else RTN)

    def check(self) -> None:
        """ConfigError where scheme, method and samples do not fit each other."""
        check_method(self.scheme, self.chosen, calibrates=bool(self.samples))
        if self.chosen != RTN and len(self.samples) < LEAST_SAMPLES:
            raise ConfigError(
                f"{len(self.samples)} samples are too few to calibrate with; give at least {LEAST_SAMPLES}, and better "
                "some hundred"
            )
        if self.dampening is not None and "gptq" not in self.chosen:
            raise ConfigError(f"dampening is of gptq, and the method is {self.chosen}; leave it out")
        if self.dampening is not None and not 0 < self.dampening < 1:
            raise ConfigError(f"dampening must be between 0 and 1, got {self.dampening}")


def check_method(scheme: Quantization, method: MethodName, *, calibrates: bool) -> None:
    """ConfigError where a method is not for a scheme, or lacks what it is calibrated with."""
    for part, schemes, what in (
        ("awq", _FOR_WEIGHTS, "whose activations stay as they are"),
        ("smoothquant", _FOR_BOTH, "whose activations are rounded"),
    ):
        if part in method and scheme not in schemes:
            raise ConfigError(f"method {method} is for {' and '.join(schemes)}, {what}; not for {scheme}")
    if method == RTN and calibrates:
        raise ConfigError("method rtn reads no calibration texts: leave calibration out, or give another method")
    if method != RTN and not calibrates:
        raise ConfigError(
            f'method {method} needs calibration="FILE", a text file or JSON lines with a "text" each; or use rtn'
        )


def quantize(
    model: str,
    output: Path,
    options: QuantizeOptions,
    report: Report = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
) -> Summary:
    """Write a quantized copy of a checkpoint, given as a folder or a Hugging Face id; on any error there is none.

    `report` is called with the bytes of the tensors that are done, `advance` with the layers. ConfigError,
    CheckpointError and UnsupportedError say what is wrong and what to do.
    """
    options.check()
    source = open_unquantized(model)
    scheme = scheme_for(source, options.scheme)
    rounding: Rounding = ToNearest(source, scheme)
    if options.chosen != RTN:
        device = rank_device(EngineConfig.create(str(source.folder), device=options.device), ALONE, 1)
        dtype = TORCH_DTYPES[compute_dtype("auto", source.config, device)]
        method = METHODS[options.chosen]
        if options.dampening is not None:
            method = replace(method, dampening=options.dampening)
        _check_tokens(options.samples, source.config.vocab_size)
        rounding = Calibrated(source, scheme, method, options.samples, device, dtype, advance)
    try:
        return write_quantized(source, output, scheme, rounding, report)
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            "the device's memory ran out while a layer was calibrated; give fewer or shorter samples, or device cpu"
        ) from error


def _check_tokens(samples: Sequence[Sequence[int]], vocab_size: int) -> None:
    for ids in samples:
        if not ids or not all(0 <= token < vocab_size for token in ids):
            raise ConfigError(
                f"a sample is empty or has tokens outside the vocabulary of {vocab_size}; are the texts tokenized with "
                "the model's own tokenizer?"
            )
