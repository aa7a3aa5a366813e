"""A rank's connections to other ranks' GPUs: memory for sums and messages that they write for each other."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from hasten.core.config import EngineConfig, SchedulerConfig
from hasten.core.model_config import ModelConfig
from hasten.parallel.groups import ALONE, ParallelGroups
from hasten.parallel.launch import Ranks
from hasten.parallel.peers import MOST_EXCHANGED_ROWS, connect, connect_stages, connect_sums, reachable

_MOST_SUMMED_ROWS = 16_384
"""Rows of the largest sum for which two ranks keep room that the other reads."""


class PeerLinks:
    """What one rank shares with the GPUs that its own can reach."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        self._abort_flag = torch.zeros(1, dtype=torch.int32, pin_memory=self.has_peers)
        """In memory of the host that a GPU sees: not 0 once a rank has failed; no kernel waits for other ranks then."""
        ranks.liveness.on_failure(partial(self._abort_flag.fill_, 1))

    @property
    def has_peers(self) -> bool:
        """Whether there are other ranks' GPUs."""
        return self._device.type == "cuda" and self._ranks.world.size > 1

    def release(self) -> None:
        """Let kernels that wait for other ranks go on."""
        self._abort_flag.fill_(1)

    def groups(self, config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype) -> ParallelGroups:
        """The groups of this rank, the tensor group with memory for sums where its GPUs can reach each other."""
        ranks, fixed = self._ranks, config.deterministic
        tensor = replace(ranks.groups.tensor, fixed_order=fixed)
        if dtype.itemsize == 2 and self._reaches(range(tensor.first, tensor.first + tensor.size)):
            assert ranks.store is not None
            width = model_config.hidden_size
            peers = connect(ranks.store, tensor, width, MOST_EXCHANGED_ROWS, self._device, self._abort_flag)
            tensor = replace(tensor, peers=None if peers is None else replace(peers, fixed_order=fixed))
            # a parallel residual adds both of its products up before ranks do, and a fixed order is that of mailboxes
            if peers is not None and tensor.size == 2 and not (fixed or model_config.parallel_residual):
                rows = min(config.scheduler.max_num_batched_tokens or 1, _MOST_SUMMED_ROWS)
                few, nbytes = MOST_EXCHANGED_ROWS, rows * width * dtype.itemsize
                sums = connect_sums(ranks.store, tensor, nbytes, few, self._device, self._abort_flag)
                tensor = replace(tensor, sums=sums)
        expert = tensor if config.parallel.expert_parallel else ALONE
        return replace(ranks.groups, tensor=tensor, expert=expert)

    def connect_stages(self, config: SchedulerConfig, row_bytes: int) -> None:
        """Open the connections to other pipeline stages, through memory of GPUs that reach each other.

        `row_bytes`: of a token's hidden states.
        """
        ranks, link = self._ranks, self._ranks.groups.pipeline.link
        if link is None:
            return
        if ranks.world.least(int(self._reaches(link.ranks))):
            assert ranks.store is not None
            most = max((config.max_num_batched_tokens or 1) * row_bytes, config.max_num_seqs * torch.int32.itemsize)
            connect_stages(ranks.store, ranks.world, link, most, self._device, self._abort_flag)
        link.connect(torch.zeros(1, dtype=torch.int32, device=self._device))

    def _reaches(self, group: Sequence[int]) -> bool:
        """Whether these ranks of the world have GPUs of this host that can write each other's memory."""
        ranks = self._ranks
        on_one_host = len({rank // ranks.local_size for rank in group}) == 1
        numbers = [ranks.first + rank % ranks.local_size for rank in group]
        return self._device.type == "cuda" and on_one_host and reachable(numbers)
