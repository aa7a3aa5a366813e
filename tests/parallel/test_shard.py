import pytest
import torch

from hasten.core.model_config import AttentionConfig
from hasten.parallel.shard import OF_ONE_EXPERT, Split, by_expert, merge, overlap, resplit, shard_shape, split

SIZES = (1, 2, 3, 4, 6)
VOCAB = 29
ATTENTION = {
    "every head its own key": AttentionConfig(num_heads=12, num_kv_heads=12, head_size=2),
    "two heads a key": AttentionConfig(num_heads=24, num_kv_heads=12, head_size=2),
    "two keys": AttentionConfig(num_heads=12, num_kv_heads=2, head_size=2),
    "one key": AttentionConfig(num_heads=12, num_kv_heads=1, head_size=2),
}


def _tensor(how: Split, attention: AttentionConfig, axes: int) -> torch.Tensor:
    if axes == 3:
        return torch.arange(12.0 * 24 * 24).view(12, 24, 24)
    qkv = (attention.num_heads + 2 * attention.num_kv_heads) * attention.head_size
    rows = {Split.VOCAB: VOCAB, Split.QKV: qkv, Split.GATE_UP: 24}.get(how, 12)
    return torch.arange(rows * 24, dtype=torch.float32).view(rows, 24)[:, : 24 if axes == 2 else 1].squeeze(1)


@pytest.mark.parametrize("attention", ATTENTION.values(), ids=list(ATTENTION))
@pytest.mark.parametrize(
    # a bias has no input features to split
    ("how", "axes"),
    [(how, axes) for how in Split for axes in (1, 2) if (how, axes) != (Split.ROW, 1) and how not in OF_ONE_EXPERT]
    + [(how, 3) for how in (*OF_ONE_EXPERT, Split.COLUMN)],
)
def test_merge_undoes_split_and_resplit_goes_between_any_sizes(
    how: Split, axes: int, attention: AttentionConfig
) -> None:
    whole = _tensor(how, attention, axes)
    fitting = [size for size in SIZES if not attention.num_kv_heads % size or not size % attention.num_kv_heads]
    for size in fitting:
        shards = [split(whole, how, rank, size, attention) for rank in range(size)]
        assert {tuple(shard.shape) for shard in shards} == {shard_shape(tuple(whole.shape), how, size, attention)}
        assert torch.equal(merge(shards, how, attention, VOCAB), whole)
        for other in fitting:
            for rank in range(other):
                asked: list[int] = []
                found = resplit(
                    lambda part, shards=shards, asked=asked: (asked.append(part), shards[part])[1],  # type: ignore[misc]
                    size,
                    how,
                    rank,
                    other,
                    attention,
                    VOCAB,
                )
                assert torch.equal(found, split(whole, how, rank, other, attention))
                assert set(asked) <= set(overlap(how, rank, other, size, VOCAB)) if other != size else asked == [rank]


def test_a_rank_of_padding_alone() -> None:
    whole = torch.arange(6.0).view(3, 2)
    attention = ATTENTION["every head its own key"]
    shards = [split(whole, Split.VOCAB, rank, 2, attention) for rank in range(2)]
    for size in (4, 7):
        found = [resplit(lambda part: shards[part], 2, Split.VOCAB, rank, size, attention, 3) for rank in range(size)]
        assert all(shard.shape == (1, 2) for shard in found)
        assert torch.equal(torch.cat(found)[:3], whole)
        assert not torch.cat(found)[3:].any()


def test_queries_keys_and_values_are_split_by_head() -> None:
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_size=1)
    whole = torch.tensor([0.0, 1, 2, 3, 10, 11, 20, 21])
    assert split(whole, Split.QKV, 1, 2, attention).tolist() == [2, 3, 11, 21]


def test_ranks_hold_the_same_key_head_where_there_are_too_few() -> None:
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_size=1)
    whole = torch.tensor([0.0, 1, 2, 3, 10, 11, 20, 21])
    shards = [split(whole, Split.QKV, rank, 4, attention).tolist() for rank in range(4)]
    assert shards == [[0, 10, 20], [1, 10, 20], [2, 11, 21], [3, 11, 21]]


@pytest.mark.parametrize(("how", "of_one"), OF_ONE_EXPERT.items())
def test_experts_are_divided_each_for_itself_or_dealt_whole(how: Split, of_one: Split) -> None:
    attention = ATTENTION["every head its own key"]
    whole = _tensor(how, attention, 3)
    for rank in range(2):
        expected = torch.stack([split(expert, of_one, rank, 2, attention) for expert in whole])
        assert torch.equal(split(whole, how, rank, 2, attention), expected)
        assert torch.equal(split(whole, by_expert(how), rank, 2, attention), whole[6 * rank : 6 * rank + 6])
    assert by_expert(Split.ROW) is Split.ROW
