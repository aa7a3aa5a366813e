"""What a model takes on each rank, known before any weight is read: the model is built without memory."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from hasten import ops
from hasten.core.dtypes import CacheDType, DTypeName
from hasten.core.model_config import ModelConfig
from hasten.layers.attention import Attention
from hasten.layers.embedding import Embedding, Head
from hasten.layers.experts import Experts, SharedExpert
from hasten.layers.linear import PackedModule
from hasten.layers.norm import LayerNorm, RMSNorm
from hasten.models.base import Transformer
from hasten.models.registry import model_class
from hasten.parallel.groups import ALONE, ParallelGroups, TensorGroup
from hasten.quantization.scheme import SCHEMES, Quantizer, quantized_bytes

_PARTS: tuple[tuple[type[nn.Module], str], ...] = (
    (Embedding, "embedding"),
    (Head, "head"),
    (Attention, "attention"),
    (SharedExpert, "mlp"),
    (Experts, "experts"),
    (PackedModule, "mlp"),
    (LayerNorm, "norms"),
    (RMSNorm, "norms"),
)
"""Which part of a model the weights of a module are counted as, if no module that holds it is one of another."""


@dataclass(frozen=True)
class Footprint:
    """Bytes and multiplications of one rank."""

    parts: dict[str, int]
    """Bytes of weights of each part, largest first."""
    kv_bytes_per_token: int
    """Of the key/value cache."""
    read_bytes: int
    """Weights that a step reads whatever it computes: all but experts, and but an embedding that is no head."""
    quantization: str | None
    widened_bytes: int
    """What quantized weights have in the type that the model computes in; 0 where none is quantized."""
    experts: int
    """That this rank holds of each mixture, or a part of each; 0 where there is none."""
    expert_bytes: int
    """Of one expert of each layer with a mixture, together."""
    layer_products: int
    """Multiplications for a token, those of one expert of each mixture left out."""
    expert_products: int
    """Multiplications for a token in one expert of each layer with a mixture."""
    head_products: int
    """Multiplications for a row of logits."""

    @property
    def weight_bytes(self) -> int:
        """Of all weights."""
        return sum(self.parts.values())


def footprint(
    config: ModelConfig,
    dtype: DTypeName,
    *,
    ranks: int = 1,
    quantization: str | None = None,
    cache_dtype: CacheDType | None = None,
    whole_experts: bool = False,
) -> Footprint:
    """What rank 0 of `ranks` takes; the others take as much. `whole_experts`: expert_parallel.

    `cache_dtype`: a type of 8 bits for the key/value cache; None for `dtype`.
    """
    group = TensorGroup(0, ranks)
    groups = ParallelGroups(tensor=group, expert=group if whole_experts else ALONE)
    with torch.device("meta"):
        model = model_class(config.architecture)(config, groups)
    itemsize = ops.TORCH_DTYPES[dtype].itemsize
    cache_itemsize = itemsize if cache_dtype is None else ops.CACHE_DTYPES[cache_dtype].itemsize
    schemes = {} if quantization is None else Quantizer(SCHEMES[quantization], model).schemes
    parts, products, widened = Counter[str](), Counter[str](), 0
    tied = any(isinstance(module, Head) and module.tied for module in model.modules())
    for name, part, parameter in _parameters(model):
        count = parameter.numel()
        scheme = schemes.get(name)
        widened += 0 if scheme is None else count * itemsize
        parts[part] += count * itemsize if scheme is None else quantized_bytes(scheme.name, *parameter.shape)
        products[part] += count if parameter.ndim > 1 else 0
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    looked_up = 0 if tied else parts["embedding"]
    held = experts[0].gate_up.shape[0] if experts else 0
    return Footprint(
        parts=dict(parts.most_common()),
        kv_bytes_per_token=sum(2 * each.num_kv_heads * each.head_size for each in attentions) * cache_itemsize,
        read_bytes=sum(parts.values()) - looked_up - parts["experts"],
        quantization=quantization,
        widened_bytes=widened,
        experts=held,
        expert_bytes=parts["experts"] // max(1, held),
        layer_products=products["attention"] + products["mlp"],
        expert_products=products["experts"] // max(1, held),
        head_products=products["embedding" if tied else "head"],
    )


def _parameters(model: Transformer) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Name, part and shape of each parameter."""
    kinds = {name: _part(module) for name, module in model.named_modules()}
    for name, parameter in model.named_parameters():
        owners = name.split(".")
        found = (kinds[".".join(owners[:end])] for end in range(len(owners)))
        yield name, next((part for part in found if part is not None), "other"), parameter


def _part(module: nn.Module) -> str | None:
    return next((part for kind, part in _PARTS if isinstance(module, kind)), None)
