"""Edits and masks of logits in fp32, and token counts: launches of `code/edits.py`."""

from torch import Tensor

from hasten.ops.edits import LogitEdits, TokenCounts
from hasten.ops.native.launch import Kernel, empty, launch

_edit = Kernel("edit", "18q")
_count = Kernel("count", "7q")
_mask = Kernel("mask", "8q")
_USUAL_ENTRIES = 256
"""Tokens of a sequence with penalties: about how many there are."""


def edit_logits(logits_rv: Tensor, edits: LogitEdits, counts: TokenCounts, chosen_r: Tensor) -> None:
    """`hasten.ops.edit_logits`, in place."""
    work = _USUAL_ENTRIES * len(edits.rows_k) + len(edits.bias_ids_b) + len(edits.ban_ids_n)
    launch(
        _edit,
        work,
        len(edits.rows_k),
        logits_rv,
        logits_rv.stride(0),
        edits.rows_k,
        edits.slots_k,
        edits.penalties_k3,
        edits.chosen_k,
        edits.bias_starts,
        edits.bias_ids_b,
        edits.biases_b,
        edits.ban_starts,
        edits.ban_ids_n,
        edits.ban_after_n,
        chosen_r,
        counts.ids_sw,
        counts.counts_sw,
        counts.sizes_s,
        counts.ids_sw.stride(0),
    )


def count_tokens(counts: TokenCounts, slots_r: Tensor, tokens_r: Tensor) -> None:
    """`hasten.ops.count_tokens`."""
    rows, table = len(slots_r), (counts.ids_sw, counts.counts_sw, counts.sizes_s, counts.ids_sw.stride(0))
    launch(_count, _USUAL_ENTRIES * rows, rows, slots_r, tokens_r, *table)


def mask_logits(logits_rv: Tensor, index_r: Tensor, masks_kw: Tensor) -> Tensor:
    """`hasten.ops.mask_logits`."""
    rows, width = logits_rv.shape
    out_rv = empty(rows, width)
    masks = (index_r, masks_kw, masks_kw.stride(0))
    launch(_mask, rows * width, rows, width, logits_rv, logits_rv.stride(0), *masks, out_rv)
    return out_rv
