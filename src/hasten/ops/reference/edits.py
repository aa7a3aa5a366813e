"""What changes logits before a choice."""

import torch
from torch import Tensor

from hasten.ops.edits import IN_PROMPT, LogitEdits, TokenCounts


def edit_logits(  # noqa: D103
    logits_rv: Tensor, edits: LogitEdits, counts: TokenCounts, chosen_r: Tensor, *, in_place: bool = False
) -> Tensor:
    edited_rv = logits_rv
    if not in_place:
        edited_rv = logits_rv.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    rows_k = edits.rows_k.long()
    penalized_k = edits.slots_k >= 0
    if bool(penalized_k.any()):
        _penalize(edited_rv, rows_k[penalized_k], edits.slots_k[penalized_k], edits.penalties_k3[penalized_k], counts)
    if len(edits.bias_ids_b):
        biased_b = rows_k.repeat_interleave(edits.bias_starts.diff())
        edited_rv.index_put_((biased_b, edits.bias_ids_b.long()), edits.biases_b, accumulate=True)
    if len(edits.ban_ids_n):
        lengths_k = edits.ban_starts.diff()
        last_n = chosen_r[edits.chosen_k.long()].repeat_interleave(lengths_k)
        holds_n = (edits.ban_after_n < 0) | (edits.ban_after_n == last_n)
        banned = (rows_k.repeat_interleave(lengths_k)[holds_n], edits.ban_ids_n[holds_n].long())
        edited_rv.index_put_(banned, edited_rv.new_tensor(float("-inf")))
    return edited_rv


def _penalize(edited_rv: Tensor, rows_k: Tensor, slots_k: Tensor, penalties_k3: Tensor, counts: TokenCounts) -> None:
    sizes_k1 = counts.sizes_s[slots_k].unsqueeze(1)
    held_kw = torch.arange(int(sizes_k1.max()), device=rows_k.device) < sizes_k1
    k_n, w_n = held_kw.nonzero(as_tuple=True)  # the entries of all rows, one after the other
    entries = slots_k[k_n], w_n
    logits = rows_k[k_n], counts.ids_sw[entries].long()
    output_n = counts.counts_sw[entries] & (IN_PROMPT - 1)
    repetition_n, presence_n, frequency_n = penalties_k3[k_n].unbind(1)
    x_n = edited_rv[logits]
    x_n = torch.where(x_n > 0, x_n / repetition_n, x_n * repetition_n)
    edited_rv[logits] = x_n - (presence_n + frequency_n * output_n).where(output_n > 0, 0)


def count_tokens(counts: TokenCounts, slots_r: Tensor, tokens_r: Tensor) -> None:  # noqa: D103
    counted_r = (slots_r >= 0) & (tokens_r >= 0)
    slots_k, tokens_k = slots_r[counted_r].long(), tokens_r[counted_r]
    if not len(slots_k):
        return
    sizes_k = counts.sizes_s[slots_k]
    width = int(sizes_k.max()) + 1  # with the entry that a new token gets
    held_kw = torch.arange(width, device=sizes_k.device) < sizes_k.unsqueeze(1)
    found_kw = held_kw & (counts.ids_sw[slots_k, :width] == tokens_k.unsqueeze(1))
    known_k = found_kw.any(1)
    at_k = found_kw.int().argmax(1).where(known_k, sizes_k.long())
    counts.ids_sw[slots_k, at_k] = tokens_k
    counts.counts_sw[slots_k, at_k] = counts.counts_sw[slots_k, at_k].where(known_k, 0) + 1
    counts.sizes_s[slots_k] = sizes_k + ~known_k


def mask_logits(logits_rv: Tensor, index_r: Tensor, masks_kw: Tensor) -> Tensor:  # noqa: D103
    rows_k = (index_r >= 0).nonzero().squeeze(1)
    words_kw = masks_kw[index_r[rows_k].long()]
    bits_kv = (words_kw.unsqueeze(-1) >> torch.arange(32, device=words_kw.device)).bitwise_and_(1).flatten(1)
    own_kv = logits_rv[rows_k].masked_fill_(bits_kv[:, : logits_rv.shape[1]] == 0, float("-inf"))
    return logits_rv.index_copy(0, rows_k, own_kv)
