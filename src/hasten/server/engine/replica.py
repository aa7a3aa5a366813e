"""One of a model's engines: its process, which is started again whenever it dies, and the requests that it has."""

import asyncio
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from hasten.core.errors import EngineError, error_of
from hasten.engine.stats import EngineStats
from hasten.server.engine.assigned import AssignedRequests
from hasten.server.engine.counters import EngineCounters
from hasten.server.engine.link import EngineLink
from hasten.server.engine.ticket import Ticket
from hasten.server.engine.wire import Abort, EngineInfo, Expire, Output, Start, Step

if TYPE_CHECKING:
    from hasten.server.engine.client import EngineClient

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 30.0
"""Before a dead process is started again: doubled each time, from the start again once it has lived for the longest."""
_log = logging.getLogger(__name__)


class Replica:
    """One engine. `start` starts its process, which then comes back until `close`."""

    def __init__(self, owner: "EngineClient", requests: AssignedRequests, count: int, stall_timeout: float) -> None:
        """One of `count` engines of `owner`'s model, the one of `requests`."""
        index = requests.index
        self.name = owner.name if count == 1 else f"{owner.name}, replica {index}"
        self.requests = requests
        self.info: EngineInfo
        self.restarts = 0
        """Times that a dead process was started again."""
        self.link: EngineLink | None = None
        """The process that is ready, if there is one."""
        config = owner.config if index == 0 else replace(owner.config, progress_bars=False)
        self._start = Start(config, index, count)
        self._owner = owner
        self._stall_timeout = stall_timeout
        self._keeper: asyncio.Task[None] | None = None
        """Starts the process again when it has died."""
        self._watcher: asyncio.Task[None] | None = None
        """Sees whether the process stands still."""
        self._ready_since = 0.0
        self._now = EngineStats()
        self._before = EngineStats()
        """Of processes that have ended: only the counters count."""

    @property
    def ready(self) -> bool:
        """Whether it computes requests now; False while its process is dead, loads or stands still."""
        return self.link is not None and not self.requests.stalled

    @property
    def pid(self) -> int | None:
        """Number of its process; None while there is none that is ready."""
        return None if self.link is None else self.link.pid

    def stats(self) -> EngineStats:
        """What goes on as of its last step; counters go on when the process is started again."""
        return self._now.after(self._before)

    async def start(self) -> None:
        """Start the process and wait until its model is loaded. Raises the HastenError that kept it from that."""
        link = await self._launch()
        self._keeper = asyncio.create_task(self._keep(link))
        self._watcher = asyncio.create_task(self._watch())

    def send(self, ticket: Ticket) -> None:
        """Pass on a request that was assigned to it."""
        assert self.link is not None, "requests go to engines that are there"
        self.link.send_frame(ticket.frame)

    def abort(self, ticket: Ticket) -> None:
        """Withdraw a request that it had."""
        if self.link is not None:
            self.link.send(Abort(ticket.number))

    def expire(self, ticket: Ticket) -> None:
        """Withdraw a request that it has, unless it has begun it."""
        if self.link is not None:
            self.link.send(Expire(ticket.number))

    def on_steps(self, steps: list[Step]) -> None:
        """Take in what it has computed, and wake the readers: those of first tokens before all others."""
        self.requests.heard = time.monotonic()
        self._set_stalled(False)
        first, others = dict[Ticket, None](), dict[Ticket, None]()
        counters = self._owner.counters.of(self.requests.index)
        for step in steps:
            self._take_changes(step, counters)
            for output in step.outputs:
                if (ticket := self.requests.get(output.id)) is not None:
                    (others if ticket.has_output else first)[ticket] = None
                    self._take_output(ticket, output, step.sent, counters)
        for ticket in (*first, *others):
            ticket.wake()

    def _take_output(self, ticket: Ticket, output: Output, now: float, counters: EngineCounters) -> None:
        """Keep what came of a request, and count it; `now`: when the engine sent it."""
        is_first, tokens = not ticket.has_output, ticket.tokens
        ticket.push(output)
        if is_first:
            counters.begin(ticket)
        counters.add(output, ticket.tokens - tokens)
        if output.finished:
            ticket.ended = True
            counters.finish(ticket, now)
            if ticket.call is not None:
                ticket.call.end_request(ticket, now)
            self.requests.finish(ticket)
            self._owner.engine_changed()

    def _take_changes(self, step: Step, counters: EngineCounters) -> None:
        """Note which requests were begun, have to wait for their grammars, or are none any more."""
        requests = self.requests
        self._now = step.stats or self._now
        for computed in step.computed:
            counters.step(computed)
        if step.blocks is not None:
            counters.watch(step.blocks)
        for numbers, compiling in ((step.compiling, True), (step.compiled, False)):
            for number in numbers:
                if (ticket := requests.get(number)) is not None:
                    requests.set_compiling(ticket, compiling)
        if step.compiling:
            self._owner.engine_changed()
        requests.observe(step, requests.heard)
        for refusal in step.refused:
            if (ticket := requests.get(refusal.id)) is not None:
                self._owner.end(ticket, error_of(refusal.kind, refusal.message))
        for number in step.expired:
            if (ticket := requests.get(number)) is not None:
                self._owner.end_late(ticket)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._stall_timeout / 4)
            silent = time.monotonic() - self.requests.heard > self._stall_timeout
            self._set_stalled(silent and self.link is not None and self.requests.has_work)

    def _set_stalled(self, stalled: bool) -> None:
        was_stalled, self.requests.stalled = self.requests.stalled, stalled
        if stalled and not was_stalled:
            text = "engine %s: it has requests, but has computed no step for %g s: not ready until it does"
            _log.error(text, self.name, time.monotonic() - self.requests.heard)
            self._owner.engine_stalled(self)
        elif was_stalled and not stalled:
            _log.warning("engine %s: it computes again", self.name)

    async def _launch(self) -> EngineLink:
        """Start a process and wait until it is ready."""
        began = time.monotonic()
        link = await EngineLink.open(self._start, self.on_steps, self._owner.delivery)
        try:
            info = await asyncio.shield(link.info)
            self.info = replace(info, load_seconds=time.monotonic() - began)
            await self._owner.prepare(self, self.info)
            if link.lost.done():
                raise link.failure or EngineError("the engine's process died as soon as the model was loaded")
        except BaseException:
            await link.close()
            raise
        self._ready_since = time.monotonic()
        self._now = EngineStats(num_blocks=info.num_blocks)
        self.requests.attach(info.max_num_seqs, info.num_blocks, info.block_size)
        self.link = link
        link.lost.add_done_callback(lambda _: self._on_loss(link))
        self._owner.engine_changed()
        return link

    def _on_loss(self, link: EngineLink) -> None:
        """The process is gone."""
        if self.link is not link:
            return  # it was stopped
        self.link = None
        self._before = self.stats()
        self._now = EngineStats(num_blocks=self.info.num_blocks)
        reason = link.failure or "its process died"
        error = EngineError(f"engine {self.name} failed while it had the request: {reason}")
        self._owner.engine_lost(self.requests.index, self.requests.detach(), error)

    async def _keep(self, link: EngineLink) -> None:
        """Whenever the process has died, start it again."""
        delay = _FIRST_DELAY_S
        while True:
            how = await asyncio.shield(link.ended)
            _log.error(
                "engine %s: process %d died (%s): %s", self.name, link.pid, how, link.failure or "it said no more"
            )
            if time.monotonic() - self._ready_since > _LONGEST_DELAY_S:
                delay = _FIRST_DELAY_S
            while self.link is None:
                await asyncio.sleep(delay)
                delay = min(2 * delay, _LONGEST_DELAY_S)
                try:
                    link = await self._launch()
                except Exception as error:
                    _log.error("engine %s: cannot be started, next try in %.1f s: %s", self.name, delay, error)
            self.restarts += 1
            _log.warning("engine %s: ready again as process %d", self.name, link.pid)

    async def close(self) -> None:
        """End the process, and wait until it has ended."""
        link, self.link = self.link, None
        for task in (self._keeper, self._watcher):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if link is not None:
            await link.close()
