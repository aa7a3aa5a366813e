"""Log-probabilities of a long prompt take no more memory at a time than those of a short one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hasten import LLM, SamplingParams
from hasten.engine import worker

VOCAB = 16_000
ROWS, STEP = 32, 96


class Peak(TorchDispatchMode):
    """The most bytes of tensors that exist at once, of those that an op returned meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has it without types
        self.nbytes = 0
        self._alive: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._alive[id(leaf)] = (weakref.ref(leaf), storage.data_ptr(), storage.nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if entry[0]() is not None}
        self.nbytes = max(self.nbytes, sum({start: nbytes for _, start, nbytes in self._alive.values()}.values()))
        return result


def test_memory_does_not_grow_with_the_prompt(make_bloom: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_PROMPT_LOGITS_ROWS", ROWS)
    folder = make_bloom(vocab_size=VOCAB, n_layer=1, hidden_size=8, n_head=1)
    params = SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0, ignore_eos=True, detokenize=False)
    peaks = []
    with LLM(folder, max_num_batched_tokens=STEP, max_num_seqs=4, kv_cache_memory=1 << 22, max_model_len=1024) as llm:
        for length in (STEP, 8 * STEP):
            prompt = [(7 * n) % VOCAB for n in range(length)]
            with Peak() as peak:
                (output,) = llm.generate([prompt], params)
            assert output.prompt_logprobs is not None
            assert len(output.prompt_logprobs) == length
            peaks.append(peak.nbytes)
    logits = ROWS * VOCAB * 4
    assert peaks[0] > 2 * logits  # it sees them, and their log-probabilities
    scores = 8 * STEP * STEP * 4  # of a step's tokens with all that came before: attention's, whatever is reported
    assert peaks[1] - peaks[0] < 2 * scores < logits / 2
    assert peaks[1] < STEP * VOCAB * 4 * 2
