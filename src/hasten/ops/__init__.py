"""Typed tensor operations: the only package that asks which device a tensor is on.

The functions stand in `dispatch/`, by what they compute; what they are given and give back has its types beside it.
"""

from hasten.core.model_config import Activation, GatedUnit
from hasten.ops.beams import BeamChoice, BeamMoves, BeamSearches, BeamStates, Search
from hasten.ops.block_caches import BlockCaches
from hasten.ops.cache_scales import CacheScales
from hasten.ops.dispatch.attention import (
    fixed_run,
    mean_squares,
    paged_attention,
    project,
    project_consecutive,
    store_heads,
    write_cache,
)
from hasten.ops.dispatch.beams import choose_beams, copy_blocks, move_beams
from hasten.ops.dispatch.device import (
    CACHE_DTYPES,
    TORCH_DTYPES,
    any_compiled,
    await_count,
    compile_cpu_kernels,
    compiled_together,
    default_device,
    hidden_dtype,
    kept_kernels,
    library_rows,
    recorded,
    records,
    set_count,
)
from hasten.ops.dispatch.experts import experts, norm_route, pack_experts, route
from hasten.ops.dispatch.norms import embedding, embedding_norm, norm, norm_alone, scaled
from hasten.ops.dispatch.products import (
    add_linear,
    cpu_multiplies,
    gated_linear,
    linear,
    linear_into,
    linear_parts,
    pack_linear,
    relocated,
)
from hasten.ops.dispatch.sampling import (
    count_tokens,
    draw,
    edit_logits,
    follow_counts,
    greedy,
    greedy_keys,
    largest,
    log_softmax,
    mask_logits,
    packed_logprobs,
    resolve_ids,
    tokens_of_keys,
    top_logprobs,
)
from hasten.ops.draws import NONE_LEFT, Draws
from hasten.ops.edits import Bans, EditList, FollowedCounts, LogitEdits, TokenCounts
from hasten.ops.grouped import Columns, GroupedWeight, pack_nibbles, packs
from hasten.ops.heads import HeadTransform
from hasten.ops.logprobs import TopLogprobs
from hasten.ops.meta import AttentionMeta
from hasten.ops.mixture import PackedExperts, Routing
from hasten.ops.order import fixed_order
from hasten.ops.packed import PackedLinear, QuantizedWeight, Table, Weight, moved
from hasten.ops.partial_sum import PartialSum
from hasten.ops.reference import activated, clipped, complete
from hasten.ops.rounding import Inputs, RoundedRows, multiplies
from hasten.ops.transfer import HostCopy, Upload, arrived_tensor, to_device

__all__ = [
    "CACHE_DTYPES",
    "NONE_LEFT",
    "TORCH_DTYPES",
    "Activation",
    "AttentionMeta",
    "Bans",
    "BeamChoice",
    "BeamMoves",
    "BeamSearches",
    "BeamStates",
    "BlockCaches",
    "CacheScales",
    "Columns",
    "Draws",
    "EditList",
    "FollowedCounts",
    "GatedUnit",
    "GroupedWeight",
    "HeadTransform",
    "HostCopy",
    "Inputs",
    "LogitEdits",
    "PackedExperts",
    "PackedLinear",
    "PartialSum",
    "QuantizedWeight",
    "RoundedRows",
    "Routing",
    "Search",
    "Table",
    "TokenCounts",
    "TopLogprobs",
    "Upload",
    "Weight",
    "activated",
    "add_linear",
    "any_compiled",
    "arrived_tensor",
    "await_count",
    "choose_beams",
    "clipped",
    "compile_cpu_kernels",
    "compiled_together",
    "complete",
    "copy_blocks",
    "count_tokens",
    "cpu_multiplies",
    "default_device",
    "draw",
    "edit_logits",
    "embedding",
    "embedding_norm",
    "experts",
    "fixed_order",
    "fixed_run",
    "follow_counts",
    "gated_linear",
    "greedy",
    "greedy_keys",
    "hidden_dtype",
    "kept_kernels",
    "largest",
    "library_rows",
    "linear",
    "linear_into",
    "linear_parts",
    "log_softmax",
    "mask_logits",
    "mean_squares",
    "move_beams",
    "moved",
    "multiplies",
    "norm",
    "norm_alone",
    "norm_route",
    "pack_experts",
    "pack_linear",
    "pack_nibbles",
    "packed_logprobs",
    "packs",
    "paged_attention",
    "project",
    "project_consecutive",
    "recorded",
    "records",
    "relocated",
    "resolve_ids",
    "route",
    "scaled",
    "set_count",
    "store_heads",
    "to_device",
    "tokens_of_keys",
    "top_logprobs",
    "write_cache",
]
