"""Shapes: t tokens, e experts, k experts a token, h hidden, i inner features of an expert."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hasten import ops
from hasten.ops import Routing, cpu, reference

Close = Callable[[str, Tensor, Tensor], None]

HIDDEN, INNER, COUNT = 24, 20, 6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * 0.25).to(dtype)


def one_by_one(x_th: Tensor, gate_up: Tensor, down: Tensor, routing: Routing, first: int) -> Tensor:
    """Token by token and choice by choice, in fp64."""
    out_th = torch.zeros(x_th.shape, dtype=torch.float64)
    for token, chosen in enumerate(routing.experts_tk.tolist()):
        for choice, expert in enumerate(chosen):
            if first <= expert < first + len(down):
                gate, up = (gate_up[expert - first].double() @ x_th[token].double()).chunk(2)
                value = down[expert - first].double() @ (gate * gate.sigmoid() * up)
                out_th[token] += value * routing.weights_tk[token, choice].double()
    return out_th


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("first", "held"), [(0, COUNT), (0, 2), (3, 3)], ids=str)
def test_both_paths_compute_the_chosen_experts(first: int, held: int, dtype: torch.dtype, assert_close: Close) -> None:
    gate_up, down = draw(held, 2 * INNER, HIDDEN, dtype=dtype), draw(held, HIDDEN, INNER, dtype=dtype)
    for tokens in (0, 1, 2, 40, 70):
        x_th = draw(tokens, HIDDEN, dtype=dtype)
        routing = ops.route(x_th, draw(COUNT, HIDDEN, dtype=dtype), 2, True)
        expected = one_by_one(x_th, gate_up, down, routing, first)
        for path, kind in ((cpu, "linear"), (reference, "stepwise")):
            found = path.experts(x_th, path.pack_experts(gate_up, down, first), routing, "silu")
            assert found.dtype == dtype
            assert_close(kind, found, expected)


@pytest.mark.parametrize("chosen", [[4], [0, 5]], ids=str)
def test_all_tokens_may_choose_the_same(chosen: list[int], assert_close: Close) -> None:
    gate_up, down = draw(COUNT, 2 * INNER, HIDDEN), draw(COUNT, HIDDEN, INNER)
    for tokens in (1, 33):
        experts_tk = torch.tensor([chosen] * tokens, dtype=torch.int32)
        routing = Routing(experts_tk, draw(tokens, len(chosen)))
        x_th = draw(tokens, HIDDEN)
        found = ops.experts(x_th, ops.pack_experts(gate_up, down), routing, "silu")
        assert_close("linear", found, one_by_one(x_th, gate_up, down, routing, 0))


def test_a_token_is_computed_alike_alone_and_among_others(assert_close: Close) -> None:
    weights = ops.pack_experts(draw(COUNT, 2 * INNER, HIDDEN), draw(COUNT, HIDDEN, INNER))
    x_th, router_eh = draw(30, HIDDEN), draw(COUNT, HIDDEN)
    together = ops.experts(x_th, weights, ops.route(x_th, router_eh, 3, False), "silu")
    for token in range(30):
        alone = x_th[token : token + 1]
        found = ops.experts(alone, weights, ops.route(alone, router_eh, 3, False), "silu")
        assert_close("linear", found, together[token : token + 1])


@pytest.mark.parametrize("normalized", [False, True])
def test_weights_are_shares_of_all_or_of_the_chosen(normalized: bool) -> None:
    logits = torch.tensor([[1.0, 3, 2, 0], [2, 2, 5, 2]])
    found = ops.route(logits, torch.eye(4), 2, normalized)
    assert found.experts_tk.tolist() == [[1, 2], [2, 0]]  # the first among equals
    shares = torch.stack([logits.softmax(-1)[0, [1, 2]], logits.softmax(-1)[1, [2, 0]]])
    torch.testing.assert_close(found.weights_tk, shares / shares.sum(1, keepdim=True) if normalized else shares)


def test_a_router_computes_in_fp32() -> None:
    """Two experts whose logits are one number in bf16."""
    x_th = torch.ones(1, 512, dtype=torch.bfloat16)
    router = torch.ones(2, 512, dtype=torch.bfloat16)
    router[1, 0] = 1.0078125
    assert ops.route(x_th, router, 1, False).experts_tk.tolist() == [[1]]
