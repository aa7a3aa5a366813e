"""The requests that one engine has: at most as many sequences as it runs, and a few more.

Of several engines of one model a request goes to the one where its prompt's prefix is cached, else the least loaded.
Both are compared in tokens of prompts: a request goes where the fewest are to be computed for it and before it. So a
cached prefix decides as long as it saves more work than the engine that has it is behind, and a common prefix, such as
a system prompt, spreads to all engines under load.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from hasten.server.engine.ticket import Ticket
from hasten.server.engine.wait import WaitEstimator
from hasten.server.engine.wire import Step

_TOKEN_COST = 4
"""Tokens of prompts that take about as long as a token of a completion, which is computed in a step of few."""
_STOPPING_TOKENS = 16
"""Tokens of a completion that may end before it has as many as it may have."""
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
    """About how many tokens of prompts a request's completions take as long as."""
    tokens = min(ticket.max_tokens, _STOPPING_TOKENS) if ticket.may_stop else ticket.max_tokens
    return _TOKEN_COST * ticket.width * tokens


def choose(ticket: "Ticket", engines: "Sequence[AssignedRequests]") -> "AssignedRequests":
    """The engine for a request, one of these; of equal ones the one that has got the fewest tokens so far."""
    if len(engines) == 1:
        return engines[0]
    prompt = len(ticket.prompt_token_ids)

    def cost(engine: "AssignedRequests") -> tuple[int, int]:
        to_compute = prompt - engine.prefixes.cached_tokens(ticket.prefixes)
        return engine.tokens_ahead + engine.tokens_to_come + to_compute, engine.tokens_sent

    return min(engines, key=cost)


_SLACK = 8
"""For each of these that may run, a sequence more waits in the engine, and fills a free place in the very next step."""


class AssignedRequests:
    """What one of a model's engines has, as the server knows it."""

    def __init__(self, index: int, on_change: Callable[[], None]) -> None:
        self.index = index
        """Number of the engine among those of its model."""
        self.attached = False
        """Whether a process of it is ready."""
        self.stalled = False
        """Whether its process has requests and computes nothing."""
        self.heard = time.monotonic()
        """When its process last said something, or got work after it had none."""
        self.sequences = 0
        """Of its requests, but for those that wait for their grammars."""
        self.tokens_ahead = self.tokens_sent = 0
        """Tokens to compute of the prompts that it has not begun, and of all that it was ever sent."""
        self.tokens_to_come = 0
        """Tokens of prompts that take as long as the completions of its sequences."""
        self.prefixes = PrefixTable()
        self._on_change = on_change
        """Called whenever a request that came now might have to wait for another time."""
        self._slots = 1
        """Sequences that it runs at once."""
        self._waits = WaitEstimator(self._slots)
        self._tickets: dict[int, Ticket] = {}
        self._begun = 0
        """Sequences of the requests that it has begun."""
        self._compiling = 0
        """Requests that wait for their grammars."""

    def attach(self, slots: int, num_blocks: int, block_size: int) -> None:
        """A process is ready that runs up to `slots` sequences at once; nothing is measured of it yet.

        Its cache is empty and has `num_blocks` blocks of `block_size` tokens.
        """
        self.attached, self.stalled = True, False
        self._slots = slots
        self._waits = WaitEstimator(slots)
        self.prefixes.reset(num_blocks, block_size)
        self._on_change()

    def detach(self) -> list[Ticket]:
        """The process is gone; returns the requests that it had."""
        self.attached = self.stalled = False
        return self.take_all()

    @property
    def is_empty(self) -> bool:
        """Whether it has no request."""
        return not self._tickets

    @property
    def has_work(self) -> bool:
        """Whether it has a request that it should compute."""
        return self.sequences > 0

    @property
    def has_room(self) -> bool:
        """Whether it may get a request more, which may take more places than are left."""
        return self.sequences < self._slots + max(1, self._slots // _SLACK)

    @property
    def num_ahead(self) -> int:
        """Requests that it has although it had no place for them when they came."""
        return sum(ticket.ahead for ticket in self._tickets.values())

    def fits(self, width: int) -> bool:
        """Whether it has places for `width` sequences now."""
        return self.sequences + width <= self._slots

    def get(self, number: int) -> Ticket | None:
        """The request with this number, if it has it."""
        return self._tickets.get(number)

    def assign(self, ticket: Ticket) -> None:
        """It gets a request."""
        if not self.has_work:
            self.heard = time.monotonic()
        ticket.engine = self
        ticket.ahead = self.has_work and not self.fits(ticket.width)
        ticket.to_compute = len(ticket.prompt_token_ids)
        if ticket.prefixes:
            ticket.to_compute -= self.prefixes.cached_tokens(ticket.prefixes)
            self.prefixes.add(ticket.prefixes)
        self.tokens_ahead += ticket.to_compute
        self.tokens_sent += ticket.to_compute
        self._count(ticket, 1)
        self._tickets[ticket.number] = ticket
        self._on_change()

    def estimated_wait(self, front: Sequence[Ticket], count: int) -> float | None:
        """Seconds until it would begin a request behind `front`, which stands for `count` requests that are to come."""
        running = [ticket for ticket in self._tickets.values() if ticket.begun is not None]
        ahead = [ticket for ticket in self._tickets.values() if ticket.begun is None and not ticket.compiling]
        return self._waits.seconds(running, [*ahead, *front], len(ahead) + count)

    def observe(self, step: Step, now: float) -> None:
        """Take in what the engine says of its state, and of the requests that it has begun."""
        if step.stats is None:
            return
        self._on_change()
        begun = list[Ticket]()
        for number, at in step.started.items():
            if (ticket := self._tickets.get(number)) is None:
                continue
            begun.append(ticket)
            ticket.begin(at, step.stats.steps)
            self._begun += ticket.width
            self.tokens_ahead -= ticket.to_compute
        holds_back = step.stats.waiting > self._compiling and self._begun < self._slots
        self._waits.observe(step.stats, now, begun, holds_back=holds_back)

    def finish(self, ticket: Ticket) -> None:
        """A request has its last token."""
        self._waits.ended(ticket)
        self.remove(ticket)

    def set_compiling(self, ticket: Ticket, compiling: bool) -> None:
        """A request begins to wait for its grammar, or has waited for it."""
        if ticket.compiling != compiling:
            ticket.compiling = compiling
            self._count(ticket, -1 if compiling else 1)
            self._compiling += 1 if compiling else -1
            self._on_change()

    def remove(self, ticket: Ticket) -> None:
        """Forget a request that it has."""
        del self._tickets[ticket.number]
        ticket.stop_timer()
        self._forget(ticket)
        self._on_change()

    def _count(self, ticket: Ticket, sign: int) -> None:
        """Sequences of a request take places, or take them no more."""
        self.sequences += sign * ticket.width
        self.tokens_to_come += sign * tokens_to_come(ticket)

    def _forget(self, ticket: Ticket) -> None:
        ticket.engine = None
        if not ticket.compiling:
            self._count(ticket, -1)
        self._begun -= 0 if ticket.begun is None else ticket.width
        self._compiling -= ticket.compiling
        self.tokens_ahead -= ticket.to_compute if ticket.begun is None else 0

    def take_all(self) -> list[Ticket]:
        """Forget all requests, and return them."""
        return self._take(list(self._tickets.values()))

    def take_movable(self) -> list[Ticket]:
        """Forget the requests that another engine may have instead, and return them."""
        return self._take([ticket for ticket in self._tickets.values() if ticket.may_move])

    def _take(self, tickets: list[Ticket]) -> list[Ticket]:
        for ticket in tickets:
            del self._tickets[ticket.number]
            self._forget(ticket)
        self._on_change()
        return tickets
