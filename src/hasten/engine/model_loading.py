"""The model of a rank: its checkpoint's folder, its types, and its weights."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hasten import ops
from hasten.checkpoint.hub import resolve_engine
from hasten.checkpoint.plan import Checkpoint, rank_tensors
from hasten.checkpoint.source import Source
from hasten.core.config import EngineConfig
from hasten.core.dtypes import DTypeName, dtype_name
from hasten.core.errors import ConfigError
from hasten.core.gpu_weights import BEGUN, begun
from hasten.core.model_config import ModelConfig
from hasten.core.progress import progress_bar
from hasten.layers.linear import PackedModule, set_weight
from hasten.models.base import Transformer
from hasten.models.registry import model_class
from hasten.parallel.groups import ParallelGroups
from hasten.parallel.launch import Ranks
from hasten.quantization.scheme import SCHEMES, Quantizer, matrices, quantized_bytes

_log = logging.getLogger(__name__)


def compute_dtype(name: str, model: ModelConfig, device: torch.device) -> DTypeName:
    """The type to compute in: what was asked; else fp32 on a CPU and the checkpoint's own on a GPU."""
    if name != "auto":
        return dtype_name(name)
    return "fp32" if device.type == "cpu" else model.dtype


def with_folders(config: EngineConfig, ranks: Ranks) -> EngineConfig:
    """The configuration with folders for names: rank 0 looks them up, and downloads what is missing for all.

    A rank whose host does not have rank 0's folder looks its own up.
    """
    if ranks.world.rank == 0:
        config = resolve_engine(config)
    folder = str(ranks.broadcast(config.model))
    if ranks.world.rank == 0:
        return config
    return replace(config, model=folder, revision=None) if Path(folder).exists() else resolve_engine(config)


def build_model(
    checkpoint: Checkpoint,
    groups: ParallelGroups,
    dtype: torch.dtype,
    device: torch.device,
    *,
    quantization: str | None = None,
    show_progress: bool = False,
    check_memory: Callable[[int], None] | None = None,
) -> Transformer:
    """The model of this rank with its weights, laid out for the device; rank 0 logs what it loads.

    With `quantization`, each weight is quantized as it comes: at most one of them is held in full precision besides.
    `check_memory` is called, before any is read, with the bytes that they take at least.
    """
    level = logging.INFO if groups.world.rank == 0 else logging.DEBUG
    config, source = checkpoint.config, checkpoint.source
    _log.log(level, "loading %s (%s) from %s to %s", config.architecture, source.kind, source.folder, device)
    if device.type == "cpu":
        _explain_cpu(dtype, level)
    start = time.perf_counter()
    with torch.device("meta"):
        model = model_class(config.architecture)(config, groups)
    model.eval()
    quantizer = None if quantization is None else Quantizer(SCHEMES[quantization], model)
    if check_memory is not None:
        check_memory(_least_bytes(model, dtype, quantizer, is_stored=checkpoint.stored_quantization is not None))
    show = show_progress and groups.world.rank == 0
    held = _load_weights(model, checkpoint, groups, dtype, device, quantizer, show=show)
    with torch.inference_mode():
        for module in model.modules():
            if isinstance(module, PackedModule):
                module.pack()
    size = f"{held / 1e9:.3f} GB" + (f" for each of {groups.world.size} ranks" if groups.world.size > 1 else "")
    shown = quantization or checkpoint.stored_quantization
    types = f"{dtype}" if shown is None else f"{shown} and {dtype}"
    _log.log(level, "loaded %s of weights as %s in %.1f s", size, types, time.perf_counter() - start)
    if shown is not None and config.experts is not None:
        _log.log(level, "quantization %s: the experts of the mixture are in %s", shown, dtype)
    return model


def _least_bytes(model: Transformer, dtype: torch.dtype, quantizer: Quantizer | None, *, is_stored: bool) -> int:
    """Bytes of a model's parameters, without those whose size depends on how the checkpoint quantized them."""
    schemes, unknown = {} if quantizer is None else quantizer.schemes, matrices(model) if is_stored else {}
    return sum(
        quantized_bytes(schemes[name].name, *parameter.shape) if name in schemes else parameter.numel() * dtype.itemsize
        for name, parameter in model.named_parameters()
        if name not in unknown
    )


def _load_weights(
    model: Transformer,
    checkpoint: Checkpoint,
    groups: ParallelGroups,
    dtype: torch.dtype,
    device: torch.device,
    quantizer: Quantizer | None,
    *,
    show: bool,
) -> int:
    """Give a model on the meta device its weights; their bytes."""
    quantizable, held = matrices(model), 0
    within, source, upload = groups.tensor, checkpoint.source, ops.Upload(device)
    if within.size == 1:
        source.upload = upload
    nbytes = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    with progress_bar("Loading weights", nbytes, unit="bytes", show=show) as bar, _arriving(source, groups, device):
        for name, loaded in rank_tensors(
            checkpoint,
            within.rank,
            within.size,
            dtype,
            expert_parallel=groups.expert.size > 1,
            names={name for name, _ in model.named_parameters()},
        ):
            owner, _, attribute = name.rpartition(".")
            weight = ops.moved(loaded, upload)
            if not isinstance(weight, Tensor) and name not in quantizable:
                weight = weight.dequantized(dtype)
            if isinstance(weight, Tensor) and weight.ndim == 1:
                weight = weight.to(ops.hidden_dtype(dtype, device.type))
            if quantizer is not None and isinstance(weight, Tensor):
                weight = quantizer(name, weight)
            set_weight(model.get_submodule(owner), attribute, weight)
            held += weight.nbytes
            bar.advance(math.prod(loaded.shape) * dtype.itemsize)
    return held


@contextmanager
def _arriving(source: Source, groups: ParallelGroups, device: torch.device) -> Iterator[None]:
    """A block in which whole tensors of a source come to a GPU directly, maybe begun before this process had torch."""
    weights, number = BEGUN.take(), device.index or 0
    is_alone = groups.world.size == 1 and device.type == "cuda"
    if weights is None and is_alone and (files := source.plain_files):
        weights = begun(files, number)
    if weights is None:
        yield
        return

    def tensor(path: Path, name: str) -> Tensor | None:
        arrived = weights.take(path, name)
        return None if arrived is None else ops.arrived_tensor(arrived, device)

    before = source.arrived
    if is_alone and weights.number == number:
        source.arrived = tensor
    try:
        yield
    finally:
        source.arrived = before
        weights.end()


def _explain_cpu(dtype: torch.dtype, level: int) -> None:
    """Say what a CPU computes in and with."""
    if not ops.cpu_multiplies(dtype):
        name = str(dtype).removeprefix("torch.")
        _log.log(level, "%s is no faster than float32 here: its products are computed in float32", name)
    if not ops.records():
        _log.log(
            level, "decoding takes about twice as long without numba, which is not installed: pip install 'hasten[cpu]'"
        )


def quantization_of(config: EngineConfig, checkpoint: Checkpoint) -> str | None:
    """How weights are quantized; ConfigError where both the checkpoint and the configuration say so."""
    if checkpoint.stored_quantization is None:
        return config.quantization or checkpoint.quantization
    if config.quantization is not None:
        raise ConfigError(
            f"{checkpoint.path} is quantized already ({checkpoint.stored_quantization}); leave out quantization "
            f"{config.quantization}, or give the full-precision checkpoint"
        )
    return checkpoint.stored_quantization
