"""Shapes: r rows, v vocabulary. The kernels run on a GPU where there is one, and on Triton's interpreter otherwise."""

import random
from collections import Counter
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hasten.ops import Bans, EditList, TokenCounts, native, reference
from hasten.ops.cpu import edits as cpu_edits
from hasten.ops.edits import IN_PROMPT

pytest.importorskip("triton")

from hasten.ops.gpu import edits as kernels

DEVICE = pytest.param("cuda", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"
VOCAB = 97
BLOCK = 16
"""Entries that the kernels look at together here: most slots have more."""
INF = float("inf")


@pytest.fixture(params=[DEVICE])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCK", BLOCK)
    monkeypatch.setattr(kernels, "_MASK_BLOCK", 2 * BLOCK)


@pytest.fixture(params=["reference", "numpy", "numba", "triton"])
def ops(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if request.param in ("reference", "triton"):
        return {"reference": reference, "triton": kernels}[request.param]
    if device.type != "cpu":
        pytest.skip("of a CPU alone")
    if request.param == "numpy":
        monkeypatch.setattr(native, "kernels", lambda: None)
    else:
        pytest.importorskip("numba", reason="there are no kernels without it")
    return cpu_edits


def counts_of(prompts: list[list[int]], outputs: list[list[int]], device: torch.device, width: int = 80) -> TokenCounts:
    """Slot n has prompt and output n; slots around them are left without tokens."""
    counts = TokenCounts.empty(len(prompts) + 2, width, device)
    counts.ids_sw.fill_(VOCAB + 1000)  # what lies behind a slot's entries must not be read
    pairs = [(np.array(prompt, int), np.array(output, int)) for prompt, output in zip(prompts, outputs, strict=True)]
    counts.load(range(1, len(prompts) + 1), pairs)
    return counts


def no_tokens(device: torch.device) -> Tensor:
    """Where no ban depends on the last token."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def add(edits: EditList, row: int, *, biases: dict[int, float], bans: list[tuple[int, int]], **options: Any) -> None:
    defaults: dict[str, Any] = {"slot": -1, "penalties": (1.0, 0.0, 0.0), "chosen": 0}
    edits.add(
        row,
        bias_ids=np.array([*biases], np.int32),
        biases=np.array([*biases.values()], np.float32),
        bans=Bans(*np.array(bans, np.int32).reshape(-1, 2).T.copy()),
        **{**defaults, **options},
    )


def contents(counts: TokenCounts, slot: int) -> dict[int, int]:
    size = int(counts.sizes_s[slot])
    ids, numbers = counts.ids_sw[slot, :size].tolist(), counts.counts_sw[slot, :size].tolist()
    assert len(set(ids)) == size
    return dict(zip(ids, numbers, strict=True))


def wanted_contents(prompt: list[int], output: list[int]) -> dict[int, int]:
    counted = Counter(output)
    return {token: counted[token] + IN_PROMPT * (token in prompt) for token in {*prompt, *output}}


def edited(
    logits: list[float], prompt: list[int], output: list[int], options: dict[str, Any], last: int
) -> list[float]:
    """The definition, token by token."""
    repetition, presence, frequency = options.get("penalties", (1.0, 0.0, 0.0))
    found = []
    for token, x in enumerate(logits):
        if options.get("slot", -1) >= 0:
            if token in prompt or token in output:
                x = x / repetition if x > 0 else x * repetition
            if token in output:
                x -= presence + frequency * output.count(token)
        x += options["biases"].get(token, 0.0)
        banned = any(token == ban and after in (-1, last) for ban, after in options["bans"])
        found.append(-INF if banned else x)
    return found


def random_options(rng: random.Random, slot: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "biases": {rng.randrange(VOCAB): rng.uniform(-100, 100) for _ in range(rng.choice([0, 0, 3, 40]))},
        "bans": [
            (rng.randrange(VOCAB), rng.choice([-1, 5, rng.randrange(VOCAB)])) for _ in range(rng.choice([0, 2, 30]))
        ],
    }
    if rng.random() < 0.7:
        options |= {"slot": slot, "penalties": (rng.uniform(0.5, 2), rng.uniform(-2, 2), rng.uniform(-2, 2))}
    return options


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_edits_follow_their_definition(ops: ModuleType, dtype: torch.dtype, device: torch.device) -> None:
    rng, rows = random.Random(1), 12
    logits = (torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    chosen = torch.tensor([5, *(rng.randrange(VOCAB) for _ in range(rows))], dtype=torch.int32)
    prompts = [rng.choices(range(VOCAB), k=rng.choice([1, 15, 16, 17, 60])) for _ in range(rows)]
    outputs = [rng.choices(range(VOCAB), k=rng.choice([0, 1, 40])) for _ in range(rows)]
    edits, wanted = EditList(), logits.float().tolist()
    for row in rng.sample(range(rows), rows - 2):  # in any order, and not all
        options, at = random_options(rng, row + 1), rng.randrange(len(chosen))
        add(edits, row, chosen=at, **options)
        wanted[row] = edited(wanted[row], prompts[row], outputs[row], options, int(chosen[at]))
    counts = counts_of(prompts, outputs, device)
    given = logits.to(device)
    found = ops.edit_logits(given, edits.to(device), counts, chosen.to(device))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), torch.tensor(wanted), rtol=1e-5, atol=1e-5)
    assert torch.equal(given.cpu(), logits)
    if dtype == torch.float32:
        again = ops.edit_logits(given, edits.to(device), counts, chosen.to(device), in_place=True)
        assert again is given
        assert torch.equal(again, found)


def test_logits_of_a_wider_tensor_are_edited(ops: ModuleType, device: torch.device) -> None:
    wide = torch.zeros(3, VOCAB + 11, device=device)
    edits = EditList()
    add(edits, 2, biases={3: 1.5}, bans=[(7, -1)])
    found = ops.edit_logits(wide[:, :VOCAB], edits.to(device), TokenCounts.empty(1, 1, device), no_tokens(device))
    wanted = torch.zeros(3, VOCAB)
    wanted[2, 3], wanted[2, 7] = 1.5, -INF
    assert torch.equal(found.cpu(), wanted)


def test_a_ban_stands_whatever_the_logit_and_its_bias(ops: ModuleType, device: torch.device) -> None:
    logits = torch.tensor([[INF, float("nan"), 1.0, -INF]], device=device)
    edits = EditList()
    add(edits, 0, biases={0: 100.0, 2: -100.0, 3: 100.0}, bans=[(0, -1), (1, -1)])
    found = ops.edit_logits(logits, edits.to(device), TokenCounts.empty(1, 1, device), no_tokens(device))
    assert found.tolist() == [[-INF, -INF, -99.0, -INF]]


def test_tokens_are_counted_as_they_are_chosen(ops: ModuleType, device: torch.device) -> None:
    rng, rows, steps = random.Random(2), 5, 40
    prompts = [rng.choices(range(VOCAB), k=k) for k in (1, 15, 16, 17, 30)]
    outputs: list[list[int]] = [[] for _ in range(rows)]
    counts = counts_of(prompts, outputs, device)
    for _ in range(steps):
        rows_now = rng.sample(range(rows), rng.randint(1, rows))
        tokens = [rng.choice([-1, rng.randrange(VOCAB)]) for _ in rows_now]
        slots = [rng.choice([-1, row + 1, row + 1]) for row in rows_now]
        for row, slot, token in zip(rows_now, slots, tokens, strict=True):
            if slot >= 0 and token >= 0:
                outputs[row].append(token)
        sent: list[Tensor] = [torch.tensor(values, dtype=torch.int32, device=device) for values in (slots, tokens)]
        ops.count_tokens(counts, *sent)
    for row in range(rows):
        assert contents(counts, row + 1) == wanted_contents(prompts[row], outputs[row])
    assert counts.sizes_s[[0, rows + 1]].tolist() == [0, 0]


def test_slots_keep_their_tokens_when_there_is_room_for_more(device: torch.device) -> None:
    prompts, outputs = [[3, 3, 9], [4]], [[9, 9, 1], []]
    counts = counts_of(prompts, outputs, device, width=8)
    for larger in (counts.grown(9, 20), counts.grown(1, 1)):
        assert [contents(larger, slot + 1) for slot in range(2)] == [
            wanted_contents(*pair) for pair in zip(prompts, outputs, strict=True)
        ]
    assert counts.grown(9, 20).ids_sw.shape == (9, 20)
    assert counts.grown(1, 1).ids_sw.shape == (4, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 64, VOCAB])
def test_masks_leave_what_their_bits_name(
    ops: ModuleType, vocab: int, dtype: torch.dtype, device: torch.device
) -> None:
    rng = random.Random(vocab)
    wide = torch.randn(4, vocab + 5, generator=torch.Generator().manual_seed(vocab)).to(dtype).to(device)
    allowed = [{token for token in range(vocab) if rng.random() < shard} for shard in (0.5, 0.0, 1.0)]
    words = np.zeros((3, -(-vocab // 32) + 1), np.uint32)
    for mask, tokens in zip(words, allowed, strict=True):
        for token in tokens:
            mask[token // 32] |= np.uint32(1 << token % 32)
    index = torch.tensor([2, -1, 0, 1], dtype=torch.int32, device=device)
    found = ops.mask_logits(wide[:, :vocab], index, torch.from_numpy(words.view(np.int32)).to(device))
    assert found.dtype == dtype
    for row, kept in enumerate((allowed[2], set(range(vocab)), allowed[0], allowed[1])):
        wanted = [value if token in kept else -INF for token, value in enumerate(wide[row, :vocab].tolist())]
        assert found[row].tolist() == wanted
