"""What `kernels.py` measures: each op at the sizes of a model, with the least that it has to move and compute.

Shapes: t tokens, h hidden, v vocabulary, q, m and d query heads, key/value heads and head size.
"""

from collections.abc import Iterator
from dataclasses import replace

from hasten.bench.kernel_cases.attention import attention, mean_squares, store_heads
from hasten.bench.kernel_cases.cache import choose_beams, copy_blocks, move_beams, write_cache
from hasten.bench.kernel_cases.case import TOLERANCE, Call, Case, Outputs, Run
from hasten.bench.kernel_cases.experts import experts, norm_route, route
from hasten.bench.kernel_cases.norms import add_norm, embedding, embedding_norms, exchange_norm, norm_alone
from hasten.bench.kernel_cases.products import activations, fp8, gated, layers, linears, project, project_consecutive
from hasten.bench.kernel_cases.sampling import (
    count_tokens,
    draw,
    edit_logits,
    greedy,
    greedy_of_shards,
    largest,
    mask_logits,
    resolve_ids,
    top_logprobs,
)
from hasten.bench.kernel_cases.setting import Setting, cache_dtypes, gpu_setting, model_shape

__all__ = ["TOLERANCE", "Call", "Case", "Outputs", "Run", "Setting", "cases", "gpu_setting", "model_shape"]


def cases(setting: Setting) -> list[Case]:
    """All that is measured."""
    return [
        *(case for rows in (1, 8, 16, 64) for case in linears(setting, rows)),
        *(case for rows in (1, 16, 64, 128, 512) for case in linears(replace(setting, quantization="int8"), rows)),
        *(case for rows in (1, 16, 64, 256, 8192) for case in layers(replace(setting, quantization="int4"), rows)),
        *(case for rows in (1, 16, 64, 256) for case in linears(replace(setting, quantization="w8a8"), rows)),
        *fp8(setting),
        *(attention(setting, f"{size} x 192", [(1, 192)] * size) for size in (1, 16, 64, 256)),
        attention(setting, "256 of 16 to 2056", [(1, 16 + 8 * n) for n in range(256)]),
        *(attention(setting, f"prefill {n} x {k}", [(k, k)] * n) for n, k in ((94, 87), (14, 560), (4, 2048))),
        attention(setting, "2048 of 8192", [(2048, 8192)]),
        attention(setting, "64 x 2048, window 512, capped", [(1, 2048)] * 64, window=512, softcap=50.0),
        attention(setting, "prefill 14 x 560, window 256, capped", [(560, 560)] * 14, window=256, softcap=50.0),
        attention(setting, "2 x 192, sinks", [(1, 192)] * 2, sinks=True),
        attention(setting, "prefill 2 x 560, window 128, sinks", [(560, 560)] * 2, window=128, sinks=True),
        attention(setting, "prefill 32 x 264, not causal", [(264, 264)] * 32, causal=False),
        attention(setting, "prefill 32 x 264, not causal, by distance", [(264, 264)] * 32, causal=False, farthest=128),
        attention(setting, "2 x 192, by distance", [(1, 192)] * 2, farthest=128),
        *(case for name in cache_dtypes(setting) for case in in_8_bits(replace(setting, cache_dtype=name))),
        *(add_norm(setting, rows) for rows in (1, 64, 8192)),
        *(add_norm(setting, rows, rms=True) for rows in (1, 64, 8192)),
        *(norm_alone(setting, rows) for rows in (64, 8192)),
        *(add_norm(setting, rows, products=2) for rows in (1, 64)),
        *(exchange_norm(setting, 64, products) for products in (1, 2)),
        *embedding_norms(setting, (1, 64, 8192)),
        *(embedding(setting, rows) for rows in (1, 8192)),
        *(write_cache(setting, rows) for rows in (64, 8192)),
        *(copy_blocks(setting, count) for count in (32, 128)),
        *(store_heads(setting, rows) for rows in (1, 64, 8192)),
        *(store_heads(setting, rows, interleaved=True) for rows in (1, 64)),
        *(mean_squares(setting, rows) for rows in (1, 64, 8192)),
        *(gated(setting, rows) for rows in (1, 64, 128)),
        *activations(setting),
        *(route(setting, rows) for rows in (1, 64, 8192)),
        norm_route(setting),
        *(experts(setting, rows) for rows in (1, 16, 64, 192, 512, 8192)),
        experts(setting, 64, ranks=2),
        *(experts(setting, rows, biases=True) for rows in (1, 16)),
        *(project(setting, rows, clip=1.0) for rows in (1, 8)),
        *(project_consecutive(setting, rows) for rows in (8, 8192)),
        *(project(setting, rows, rotated=True) for rows in (1, 16)),
        resolve_ids(setting, 256),
        *(greedy(setting, rows) for rows in (1, 64, 256)),
        *greedy_of_shards(setting, 64),
        *(draw(setting, rows) for rows in (64, 256)),
        *(edit_logits(setting, rows) for rows in (64, 256)),
        count_tokens(setting, 256),
        mask_logits(setting, 256),
        *(top_logprobs(setting, rows) for rows in (64, 256)),
        largest(setting, 64),
        *(choose_beams(setting, searches) for searches in (16, 64)),
        *(move_beams(setting, count) for count in (64, 256)),
    ]


def in_8_bits(setting: Setting) -> Iterator[Case]:
    """What reads and writes a cache of 8 bits."""
    for size in (1, 16, 64, 256):
        yield attention(setting, f"{size} x 192", [(1, 192)] * size)
    yield attention(setting, "64 x 2048", [(1, 2048)] * 64)
    yield attention(setting, "prefill 14 x 560", [(560, 560)] * 14)
    for rows in (64, 8192):
        yield write_cache(setting, rows)
        yield store_heads(setting, rows)
    yield project(setting, 16)
