"""What travels between the stages of a pipeline: hidden states forwards, and chosen tokens back to the first stage.

Both go from rank to rank, on GPUs from device to device. Each connection has a group of its own, since what is sent and
received within one must be in the same order on both sides, and the connections are not in step with each other.
"""

from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from hasten.parallel.liveness import Liveness


@dataclass
class _Connection:
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

    def wait(self, tensor: Tensor, work: dist.Work) -> None:
        """Let whatever comes next wait for a transfer: this process on a CPU, what it launches on a GPU."""
        if tensor.is_cuda:
            work.wait()
        else:
            self.liveness.finish(work)

    def send(self, tensor: Tensor) -> None:
        """Send a tensor, which must not change any more, without waiting for the other side."""
        self._under_way.append((tensor, self._begin(tensor, sends=True)))
        while len(self._under_way) > self.depth:
            self.wait(*self._under_way.popleft())

    def receive(self, tensor: Tensor) -> dist.Work:
        """Begin to receive a tensor."""
        return self._begin(tensor, sends=False)


class StageLink:
    """A rank's connections to the ranks with the same shard in other stages."""

    def __init__(self, connections: list[_Connection], stage: int) -> None:
        """`connections`: from each stage to the next one, and at last from the last stage to the first."""
        self._stage, self._stages = stage, len(connections)
        self._before, self._next = connections[stage - 1], connections[stage]
        self._tokens = connections[-1]
        self._expected: deque[tuple[int, Tensor, dist.Work]] = deque()
        """Tokens that the last stage is to send: their number among the steps, and what receives them."""

    @classmethod
    def form(cls, ranks: list[int], stage: int, liveness: Liveness, timeout: timedelta) -> "StageLink":
        """Connect `ranks`, which hold the same shard of each stage; all ranks of the world must call this alike."""
        depth, pairs = len(ranks), zip(ranks, [*ranks[1:], ranks[0]], strict=True)
        return cls(
            [
                _Connection(sender, receiver, dist.new_group([sender, receiver], timeout=timeout), liveness, depth)
                for sender, receiver in pairs
            ],
            stage,
        )

    def send(self, hidden_th: Tensor) -> None:
        """Give hidden states to the next stage; they must not change any more."""
        self._next.send(hidden_th.contiguous())

    def receive(self, hidden_th: Tensor) -> None:
        """Take hidden states from the stage before; a GPU waits for them, and this process does not."""
        self._before.wait(hidden_th, self._before.receive(hidden_th))

    def return_tokens(self, tokens_r: Tensor) -> None:
        """Give the tokens that the last stage chose to the first one."""
        self._tokens.send(tokens_r.clone())

    def expect_tokens(self, tokens_r: Tensor, step: int) -> None:
        """In the first stage, let the tokens that a step chooses come into this tensor."""
        self.await_tokens(step - self._stages)  # which came into the same tensor
        self._expected.append((step, tokens_r, self._tokens.receive(tokens_r)))

    def await_tokens(self, step: int) -> None:
        """In the first stage, let what is computed from now on wait for the tokens of steps up to this one."""
        while self._expected and self._expected[0][0] <= step:
            _, tokens_r, work = self._expected.popleft()
            self._tokens.wait(tokens_r, work)

    def connect(self, probe: Tensor) -> None:
        """Open the connections, in the order of stages, so that no step waits for that."""
        if self._stage > 0:
            self.receive(probe)
        if self._stage < self._stages - 1:
            self.send(probe.clone())
        if self._stage == self._stages - 1:
            self.return_tokens(probe)
        if self._stage == 0:
            self._tokens.wait(probe, self._tokens.receive(probe))
