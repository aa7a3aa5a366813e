"""One layer of a decoder while its linear layers are rounded for what they are seen to read.

Shapes: o output features, h input features.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from hasten import ops
from hasten.checkpoint.quantize import Errors, check_finite, is_linear
from hasten.core.errors import CheckpointError
from hasten.engine.calibration.observed import Magnitudes, Products, giving, reading
from hasten.layers.linear import set_weight
from hasten.layers.norm import LayerNorm, RMSNorm
from hasten.models.weight_map import WeightSpec
from hasten.quantization.formats.written import WrittenScheme
from hasten.quantization.gptq import round_by_gptq
from hasten.quantization.grid import RoundedWeight
from hasten.quantization.scheme import matrices
from hasten.quantization.smoothing import moved, smoothing_scales

_log = logging.getLogger(__name__)

_ROWS = 512
"""Tokens on which scales between a norm and linear layers are tried."""
_UNCHANGED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far moved scales may change a layer's outputs, relative to the largest; else not only linear layers read them."""


class _EnoughError(Exception):
    """A linear layer was called, and nothing behind it is of interest."""


@dataclass(frozen=True)
class Method:
    """How weights are rounded; without either, to nearest, with scales for what is read."""

    smooths: bool = False
    """Whether scales are moved from norms into the linear layers behind them (AWQ, SmoothQuant)."""
    compensates: bool = False
    """Whether input features take up each other's rounding errors (GPTQ)."""
    dampening: float = 0.01
    """Of GPTQ: added to the diagonal of the inputs' products, as a part of its mean."""


class Layer:
    """A layer with its weights, which runs over all samples again and again."""

    def __init__(
        self,
        block: nn.Module,
        specs: Sequence[WeightSpec],
        read: Callable[[WeightSpec], Tensor],
        run: Callable[[int], Tensor],
        batches: int,
    ) -> None:
        """`read` gives a stored weight in hasten's layout, `run` what the layer gives for one of the `batches`."""
        self._block, self._read, self._run, self._num_batches = block, read, run, batches
        self._specs = {spec.name: spec for spec in specs}
        self._prefix = ".".join(specs[0].name.split(".")[:2])
        modules = matrices(block)
        self._linears = {
            spec.name: modules[spec.name.removeprefix(f"{self._prefix}.")] for spec in specs if is_linear(spec)
        }
        """By the names of their weights."""
        self._scales: dict[str, Tensor] = {}
        """What input features of weights are multiplied by, [h]."""
        self._order, self._readers = self._looked_at()

    @property
    def _norms(self) -> dict[str, LayerNorm | RMSNorm]:
        """By their names."""
        return {
            f"{self._prefix}.{name}": module
            for name, module in self._block.named_modules()
            if isinstance(module, (LayerNorm, RMSNorm))
        }

    def _looked_at(self) -> tuple[list[str], dict[str, list[str]]]:
        """The linear layers in the order of their calls, and those that read what a norm gives, by the norm's name."""
        given: list[tuple[str, Tensor]] = []
        read: list[tuple[str, Tensor]] = []
        with ExitStack() as hooks:
            for name, norm in self._norms.items():
                hooks.enter_context(giving(norm, partial(_note, given, name)))
            for name, linear in self._linears.items():
                hooks.enter_context(reading(linear, partial(_note, read, name)))
            self._run(0)
        readers = {norm: [linear for linear, x_th in read if x_th is normed_th] for norm, normed_th in given}
        return list(dict.fromkeys(name for name, _ in read)), {norm: found for norm, found in readers.items() if found}

    def _weight(self, name: str) -> Tensor:
        """A weight [o, h] in fp32, with scales that were moved into it."""
        weight_oh = self._read(self._specs[name]).float()
        check_finite(self._specs[name], weight_oh)
        return weight_oh * self._scales[name] if name in self._scales else weight_oh

    def _set(self, name: str, weight: ops.Weight) -> None:
        linear = self._linears[name]
        set_weight(linear, "weight", weight)
        linear.pack()

    def smoothed(self, scheme: WrittenScheme, dtype: torch.dtype) -> dict[str, Tensor]:
        """Move scales from norms into the linear layers behind them; what becomes of the norms, by their parameters."""
        changes: dict[str, Tensor] = {}
        for name, magnitudes in self._magnitudes().items():
            weights = [self._weight(reader) for reader in self._readers[name]]
            scales_h = smoothing_scales(weights, magnitudes.inputs, scheme.grid, scheme.rounds_to)
            if scales_h is not None:
                changes |= self._move(name, scales_h, dtype)
        return changes

    def _magnitudes(self) -> dict[str, Magnitudes]:
        seen = {name: Magnitudes(-(-_ROWS // self._num_batches)) for name in self._readers}
        with ExitStack() as hooks:
            for name, magnitudes in seen.items():
                hooks.enter_context(giving(self._norms[name], magnitudes.add))
            for batch in range(self._num_batches):
                self._run(batch)
        return seen

    def _move(self, name: str, scales_h: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Move scales from one norm; nothing where more than linear layers read what it gives."""
        norm, before_th = self._norms[name], self._run(0)
        offset = float(isinstance(norm, RMSNorm) and norm.unit_offset)
        bias = f"{name}.bias" if f"{name}.bias" in self._specs else None
        stored_h = self._read(self._specs[f"{name}.weight"])
        stored_bias_h = None if bias is None else self._read(self._specs[bias])
        new = moved(stored_h, stored_bias_h, scales_h, offset)
        changes = {f"{name}.weight": new.weight_h}
        if bias is not None and new.bias_h is not None:
            changes[bias] = new.bias_h
        self._apply(name, changes, new.scales_h, dtype)
        after_th = self._run(0)
        if bool((after_th - before_th).abs().max() <= _UNCHANGED[dtype] * before_th.abs().max()):
            return changes
        _log.warning("%s is read by more than linear layers: no scales are moved from it", name)
        old = {each: self._read(self._specs[each]) for each in changes}
        self._apply(name, old, 1 / new.scales_h, dtype)
        return {}

    def _apply(self, name: str, parameters: dict[str, Tensor], scales_h: Tensor, dtype: torch.dtype) -> None:
        norm = self._norms[name]
        for parameter, value_h in parameters.items():
            setattr(norm, parameter.rpartition(".")[2], nn.Parameter(value_h.to(dtype), requires_grad=False))
        for reader in self._readers[name]:
            self._scales[reader] = self._scales.get(reader, torch.ones_like(scales_h)) * scales_h
            self._set(reader, self._weight(reader).to(dtype))

    def rounded(
        self, scheme: WrittenScheme, method: Method, dtype: torch.dtype, errors: Errors
    ) -> dict[str, RoundedWeight]:
        """Round the linear layers one after the other: each for what it reads from those that are rounded already."""
        weights = {}
        for name in self._order:
            products = self._products(name)
            weights[name] = self._rounded(name, products.mean_hh, scheme, method, errors)
            self._set(name, _computed(weights[name], scheme, dtype))
        for name in self._linears.keys() - weights.keys():
            _log.warning("no sample was seen to go through %s, which is rounded to nearest", name)
            weight_oh = self._weight(name)
            scales_og = scheme.grid.scales(weight_oh, scheme.scale_dtype(self._read(self._specs[name]).dtype))
            weights[name] = scheme.grid.rounded(weight_oh, scales_og)
        return weights

    def _products(self, name: str) -> Products:
        """What a linear layer reads; nothing behind it is computed."""
        products = Products()

        def see(x_th: Tensor) -> None:
            products.add(x_th)
            raise _EnoughError

        with reading(self._linears[name], see):
            for batch in range(self._num_batches):
                with suppress(_EnoughError):
                    self._run(batch)
        return products

    def _rounded(
        self, name: str, hessian_hh: Tensor, scheme: WrittenScheme, method: Method, errors: Errors
    ) -> RoundedWeight:
        if not bool(hessian_hh.isfinite().all()):
            raise CheckpointError(f"what {name} reads has NaN or infinity: the checkpoint is damaged")
        weight_oh, grid = self._weight(name), scheme.grid
        dtype = scheme.scale_dtype(self._read(self._specs[name]).dtype)
        if method.compensates:
            weight = round_by_gptq(weight_oh, hessian_hh, grid, dtype, dampening=method.dampening)
        else:
            weight = grid.rounded(weight_oh, grid.scales(weight_oh, dtype, hessian_hh.diagonal()))
        errors.add_outputs(weight.dequantized() - weight_oh, weight_oh, hessian_hh)
        return weight


def _note(seen: list[tuple[str, Tensor]], name: str, x_th: Tensor) -> None:
    seen.append((name, x_th))


def _computed(weight: RoundedWeight, scheme: WrittenScheme, dtype: torch.dtype) -> ops.Weight:
    """What the layer goes on with: rounded weights, and inputs rounded where the scheme rounds them."""
    if scheme.rounds_to is None:
        return weight.dequantized().to(dtype)
    return ops.QuantizedWeight(weight.numbers, weight.scales[:, 0].float(), dtype, scheme.rounds_to)
