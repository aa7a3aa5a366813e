"""Stories as padded token batches, written and tokenized by background processes."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Collection, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from generate import stories

PAD_ID: Final = 3
END_ID: Final = 2

PADDING: Final = 0
ORDINARY: Final = 1
LAST_WORD: Final = 2

_WIDTH_STEP: Final = 16


@dataclass(frozen=True, slots=True)
class Batch:
    """One story a row, padded on the right; `roles` marks padding, ordinary and last-word tokens."""

    ids: NDArray[np.int32]
    roles: NDArray[np.uint8]


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Batch:
    """Tokenize as LAMBADA does: the context, then a space and the last word, then the end."""
    contexts, words = zip(*(text.rsplit(" ", 1) for text in texts), strict=True)
    heads = [encoding.ids for encoding in tokenizer.encode_batch(list(contexts))]
    tails = [encoding.ids for encoding in tokenizer.encode_batch([f" {word}" for word in words])]
    longest = max(len(head) + len(tail) + 1 for head, tail in zip(heads, tails, strict=True))
    # Few different widths keep the accelerator's allocator from fragmenting.
    width = -(-longest // _WIDTH_STEP) * _WIDTH_STEP
    ids = np.full((len(texts), width), PAD_ID, dtype=np.int32)
    roles = np.full((len(texts), width), PADDING, dtype=np.uint8)
    for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        tokens = [*head, *tail, END_ID]
        ids[row, : len(tokens)] = tokens
        roles[row, : len(tokens)] = ORDINARY
        roles[row, len(head) : len(head) + len(tail)] = LAST_WORD
    return Batch(ids, roles)


_tokenizer: Tokenizer
_exclude: frozenset[str]


def _start_worker(tokenizer_json: str, exclude: frozenset[str]) -> None:
    global _tokenizer, _exclude
    # One process a core is parallel enough.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = Tokenizer.from_str(tokenizer_json)
    _exclude = exclude


def _make_batch(seed: str, size: int) -> Batch:
    return encode(_tokenizer, list(islice(stories(seed, exclude=_exclude), size)))


def training_batches(
    tokenizer_json: str, exclude: Collection[str], *, size: int, seed: int, workers: int
) -> Generator[Batch, None, None]:
    """Batches without end, in an order that depends on `seed` alone; close it to stop the workers."""
    # Forking is unsafe once torch or tokenizers have started their threads.
    executor = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer_json, frozenset(exclude)),
    )
    try:
        pending: deque[Future[Batch]] = deque()
        index = 0
        while True:
            while len(pending) < 4 * workers:
                pending.append(executor.submit(_make_batch, f"{seed}/{index}", size))
                index += 1
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)
