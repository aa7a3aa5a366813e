"""Shapes: t tokens, e experts, k experts a token, h hidden, i inner features of an expert."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hasten.ops import GatedUnit, PackedExperts, PartialSum, Routing, reference
from hasten.ops.gpu import experts as kernels
from hasten.ops.gpu import norm, router

# tests/bench/test_kernels.py runs every kernel on every Python
Close = Callable[[str, Tensor, Tensor], None]

HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
"""bf16 is not among numpy's types: the interpreter multiplies matrices of its bits instead."""
SILU = GatedUnit("silu")
TOKENS = [1, 5, 64, 65, 150]
"""Alone, in tiles of each size, at both ends of what is cut into parts."""


def draw(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)


def make_experts(
    count: int, hidden: int, inner: int, dtype: torch.dtype, device: torch.device, *, biases: int = 0
) -> PackedExperts:
    """`biases`: whether none, the first or both linear layers have some."""
    gate_up = draw(count, 2 * inner, hidden, dtype=dtype, device=device, scale=hidden**-0.5)
    down = draw(count, hidden, inner, dtype=dtype, device=device, scale=inner**-0.5)
    both = [draw(count, width, dtype=dtype, device=device) for width in (2 * inner, hidden)]
    return kernels.pack_experts(gate_up, down, 0, *both[:biases])


def wide(weights: PackedExperts) -> PackedExperts:
    assert weights.gate_up is not None
    assert weights.down is not None
    biases = (None if bias is None else bias.double() for bias in (weights.gate_up_bias, weights.down_bias))
    return PackedExperts(weights.count, weights.first, weights.gate_up.double(), weights.down.double(), (), *biases)


def make_routing(rows: list[list[int]], count: int, device: torch.device) -> Routing:
    """The kernels' own, of logits that choose these experts in this order."""
    logits = torch.zeros(len(rows), count)
    for row, chosen in enumerate(rows):
        logits[row, chosen] = torch.linspace(5, 4, len(chosen))
    found = router.route(logits.to(device), torch.eye(count, device=device), len(rows[0]), True)
    assert found.experts_tk.tolist() == rows
    return found


def check(
    x_th: Tensor,
    weights: PackedExperts,
    routing: Routing,
    assert_close: Close,
    *,
    parts: bool,
    unit: GatedUnit = SILU,
) -> None:
    found = kernels.experts(x_th, weights, routing, unit)
    assert found.dim() == (3 if parts else 2)
    assert found.dtype == (torch.float32 if parts else x_th.dtype)
    exact = reference.experts(x_th.double(), wide(weights), routing, unit)
    # what lies between the products is rounded to the type
    total = (found.sum(0) if parts else found).to(x_th.dtype)
    assert_close("stepwise", total, exact)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("count", "top_k", "hidden"), [(6, 2, 48), (8, 8, 64), (60, 4, 200), (1, 1, 16)], ids=str)
def test_tokens_choose_their_experts(
    count: int, top_k: int, hidden: int, normalized: bool, device: torch.device, assert_close: Close
) -> None:
    weight = draw(count, hidden, dtype=HALF, device=device, scale=hidden**-0.5)
    for tokens in TOKENS:
        x_th = draw(tokens, hidden, dtype=HALF, device=device)
        found, exact = (op.route(x_th, weight, top_k, normalized) for op in (router, reference))
        assert torch.equal(found.experts_tk, exact.experts_tk)
        assert found.weights_tk.dtype == torch.float32
        assert_close("linear", found.weights_tk, exact.weights_tk)
        assert found.counts_be is not None
        for block, chosen in zip(found.counts_be, exact.experts_tk.split(found.block), strict=True):
            assert block.tolist() == torch.bincount(chosen.flatten(), minlength=count).tolist()


@pytest.mark.parametrize(("real", "padded"), [(3, 8), (5, 7), (40, 64), (200, 300)], ids=str)
def test_padding_chooses_no_expert_that_no_token_chooses(real: int, padded: int, device: torch.device) -> None:
    weight = torch.eye(40, device=device)
    x_th = draw(padded, 40, dtype=torch.float32, device=device)
    x_th[:real, 25:] -= 100
    alone = router.route(x_th[:real], weight, 2, True)
    slots_t = torch.arange(padded, dtype=torch.int32, device=device)
    slots_t[real:] = -1
    found = router.route(x_th, weight, 2, True, slots_t)
    assert torch.equal(found.experts_tk[:real], alone.experts_tk)
    assert torch.equal(found.weights_tk[:real], alone.weights_tk)
    repeats = torch.arange(real, padded, device=device) % real
    assert torch.equal(found.experts_tk[real:], alone.experts_tk[repeats])
    assert found.counts_be is not None
    assert found.counts_be.sum() == 2 * padded


@pytest.mark.parametrize("padded", [1, 3])
def test_a_step_of_padding_alone_is_routed(padded: int, device: torch.device) -> None:
    x_th, nowhere = torch.ones(padded, 8, device=device), torch.full((padded,), -1, dtype=torch.int32, device=device)
    found = router.route(x_th, torch.eye(8, device=device), 2, True, nowhere)
    assert found.experts_tk.tolist() == [[0, 1]] * padded


@pytest.mark.parametrize(
    ("count", "top_k", "hidden", "normalized", "offset"),
    [(6, 2, 48, True, False), (40, 8, 64, False, True), (1, 1, 16, True, True)],
    ids=str,
)
def test_a_single_token_is_normed_and_routed_at_once(
    count: int,
    top_k: int,
    hidden: int,
    normalized: bool,
    offset: bool,
    device: torch.device,
    assert_close: Close,
) -> None:
    parts, added = (draw(number, 1, hidden, dtype=torch.float32, device=device) for number in (2, 3))
    bias, added_bias, gain = (draw(number, hidden, dtype=HALF, device=device)[0] for number in (1, 2, 3))
    residual, rows = draw(3, hidden, dtype=HALF, device=device), torch.tensor([2], dtype=torch.int32, device=device)
    sum_ = PartialSum(parts, bias, residual, rows, added=added, added_bias=added_bias)
    router_eh = draw(count, hidden, dtype=HALF, device=device, scale=hidden**-0.5)
    bias_e = draw(count, dtype=HALF, device=device)
    normed_th, total_th, found = router.norm_route(
        sum_, gain, 1e-5, router_eh, top_k, normalized, unit_offset=offset, bias_e=bias_e
    )
    expected = norm.norm(sum_, gain, None, 1e-5, rms=True, unit_offset=offset)
    assert torch.equal(total_th, expected[1])
    assert_close("linear", normed_th, expected[0])
    exact = reference.route(normed_th, router_eh, top_k, normalized, bias_e=bias_e)
    assert torch.equal(found.experts_tk, exact.experts_tk)
    assert_close("linear", found.weights_tk, exact.weights_tk)
    assert found.counts_be is not None
    assert found.counts_be.tolist() == [torch.bincount(exact.experts_tk[0], minlength=count).tolist()]


def test_the_first_among_equals_is_chosen(device: torch.device) -> None:
    logits = torch.tensor([[1.0, 3, 3, 0, 3, 1], [0, 0, 0, 0, 0, 0], [2, 1, 2, 1, 2, 1]], device=device)
    found = router.route(logits, torch.eye(6, device=device), 4, True)
    assert found.experts_tk.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [0, 2, 4, 1]]
    assert torch.equal(found.experts_tk, reference.route(logits, torch.eye(6, device=device), 4, True).experts_tk)


@pytest.mark.parametrize("normalized", [False, True])
def test_no_expert_is_chosen_twice_whatever_the_logits_are(normalized: bool, device: torch.device) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[nan] * 5, [-inf] * 5, [inf] * 5, [nan, 1, inf, -inf, 2], [1, nan, 0, 0, 0], [0, 0, -inf, 0, 0]]
    with np.errstate(invalid="ignore"):  # infinity times 0 is not a number, nor is infinity less infinity
        found = router.route(torch.tensor(rows, device=device), torch.eye(5, device=device), 3, normalized)
    for chosen in found.experts_tk.tolist():
        assert len(set(chosen)) == 3
        assert set(chosen) <= set(range(5))


@pytest.mark.parametrize(
    ("count", "top_k", "hidden", "inner", "dtype"),
    [(6, 2, 48, 24, HALF), (20, 2, 64, 32, torch.float32), (2, 1, 32, 80, HALF), (2, 1, 80, 32, torch.float32)],
    ids=str,
)
def test_products_of_any_number_of_tokens(
    count: int, top_k: int, hidden: int, inner: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    weights = make_experts(count, hidden, inner, dtype, device)
    router_eh = draw(count, hidden, dtype=dtype, device=device)
    for tokens in TOKENS:
        x_th = draw(tokens, hidden, dtype=dtype, device=device)
        routing = router.route(x_th, router_eh, top_k, top_k > 1)
        check(x_th, weights, routing, assert_close, parts=tokens <= 64)


@pytest.mark.parametrize("hidden", [2048, 2880, 2888])
def test_programs_of_pairs_suit_the_number_of_input_features(
    hidden: int, device: torch.device, assert_close: Close
) -> None:
    weights = make_experts(9, hidden, 11, HALF, device)
    x_th = draw(1, hidden, dtype=HALF, device=device)
    check(x_th, weights, make_routing([[5]], 9, device), assert_close, parts=True)


@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("chosen", [[3], [3, 0], [1, 3]], ids=str)
def test_all_tokens_may_choose_the_same_experts(
    chosen: list[int], tokens: int, device: torch.device, assert_close: Close
) -> None:
    weights = make_experts(4, 32, 16, torch.float32, device)
    routing = make_routing([chosen] * tokens, 4, device)
    x_th = draw(tokens, 32, dtype=torch.float32, device=device)
    check(x_th, weights, routing, assert_close, parts=tokens <= 64)


@pytest.mark.parametrize("tokens", [1, 40, 70])
@pytest.mark.parametrize(("first", "held"), [(0, 3), (3, 3), (2, 1)], ids=str)
def test_experts_of_other_ranks_count_as_zero(
    first: int, held: int, tokens: int, device: torch.device, assert_close: Close
) -> None:
    weights = make_experts(held, 32, 16, torch.float32, device)
    x_th = draw(tokens, 32, dtype=torch.float32, device=device)
    routing = router.route(x_th, draw(6, 32, dtype=torch.float32, device=device), 2, True)
    check(x_th, replace(weights, first=first), routing, assert_close, parts=tokens == 1)


def test_gates_of_other_families(device: torch.device, assert_close: Close) -> None:
    weights = make_experts(4, 32, 16, torch.float32, device)
    for tokens in (1, 20):
        x_th = draw(tokens, 32, dtype=torch.float32, device=device)
        routing = router.route(x_th, draw(4, 32, dtype=torch.float32, device=device), 2, True)
        check(x_th, weights, routing, assert_close, parts=True, unit=GatedUnit("gelu_tanh"))


@pytest.mark.parametrize(("inner", "biases"), [(24, 2), (32, 1)], ids=str)
def test_clamped_units_with_biases(inner: int, biases: int, device: torch.device, assert_close: Close) -> None:
    unit = GatedUnit("quick_gelu", limit=0.7, offset=1.0)
    weights = make_experts(5, 48, inner, HALF, device, biases=biases)
    router_eh, bias_e = draw(5, 48, dtype=HALF, device=device), draw(5, dtype=HALF, device=device, scale=9.0)
    for tokens in (1, 20, 70):
        x_th = draw(tokens, 48, dtype=HALF, device=device)
        routing, exact = (op.route(x_th, router_eh, 2, True, bias_e=bias_e) for op in (router, reference))
        assert torch.equal(routing.experts_tk, exact.experts_tk)
        assert_close("linear", routing.weights_tk, exact.weights_tk)
        check(x_th, weights, routing, assert_close, parts=tokens <= 64, unit=unit)


def test_values_that_are_no_numbers_stay_so(device: torch.device) -> None:
    weights = make_experts(2, 16, 16, torch.float32, device, biases=2)
    x_th = torch.full((1, 16), float("nan"), device=device)
    found = kernels.experts(x_th, weights, make_routing([[0]], 2, device), GatedUnit("silu", limit=1.0))
    assert found.isnan().all()


def test_no_tokens(device: torch.device) -> None:
    x_th = torch.empty(0, 32, device=device)
    routing = router.route(x_th, torch.eye(4, 32, device=device), 2, True)
    found = kernels.experts(x_th, make_experts(4, 32, 16, torch.float32, device), routing, SILU)
    assert found.shape == (1, 0, 32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("count", "top_k", "hidden", "inner"),
    [(128, 8, 2048, 768), (60, 4, 2048, 1408), (8, 2, 4096, 3584), (32, 4, 2880, 2880)],
    ids=str,
)
def test_real_sizes(
    count: int, top_k: int, hidden: int, inner: int, dtype: torch.dtype, device: torch.device, assert_close: Close
) -> None:
    unit = GatedUnit("quick_gelu", limit=7.0, offset=1.0) if hidden == 2880 else SILU
    weights = make_experts(count, hidden, inner, dtype, device, biases=2 if hidden == 2880 else 0)
    router_eh = draw(count, hidden, dtype=dtype, device=device, scale=hidden**-0.5)
    for tokens in (*TOKENS, 8192):
        x_th = draw(tokens, hidden, dtype=dtype, device=device)
        routing = router.route(x_th, router_eh, top_k, True)
        check(x_th, weights, routing, assert_close, parts=tokens <= 64, unit=unit)
