"""Layers with weights, alone and as ranks that share one. Shapes: t tokens, h hidden, v vocabulary."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Barrier
from typing import TypeVar

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from tests.waiting import LIMIT_S
from torch import Tensor

from hasten import ops
from hasten.core.model_config import AttentionConfig
from hasten.layers.attention import Attention
from hasten.layers.embedding import Embedding, Head
from hasten.layers.linear import ColumnLinear, PackedModule, RowLinear
from hasten.layers.norm import LayerNorm
from hasten.layers.position import alibi_slopes
from hasten.ops import NONE_LEFT, reference
from hasten.parallel.groups import ALONE, TensorGroup
from hasten.parallel.shard import Split, padded_vocab, split

ATTENTION = AttentionConfig(num_heads=12, num_kv_heads=12, head_size=4)
HIDDEN, BLOCK_SIZE = 48, 4


class Meeting:
    """Where ranks that are threads bring their shards together."""

    def __init__(self, size: int) -> None:
        self._barrier = Barrier(size)
        self._shards: list[Tensor] = [torch.empty(0)] * size

    def shards(self, rank: int, shard: Tensor) -> list[Tensor]:
        """All ranks' shards, once all have brought theirs."""
        self._shards[rank] = shard
        self._barrier.wait(LIMIT_S)
        shards = list(self._shards)
        self._barrier.wait(LIMIT_S)
        return shards

    def leave(self) -> None:
        """Nobody waits any longer for a rank that has failed."""
        self._barrier.abort()


@dataclass(frozen=True)
class Together(TensorGroup):
    """A rank that is a thread."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.meeting.shards(self.rank, tensor)).sum(0)

    def greatest(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.meeting.shards(self.rank, tensor)).amax(0)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.meeting.shards(self.rank, tensor))

    def gather(self, shard: Tensor) -> Tensor | None:
        shards = self.meeting.shards(self.rank, shard)
        return torch.cat(shards, dim=-1) if self.rank == 0 else None


Built = TypeVar("Built")
Found = TypeVar("Found")


def on_ranks(size: int, build: Callable[[TensorGroup], Built], run: Callable[[Built], Found]) -> list[Found]:
    """What `run` finds on every rank, with what `build` made there for the rank's group."""
    meeting = Meeting(size)
    built = []
    for rank in range(size):
        with torch.inference_mode():
            built.append(build(Together(rank, size, meeting=meeting)))

    def one(rank: int) -> Found:
        try:
            with torch.inference_mode():
                return run(built[rank])
        except BaseException:
            meeting.leave()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def settled(layer: RowLinear, made: Tensor | ops.PartialSum) -> Tensor:
    """What the next norm reads."""
    reduced = layer.group.reduced(made)
    return reduced if isinstance(reduced, Tensor) else reference.complete(reduced)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


def fill(module: nn.Module, **weights: Tensor) -> None:
    for name, value in weights.items():
        parameter = module.get_parameter(name.replace("__", "."))
        assert parameter.shape == value.shape
        parameter.data.copy_(value)
    for part in module.modules():
        if isinstance(part, PackedModule):
            part.pack()


def test_layer_norm() -> None:
    norm = LayerNorm(8, eps=0.1)
    fill(norm, weight=draw(8), bias=draw(8) + 1)
    x_th = draw(3, 8)
    normed_th, found_th = norm(x_th)
    torch.testing.assert_close(normed_th, F.layer_norm(x_th, (8,), norm.weight, norm.bias, 0.1))
    assert torch.equal(found_th, x_th)
    assert norm.bias is not None
    normed_th, found_th = norm(ops.PartialSum(x_th, norm.bias.data, residual=x_th * 2))
    torch.testing.assert_close(found_th, x_th * 3 + norm.bias)
    torch.testing.assert_close(normed_th, F.layer_norm(found_th, (8,), norm.weight, norm.bias, 0.1))


@pytest.mark.parametrize("vocab", [13, 16])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_embedding_and_head_of_all_ranks_are_those_of_one(size: int, vocab: int) -> None:
    weight_vh, ids_t = draw(vocab, HIDDEN), torch.tensor([0, 12, 6, 7, 3])
    weight_h, bias_h = draw(HIDDEN), draw(HIDDEN) + 1

    def build(group: TensorGroup) -> tuple[Embedding, LayerNorm, Head]:
        embedding, head = Embedding(vocab, HIDDEN, group=group), Head(vocab, HIDDEN, tied=None, group=group)
        norm = LayerNorm(HIDDEN, eps=1e-5, group=group)
        shard = split(weight_vh, Split.VOCAB, group.rank, size, ATTENTION)
        fill(embedding, weight=shard)
        fill(norm, weight=weight_h, bias=bias_h)
        fill(head, weight=shard)
        return embedding, norm, head

    def run(built: tuple[Embedding, LayerNorm, Head]) -> tuple[Tensor, Tensor, Tensor | None]:
        embedding, norm, head = built
        return embedding.normed(ids_t, ids_t, norm), head.local_logits(weight_vh), head(weight_vh)

    found = on_ranks(size, build, run)
    for normed_th, shard, _ in found:
        torch.testing.assert_close(normed_th, F.layer_norm(weight_vh[ids_t], (HIDDEN,), weight_h, bias_h, 1e-5))
        assert shard.shape == (vocab, padded_vocab(vocab, size) // size)
    logits = [whole for *_, whole in found]
    assert logits[0] is not None
    assert logits[1:] == [None] * (size - 1)
    torch.testing.assert_close(logits[0], weight_vh @ weight_vh.T)  # and none of what pads the vocabulary


@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_learned_positions_are_added_once_however_many_ranks(size: int, offset: int) -> None:
    weight_vh, positions_ph, ids_t = draw(13, HIDDEN), draw(5 + offset, HIDDEN) * 3, torch.tensor([0, 12, 6, 7, 7])
    positions_t = torch.tensor([3, 4, 0, 1, 4])
    weight_h, bias_h = draw(HIDDEN), draw(HIDDEN) + 1

    def build(group: TensorGroup) -> tuple[Embedding, LayerNorm]:
        embedding = Embedding(13, HIDDEN, positions=5 + offset, position_offset=offset, group=group)
        norm = LayerNorm(HIDDEN, eps=1e-5, group=group)
        fill(norm, weight=weight_h, bias=bias_h)
        fill(embedding, weight=split(weight_vh, Split.VOCAB, group.rank, size, ATTENTION), positions=positions_ph)
        return embedding, norm

    def run(built: tuple[Embedding, LayerNorm]) -> tuple[Tensor, Tensor]:
        embedding, norm = built
        return norm(embedding(ids_t, positions_t))[1], embedding.normed(ids_t, positions_t, norm)

    expected = weight_vh[ids_t] + torch.stack([positions_ph[int(position) + offset] for position in positions_t])
    for found_th, normed_th in on_ranks(size, build, run):
        assert torch.equal(found_th, expected)
        torch.testing.assert_close(normed_th, F.layer_norm(expected, (HIDDEN,), weight_h, bias_h, 1e-5))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_a_head_with_a_bias_and_scaled_logits(size: int, tied: bool) -> None:
    weight_vh, bias_v, x_rh = draw(13, HIDDEN), draw(13), draw(5, HIDDEN)

    def build(group: TensorGroup) -> Head:
        embedding, tie = Embedding(13, HIDDEN, group=group), tied or None
        head = Head(13, HIDDEN, tied=tie and embedding, bias=True, scale=0.7, softcap=1.5, group=group)
        weight = split(weight_vh, Split.VOCAB, group.rank, size, ATTENTION)
        fill(embedding, weight=weight)
        fill(head, bias=split(bias_v, Split.VOCAB, group.rank, size, ATTENTION), **({} if tied else {"weight": weight}))
        return head

    found, *others = on_ranks(size, build, lambda head: head(x_rh))
    assert others == [None] * (size - 1)
    assert found is not None
    torch.testing.assert_close(found, 1.5 * torch.tanh(0.7 * F.linear(x_rh, weight_vh, bias_v) / 1.5))


@pytest.mark.parametrize("vocab", [1, 5, 13, 16])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_knows_the_most_probable_token_of_all(size: int, vocab: int) -> None:
    rows, infinity = 40, float("inf")
    generator = torch.Generator().manual_seed(vocab)
    # few different values, so that the largest is often there more than once, on one rank or on several
    logits = torch.randint(-3, 3, (rows, vocab), generator=generator).float()
    expected = [row.index(max(row)) for row in logits.tolist()]
    for index, value in enumerate((float("nan"), infinity)):
        for token in range(vocab):
            row = 2 * token + index
            logits[row, token] = value
            expected[row] = -1
    logits[-1] = -infinity
    expected[-1] = NONE_LEFT
    # whatever the logits of what pads the vocabulary are
    padded = F.pad(logits, (0, padded_vocab(vocab, size) - vocab), value=9)

    def run(head: Head) -> list[int]:
        tokens_r = head.greedy(padded.chunk(size, dim=1)[head.group.rank])
        assert tokens_r.dtype == torch.int32
        return tokens_r.tolist()

    assert on_ranks(size, lambda group: Head(vocab, HIDDEN, tied=None, group=group), run) == [expected] * size


def test_a_large_tied_head_has_no_weights_of_its_own() -> None:
    embedding = Embedding(4096, 256)
    head = Head(4096, 256, tied=embedding)
    assert not list(head.parameters())
    fill(embedding, weight=draw(4096, 256))
    head.pack()
    held = [tensor for tensor in (head.packed.plain, head.packed.blocked) if tensor is not None]
    assert isinstance(embedding.weight, Tensor)
    assert [tensor.data_ptr() for tensor in held] == [embedding.weight.data_ptr()]
    logits = head(embedding.weight[[3, 5]])
    assert logits is not None
    torch.testing.assert_close(logits, F.linear(embedding.weight[[3, 5]], embedding.weight))


def test_packing_lets_the_loaded_weight_go() -> None:
    for layer in (ColumnLinear(HIDDEN, 8), RowLinear(HIDDEN, 8), Head(9, HIDDEN, tied=None)):
        for parameter in layer.parameters():
            parameter.data.zero_()
        layer.pack()
        assert "weight" not in dict(layer.named_parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_mlp_of_all_ranks_is_that_of_one(size: int, bias: bool) -> None:
    inner = 24
    up, down = draw(inner, HIDDEN), draw(HIDDEN, inner)
    up_bias, down_bias = draw(inner), draw(HIDDEN)
    x_th, residual_th = draw(5, HIDDEN), draw(5, HIDDEN) * 9
    rows_t = torch.tensor([4, 0, 2, 2, 1])

    def build(group: TensorGroup) -> tuple[ColumnLinear, RowLinear]:
        column = ColumnLinear(HIDDEN, inner, bias=bias, activation="gelu_tanh", group=group)
        row = RowLinear(inner, HIDDEN, bias=bias, group=group)
        biases = split(up_bias, Split.COLUMN, group.rank, size, ATTENTION), down_bias
        fill(
            column,
            weight=split(up, Split.COLUMN, group.rank, size, ATTENTION),
            **({"bias": biases[0]} if bias else {}),
        )
        fill(row, weight=split(down, Split.ROW, group.rank, size, ATTENTION), **({"bias": biases[1]} if bias else {}))
        return column, row

    def run(built: tuple[ColumnLinear, RowLinear]) -> tuple[Tensor, Tensor, Tensor]:
        column, row = built
        inner_th = column(x_th)
        whole_th, picked_th = (settled(row, row(inner_th, residual_th, rows)) for rows in (None, rows_t))
        # both halves of a parallel residual at once
        return whole_th, picked_th, settled(row, row(inner_th, row(inner_th, residual_th, rows_t)))

    inner_th = F.gelu(F.linear(x_th, up, up_bias if bias else None), approximate="tanh")
    product_th = F.linear(inner_th, down, down_bias if bias else None)
    for whole_th, picked_th, both_th in on_ranks(size, build, run):
        torch.testing.assert_close(whole_th, product_th + residual_th)
        torch.testing.assert_close(picked_th, product_th + residual_th[rows_t])
        torch.testing.assert_close(both_th, 2 * product_th + residual_th[rows_t])


def one_sequence(first: int, count: int) -> ops.AttentionMeta:
    """The next `count` tokens of a sequence whose blocks stand in reverse order."""
    blocks = torch.tensor([[3, 2, 1]], dtype=torch.int32)
    indices = torch.arange(first, first + count)
    return ops.AttentionMeta(
        num_tokens=count,
        block_tables=blocks,
        slot_mapping=blocks[0].long()[indices // BLOCK_SIZE] * BLOCK_SIZE + indices % BLOCK_SIZE,
        sequences=[0],
        query_lens=[count],
        kv_lens=[first + count],
    )


def part(meta: ops.AttentionMeta, count: int) -> ops.AttentionMeta:
    """The last `count` tokens of a batch of one sequence; no sequence at all where that is none."""
    tokens = meta.num_tokens
    sequences = min(count, 1)
    return replace(
        meta,
        num_tokens=count,
        sequences=meta.sequences[:sequences],
        query_lens=[count][:sequences],
        kv_lens=meta.kv_lens[:sequences],
        output_indices=torch.arange(tokens - count, tokens),
        scratch={},
    )


def make_attention(group: TensorGroup = ALONE) -> Attention:
    """This rank's shard of one attention layer over a cache of zeros."""
    layer, size = Attention(HIDDEN, ATTENTION, group=group), group.size
    width = 3 * HIDDEN
    fill(
        layer,
        qkv__weight=split(draw(width, HIDDEN), Split.QKV, group.rank, size, ATTENTION),
        qkv__bias=split(draw(width), Split.QKV, group.rank, size, ATTENTION),
        dense__weight=split(draw(HIDDEN, HIDDEN), Split.ROW, group.rank, size, ATTENTION),
        dense__bias=draw(HIDDEN),
    )
    key_cache, value_cache = torch.zeros(2, 4, BLOCK_SIZE, layer.num_kv_heads, layer.head_size)
    layer.bind_cache(key_cache, value_cache)
    return layer


def expected_attention(x_th: Tensor, residual_th: Tensor) -> Tensor:
    """All tokens of the sequence at once, without a cache, in fp64."""
    tokens, heads = x_th.shape[0], ATTENTION.num_heads
    qkv = F.linear(x_th.double(), draw(3 * HIDDEN, HIDDEN).double(), draw(3 * HIDDEN).double())
    query, key, value = qkv.view(tokens, 3, heads, -1).permute(1, 2, 0, 3)
    distance_qk = torch.arange(tokens) - torch.arange(tokens).unsqueeze(1)
    scores = query @ key.transpose(1, 2) / ATTENTION.head_size**0.5
    scores = scores + alibi_slopes(heads).double().view(-1, 1, 1) * distance_qk
    out = scores.masked_fill(distance_qk > 0, float("-inf")).softmax(-1) @ value
    out_th = out.transpose(0, 1).flatten(1)
    return residual_th.double() + F.linear(out_th, draw(HIDDEN, HIDDEN).double(), draw(HIDDEN).double())


@pytest.mark.parametrize("chunks", [[11], [4, 7], [1] * 11, [5, 5, 1]], ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_attention_of_all_ranks_in_any_chunks_is_that_of_one_without_a_cache(size: int, chunks: list[int]) -> None:
    x_th, residual_th = draw(11, HIDDEN) * 3, draw(11, HIDDEN)

    def run(layer: Attention) -> Tensor:
        first, found = 0, []
        for count in chunks:
            rows = slice(first, first + count)
            meta = one_sequence(first, count)
            out_th = layer(x_th[rows], torch.arange(count), meta, residual_th[rows])
            found.append(settled(layer.dense, out_th))
            first += count
        return torch.cat(found).double()

    for found_th in on_ranks(size, make_attention, run):
        torch.testing.assert_close(found_th, expected_attention(x_th, residual_th), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_the_last_layer_computes_what_is_asked_for_and_writes_all(count: int) -> None:
    x_th, residual_th = draw(9, HIDDEN) * 3, draw(9, HIDDEN)
    with torch.inference_mode():
        whole, some = make_attention(), make_attention()
        meta = one_sequence(0, 9)
        expected_th = whole(x_th, torch.arange(9), meta, residual_th, last=True)
        requested = replace(meta, output_part=part(meta, count), scratch={})
        found_th = some(x_th, torch.arange(9), requested, residual_th, last=True)
        torch.testing.assert_close(found_th, expected_th[9 - count :])
        assert torch.equal(some.key_cache, whole.key_cache)
        assert torch.equal(some.value_cache, whole.value_cache)
        assert torch.equal(make_attention()(x_th, torch.arange(9), requested, residual_th), expected_th)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_slopes_go_with_their_heads(size: int) -> None:
    shards = []
    for rank in range(size):
        with torch.device("meta"):
            slopes_n = Attention(HIDDEN, ATTENTION, group=TensorGroup(rank, size)).slopes_n
        assert slopes_n is not None
        shards.append(slopes_n)
    assert torch.equal(torch.cat(shards), alibi_slopes(12))
