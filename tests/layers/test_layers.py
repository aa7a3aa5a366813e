"""Layers with weights, alone and as ranks that share one. Shapes: t tokens, h hidden, v vocabulary."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten import ops
from hasten.core.config import AttentionConfig
from hasten.layers.attention import Attention
from hasten.layers.embedding import Embedding, Head
from hasten.layers.linear import ColumnLinear, PackedModule, RowLinear
from hasten.layers.norm import LayerNorm
from hasten.layers.position import alibi_slopes
from hasten.parallel.groups import TensorGroup, use_group
from hasten.parallel.shard import Split, padded_vocab, split

ATTENTION = AttentionConfig(num_heads=12, num_kv_heads=12, head_size=4)
HIDDEN, BLOCK_SIZE = 48, 4


@dataclass(frozen=True)
class OwnShare(TensorGroup):
    """A rank whose collectives give its own share back: the test adds the shares itself."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, share: Tensor) -> Tensor | None:
        return share


@contextmanager
def rank_of(rank: int, size: int) -> Iterator[None]:
    with use_group(OwnShare(rank, size)), torch.inference_mode():
        yield


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
    assert torch.equal(norm(x_th), F.layer_norm(x_th, (8,), norm.weight, norm.bias, 0.1))


@pytest.mark.parametrize("vocab", [13, 16])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_embedding_and_head_of_all_ranks_are_those_of_one(size: int, vocab: int) -> None:
    weight_vh, ids_t = draw(vocab, HIDDEN), torch.tensor([0, 12, 6, 7, 3])
    rows_th, logits = torch.zeros(5, HIDDEN), []
    for rank in range(size):
        with rank_of(rank, size):
            embedding = Embedding(vocab, HIDDEN)
            head = Head(vocab, HIDDEN, tied=None)
            share = split(weight_vh, Split.VOCAB, rank, size, ATTENTION)
            fill(embedding, weight=share)
            fill(head, weight=share)
            rows_th += embedding(ids_t)
            logits.append(head(weight_vh))
    assert torch.equal(rows_th, weight_vh[ids_t])
    whole = torch.cat(logits, dim=1)
    assert whole.shape == (vocab, padded_vocab(vocab, size))
    torch.testing.assert_close(whole[:, :vocab], weight_vh @ weight_vh.T)


def test_the_head_gives_no_logits_of_padding() -> None:
    class Gathered(OwnShare):
        def gather(self, share: Tensor) -> Tensor | None:
            return torch.cat([share, share], dim=1)

    with use_group(Gathered(0, 2)), torch.inference_mode():
        head = Head(13, HIDDEN, tied=None)
        fill(head, weight=draw(7, HIDDEN))
        assert head(draw(2, HIDDEN)).shape == (2, 13)


@pytest.mark.parametrize("rows", [40, 4096])
def test_a_tied_head_has_no_weights_of_its_own(rows: int) -> None:
    embedding = Embedding(rows, 256)
    head = Head(rows, 256, tied=embedding)
    assert not list(head.parameters())
    fill(embedding, weight=draw(rows, 256))
    head.pack()
    held = [tensor for tensor in (head.packed.plain, head.packed.blocked) if tensor is not None]
    assert [tensor.data_ptr() for tensor in held] == [embedding.weight.data_ptr()]
    logits = head(embedding(torch.tensor([3, 5])))
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
    total_th = torch.zeros(5, HIDDEN)
    for rank in range(size):
        with rank_of(rank, size):
            column = ColumnLinear(HIDDEN, inner, bias=bias, activation="gelu_tanh")
            row = RowLinear(inner, HIDDEN, bias=bias)
            biases = split(up_bias, Split.COLUMN, rank, size, ATTENTION), down_bias
            fill(
                column,
                weight=split(up, Split.COLUMN, rank, size, ATTENTION),
                **({"bias": biases[0]} if bias else {}),
            )
            fill(row, weight=split(down, Split.ROW, rank, size, ATTENTION), **({"bias": biases[1]} if bias else {}))
            total_th += row(column(x_th), residual_th)
    inner_th = F.gelu(F.linear(x_th, up, up_bias if bias else None), approximate="tanh")
    expected_th = F.linear(inner_th, down, down_bias if bias else None) + residual_th
    torch.testing.assert_close(total_th, expected_th)


def one_sequence(first: int, count: int) -> ops.AttentionMeta:
    """The next `count` tokens of a sequence whose blocks stand in reverse order."""
    blocks = torch.tensor([[3, 2, 1]], dtype=torch.int32)
    places = torch.arange(first, first + count)
    return ops.AttentionMeta(
        query_start=torch.tensor([0, count], dtype=torch.int32),
        seq_lens=torch.tensor([first + count], dtype=torch.int32),
        block_tables=blocks,
        slot_mapping=blocks[0].long()[places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE,
        query_lens=[count],
        kv_lens=[first + count],
    )


def part(meta: ops.AttentionMeta, count: int) -> ops.AttentionMeta:
    """The last `count` tokens of a batch of one sequence; no sequence at all where that is none."""
    tokens = meta.slot_mapping.numel()
    sequences = min(count, 1)
    return ops.AttentionMeta(
        query_start=torch.tensor([0, count], dtype=torch.int32)[: sequences + 1],
        seq_lens=meta.seq_lens[:sequences],
        block_tables=meta.block_tables[:sequences],
        slot_mapping=meta.slot_mapping[tokens - count :],
        query_lens=[count][:sequences],
        kv_lens=meta.kv_lens[:sequences],
        rows=torch.arange(tokens - count, tokens),
    )


def make_attention(rank: int = 0, size: int = 1) -> Attention:
    """This rank's share of one attention layer over a cache of zeros; call it inside `rank_of`."""
    layer = Attention(HIDDEN, ATTENTION, bias=True)
    width = 3 * HIDDEN
    fill(
        layer,
        qkv__weight=split(draw(width, HIDDEN), Split.QKV, rank, size, ATTENTION),
        qkv__bias=split(draw(width), Split.QKV, rank, size, ATTENTION),
        dense__weight=split(draw(HIDDEN, HIDDEN), Split.ROW, rank, size, ATTENTION),
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
    total_th = torch.zeros(11, HIDDEN)
    for rank in range(size):
        with rank_of(rank, size):
            layer = make_attention(rank, size)
            first = 0
            for count in chunks:
                rows = slice(first, first + count)
                total_th[rows] += layer(x_th[rows], one_sequence(first, count), residual_th[rows])
                first += count
    torch.testing.assert_close(total_th.double(), expected_attention(x_th, residual_th), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_the_last_layer_computes_what_is_asked_for_and_writes_all(count: int) -> None:
    x_th, residual_th = draw(9, HIDDEN) * 3, draw(9, HIDDEN)
    with rank_of(0, 1):
        whole, some = make_attention(), make_attention()
        meta = one_sequence(0, 9)
        expected_th = whole(x_th, meta, residual_th, last=True)
        asked = replace(meta, last=part(meta, count), scratch={})
        found_th = some(x_th, asked, residual_th, last=True)
        torch.testing.assert_close(found_th, expected_th[9 - count :])
        assert torch.equal(some.key_cache, whole.key_cache)
        assert torch.equal(some.value_cache, whole.value_cache)
        assert torch.equal(make_attention()(x_th, asked, residual_th), expected_th)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_slopes_go_with_their_heads(size: int) -> None:
    shares = []
    for rank in range(size):
        with rank_of(rank, size), torch.device("meta"):
            shares.append(Attention(HIDDEN, ATTENTION, bias=True).slopes_n)
    assert torch.equal(torch.cat(shares), alibi_slopes(12))
