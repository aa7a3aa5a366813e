"""Messages between the stages of a pipeline: hidden states forwards, and chosen tokens back to the first stage.

So each rank has one connection that brings messages and one that takes them, and the stages form a ring. Both go from
rank to rank, on GPUs from device to device. Each connection has a group of its own, since what is sent and received
within one must be in the same order on both sides, and the connections are not in step with each other. GPUs that can
write each other's memory need no group (`peer_ring.py`).
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from hasten.parallel.liveness import Liveness

Wait = Callable[[], None]
"""Lets whatever comes next wait for a message: this process on a CPU, what it launches on a GPU."""


class Outbound(Protocol):
    """A connection to the rank behind."""

    def send(self, tensor: Tensor) -> None:
        """Send a contiguous tensor, which may change afterwards, without letting this process wait."""


class Inbound(Protocol):
    """A connection from the rank before."""

    def receive(self, tensor: Tensor) -> Wait:
        """Begin to receive a contiguous tensor, in the order of sending."""


class Connection(Inbound, Outbound, Protocol):
    """Both of a rank's connections."""


@dataclass
class _GroupConnection:
    """From one rank to another one; by ranks in the world."""

    sender: int
    receiver: int
    group: dist.ProcessGroup
    liveness: Liveness
    depth: int
    """Tensors that may be under way before the oldest is waited for."""
    _under_way: deque[tuple[Tensor, dist.Work]] = field(default_factory=deque)
    """Sent, and to stay in memory until the other side has them; the oldest first."""

    def _begin(self, tensor: Tensor, *, sends: bool) -> dist.Work:
        if not tensor.is_cuda:  # gloo waits for the end of a broadcast alone so that a rank's death can end it
            work = dist.broadcast(tensor, self.sender, group=self.group, async_op=True)
        elif sends:
            work = dist.isend(tensor, self.receiver, group=self.group)
        else:
            work = dist.irecv(tensor, self.sender, group=self.group)
        assert work is not None, "this rank is in the group"
        return work

    def _wait(self, tensor: Tensor, work: dist.Work) -> None:
        if tensor.is_cuda:
            work.wait()
        else:
            self.liveness.finish(work)

    def send(self, tensor: Tensor) -> None:
        """See `Outbound`: what is sent is a copy."""
        copy = tensor.clone()
        self._under_way.append((copy, self._begin(copy, sends=True)))
        while len(self._under_way) > self.depth:
            self._wait(*self._under_way.popleft())

    def receive(self, tensor: Tensor) -> Wait:
        """See `Inbound`."""
        work = self._begin(tensor, sends=False)
        return lambda: self._wait(tensor, work)


class StageLink:
    """A rank's connections to the ranks with the same shard in other stages."""

    def __init__(self, ranks: list[int], stage: int, inbound: Inbound, outbound: Outbound) -> None:
        """`ranks` of all stages; the first stage's inbound connection is from the last stage."""
        self.ranks, self.stage = ranks, stage
        self._inbound, self._outbound = inbound, outbound
        self._expected: deque[tuple[int, Wait]] = deque()
        """Tokens that the last stage is to send: their number among the steps, and what lets others wait for them."""

    @classmethod
    def form(cls, ranks: list[int], stage: int, liveness: Liveness, timeout: timedelta) -> "StageLink":
        """Connect `ranks`, which hold the same shard of each stage; all ranks of the world must call this alike."""
        depth, pairs = len(ranks), zip(ranks, [*ranks[1:], ranks[0]], strict=True)
        connections = [
            _GroupConnection(sender, receiver, dist.new_group([sender, receiver], timeout=timeout), liveness, depth)
            for sender, receiver in pairs
        ]
        return cls(ranks, stage, connections[stage - 1], connections[stage])

    @property
    def connections(self) -> tuple[Inbound, Outbound]:
        """From the stage before and to the next one."""
        return self._inbound, self._outbound

    def use(self, both: "Connection") -> None:
        """Take another connection to both neighbours, before anything was sent."""
        self._inbound = self._outbound = both

    def send(self, hidden_th: Tensor) -> None:
        """Give hidden states to the next stage; they may change afterwards."""
        self._outbound.send(hidden_th.contiguous())

    def receive(self, hidden_th: Tensor) -> None:
        """Take hidden states from the stage before; a GPU waits for them, and this process does not."""
        self._inbound.receive(hidden_th)()

    def return_tokens(self, tokens_r: Tensor) -> None:
        """Give the tokens that the last stage chose to the first one."""
        self._outbound.send(tokens_r.contiguous())

    def expect_tokens(self, tokens_r: Tensor, step: int) -> None:
        """In the first stage, let the tokens that a step chooses come into this tensor."""
        self.await_tokens(step - len(self.ranks))  # which came into the same tensor
        self._expected.append((step, self._inbound.receive(tokens_r)))

    def await_tokens(self, step: int) -> None:
        """In the first stage, let what is computed from now on wait for the tokens of steps up to this one."""
        while self._expected and self._expected[0][0] <= step:
            _, wait = self._expected.popleft()
            wait()

    def connect(self, probe: Tensor) -> None:
        """Open the connections, in the order of stages, so that no step waits for that."""
        if self.stage > 0:
            self.receive(probe)
        self._outbound.send(probe)
        if self.stage == 0:
            self.receive(probe)
