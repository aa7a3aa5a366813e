"""Memory that ops on a CPU use again."""

import math
import threading

import torch
from torch import Tensor


class Scratch(threading.local):
    """Memory that an op needs for a moment, kept for its next call on this thread.

    The system would take large pieces back each time and give them out again page by page, at times for longer than
    the op itself takes.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, use: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor with whatever content; the next `take` for the same use gives the same memory."""
        size = math.prod(shape)
        kept = self._kept.get((use, dtype))
        if kept is None or kept.numel() < size:
            with torch.inference_mode(False):  # a tensor made inside could not be written outside
                kept = self._kept[use, dtype] = torch.empty(size, dtype=dtype)
        return kept[:size].view(shape)


SCRATCH = Scratch()
