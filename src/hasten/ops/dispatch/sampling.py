"""From logits to tokens and their log-probabilities."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.ops import cpu, native, reference
from hasten.ops.draws import Draws
from hasten.ops.edits import FollowedCounts, LogitEdits, TokenCounts
from hasten.ops.logprobs import TopLogprobs

if TYPE_CHECKING:
    pass


def resolve_ids(ids_t: Tensor, chosen_r: Tensor) -> Tensor:
    """Token ids [t] with those below 0 replaced: -1 - i stands for `chosen_r[i]`, and for token 0 if that is below 0.

    So a step can read tokens that the step before chose and only the device knows.
    """
    if ids_t.is_cuda:
        from hasten.ops.gpu import cache

        return cache.resolve_ids(ids_t, chosen_r)
    return reference.resolve_ids(ids_t, chosen_r)


def greedy(logits_rv: Tensor) -> Tensor:
    """The most probable token of each row, the first among equals: int32 [r].

    -1 where a logit is NaN or infinite, `NONE_LEFT` where all are minus infinity.
    """
    if logits_rv.is_cuda:
        from hasten.ops.gpu import sampling

        return sampling.greedy(logits_rv)
    return cpu.sampling.greedy(logits_rv)


def greedy_keys(logits_rv: Tensor, first: int) -> Tensor:
    """What `greedy` compares of each row, int64 [r]: of the shards of a row, the greatest has the token.

    `first`: the token of the first logit. A shard may have none.
    """
    if logits_rv.is_cuda:
        from hasten.ops.gpu import sampling

        return sampling.greedy_keys(logits_rv, first)
    return reference.greedy_keys(logits_rv, first)


def tokens_of_keys(keys_r: Tensor) -> Tensor:
    """The tokens of keys, int32 [r], below 0 as in `greedy`."""
    if keys_r.is_cuda:
        from hasten.ops.gpu import sampling

        return sampling.tokens_of_keys(keys_r)
    return reference.tokens_of_keys(keys_r)


def draw(logits_rv: Tensor, draws: Draws) -> Tensor:
    """Tokens drawn by temperature, min-p, top-k and top-p, in this order: int32 [r], below 0 as in `greedy`.

    Each filter keeps what is as probable as the last token it keeps, and the draw goes through the vocabulary in its
    own order: neither ties nor the filters of other rows can change which token a point stands for. Sources: Fan,
    Lewis, Dauphin, "Hierarchical Neural Story Generation", 2018 (top-k); Holtzman et al., "The Curious Case of Neural
    Text Degeneration", 2020 (top-p); Nguyen et al., "Turning Up the Heat", 2024 (min-p).
    """
    if logits_rv.is_cuda:
        from hasten.ops.gpu import draw as gpu_draw

        return gpu_draw.draw(logits_rv, draws)
    return cpu.sampling.draw(logits_rv, draws)


def edit_logits(
    logits_rv: Tensor, edits: LogitEdits, counts: TokenCounts, chosen_r: Tensor, *, in_place: bool = False
) -> Tensor:
    """The logits in fp32 after penalties, then biases, then bans: [r, v]; the given ones stay as they are, unless they
    are in fp32, contiguous, and to be changed `in_place`.

    `chosen_r` [int32] are the tokens that the previous step chose, for bans that depend on the last token. Sources:
    Keskar et al., "CTRL", 2019 (repetition penalty: positive logits of tokens seen are divided by it, others
    multiplied); OpenAI's API (presence and frequency penalties over the output; logit bias).
    """
    if logits_rv.is_cuda:
        from hasten.ops.gpu import edits as kernels

        return kernels.edit_logits(logits_rv, edits, counts, chosen_r, in_place=in_place)
    return cpu.edits.edit_logits(logits_rv, edits, counts, chosen_r, in_place=in_place)


def count_tokens(counts: TokenCounts, slots_r: Tensor, tokens_r: Tensor) -> None:
    """Add one token per row [int32] to the output counts of the row's slot, in place; -1 in either changes nothing.

    No two rows may have the same slot.
    """
    if tokens_r.is_cuda:
        from hasten.ops.gpu import edits as kernels

        kernels.count_tokens(counts, slots_r, tokens_r)
    else:
        cpu.edits.count_tokens(counts, slots_r, tokens_r)


def follow_counts(counts: TokenCounts, followed: FollowedCounts, parents_b: Tensor) -> None:
    """Let the slots of beams have the counts of the beams that they continue, by number [int32], in place.

    No beam that is continued may continue another.
    """
    kernels = None if parents_b.is_cuda else native.kernels()
    if kernels is None:
        counts.follow(followed, parents_b)
    else:
        kernels.edits.follow_counts(counts, followed, parents_b)


def mask_logits(logits_rv: Tensor, index_r: Tensor, masks_kw: Tensor) -> Tensor:
    """The logits with minus infinity where a row's mask has no bit: [r, v]; the given ones stay as they are.

    Row r has the mask `index_r[r]` [int32], none where that is below 0. Bit i of word w [int32] stands for token
    32 * w + i.
    """
    if logits_rv.is_cuda:
        from hasten.ops.gpu import edits as kernels

        return kernels.mask_logits(logits_rv, index_r, masks_kw)
    return cpu.edits.mask_logits(logits_rv, index_r, masks_kw)


def top_logprobs(logits_rv: Tensor, tokens_r: Tensor, count: int) -> TopLogprobs:
    """Log-probabilities and ranks of the given tokens [int32], and of the `count` most probable ones of each row.

    A token below 0 stands for token 0. Rows that are not finite have undefined values.
    """
    if logits_rv.is_cuda:
        from hasten.ops.gpu import logprobs

        return logprobs.top_logprobs(logits_rv, tokens_r, count)
    return cpu.sampling.top_logprobs(logits_rv, tokens_r, count)


def packed_logprobs(logits_rv: Tensor, tokens_r: Tensor, count: int) -> Tensor:
    """What `top_logprobs` finds, in one tensor: int32 [r, 3 + 2k].

    A row has its token [int32], this token's rank, in fp32 its log-probability and those of the most probable tokens,
    and their ids.
    """
    if logits_rv.is_cuda:
        return top_logprobs(logits_rv, tokens_r, count).packed(tokens_r)
    return cpu.sampling.packed_logprobs(logits_rv, tokens_r, count)


def log_softmax(logits_rv: Tensor) -> Tensor:
    """Log-probabilities of all tokens in fp32: [r, v]."""
    kernels = None if logits_rv.is_cuda else native.kernels()
    if kernels is None or logits_rv.dtype != torch.float32 or logits_rv.stride(1) != 1:
        return logits_rv.log_softmax(-1, dtype=torch.float32)
    return kernels.sampling.log_softmax(logits_rv)


def largest(x_rv: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` greatest numbers of each row in descending order, and their places [int32]; of equals the first."""
    if x_rv.is_cuda:
        from hasten.ops.gpu import logprobs

        return logprobs.largest(x_rv, count)
    return cpu.sampling.largest(x_rv, count)
