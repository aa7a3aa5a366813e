"""Blocks of the paged cache: who holds which, which prefixes they hold, when to copy. Never imports torch."""

import math
from collections import OrderedDict

from hasten.engine.block_watch import BlockWatch
from hasten.engine.encoder_input import EncoderInput
from hasten.engine.sequence import Sequence

_INPUT = -1
"""In place of a prefix before the first block of an encoder's input, which is known by all tokens of the input."""


_READ_TOGETHER = 64
"""Keys that attention reads together, from a multiple of this number on: those before a window with the first in it."""


class BlockManager:
    """Hands out blocks, shares those of equal prefixes, and copies a shared block before it is written.

    A full block is known by its prefix: the number of the prefix before it and its own tokens, compared exactly, so
    that two prompts never share by accident. A block that nobody holds keeps its content until it is handed out anew:
    those without any first, the last one freed before the others, then the longest unused.

    The keys and values that an encoder leaves depend on all of its input, so they are known by that, and their number
    is what the decoder's prefixes begin with in place of the empty one.

    The empty prefix of a request is its `root`, which a salt of its own makes another one than that of other requests:
    it finds no block of theirs, and they none of its.

    With a `window`, the largest number of tokens that a layer sees, blocks before that of the next token go back while
    their sequence runs; its table still has their numbers, which nobody reads.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True, window: int | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._window = window
        self.enable_prefix_caching = enable_prefix_caching
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._known: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        """(prefix before, tokens) -> (block, prefix with these tokens)."""
        self._content: list[tuple[int, tuple[int, ...]] | None] = [None] * num_blocks
        self._last_prefix = -_INPUT
        self.prefix_queries = 0
        self.prefix_hits = 0
        """Tokens looked up in the prefix cache, and those found."""
        self.watch: BlockWatch | None = None
        """Hears what becomes of blocks, where anybody wants to know."""

    @property
    def num_used(self) -> int:
        """Blocks that a sequence holds."""
        return self.num_blocks - len(self._free)

    def share_prefix(self, sequence: Sequence) -> None:
        """Give a sequence without blocks those that hold its beginning; its last token is always left to compute.

        Of beams that is the last one which all have in common. No token of it may be pending: it comes for the first
        time, or it was preempted and those of the step then under way are known by now.
        """
        assert not sequence.pending
        prefix = _first_prefix(sequence)
        if not self.enable_prefix_caching or sequence.wants_prompt_logprobs or prefix is None:
            return
        size, tokens, found = self.block_size, sequence.token_ids, []
        if sequence.beams is not None:
            tokens = tokens[: sequence.beams.trunk]
        for start in range(0, (len(tokens) - 1) // size * size, size):
            entry = self._known.get((prefix, tuple(tokens[start : start + size])))
            if entry is None:
                break
            block, prefix = entry
            found.append(block)
        self._hold_found(found)
        self.prefix_queries += len(tokens)
        self.prefix_hits += len(found) * size
        sequence.block_table = found
        sequence.table_version += 1
        sequence.num_computed = len(found) * size
        sequence.prefix, sequence.num_registered = prefix, len(found)

    def reserve(self, sequence: Sequence, num_tokens: int) -> list[tuple[int, int]] | None:
        """Make room for the next `num_tokens` tokens; None, with nothing changed, if blocks run out.

        Returns the copies (source, target) to make before the tokens are written: blocks that others hold too.
        """
        size, table, references = self.block_size, sequence.block_table, self._references
        first, held = sequence.num_computed // size, len(table)
        missing = -(-(sequence.num_computed + num_tokens) // size) - held
        if missing == 0 and first == held - 1 and references[table[first]] == 1:
            return []  # a decode into a block begun before: most calls are this one
        missing = max(0, missing)
        shared = [index for index in range(first, held) if references[table[index]] > 1]
        if not missing and not shared:
            return []
        if missing + len(shared) > len(self._free):
            return None
        copies = []
        for index in shared:
            source, target = table[index], self._take()
            references[source] -= 1
            table[index] = target
            copies.append((source, target))
        if shared:
            sequence.table_version += 1
        table.extend(self._take() for _ in range(missing))
        return copies

    def register(self, sequence: Sequence) -> None:
        """Make the blocks that `sequence` has filled known to others with the same prefix.

        A block with a pending token waits until that is known: it is part of what the block is known by.
        """
        if not self.enable_prefix_caching:
            return
        size, whole = self.block_size, min(sequence.num_computed, len(sequence.token_ids))
        while (sequence.num_registered + 1) * size <= whole:
            index = sequence.num_registered
            if index == 0:
                sequence.prefix = _first_prefix(sequence) or sequence.root
            content = (sequence.prefix, tuple(sequence.token_ids[index * size : (index + 1) * size]))
            block = sequence.block_table[index]
            entry = self._known.get(content)
            if entry is None:
                self._forget(block)
                self._last_prefix += 1
                entry = self._known[content] = (block, self._last_prefix)
                self._content[block] = content
            sequence.prefix = entry[1]
            sequence.num_registered += 1

    def release_unseen(self, sequence: Sequence) -> None:
        """Let the blocks go that no token to come of a sequence sees; those to be made known stay until they are."""
        if self._window is None:
            return
        step = math.lcm(_READ_TOGETHER, self.block_size)
        count = max(0, sequence.num_computed - self._window) // step * step // self.block_size
        if self.enable_prefix_caching:
            count = min(count, sequence.num_registered)
        if count > sequence.num_released:
            self._drop(sequence.block_table[sequence.num_released : count])
            sequence.num_released = count

    def hold_input(self, sequence: Sequence) -> bool:
        """Let a sequence hold the blocks of its encoder's input: known ones of the same input, or ones to be written.

        False, with nothing changed, if blocks run out.
        """
        given = sequence.encoder_input
        if given is None or sequence.holds_input:
            return True
        if given.holders == 0:
            missing = -(-len(given.token_ids) // self.block_size)
            given.is_computed = self._share_input(given, missing)
            if not given.is_computed:
                if missing > len(self._free):
                    return False
                given.block_table = [self._take() for _ in range(missing)]
            given.table_version += 1
        given.holders += 1
        sequence.holds_input = True
        return True

    def _share_input(self, given: EncoderInput, count: int) -> bool:
        """Give an encoder's input the `count` blocks of an equal one, if all are known."""
        if not self.enable_prefix_caching:
            return False
        self.prefix_queries += len(given.token_ids)
        first = self._known.get(_input_content(given))
        if first is None:
            return False
        more = [self._known.get((-first[1], (index,))) for index in range(1, count)]
        found = [first[0], *(entry[0] for entry in more if entry is not None)]
        if len(found) < count:
            return False
        self._hold_found(found)
        given.block_table, given.prefix = found, first[1]
        self.prefix_hits += len(given.token_ids)
        return True

    def register_input(self, given: EncoderInput) -> None:
        """Make the blocks of an encoder's input, which a step writes, known to others with the same one."""
        if not self.enable_prefix_caching:
            return
        entry = self._known.get(_input_content(given))
        if entry is None:
            self._last_prefix += 1
        given.prefix = self._last_prefix if entry is None else entry[1]
        for index, block in enumerate(given.block_table):
            content = (-given.prefix, (index,)) if index else _input_content(given)
            if content not in self._known:
                self._forget(block)
                self._known[content] = (block, given.prefix)
                self._content[block] = content

    def forget_prefixes(self) -> None:
        """Let no sequence to come find the blocks that are known by now; who holds them keeps them."""
        self._known.clear()
        self._content = [None] * self.num_blocks
        if self.watch is not None:
            self.watch.forgotten()

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child` hold all blocks of `parent`'s prompt, none released yet; its last token is left to compute."""
        assert not parent.num_released
        blocks = -(-parent.prompt_len // self.block_size)
        child.block_table = parent.block_table[:blocks]
        for block in child.block_table:
            self._hold(block)
        child.num_computed = parent.prompt_len - 1

    def share(self, parent: Sequence, child: Sequence, count: int) -> None:
        """Let the first `count` blocks of `child` be those of `parent`, all full; what is behind them stays its own."""
        table, before = parent.block_table[:count], child.block_table[:count]
        common = len(before)
        while before[:common] != table[:common]:
            common -= 1  # beams differ in their last blocks alone
        for block in table[common:]:
            self._hold(block)
        self._drop(before[common:])
        if common < count:
            child.block_table[:count] = table
            child.table_version += 1
        if parent.num_registered <= count:
            child.prefix, child.num_registered = parent.prefix, parent.num_registered

    def free(self, sequence: Sequence) -> None:
        """Let all blocks of `sequence` go, its tail to be reused first; it has nothing computed then."""
        self._drop(sequence.block_table[sequence.num_released :])
        sequence.block_table = []
        sequence.table_version += 1
        sequence.num_computed = sequence.num_registered = sequence.num_released = 0
        sequence.prefix = sequence.root
        self.release_input(sequence)

    def release_input(self, sequence: Sequence) -> None:
        """Let a sequence no longer hold the blocks of its encoder's input; the last holder frees them."""
        given = sequence.encoder_input
        if given is None or not sequence.holds_input:
            return
        sequence.holds_input = False
        given.holders -= 1
        if given.holders == 0:
            self._drop(given.block_table)
            given.block_table, given.is_computed = [], False
            given.table_version += 1

    def _drop(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._content[block] is None:
                    self._free.move_to_end(block, last=False)  # nothing to keep: reuse it while it is warm
                if self.watch is not None:
                    self.watch.freed(block, kept=self._content[block] is not None)

    def _hold_found(self, blocks: list[int]) -> None:
        """Hold blocks that were found by what they hold."""
        for block in blocks:
            self._hold(block)
            if self.watch is not None:
                self.watch.found(block)

    def _hold(self, block: int) -> None:
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._references[block] = 1
        if self.watch is not None:
            self.watch.taken(block)
        return block

    def _forget(self, block: int) -> None:
        content = self._content[block]
        if content is not None:
            del self._known[content]
            self._content[block] = None


def _first_prefix(sequence: Sequence) -> int | None:
    """What a sequence's prefixes begin with: the number of its encoder's input, if it has one; None: not known yet."""
    return sequence.root if sequence.encoder_input is None else sequence.encoder_input.prefix or None


def _input_content(given: EncoderInput) -> tuple[int, tuple[int, ...]]:
    """What the first block of an encoder's input is known by."""
    return (_INPUT - given.root, given.token_ids)
