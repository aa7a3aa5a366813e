"""Which of several engines of one model a request goes to: where its prompt's prefix is cached, else the least loaded.

Both are compared in tokens: a request goes where the fewest are to be computed for it and before it. So a
cached prefix decides as long as it saves more work than the engine that has it is behind, and a common prefix, such as
a system prompt, spreads to all engines under load.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hasten.server.engine.assigned import AssignedRequests
    from hasten.server.engine.ticket import Ticket

_SEQUENCE_TOKENS = 64
"""Tokens to come of a completion that may end before it has as many as it may have."""
_MOST_BLOCKS = 1024
"""Of a prompt that are looked at: each takes about half a microsecond."""


def prefixes_of(tokens: tuple[int, ...], block_size: int, cache_salt: str = "") -> tuple[int, ...]:
    """A hash for each whole block of a prompt and all tokens before it, but for the block of the last token alone.

    Prompts of other salts have others. Blocks are cut as the engine's block manager cuts them; it compares tokens, so a
    collision costs time and no more.
    """
    found, before = [], hash(cache_salt)
    last = min((len(tokens) - 1) // block_size, _MOST_BLOCKS) * block_size
    for start in range(0, last, block_size):
        before = hash((before, tokens[start : start + block_size]))
        found.append(before)
    return tuple(found)


class PrefixTable:
    """Prefixes of the prompts that one engine was sent lately: about those that its cache holds."""

    def __init__(self) -> None:
        self._known: OrderedDict[int, None] = OrderedDict()
        """The longest unused first."""
        self._num_blocks = self._block_size = 0
        """Blocks of the engine's cache, and tokens of a block."""

    def reset(self, num_blocks: int, block_size: int) -> None:
        """The engine's cache is empty, and has `num_blocks` blocks of `block_size` tokens."""
        self._known.clear()
        self._num_blocks, self._block_size = num_blocks, block_size

    def cached_tokens(self, prefixes: Sequence[int]) -> int:
        """Tokens of a prompt with these prefixes that the engine need not compute."""
        blocks = 0
        for prefix in prefixes:
            if prefix not in self._known:
                break
            blocks += 1
        return blocks * self._block_size

    def add(self, prefixes: Sequence[int]) -> None:
        """The engine gets a prompt with these prefixes."""
        for prefix in reversed(prefixes):  # the cache also gives up ends before beginnings
            self._known[prefix] = None
            self._known.move_to_end(prefix)
        while len(self._known) > self._num_blocks:
            self._known.popitem(last=False)


def tokens_to_come(ticket: "Ticket") -> int:
    """About how many tokens a request's completions will have."""
    return ticket.width * (min(ticket.max_tokens, _SEQUENCE_TOKENS) if ticket.may_stop else ticket.max_tokens)


def choose(ticket: "Ticket", engines: "Sequence[AssignedRequests]") -> "AssignedRequests":
    """The engine for a request, one of these; of equal ones the one that has got the fewest tokens so far."""
    if len(engines) == 1:
        return engines[0]
    prompt = len(ticket.prompt_token_ids)

    def cost(engine: "AssignedRequests") -> tuple[int, int]:
        to_compute = prompt - engine.prefixes.cached_tokens(ticket.prefixes)
        return engine.tokens_ahead + engine.tokens_to_come + to_compute, engine.tokens_sent

    return min(engines, key=cost)
