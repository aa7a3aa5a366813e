"""What travels between the stages of a pipeline: hidden states forwards, and chosen tokens back to the first stage.

Both go from rank to rank, on GPUs from device to device. Each direction has a group of its own, since what is sent and
received within one must be in the same order on both sides, and the two directions are not in step with each other.
"""

from collections import deque
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor


@dataclass
class _Direction:
    """One direction between this rank and another one."""

    group: dist.ProcessGroup
    depth: int
    """Tensors that may be under way before the oldest is waited for."""
    _under_way: deque[tuple[Tensor, dist.Work]] = field(default_factory=deque)
    """Sent, and to stay in memory until the other side has them; the oldest first."""

    def send(self, tensor: Tensor, to: int) -> None:
        """Send a tensor, which must not change any more, without waiting for the other side."""
        work = dist.isend(tensor, to, group=self.group)
        assert work is not None, "this rank is in the group"
        self._under_way.append((tensor, work))
        while len(self._under_way) > self.depth:
            self._under_way.popleft()[1].wait()

    def receive(self, tensor: Tensor, sender: int) -> dist.Work:
        """Begin to receive a tensor."""
        work = dist.irecv(tensor, sender, group=self.group)
        assert work is not None, "this rank is in the group"
        return work


class StageLink:
    """A rank's connections to the ranks with the same shard in other stages; by ranks in the world."""

    def __init__(self, ranks: list[int], stage: int, hidden: dist.ProcessGroup, tokens: dist.ProcessGroup) -> None:
        """`ranks`: those that hold the same shard, by stage."""
        self._ranks, self._stage = ranks, stage
        depth = len(ranks)
        self._hidden, self._tokens = _Direction(hidden, depth), _Direction(tokens, depth)
        self._expected: deque[tuple[int, dist.Work]] = deque()
        """Tokens that the last stage is to send: their number among the steps, and what receives them."""

    def send(self, hidden_th: Tensor) -> None:
        """Give hidden states to the next stage; they must not change any more."""
        self._hidden.send(hidden_th.contiguous(), self._ranks[self._stage + 1])

    def receive(self, hidden_th: Tensor) -> None:
        """Take hidden states from the stage before; a GPU waits for them, and this process does not."""
        self._hidden.receive(hidden_th, self._ranks[self._stage - 1]).wait()

    def return_tokens(self, tokens_r: Tensor) -> None:
        """Give the tokens that the last stage chose to the first one."""
        self._tokens.send(tokens_r.clone(), self._ranks[0])

    def expect_tokens(self, tokens_r: Tensor, step: int) -> None:
        """In the first stage, let the tokens that a step chooses come into this tensor."""
        self.await_tokens(step - len(self._ranks))  # which came into the same tensor
        self._expected.append((step, self._tokens.receive(tokens_r, self._ranks[-1])))

    def await_tokens(self, step: int) -> None:
        """In the first stage, let what is computed from now on wait for the tokens of steps up to this one."""
        while self._expected and self._expected[0][0] <= step:
            self._expected.popleft()[1].wait()

    def connect(self, probe: Tensor) -> None:
        """Open the connections, in the order of stages, so that no step waits for that."""
        if self._stage > 0:
            self.receive(probe)
        if self._stage < len(self._ranks) - 1:
            self.send(probe.clone())
        if self._stage == len(self._ranks) - 1:
            self.return_tokens(probe)
        if self._stage == 0:
            self._tokens.receive(probe, self._ranks[-1]).wait()
