"""Every op in plain torch: its definition, and the oracle of the tests. Docstrings stand at `hasten.ops.dispatch`."""

from hasten.ops.reference.attention import paged_attention, relative_bias, unseen, with_sinks
from hasten.ops.reference.device import await_count, copy_blocks, resolve_ids, set_count
from hasten.ops.reference.edits import count_tokens, edit_logits, mask_logits
from hasten.ops.reference.experts import chosen, experts, gated, pack_experts, route
from hasten.ops.reference.heads import clipped, mean_squares, project, rotated, split_heads, store_heads, write_cache
from hasten.ops.reference.norms import complete, embedding, embedding_norm, norm
from hasten.ops.reference.products import activated, add_linear, dequantized, gated_linear, linear, pack_linear
from hasten.ops.reference.sampling import (
    draw,
    drawn_indices,
    filtered,
    floor,
    greedy,
    greedy_keys,
    largest,
    probabilities,
    tokens_of_keys,
    top_logprobs,
    where_finite,
)

__all__ = [
    "activated",
    "add_linear",
    "await_count",
    "chosen",
    "clipped",
    "complete",
    "copy_blocks",
    "count_tokens",
    "dequantized",
    "draw",
    "drawn_indices",
    "edit_logits",
    "embedding",
    "embedding_norm",
    "experts",
    "filtered",
    "floor",
    "gated",
    "gated_linear",
    "greedy",
    "greedy_keys",
    "largest",
    "linear",
    "mask_logits",
    "mean_squares",
    "norm",
    "pack_experts",
    "pack_linear",
    "paged_attention",
    "probabilities",
    "project",
    "relative_bias",
    "resolve_ids",
    "rotated",
    "route",
    "set_count",
    "split_heads",
    "store_heads",
    "tokens_of_keys",
    "top_logprobs",
    "unseen",
    "where_finite",
    "with_sinks",
    "write_cache",
]
