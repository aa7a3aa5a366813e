"""Edits and masks of logits in fp32, and token counts: launches of `code/edits.py`."""

from torch import Tensor

from hasten.ops.edits import FollowedCounts, LogitEdits, TokenCounts
from hasten.ops.native.launch import Kernel, empty, launch

_edit = Kernel("edit", "18q")
_copied = Kernel("copied", "5q")
_follow = Kernel("follow", "9q")
_count = Kernel("count", "7q")
_mask = Kernel("mask", "8q")
_USUAL_ENTRIES = 256
"""Tokens of a sequence with penalties: about how many there are."""


def copied(logits_rv: Tensor) -> Tensor:
    """Rows of numbers once more."""
    rows, width = logits_rv.shape
    out_rv = empty(rows, width)
    launch(_copied, rows * width, rows, width, logits_rv, logits_rv.stride(0), out_rv)
    return out_rv


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


def follow_counts(counts: TokenCounts, followed: FollowedCounts, parents_b: Tensor) -> None:
    """`hasten.ops.follow_counts`."""
    table = (counts.ids_sw, counts.counts_sw, counts.sizes_s, counts.ids_sw.stride(0))
    followers = len(followed.seats_k)
    launch(_follow, 2 * _USUAL_ENTRIES * followers, followers, *followed, parents_b, *table)


def mask_logits(logits_rv: Tensor, index_r: Tensor, masks_kw: Tensor) -> Tensor:
    """`hasten.ops.mask_logits`."""
    rows, width = logits_rv.shape
    out_rv = empty(rows, width)
    masks = (index_r, masks_kw, masks_kw.stride(0))
    launch(_mask, rows * width, rows, width, logits_rv, logits_rv.stride(0), *masks, out_rv)
    return out_rv
