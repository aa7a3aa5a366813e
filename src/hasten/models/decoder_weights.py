"""Weight maps of decoders: what stands around the layers, and layers of attention and a plain MLP of two products."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

from hasten.core.model_config import ModelConfig
from hasten.models.weight_map import (
    SAME,
    Axis,
    Layout,
    Tie,
    WeightMap,
    WeightSpec,
    linear,
    norm,
    vocabulary,
    vocabulary_bias,
)
from hasten.parallel.shard import Split

BOTH_NORMS: Mapping[str, str] = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
"""The norms of a layer under the most common names: the module's and the checkpoint's."""


def decoder_weights(
    config: ModelConfig,
    of_layer: Callable[[int], Iterable[WeightSpec]],
    *,
    prefix: str,
    embedding: str,
    last: Iterable[WeightSpec],
    first: Iterable[WeightSpec] = (),
    head: str = "lm_head",
    ignored: tuple[str, ...] = (),
) -> WeightMap:
    """That of an embedding, layers and a head, which has a weight of its own where it is not tied.

    `first` and `last` are what stands between the embedding and the layers, and between these and the head. `prefix`
    is that of the base model, to which the stored module `head` does not belong; `ignored`: see `WeightMap`.
    """
    embedding_spec, head_spec = (
        vocabulary("embedding.weight", f"{embedding}.weight"),
        vocabulary("head.weight", f"{head}.weight"),
    )
    tied, biased = config.tie_word_embeddings, config.head_bias
    return WeightMap(
        specs=(
            embedding_spec,
            *first,
            *chain.from_iterable(map(of_layer, range(config.num_layers))),
            *last,
            *(() if tied else (head_spec,)),
            *((vocabulary_bias("head.bias", f"{head}.bias"),) if biased else ()),
        ),
        hf_prefix=prefix,
        hf_unprefixed=frozenset({f"{head}.weight", *((f"{head}.bias",) if biased else ())}),
        hf_ignored=ignored,
        head_tie=Tie(head_spec, embedding_spec) if tied else None,
    )


def separate_qkv(attention: str) -> dict[str, Axis]:
    """Projections of queries, keys and values of their own, in the stored module `attention`."""
    return {f"{attention}.q_proj": "query", f"{attention}.k_proj": "kv", f"{attention}.v_proj": "kv"}


def plain_layer(
    layer: int,
    stored: str,
    *,
    norms: Mapping[str, str],
    qkv: Mapping[str, Axis],
    dense: str,
    up: str,
    down: str,
    qkv_bias: bool = True,
    dense_bias: bool = True,
    mlp_bias: bool = True,
    norm_bias: bool = True,
    layout: Layout = SAME,
    qkv_layout: Layout | None = None,
) -> Iterator[WeightSpec]:
    """The weights of one layer, whose stored modules are named relative to `stored`.

    `norms`: the module's names and the checkpoint's. `qkv`: stored projections in this order, each with its axis. A
    fused one may have a `qkv_layout` other than the `layout` of the rest.
    """
    name = f"layers.{layer}"
    sources: dict[str, Axis] = {f"{stored}.{each}": axis for each, axis in qkv.items()}
    for ours, theirs in norms.items():
        yield from norm(f"{name}.{ours}", f"{stored}.{theirs}", bias=norm_bias)
    own = qkv_layout or layout
    yield from linear(f"{name}.attention.qkv", sources, "qkv", "hidden", Split.QKV, bias=qkv_bias, layout=own)

    def part(ours: str, theirs: str, out: Axis, into: Axis, split: Split, bias: bool) -> tuple[WeightSpec, ...]:
        return linear(f"{name}.{ours}", {f"{stored}.{theirs}": out}, out, into, split, bias=bias, layout=layout)

    yield from part("attention.dense", dense, "hidden", "query", Split.ROW, dense_bias)
    yield from part("mlp.up", up, "inner", "hidden", Split.COLUMN, mlp_bias)
    yield from part("mlp.down", down, "hidden", "inner", Split.ROW, mlp_bias)
