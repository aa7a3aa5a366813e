"""An engine in a process of its own: what `EngineClient` starts and talks to. The only part of the server with torch.

It reads messages between two steps, so a withdrawn request's blocks are free before the next one, and sends what steps
brought in one write, as soon as the server has dealt with the message before. What a server that stands still does not
take is joined here, and is no more than the requests' outputs.
"""

import gc
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from hasten.core import gpu_start
from hasten.core.config import EngineConfig
from hasten.core.cpus import available_cpus
from hasten.core.errors import EngineError, HastenError
from hasten.core.types import Request, SamplingParams
from hasten.engine.block_watch import BlockWatch
from hasten.engine.stats import EngineStats
from hasten.server.engine.coalescer import OutputCoalescer, pause_per_cpu_second
from hasten.server.engine.wire import (
    Abort,
    Acknowledge,
    Add,
    Computed,
    EngineInfo,
    Expire,
    Failed,
    Frames,
    Ready,
    Refusal,
    Start,
    Step,
    ToEngine,
    framed,
)

if TYPE_CHECKING:
    from concurrent.futures import Future

    from hasten.engine.engine import Engine
    from hasten.engine.grammar import Grammar

_GRACE_S = 2.0
"""How long a step may take to end once the server is gone."""
_READ_BYTES = 1 << 18
_STATE_S = 0.05
"""A server that keeps up hears of a working engine so often, or after each step that takes longer."""
_HEARTBEAT_S = 1.0
"""… and so often where it does not keep up."""
_ITL_TARGET_MS = 30.0
"""The default of a server, whose clients see each token. Offline, the time of all together counts alone."""
_NO_SAMPLING = SamplingParams()
_MOST_COMPILING = 1024
"""Requests that wait for their grammars: they take no places, so the queue's limits do not hold for them."""


class Channel:
    """Messages from and to the server."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._frames = Frames()
        self._decode = msgspec.msgpack.Decoder(ToEngine).decode
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._readable = select.poll()  # an empty socket is looked at in less time than it takes to read it
        for each in (connection, self._woken):
            self._readable.register(each, select.POLLIN)
        self.closed = False
        """Whether the server has closed its end: there is nothing more to do."""

    def wake(self) -> None:
        """End a wait for messages, from any thread."""
        with suppress(BlockingIOError):  # it is about to end anyway
            self._waker.send(b"\0")

    def receive(self, *, wait: bool) -> list[ToEngine]:
        """The messages that have come; with `wait`, at least one unless the server is gone or `wake` was called."""
        messages: list[ToEngine] = []
        while not self.closed:
            ready = dict(self._readable.poll(None if wait and not messages else 0))
            if not ready:
                break
            if self._woken.fileno() in ready:
                self._woken.recv(_READ_BYTES)
                wait = False
            if self._connection.fileno() not in ready:
                break
            try:
                data = self._connection.recv(_READ_BYTES)
            except ConnectionError:
                data = b""
            self.closed = not data
            messages += map(self._decode, self._frames.feed(data))
        return messages

    def send(self, message: Any) -> None:
        """Send one message; waits where the server does not read."""
        try:
            self._connection.sendall(framed(message))
        except ConnectionError:
            self.closed = True


_WINDOW = 4
"""Messages that a server with a core of its own may be behind: a burst of first tokens passes without joining any. It
costs no latency, since what is sent is written in order as soon as the server comes to it."""


class EngineLoop:
    """Messages in, steps, deltas out, until the server closes its end."""

    def __init__(self, engine: "Engine", channel: Channel, coalescer: OutputCoalescer) -> None:
        self._engine = engine
        self._channel = channel
        self._coalescer = coalescer
        self._changed = False
        """Whether there is anything that the server does not know."""
        self._next = Step()
        """What the server does not know: the next message to it."""
        self._not_begun: set[str] = set()
        self._compiling: dict[int, tuple[Add, SamplingParams, Future[Grammar]]] = {}
        """Requests that wait for their grammar: they are not the engine's yet."""
        self._state_sent = 0.0
        """When the server last heard of the engine's state."""
        self._blocks = engine.scheduler.blocks.watch = BlockWatch()
        self._ends = deque([0.0], maxlen=engine.worker.stage.size)
        """When the last steps ended: as many as a completion waits for from one of its tokens to the next."""

    def run(self) -> None:
        """Serve; raises what a step raises."""
        while not self._channel.closed:
            if self._engine.has_unfinished:
                self._step()
            idle = not self._engine.has_unfinished and not self._changed
            self._receive(wait=idle and not self._engine.prepare_next())
            self._engine.ranks.liveness.raise_failure()
            if self._compiling:
                self._admit_compiled()
            if self._changed and not self._channel.closed:
                self._send()

    def _receive(self, *, wait: bool) -> None:
        for message in self._channel.receive(wait=wait):
            if isinstance(message, Acknowledge):
                self._coalescer.acknowledge(message.steps, message.cpu_seconds, time.monotonic())
                self._changed = self._changed or self._coalescer.goes_on
                continue
            self._changed = True
            if isinstance(message, Add):
                self._add(message)
            elif isinstance(message, Abort):
                self._abort(message.id)
            elif isinstance(message, Expire) and str(message.id) in self._not_begun:
                self._abort(message.id)
                self._next.expired.append(message.id)

    def _add(self, message: Add) -> None:
        """Give the engine a request, at once or when its grammar is compiled."""
        params = _NO_SAMPLING if message.params is None else SamplingParams(**message.params)
        future = self._engine.grammars.compile(params)
        self._not_begun.add(str(message.id))
        if future is None or future.done():
            self._admit(message, params, future)
            return
        if len(self._compiling) >= _MOST_COMPILING:
            self._engine.grammars.withdraw(params)
            self._refuse(message.id, EngineError(f"{_MOST_COMPILING} requests wait for their grammars already"))
            return
        self._compiling[message.id] = (message, params, future)
        self._next.compiling.append(message.id)
        future.add_done_callback(lambda _: self._channel.wake())

    def _admit_compiled(self) -> None:
        for number, (message, params, future) in list(self._compiling.items()):
            if future.done():
                self._changed = True
                del self._compiling[number]
                self._next.compiled.append(number)
                self._admit(message, params, future)

    def _admit(self, message: Add, params: SamplingParams, grammar: "Future[Grammar] | None") -> None:
        request_id = str(message.id)
        request = Request(
            request_id=request_id,
            prompt_token_ids=message.prompt_token_ids,
            params=params,
            pooling=message.pooling,
            token_type_ids=message.token_type_ids,
            skipped_tokens=message.skipped_tokens,
            masks=message.masks,
            cache_salt=message.cache_salt,
        )
        try:
            self._engine.add(request, stream=message.stream, grammar=None if grammar is None else grammar.result())
        except Exception as error:  # nothing is queued, so whatever it is ends this request alone
            if not isinstance(error, HastenError):
                traceback.print_exc()
            self._refuse(message.id, error)
            return
        self._coalescer.begin(message.id, stream=message.stream)

    def _refuse(self, number: int, error: Exception) -> None:
        text = str(error).removeprefix(f"request {number}: ")
        self._next.refused.append(Refusal(number, type(error).__name__, text))
        self._not_begun.discard(str(number))

    def _abort(self, number: int) -> None:
        waiting = self._compiling.pop(number, None)
        if waiting is None:
            self._engine.abort(str(number))
            self._coalescer.forget(number)
        else:
            self._engine.grammars.withdraw(waiting[1])
        self._not_begun.discard(str(number))

    def _step(self) -> None:
        """Compute a step."""
        began, tally = time.monotonic(), self._engine.tally
        computed, continued = tally.computed, tally.generated - tally.first
        for state in self._engine.advance():
            self._coalescer.put(int(state.request.request_id), state.shown, finished=state.unfinished == 0)
        self._note(tally.computed - computed, tally.generated - tally.first - continued)
        if self._not_begun:
            started = self._not_begun - self._engine.waiting - set(map(str, self._compiling))
            self._not_begun -= started
            self._next.started |= dict.fromkeys(map(int, started), began)
        self._changed = True

    def _note(self, tokens: int, continued: int) -> None:
        """Note what a step was, for the server's metrics."""
        now = time.monotonic()
        if tokens or continued:
            self._next.computed.append(Computed(tokens, now - self._ends[0], continued))
        self._ends.append(now)

    def _send(self) -> None:
        """Send what the server should know now.

        State alone can wait: a message costs as much as a third of a short step. It goes with whatever ends a request,
        and when there is nothing more to compute, so that what the server knows is never old for long. So can that
        requests were begun, while none waits for a place: those of a burst begin in several steps.
        """
        now, step = time.monotonic(), self._next
        idle = not self._engine.has_unfinished
        filled = self._not_begun or len(self._engine.scheduler.running) >= self._engine.scheduler.config.max_num_seqs
        events = (step.started and filled) or step.refused or step.expired or step.compiling or step.compiled
        if not (idle or events or self._coalescer.has_news or now - self._state_sent > _STATE_S):
            return
        everything = idle or self._coalescer.is_due(now)
        outputs = self._coalescer.take(everything=everything)
        is_old = now - self._state_sent > (_STATE_S if everything else _HEARTBEAT_S)
        with_state = bool(idle or step.started or events or is_old or any(output.finished for output in outputs))
        if not (outputs or with_state):
            return
        step.stats = self._state() if with_state else None
        step.outputs, step.sent, step.blocks = outputs, now, self._blocks.take()
        self._channel.send(step)
        self._coalescer.sent()
        if with_state:
            self._state_sent = now
        self._next = Step()
        self._changed = not everything or self._coalescer.goes_on

    def _state(self) -> EngineStats:
        stats = self._engine.stats
        return replace(stats, waiting=stats.waiting + len(self._compiling)) if self._compiling else stats


def server_coalescer(engine: "Engine") -> OutputCoalescer:
    """A coalescer for a server on the cores of this engine."""
    import torch

    threads = torch.get_num_threads() if engine.worker.device.type == "cpu" else 1
    ranks = engine.ranks
    pause = pause_per_cpu_second(available_cpus() / ranks.engines, engine_threads=threads * ranks.world.size)
    return OutputCoalescer(pause, window=1 if pause else _WINDOW)


def engine_info(engine: "Engine") -> EngineInfo:
    """What the server is sent about a loaded engine."""
    import torch

    from hasten import ops
    from hasten.models.registry import MODELS

    worker, model = engine.worker, engine.model_config
    folder = engine.config.tokenizer or worker.tokenizer_folder
    names = {dtype: name for name, dtype in ops.TORCH_DTYPES.items()}
    on_gpu = worker.device.type == "cuda"
    return EngineInfo(
        vocab_size=model.vocab_size,
        max_model_len=engine.max_model_len,
        eos_token_ids=model.eos_token_ids,
        bos_token_id=model.bos_token_id,
        pad_token_id=model.pad_token_id,
        num_blocks=engine.scheduler.blocks.num_blocks,
        block_size=engine.scheduler.blocks.block_size,
        max_num_seqs=engine.scheduler.config.max_num_seqs,
        dtype=names[worker.runner.dtype],
        quantization=worker.quantization,
        cache_dtype=engine.config.cache.eight_bits,
        device=torch.cuda.get_device_name(worker.device) if on_gpu else "cpu",
        ranks=engine.ranks.world.size,
        tokenizer_folder=None if folder is None else str(folder),
        pooling=None if worker.pooler is None else worker.pooler.info,
        decoder_start_token_id=None if model.encoder is None else model.decoder_start_token_id,
        model_type=MODELS[model.architecture].partition(":")[0].rpartition(".")[2],
    )


def with_defaults(config: EngineConfig) -> EngineConfig:
    """The configuration with a server's own defaults in place of what was left open."""
    if config.scheduler.itl_target is not None:
        return config
    return replace(config, scheduler=replace(config.scheduler, itl_target=_ITL_TARGET_MS))


def _load(start: ToEngine) -> "Engine":
    from hasten.engine.launch import launched_rank, start_engine

    assert isinstance(start, Start)
    config = with_defaults(start.config)
    return start_engine(config, launched_rank(config), index=start.index, count=start.count)


def serve(channel: Channel) -> None:
    """Load the engine that the first message describes, and serve until the server is gone."""
    import_module("hasten.engine.launch")  # it takes seconds, while the server gets ready to say what to load
    for start in channel.receive(wait=True):
        engine = _load(start)
        engine.check()
        engine.estimate_work()
        engine.ranks.liveness.on_failure(channel.wake)  # a rank may die while there is nothing to compute
        channel.send(Ready(engine_info(engine)))
        gc.freeze()  # what loading left stays: no collection need look at it
        gc.enable()
        EngineLoop(engine, channel, server_coalescer(engine)).run()
        engine.close()


def _end_with_server() -> None:
    """The server holds the other end of standard input for as long as it lives."""
    sys.stdin.buffer.read()
    time.sleep(_GRACE_S)
    os._exit(1)


def main() -> None:
    """The process: arguments are the socket's number, and a folder whose weights its GPU is known to need, if any."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # the server decides when this process ends
    threading.Thread(target=_end_with_server, daemon=True).start()
    gpu_start.begin(Path(sys.argv[2]) if sys.argv[2:] else None)
    gc.disable()  # imports leave nothing to collect, and looking for it takes a tenth of the start
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    code = 0
    try:
        serve(channel)
    except BaseException as error:
        if not isinstance(error, HastenError):
            traceback.print_exc()
        channel.send(Failed(type(error).__name__, str(error)))
        code = 1
    sys.stderr.flush()
    os._exit(code)  # without taking torch apart, which takes its time


if __name__ == "__main__":
    main()
