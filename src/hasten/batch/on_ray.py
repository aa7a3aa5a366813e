"""A batch's engines on a Ray cluster: one per actor, on GPUs of its own, and as many at a time as there is room for.

This process reads the rows and writes the results, so a batch resumes as on one machine. An actor that dies is
restarted, and the others compute its rows.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from hasten.batch.engine import LLMEngine, Refused
from hasten.core.errors import EngineError, HastenError, InvalidRequestError
from hasten.core.types import Request, RequestOutput
from hasten.engine.chat import ChatTemplate
from hasten.engine.text import Tokenizer

_log = logging.getLogger(__name__)

_LEAST_S = 0.1
"""How long an engine computes before it hands over what is done: a message takes a few milliseconds."""
_CALLS = 2
"""Calls that an engine has, so that it goes on with the second while this process reads the answer to the first."""
_RESERVE = 4
"""Of what an engine computes at once, the part that it has besides, to begin with while messages are on their way. All
other prompts wait here, where an engine that comes later finds them."""
MOST_FAILURES = 3
"""Engines that may fail with no row being done in between."""


@dataclass(frozen=True)
class EngineFacts:
    """What a batch must know of an engine, as `BatchEngine` has it."""

    capacity: int
    """Prompts that it computes at once."""
    window: int
    max_model_len: int
    seed: int
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    eos_token_ids: Sequence[int]
    tool_call_parser: str
    reasoning_parser: str


class EngineActor:
    """An engine in an actor's process."""

    def __init__(self) -> None:
        self._left = set[str]()
        """Ids of prompts that are not done."""

    def load(self, model: str, options: Mapping[str, Any]) -> EngineFacts:
        """Load the model; not in the constructor, whose error would come as the death of the actor."""
        from hasten.engine.llm import LLM

        self._engine = engine = LLMEngine(LLM(model, **options))
        return EngineFacts(
            engine.capacity,
            engine.window,
            engine.max_model_len,
            engine.seed,
            engine.tokenizer,
            engine.template,
            engine.eos_token_ids,
            engine.tool_call_parser,
            engine.reasoning_parser,
        )

    def exchange(self, requests: Sequence[Request], withdrawn: Sequence[str]) -> list[RequestOutput | Refused]:
        """Take prompts and give what is done; computes until something is, if anything is left."""
        for each in withdrawn:
            self._engine.abort(each)
            self._left.discard(each)
        done: list[RequestOutput | Refused] = []
        for request in requests:
            try:
                self._engine.add(request)
                self._left.add(request.request_id)
            except InvalidRequestError as error:
                done.append(Refused(request.request_id, str(error)))
        end = time.monotonic() + _LEAST_S
        while self._left and (not done or time.monotonic() < end):
            outputs = self._engine.step()
            self._left.difference_update(output.request_id for output in outputs)
            done += outputs
        return done


@dataclass
class _Engine:
    """An actor as this process sees it."""

    actor: Any
    starting: Any
    """The call that loads its model; None once that is done."""
    calls: list[Any] = field(default_factory=list)
    queued: list[Request] = field(default_factory=list)
    computed: dict[str, Request] = field(default_factory=dict)
    """What the actor has, by id."""
    withdrawn: list[str] = field(default_factory=list)

    @property
    def next_call(self) -> Any:
        """The call whose answer comes next; None if there is none."""
        return self.starting if self.starting is not None else next(iter(self.calls), None)

    @property
    def load(self) -> int:
        """Prompts that it has or will get."""
        return len(self.queued) + len(self.computed)

    def call(self) -> None:
        """Keep the actor busy."""
        while (self.queued or self.computed or self.withdrawn) and len(self.calls) < _CALLS:
            self.calls.append(self.actor.exchange.remote(self.queued, self.withdrawn))
            self.computed |= {request.request_id: request for request in self.queued}
            self.queued, self.withdrawn = [], []


class RayEngines:
    """The engines of a batch; a context manager that ends them.

    `options` are those of `LLM`; each of `engines` actors has `ranks` GPUs, where the cluster has any, and `cpus` CPUs.
    Ray finds the cluster (RAY_ADDRESS), and where there is none, one is started on this machine. EngineError where no
    engine can be started.
    """

    def __init__(self, model: str, options: Mapping[str, Any], *, engines: int, ranks: int = 1, cpus: int = 1) -> None:
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        on_cpus = str(options.get("device") or "").startswith("cpu") or not ray.cluster_resources().get("GPU")
        gpus = 0 if on_cpus else ranks
        self._actor, self._model = ray.remote(EngineActor).options(num_gpus=gpus, num_cpus=cpus), (model, dict(options))
        self._waiting = deque[Request]()
        """Prompts that no engine has."""
        self._failures = 0
        self._is_last = False
        self._engines: list[_Engine] = []
        try:
            self._engines += [self._start() for _ in range(engines)]
            facts = self._first_facts()
        except BaseException:
            self.close()
            raise
        self._window, self._most = facts.window, facts.capacity + max(1, facts.capacity // _RESERVE)
        self.max_model_len, self.seed = facts.max_model_len, facts.seed
        self.tokenizer, self.template = facts.tokenizer, facts.template
        self.eos_token_ids, self.tool_call_parser = facts.eos_token_ids, facts.tool_call_parser
        self.reasoning_parser = facts.reasoning_parser

    def _start(self) -> _Engine:
        actor = self._actor.remote()
        return _Engine(actor, actor.load.remote(*self._model))

    def _first_facts(self) -> EngineFacts:
        (first,), _ = ray.wait([engine.starting for engine in self._engines])
        try:
            facts: EngineFacts = ray.get(first)
        except RayError as error:
            raise EngineError(f"no engine starts on Ray: {_reason(error)}") from error
        return facts

    @property
    def window(self) -> int:
        """Prompts that all engines which are there have at once."""
        return self._window * max(1, sum(engine.starting is None for engine in self._engines))

    def add(self, request: Request) -> None:
        """Queue a prompt."""
        self._waiting.append(request)

    def abort(self, request_id: str) -> None:
        """Withdraw a prompt."""
        self._waiting = deque(request for request in self._waiting if request.request_id != request_id)
        for engine in self._engines:
            engine.queued = [request for request in engine.queued if request.request_id != request_id]
            if engine.computed.pop(request_id, None) is not None:
                engine.withdrawn.append(request_id)

    def step(self) -> list[RequestOutput | Refused]:
        """Wait until an engine says something; what is done by then. EngineError where engines keep failing."""
        ready = [engine for engine in self._engines if engine.starting is None]
        while self._waiting and ready:
            least = min(ready, key=lambda engine: engine.load)
            if least.load >= self._most:
                break
            least.queued.append(self._waiting.popleft())
        for engine in ready:
            engine.call()
        if self._is_last:
            self._release()
        by_call = {engine.next_call: engine for engine in self._engines if engine.next_call is not None}
        calls, _ = ray.wait(list(by_call))
        return [output for call in calls for output in self._answered(by_call[call], call)]

    def no_more(self) -> None:
        """No prompt will be added: engines that have nothing left to do may go."""
        self._is_last = True

    def _release(self) -> None:
        """End the engines that nothing waits for, so that an autoscaler takes their hosts back before the last row."""
        if self._waiting:
            return
        idle = [engine for engine in self._engines if not (engine.load or engine.calls)]
        for engine in idle if len(idle) < len(self._engines) else ():
            ray.kill(engine.actor)
            self._engines.remove(engine)

    def _answered(self, engine: _Engine, call: Any) -> Iterable[RequestOutput | Refused]:
        try:
            answer = ray.get(call)
        except RayError as error:
            self._replace(engine, error)
            return []
        if engine.starting is not None:
            engine.starting = None
            return []
        engine.calls.pop(0)
        self._failures = 0
        return [output for output in answer if engine.computed.pop(output.request_id, None) is not None]

    def _replace(self, engine: _Engine, error: RayError) -> None:
        """Start an actor instead of one that failed, and compute what it had once more."""
        self._failures += 1
        if self._failures > MOST_FAILURES:
            raise EngineError(f"engines on Ray keep failing: {_reason(error)}") from error
        _log.warning("an engine on Ray failed and is started again: %s", _reason(error))
        ray.kill(engine.actor)
        self._waiting.extendleft([*engine.queued, *engine.computed.values()])
        self._engines[self._engines.index(engine)] = self._start()

    def close(self) -> None:
        """End the engines, and Ray if it was started here."""
        for engine in self._engines:
            ray.kill(engine.actor)
        self._engines = []
        if self._started_ray:
            ray.shutdown()

    def __enter__(self) -> "RayEngines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _reason(error: RayError) -> str:
    """Why a call failed, in one line: hasten's own errors as they are."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    text = str(cause) if isinstance(cause, HastenError) else f"{type(cause).__name__}: {cause}"
    return text.strip().partition("\n")[0]
