"""Sums over ranks. Shapes: t tokens, h hidden, s ranks.

The interpreter cannot run ranks beside each other. It does not have to: a rank whose mailbox holds the words of the
others already waits for nothing. Run as a program, this file is one rank of the test on several GPUs.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hasten.core.ports import free_port
from hasten.ops import PartialSum, reference
from hasten.ops.gpu import exchange, norm
from hasten.ops.peers import Peers

Close = Callable[[str, Tensor, Tensor], None]

DTYPES = [torch.float16, torch.bfloat16]
# The interpreter cuts bf16 off: what is rounded before an exchange and after it comes out too far from the sum.
GPU_ONLY = [] if torch.cuda.is_available() else [pytest.mark.gpu]
KINDS = [
    (torch.float16, 0),
    (torch.float16, 2),
    (torch.bfloat16, 0),
    pytest.param(torch.bfloat16, 2, marks=GPU_ONLY),
]
TWO_PRODUCTS = [
    (torch.float16, 0, True),
    (torch.float16, 2, True),
    pytest.param(torch.bfloat16, 0, True, marks=GPU_ONLY),
    pytest.param(torch.bfloat16, 2, True, marks=GPU_ONLY),
]
ONE_PRODUCT = [pytest.param(*getattr(kind, "values", kind), False, marks=getattr(kind, "marks", ())) for kind in KINDS]
"""Types, and the parts in fp32 that each rank adds up first; 0 for one in the type itself."""
EPS = 1e-5
MAX_ROWS = 8
LIMIT_S = 100


def draw(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@dataclass(frozen=True)
class Case:
    """What each rank has to add, and what all have alike."""

    parts: list[Tensor]
    """Of each rank: [t, h], or [parts, t, h] in fp32."""
    bias: Tensor
    residual: Tensor
    rows: Tensor
    weight: Tensor
    shift: Tensor
    added: list[Tensor]
    """Of each rank, where there are two products: the parts of the second, whose bias is `shift`."""

    @classmethod
    def of(
        cls,
        ranks: int,
        rows: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        split: int = 0,
        seed: int = 0,
        second: bool = False,
    ) -> "Case":
        shape, kind = ((split, rows, width), torch.float32) if split else ((rows, width), dtype)
        parts = [draw(*shape, dtype=kind, device=device, seed=100 * seed + rank) for rank in range(ranks)]
        bias, weight, shift = draw(3, width, dtype=dtype, device=device, seed=7)
        residual = draw(2 * rows, width, dtype=dtype, device=device, seed=8)
        chosen = torch.arange(rows, dtype=torch.int32, device=device) * 2 + 1
        added = [draw(*shape, dtype=kind, device=device, seed=100 * seed + 50 + rank) for rank in range(ranks * second)]
        return cls(parts, bias, residual, chosen, weight, shift, added)

    def run(self, peers: Peers) -> tuple[Tensor, Tensor]:
        sum_ = PartialSum(self.parts[peers.rank], self.bias, self.residual, self.rows, peers)
        sum_ = sum_.plus(self.added[peers.rank], self.shift) if self.added else sum_
        return exchange.exchange_norm(sum_, peers, self.weight, self.shift, EPS)

    def sent(self, rank: int) -> Tensor:
        """A rank's part, as the others get it."""
        total = torch.zeros(())
        for part in (self.parts[rank], *self.added[rank : rank + 1]):
            for each in part.unsqueeze(0) if part.dim() == 2 else part:
                total = total + each.float()
        return total.to(self.weight.dtype)

    @property
    def total(self) -> Tensor:
        """In fp64."""
        whole = torch.stack([self.sent(rank).double() for rank in range(len(self.parts))]).sum(0)
        shift = self.shift.double() if self.added else 0
        return whole + self.bias.double() + shift + self.residual[self.rows.long()].double()

    def norm(self, total: Tensor) -> Tensor:
        return reference.norm(total.double(), self.weight.double(), self.shift.double(), EPS)[0]


def make_peers(
    ranks: int, width: int, device: torch.device, max_rows: int = MAX_ROWS, fixed_order: bool = False
) -> list[Peers]:
    """All ranks' mailboxes, on one device."""
    mailboxes = torch.zeros(ranks, 2, max_rows, ranks, width // 2, dtype=torch.int64, device=device)
    addresses = torch.tensor([mailbox.data_ptr() for mailbox in mailboxes], device=device)
    return [
        Peers(
            rank=rank,
            size=ranks,
            max_rows=max_rows,
            width=width,
            mailbox=mailboxes[rank],
            addresses=addresses,
            exchanges=torch.zeros(max_rows, dtype=torch.int32, device=device),
            abort_flag=torch.zeros(1, dtype=torch.int32, device=device),
            fixed_order=fixed_order,
        )
        for rank in range(ranks)
    ]


def words(part: Tensor, number: int) -> Tensor:
    """[t, h / 2]: a rank's values in pairs, the first lowest, and above them the number of the exchange."""
    low, high = (part.view(torch.int16).long() & 0xFFFF).unflatten(1, (-1, 2)).unbind(2)
    return low | (high << 16) | (number << 32)


@pytest.mark.parametrize(("dtype", "split"), KINDS, ids=str)
@pytest.mark.parametrize("width", [2, 64, 100, 4096])
def test_one_rank_alone_sums_as_a_norm_does(
    width: int, dtype: torch.dtype, split: int, device: torch.device, assert_close: Close
) -> None:
    (peers,) = make_peers(1, width, device)
    case = Case.of(1, 3, width, dtype, device, split)
    for number in (1, 2):
        found, total = case.run(peers)
        assert_close("layer_norm", total, case.total)
        assert_close("layer_norm", found, case.norm(total))
        assert peers.exchanges.tolist() == [number] * 3 + [0] * (MAX_ROWS - 3)
    plain = PartialSum(case.sent(0), case.bias, case.residual, case.rows)
    assert_close("layer_norm", total, norm.norm(plain, case.weight, case.shift, EPS)[1].double())


@pytest.mark.parametrize(("dtype", "split"), KINDS, ids=str)
def test_a_root_mean_square_norm_without_bias(
    dtype: torch.dtype, split: int, device: torch.device, assert_close: Close
) -> None:
    (peers,) = make_peers(1, 100, device)
    case = Case.of(1, 3, 100, dtype, device, split)
    sum_ = PartialSum(case.parts[0], case.bias, case.residual, case.rows, peers)
    for offset in (False, True):
        found, total = norm.norm(sum_, case.weight, None, EPS, rms=True, unit_offset=offset)
        exact = reference.norm(total.double(), case.weight.double(), None, EPS, rms=True, unit_offset=offset)[0]
        assert_close("layer_norm", total, case.total)
        assert_close("layer_norm", found, exact)


@pytest.mark.parametrize(("dtype", "split", "second"), [*ONE_PRODUCT, *TWO_PRODUCTS], ids=str)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_in_turns(
    ranks: int, dtype: torch.dtype, split: int, second: bool, device: torch.device, assert_close: Close
) -> None:
    """The last rank comes first and finds words made here; all others find those that the ranks themselves sent."""
    width = 100
    peers = make_peers(ranks, width, device)
    for number, rows in enumerate([3, 3, 3], start=1):
        case = Case.of(ranks, rows, width, dtype, device, split, seed=number, second=second)
        index = number & 1
        for rank in range(ranks):
            for other in range(ranks):
                if rank > other:  # the ranks below have not run when this one does
                    peers[rank].mailbox[index, :rows, other] = words(case.sent(other), number)
        results = [case.run(peers[rank]) for rank in reversed(range(ranks))]
        for found, total in results:
            assert_close("layer_norm", total, case.total)
            assert_close("layer_norm", found, case.norm(total))
            assert torch.equal(found, results[0][0])
            assert torch.equal(total, results[0][1])
        for receiver in range(ranks):
            for sender in range(ranks):
                held = peers[receiver].mailbox[index, :rows, sender]
                assert torch.equal(held, words(case.sent(sender), number) if sender != receiver else held * 0)


def test_rows_count_their_exchanges_by_themselves(device: torch.device, assert_close: Close) -> None:
    """Batches change their size: what counts for a row is how often that row was exchanged."""
    width, peers = 64, make_peers(2, 64, device)
    for step, rows in enumerate([2, 5, 1, 5]):
        case = Case.of(2, rows, width, torch.float16, device, seed=step)
        for row in range(rows):
            number = int(peers[1].exchanges[row]) + 1
            peers[1].mailbox[number & 1, row, 0] = words(case.sent(0), number)[row]
        first, second = case.run(peers[1]), case.run(peers[0])
        assert torch.equal(first[1], second[1])
        assert_close("layer_norm", first[1], case.total)
    assert peers[0].exchanges.tolist() == peers[1].exchanges.tolist() == [4, 3, 2, 2, 2, 0, 0, 0]


@pytest.mark.parametrize(("dtype", "split"), KINDS, ids=str)
@pytest.mark.parametrize("width", [100, 4096, 8192])
def test_in_a_fixed_order_rows_take_turns_and_a_row_is_the_same_alone(
    width: int, dtype: torch.dtype, split: int, device: torch.device, assert_close: Close
) -> None:
    slots, rows = 4, 7  # a mailbox holds two rows of a slot, so nobody has to wait for the other here
    case = Case.of(2, rows, width, dtype, device, split)

    def run(case: Case, most: int) -> tuple[list[tuple[Tensor, Tensor]], list[Peers]]:
        peers = make_peers(2, width, device, most, fixed_order=True)
        for row in range(len(case.rows)):
            number = row // most + 1
            peers[1].mailbox[number & 1, row % most, 0] = words(case.sent(0), number)[row]
        return [case.run(peers[1]), case.run(peers[0])], peers

    results, peers = run(case, slots)
    for found, total in results:
        assert_close("layer_norm", total, case.total)
        assert_close("layer_norm", found, case.norm(total))
        assert torch.equal(found, results[0][0])
    assert [each.exchanges.tolist() for each in peers] == [[2, 2, 2, 1]] * 2
    for row in range(rows):
        alone = replace(case, parts=[part[..., row : row + 1, :] for part in case.parts], rows=case.rows[row : row + 1])
        for (found, total), (own, own_total) in zip(results, run(alone, slots)[0], strict=True):
            assert torch.equal(own, found[row : row + 1])
            assert torch.equal(own_total, total[row : row + 1])


@pytest.mark.multi_gpu
@pytest.mark.parametrize("width", [1024, 4096, 14_336])
def test_ranks_on_gpus_of_their_own(width: int) -> None:
    port = free_port()
    program = [sys.executable, str(Path(__file__)), str(width), str(port)]
    ranks = [
        subprocess.Popen([*program, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]
    try:
        printed = [rank.communicate(timeout=LIMIT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert printed == ["", ""]
    assert [rank.returncode for rank in ranks] == [0, 0]


def run_rank(width: int, port: int, rank: int) -> None:
    """Exchange again and again; any rank ends with an error if a sum is wrong or differs from the other's."""
    import torch.distributed as dist

    from hasten.parallel.launch import Ranks
    from hasten.parallel.peers import connect
    from hasten.parallel.rank import RankInfo

    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    ranks = Ranks(RankInfo(rank, 2, 2, "127.0.0.1", port), None, "cuda")
    assert ranks.store is not None
    peers = connect(ranks.store, ranks.world, width, 64, device, torch.zeros(1, dtype=torch.int32).pin_memory())
    assert peers is not None, "these GPUs cannot write each other's memory"
    for seed, rows in enumerate([1, 64, 3, 17, 2, 64, 1, 33] * 10):
        case = Case.of(2, rows, width, DTYPES[seed % 2], device, split=seed % 3, seed=seed, second=seed % 4 == 1)
        check_rank(case, *case.run(peers))
    for rows in (1, 64):
        replay(Case.of(2, rows, width, torch.float16, device), peers)
    for split in (0, 4):
        check_fixed_order(Case.of(2, 700, width, DTYPES[split % 3], device, split), replace(peers, fixed_order=True))
    torch.cuda.synchronize(device)
    dist.all_reduce(torch.zeros(1))  # the other may still write to this one's mailbox
    ranks.leave()


def check_fixed_order(case: Case, peers: Peers) -> None:
    """Rows are the same among more than a mailbox holds, and among few."""
    found, total = case.run(peers)
    for first, count in ((0, 1), (3, 17), (64, 64), (500, 200)):
        rows = slice(first, first + count)
        few = replace(case, parts=[part[..., rows, :].contiguous() for part in case.parts], rows=case.rows[rows])
        own, own_total = few.run(peers)
        if count <= 64:
            check_rank(few, own, own_total)
        assert torch.equal(own_total, total[rows]), f"sums of {count} rows are not those among 700"
        assert torch.equal(own, found[rows]), f"norms of {count} rows are not those among 700"


def check_rank(case: Case, found: Tensor, total: Tensor) -> None:
    import torch.distributed as dist

    for actual, expected in ((total, case.total), (found, case.norm(total))):
        bound = 6e-4 if actual.dtype == torch.float16 else 5e-3
        error = (actual.double() - expected).abs() / expected.abs().clamp(min=1)
        assert error.max() <= bound, f"error {error.max():.1e} in {actual.shape[0]} rows of {actual.dtype}"
        others = actual.clone()
        dist.broadcast(others, 0)
        assert torch.equal(others.view(torch.int16), actual.view(torch.int16)), "the ranks differ"


def replay(case: Case, peers: Peers) -> None:
    """A graph of three exchanges, as of three layers, 100 times, on inputs that change and ranks that drift apart."""
    first = [part.clone() for part in case.parts]
    case.run(peers)  # compiles what is not compiled yet, which a capture must not do
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = [case.run(peers) for _ in range(3)]
    kept = []
    for step in range(100):
        scale(case.parts, first, step)
        if step // 5 % 3 == peers.rank:
            torch.cuda._sleep(1_000_000)
        graph.replay()
        kept.append([(found.clone(), total.clone()) for found, total in results])
    for step, outputs in enumerate(kept):
        scale(case.parts, first, step)
        for found, total in outputs:
            check_rank(case, found, total)


def scale(parts: list[Tensor], first: list[Tensor], step: int) -> None:
    for part, before in zip(parts, first, strict=True):
        torch.mul(before, 1 + step / 100, out=part)


if __name__ == "__main__":
    run_rank(*map(int, sys.argv[1:]))
