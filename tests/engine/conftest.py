"""A cache that remembers what was written where, and Hugging Face's answers."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import chain
from itertools import count as counter
from pathlib import Path
from typing import Any

import pytest

from hasten.core.types import Request, SamplingParams
from hasten.engine.batch import Batch
from hasten.engine.block_manager import BlockManager
from hasten.engine.inputs import BlockTables
from hasten.engine.llm import LLM
from hasten.engine.sequence import Sequence
from hasten.engine.step_message import StepMessage, TableRows

MakeSequence = Callable[..., Sequence]


class Shadow:
    """A cache on paper: each slot holds the whole prefix that its key and value depend on."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.slots: list[list[tuple[int, ...]]] = [[()] * manager.block_size for _ in range(manager.num_blocks)]

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """All sources are read before a target is written, as the runner does."""
        assert len({target for _, target in pairs}) == len(pairs)
        for target, content in [(target, list(self.slots[source])) for source, target in pairs]:
            self.slots[target] = content

    def write(self, sequence: Sequence, count: int) -> None:
        """What computing the next `count` tokens leaves in the cache; never in a block that another holds too."""
        size = self.manager.block_size
        for position in range(sequence.num_computed, sequence.num_computed + count):
            block = sequence.block_table[position // size]
            assert self.manager._references[block] == 1
            self.slots[block][position % size] = tuple(sequence.token_ids[: position + 1])

    def run(self, batch: Batch) -> None:
        """A whole step."""
        self.copy(batch.copies)
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            self.write(sequence, count)

    def check(self, holders: Iterable[Sequence]) -> None:
        """Everything that must hold between two steps, of the manager's books and of what the blocks hold."""
        size, holders = self.manager.block_size, list(holders)
        self.check_books(holders)
        for sequence in holders:
            for position in range(sequence.num_computed):
                block = sequence.block_table[position // size]
                assert self.slots[block][position % size] == tuple(sequence.token_ids[: position + 1])

    def check_books(self, holders: list[Sequence]) -> None:
        """What must hold whatever the sequences go on with: of the books, and of the blocks that the cache knows."""
        manager, size = self.manager, self.manager.block_size
        held = list(chain.from_iterable(sequence.block_table for sequence in holders))
        references = [held.count(block) for block in range(manager.num_blocks)]
        assert manager._references == references
        assert set(manager._free) == {block for block, count in enumerate(references) if count == 0}
        assert manager.num_used == len(set(held))
        for sequence in holders:
            assert len(set(sequence.block_table)) == len(sequence.block_table)
            if sequence.beams is None:
                assert len(sequence.block_table) * size >= sequence.num_computed
        self._check_known()

    def _check_known(self) -> None:
        manager, size = self.manager, self.manager.block_size
        assert {content: entry[0] for content, entry in manager._known.items()} == {
            content: block for block, content in enumerate(manager._content) if content is not None
        }
        prefixes = [prefix for _, prefix in manager._known.values()]
        assert len(set(prefixes)) == len(prefixes)
        assert 0 not in prefixes
        whole = {0: ()} | {prefix: self.slots[block][size - 1] for block, prefix in manager._known.values()}
        for (before, tokens), (block, _) in manager._known.items():
            assert self.slots[block][size - 1][-size:] == tokens
            if before in whole:  # the block before may have been handed out anew, and then nobody can come this far
                assert self.slots[block][size - 1] == whole[before] + tokens


class Follower:
    """The block tables of another rank, which knows nothing but messages."""

    def __init__(self, max_sequences: int, max_blocks: int = 64) -> None:
        self.rows = TableRows(max_sequences)
        self.tables = BlockTables(max_sequences, max_blocks)

    def follow(self, batch: Batch) -> StepMessage:
        """What arrives is what was sent, and the tables are those of the sequences then."""
        message = StepMessage.of(batch, self.rows)
        numbers = message.packed()
        arrived = StepMessage.unpacked(numbers)
        assert arrived == message
        self.tables.apply(arrived.edits)
        for row, sequence in zip(arrived.rows, batch.sequences, strict=True):
            assert self.tables.array[row, : len(sequence.block_table)].tolist() == sequence.block_table
        return arrived


@pytest.fixture(scope="session")
def make_follower() -> type[Follower]:
    return Follower


@pytest.fixture(scope="session")
def shadow() -> type[Shadow]:
    return Shadow


@pytest.fixture(scope="session")
def make_sequence() -> MakeSequence:
    """A sequence of token ids; `seed` and `output` are its own, the rest are SamplingParams."""
    keys = counter()

    def make(token_ids: Iterable[int], seed: int = 0, output: Iterable[int] = (), **params: Any) -> Sequence:
        chosen = SamplingParams(**params)
        result = Sequence(Request(request_id="r", prompt_token_ids=tuple(token_ids), params=chosen), seed)
        result.token_ids += output
        result.key = next(keys)
        return result

    return make


class Reference:
    """Hugging Face's model, one prompt at a time."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The next `count` tokens, whatever they are."""
        import torch

        ids = torch.tensor([prompt])
        outputs = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            eos_token_id=None,
        )
        return list(outputs[0, len(prompt) :].tolist())

    def logprobs(self, ids: list[int]) -> Any:
        """[tokens, vocabulary]: at each place those of the token that follows."""
        import torch

        with torch.inference_mode():
            return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.fixture(scope="session")
def reference() -> Callable[[Path], Reference]:
    return lru_cache(maxsize=None)(Reference)


@pytest.fixture(scope="session")
def llm(tiny_bloom: Path) -> Iterable[LLM]:
    """With everything as it is by default; tests leave it as they found it."""
    with LLM(tiny_bloom) as llm:
        yield llm
        assert llm.engine.scheduler.blocks.num_used == 0
