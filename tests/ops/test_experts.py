"""Shapes: t tokens, e experts, k experts a token, h hidden, i inner features of an expert."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hasten import ops
from hasten.ops import GatedUnit, PackedExperts, Routing, cpu, reference

Close = Callable[[str, Tensor, Tensor], None]

HIDDEN, INNER, COUNT = 24, 20, 6
SILU = GatedUnit("silu")
CLAMPED = GatedUnit("quick_gelu", limit=0.2, offset=1.0)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * 0.25).to(dtype)


def in_unit(gate: Tensor, up: Tensor, unit: GatedUnit) -> Tensor:
    if unit.limit is not None:
        gate, up = gate.clamp(max=unit.limit), up.clamp(-unit.limit, unit.limit)
    return gate * (gate * (1.702 if unit.gate == "quick_gelu" else 1)).sigmoid() * (up + unit.offset)


def one_by_one(
    x_th: Tensor,
    gate_up: Tensor,
    down: Tensor,
    routing: Routing,
    first: int,
    unit: GatedUnit = SILU,
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Token by token and choice by choice, in fp64."""
    out_th = torch.zeros(x_th.shape, dtype=torch.float64)
    in_bias, out_bias = (torch.zeros(weight.shape[:2]) for weight in (gate_up, down)) if biases is None else biases
    for token, chosen in enumerate(routing.experts_tk.tolist()):
        for choice, expert in enumerate(chosen):
            if first <= expert < first + len(down):
                own = expert - first
                gate, up = (gate_up[own].double() @ x_th[token].double() + in_bias[own].double()).chunk(2)
                value = down[own].double() @ in_unit(gate, up, unit) + out_bias[own].double()
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
        for path, kind in ((cpu.experts, "linear"), (reference, "stepwise")):
            found = path.experts(x_th, path.pack_experts(gate_up, down, first), routing, SILU)
            assert found.dtype == dtype
            assert_close(kind, found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biases", ["both", "the first", "none"])
@pytest.mark.parametrize("unit", [CLAMPED, GatedUnit("silu", limit=0.2), GatedUnit("silu", offset=1.0)], ids=str)
def test_experts_with_biases_and_limits(unit: GatedUnit, biases: str, dtype: torch.dtype, assert_close: Close) -> None:
    gate_up, down = draw(3, 2 * INNER, HIDDEN, dtype=dtype), draw(3, HIDDEN, INNER, dtype=dtype)
    in_bias, out_bias = draw(3, 2 * INNER, dtype=dtype), draw(3, HIDDEN, dtype=dtype)
    given = None if biases == "none" else in_bias, out_bias if biases == "both" else None
    present = given[0] if given[0] is not None else in_bias * 0, given[1] if given[1] is not None else out_bias * 0
    x_th = draw(20, HIDDEN, dtype=dtype)
    routing = ops.route(x_th, draw(COUNT, HIDDEN, dtype=dtype), 2, True)
    expected = one_by_one(x_th, gate_up, down, routing, 2, unit, present)
    for path, kind in ((cpu.experts, "linear"), (reference, "stepwise")):
        packed: PackedExperts = path.pack_experts(gate_up, down, 2, *given)
        assert_close(kind, path.experts(x_th, packed, routing, unit), expected)


def test_a_router_with_biases() -> None:
    bias = torch.tensor([0.0, -5, 0, 2.5])
    found = ops.route(torch.tensor([[1.0, 3, 2, 0]]), torch.eye(4), 2, True, bias_e=bias)
    assert found.experts_tk.tolist() == [[3, 2]]
    torch.testing.assert_close(found.weights_tk, torch.tensor([[2.5, 2.0]]).softmax(-1))


@pytest.mark.parametrize("chosen", [[4], [0, 5]], ids=str)
def test_all_tokens_may_choose_the_same(chosen: list[int], assert_close: Close) -> None:
    gate_up, down = draw(COUNT, 2 * INNER, HIDDEN), draw(COUNT, HIDDEN, INNER)
    for tokens in (1, 33):
        experts_tk = torch.tensor([chosen] * tokens, dtype=torch.int32)
        routing = Routing(experts_tk, draw(tokens, len(chosen)))
        x_th = draw(tokens, HIDDEN)
        found = ops.experts(x_th, ops.pack_experts(gate_up, down), routing, SILU)
        assert_close("linear", found, one_by_one(x_th, gate_up, down, routing, 0))


def test_a_token_is_computed_alike_alone_and_among_others(assert_close: Close) -> None:
    weights = ops.pack_experts(draw(COUNT, 2 * INNER, HIDDEN), draw(COUNT, HIDDEN, INNER))
    x_th, router_eh = draw(30, HIDDEN), draw(COUNT, HIDDEN)
    together = ops.experts(x_th, weights, ops.route(x_th, router_eh, 3, False), SILU)
    for token in range(30):
        alone = x_th[token : token + 1]
        found = ops.experts(alone, weights, ops.route(alone, router_eh, 3, False), SILU)
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
