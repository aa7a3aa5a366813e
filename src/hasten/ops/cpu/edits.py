"""Edits of logits, and the counts that they read, on a CPU: by kernels, and without them in numpy.

Shapes: k edited rows, or rows whose token is counted; n entries of all rows, one after the other.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.ops import native
from hasten.ops.edits import IN_PROMPT, LogitEdits, TokenCounts

Logits = NDArray[np.float32]


def edit_logits(  # noqa: D103
    logits_rv: Tensor, edits: LogitEdits, counts: TokenCounts, chosen_r: Tensor, *, in_place: bool = False
) -> Tensor:
    kernels = native.kernels()
    edited_rv = logits_rv
    if not in_place and kernels is not None and logits_rv.dtype == torch.float32 and logits_rv.stride(1) == 1:
        edited_rv = kernels.edits.copied(logits_rv)
    elif not in_place:
        edited_rv = logits_rv.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if kernels is not None and edited_rv.stride(1) == 1:
        kernels.edits.edit_logits(edited_rv, edits, counts, chosen_r)
        return edited_rv
    edited: Logits = edited_rv.numpy()
    with np.errstate(all="ignore"):
        _penalize(edited, edits, counts)
        rows = edits.rows_k.numpy()
        if len(edits.bias_ids_b):
            biased = np.repeat(rows, np.diff(edits.bias_starts.numpy()))
            np.add.at(edited, (biased, edits.bias_ids_b.numpy()), edits.biases_b.numpy())
    if len(edits.ban_ids_n):
        lengths, after = np.diff(edits.ban_starts.numpy()), edits.ban_after_n.numpy()
        last = np.repeat(chosen_r.numpy()[edits.chosen_k.numpy()], lengths)
        holds = (after < 0) | (after == last)
        edited[np.repeat(rows, lengths)[holds], edits.ban_ids_n.numpy()[holds]] = -np.inf
    return edited_rv


def _penalize(edited: Logits, edits: LogitEdits, counts: TokenCounts) -> None:
    rows = np.flatnonzero(edits.slots_k.numpy() >= 0)
    if not len(rows):
        return
    slots, penalties = edits.slots_k.numpy()[rows], edits.penalties_k3.numpy()[rows]
    sizes = counts.sizes_s.numpy()[slots]
    k, at = (np.arange(int(sizes.max())) < sizes[:, np.newaxis]).nonzero()
    entries = (slots[k], at)
    logits = (edits.rows_k.numpy()[rows[k]], counts.ids_sw.numpy()[entries])
    output = (counts.counts_sw.numpy()[entries] & (IN_PROMPT - 1)).astype(np.float32)
    repetition, presence, frequency = penalties[k].T
    x = edited[logits]
    x = np.where(x > 0, x / repetition, x * repetition)
    edited[logits] = x - np.where(output > 0, presence + frequency * output, 0)


def count_tokens(counts: TokenCounts, slots_r: Tensor, tokens_r: Tensor) -> None:  # noqa: D103
    kernels = native.kernels()
    if kernels is not None:
        kernels.edits.count_tokens(counts, slots_r.contiguous(), tokens_r.contiguous())
        return
    slots, tokens = slots_r.numpy(), tokens_r.numpy()
    counted = (slots >= 0) & (tokens >= 0)
    slots, tokens = slots[counted], tokens[counted]
    if not len(slots):
        return
    all_ids, all_counts, all_sizes = (each.numpy() for each in (counts.ids_sw, counts.counts_sw, counts.sizes_s))
    sizes = all_sizes[slots]
    width = int(sizes.max()) + 1  # with the entry that a new token gets
    found = (all_ids[slots, :width] == tokens[:, np.newaxis]) & (np.arange(width) < sizes[:, np.newaxis])
    known = found.any(axis=1)
    at = np.where(known, found.argmax(axis=1), sizes)
    all_ids[slots, at] = tokens
    all_counts[slots, at] = np.where(known, all_counts[slots, at], 0) + 1
    all_sizes[slots] = sizes + ~known


def mask_logits(logits_rv: Tensor, index_r: Tensor, masks_kw: Tensor) -> Tensor:  # noqa: D103
    kernels = native.kernels()
    if kernels is not None and logits_rv.dtype == torch.float32 and logits_rv.stride(1) == masks_kw.stride(1) == 1:
        return kernels.edits.mask_logits(logits_rv, index_r, masks_kw)
    index = index_r.numpy()
    rows = np.flatnonzero(index >= 0)
    octets = masks_kw.numpy()[index[rows]].astype("<i4", copy=False).view(np.uint8)
    left_out = np.unpackbits(octets, axis=-1, count=logits_rv.shape[1], bitorder="little") == 0
    rows_k = torch.from_numpy(rows)
    return logits_rv.index_copy(0, rows_k, logits_rv[rows_k].masked_fill_(torch.from_numpy(left_out), float("-inf")))
