"""`AsyncLLM`: the engine for programs with an event loop and for notebooks, with the names that vLLM's users know.

The engine steps on a thread of its own, for as long as any request is unfinished. Everything that changes it runs
there; event loops get copies of its outputs.
"""

import asyncio
import atexit
import itertools
import os
import threading
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, Unpack

from hasten.core.engine_options import EngineOptions
from hasten.core.errors import EngineError, InvalidRequestError
from hasten.core.model_config import ModelConfig
from hasten.core.types import (
    FailedOutput,
    PooledOutput,
    PoolingParams,
    PoolingRequestOutput,
    Request,
    RequestOutput,
    SamplingParams,
)
from hasten.core.vllm_arguments import OF_GENERATE, with_accepted_names
from hasten.engine.llm import LLM, output_copy, prompt_request
from hasten.engine.llm_pooling import given_params
from hasten.engine.pooling import generates_text
from hasten.engine.prompts import ParsedPrompt, Prompt, given_prompts, params_for_each, parse_prompts
from hasten.engine.request_state import Output
from hasten.engine.texts import Instruction, TextRequests

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hasten.engine.grammar import Grammar

_LONG_TEXT = 4096
"""Characters of a prompt that is tokenized beside the event loop."""
_Result = TypeVar("_Result", bound=Output)
_Item = TypeVar("_Item")


class AsyncEngineArgs:
    """A model and options, for `AsyncLLM.from_engine_args`."""

    def __init__(self, model: str | os.PathLike[str], **options: Unpack[EngineOptions]) -> None:
        self.model = model
        self.options = options


class _Reader(Generic[_Result]):
    """Where an event loop takes the outputs of one request.

    One that is not taken gives way to the next, which has all that it had.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._news = asyncio.Event()
        self._output: _Result | None = None
        self._error: Exception | None = None
        self.compiling: SamplingParams | None = None
        """Of a request that waits for its grammar; the engine has not got it then."""

    def put(self, output: _Result | None, error: Exception | None) -> None:
        """On the loop: there is an output, or the error that ends the request."""
        self._output, self._error = output or self._output, error
        self._news.set()

    async def read(self) -> _Result:
        """The newest output; raises the error that ended the request, after what came before it."""
        await self._news.wait()
        self._news.clear()
        output, self._output = self._output, None
        if output is None:
            assert self._error is not None, "there is news"
            raise self._error
        if self._error is not None:
            self._news.set()
        return output


class AsyncLLM:
    """A model ready to generate, or to make vectors or scores of texts, for any number of callers at once.

    The options and the errors are those of `LLM`. `close` it, or use it with `async with`.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Unpack[EngineOptions]) -> None:
        self._changed = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        """What the engine's thread is to do before its next step."""
        self._closing = self._ended = False
        self._dead: Exception | None = None
        """Why nothing more is computed, where a step failed."""
        self._readers: dict[str, _Reader[Any]] = {}
        """By request; of the engine's thread alone."""
        self._numbers = itertools.count()
        started: Future[LLM] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(model, options, started), name="hasten-engine", daemon=True
        )
        self._thread.start()
        atexit.register(self.close)
        try:
            self._llm = started.result()
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_engine_args(cls, engine_args: AsyncEngineArgs) -> "AsyncLLM":
        """That of a model and options."""
        return cls(engine_args.model, **engine_args.options)

    def __repr__(self) -> str:
        return f"Async{self._llm!r}"

    @property
    def config(self) -> ModelConfig:
        """What the model looks like."""
        return self._llm.config

    def get_tokenizer(self) -> "PreTrainedTokenizerBase":
        """See LLM."""
        return self._llm.get_tokenizer()

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""
        return self._dead is None and not self._closing

    @property
    def errored(self) -> bool:
        """Whether a failed step has ended it."""
        return self._dead is not None

    @property
    def dead_error(self) -> Exception | None:
        """Why it takes no more requests."""
        return self._dead

    async def check_health(self) -> None:
        """EngineError where it takes no requests."""
        self._check_open()

    @with_accepted_names(OF_GENERATE)
    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt and yield outputs as they grow, each with all of its text and tokens so far.

        The last one is `finished`. A caller that is slower than the engine gets fewer of them. Closing the generator,
        or cancelling the task that reads it, withdraws the request. Raises InvalidRequestError where the prompt cannot
        be served, and EngineError where the engine has failed or was closed.
        """
        self._check_open()
        (parsed,) = _single(parse_prompts(prompt))
        (params,) = params_for_each(1, sampling_params, SamplingParams())
        ids = await self._token_ids(parsed)
        request = replace(prompt_request(parsed, ids, params), request_id=self._id(request_id))
        reader = _Reader[RequestOutput](asyncio.get_running_loop())
        self._call(lambda: self._begin(request, reader))
        async with aclosing(self._outputs(request.request_id, reader)) as outputs:
            async for output in outputs:
                yield output

    @with_accepted_names(OF_GENERATE)
    async def encode(
        self, prompt: Prompt, pooling_params: PoolingParams | None = None, request_id: str | None = None
    ) -> AsyncGenerator[PoolingRequestOutput[Any], None]:
        """What the model makes of a text, as `LLM.encode` does: one output. Errors are those of `generate`."""
        self._check_open()
        engine = self._llm.engine
        pooler = engine.worker.pooler
        if pooler is None:
            raise generates_text("encode", engine.model_config.architecture)
        params = given_params(pooling_params) or PoolingParams(task=pooler.tasks[0])
        pooler.check(params)
        texts = TextRequests(pooler.pooling.texts, engine.tokenizer, engine.max_model_len)
        ((_, request),) = texts.of_prompts(_single(given_prompts(prompt)), params, Instruction())
        request = replace(request, request_id=self._id(request_id))
        reader = _Reader[PoolingRequestOutput[PooledOutput]](asyncio.get_running_loop())
        self._call(lambda: self._begin(request, reader))
        async with aclosing(self._outputs(request.request_id, reader)) as outputs:
            async for output in outputs:
                if isinstance(output.outputs, FailedOutput):
                    raise EngineError(output.outputs.error)
                yield output

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Withdraw requests: what reads them gets what they have, as their last output."""
        for each in [request_id] if isinstance(request_id, str) else list(request_id):
            self._wake(partial(self._abort, each))

    async def reset_prefix_cache(self) -> bool:
        """Forget what the cache holds of earlier prompts; True, as nothing can keep it from that."""
        self._check_open()
        self._call(self._llm.engine.reset_prefix_cache)
        return True

    def close(self) -> None:
        """End the engine and free the model; requests that are unfinished get an EngineError. A second call waits."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()
        atexit.unregister(self.close)

    shutdown = close

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def _check_open(self) -> None:
        if self._dead is not None or self._closing:
            raise self._end_error

    @property
    def _end_error(self) -> EngineError:
        """What requests get that are unfinished at the end, or come after it."""
        why = "close() was called" if self._dead is None else f"{type(self._dead).__name__}: {self._dead}"
        return EngineError(f"this AsyncLLM is closed: {why}; create a new one")

    def _id(self, given: str | None) -> str:
        if given is not None and not isinstance(given, str):
            raise InvalidRequestError(f"request_id must be a text, got {given!r:.80}")
        return f"async-{next(self._numbers)}" if given is None else given

    async def _token_ids(self, prompt: ParsedPrompt) -> tuple[int, ...]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        assert prompt.text is not None, "a prompt has a text or token ids"
        encode = self._llm.tokenizer.encode
        if len(prompt.text) > _LONG_TEXT:
            return tuple(await asyncio.to_thread(encode, prompt.text))
        return tuple(encode(prompt.text))

    async def _outputs(self, request_id: str, reader: _Reader[_Result]) -> AsyncGenerator[_Result, None]:
        finished = False
        try:
            while not finished:
                output = await reader.read()
                finished = output.finished
                yield output
        finally:
            if not finished:
                self._wake(lambda: self._leave(request_id, reader))

    def _call(self, command: Callable[[], None]) -> None:
        """Have the engine's thread do something before its next step; EngineError where that has ended."""
        with self._changed:
            if self._ended:
                self._check_open()
            self._commands.append(command)
            self._changed.notify()

    def _wake(self, command: Callable[[], None]) -> None:
        """The same; nothing once that has ended."""
        with suppress(EngineError):
            self._call(command)

    def _run(self, model: str | os.PathLike[str], options: EngineOptions, started: "Future[LLM]") -> None:
        """The engine's thread."""
        try:
            llm = LLM(model, **options)
        except BaseException as error:
            started.set_exception(error)
            return
        llm.engine.ranks.liveness.on_failure(lambda: self._wake(_nothing))  # a rank may die between two steps
        started.set_result(llm)
        try:
            while self._wait(llm):
                self._deliver(llm.engine.step())
        except Exception as error:
            self._dead = error
        self._end(llm)

    def _wait(self, llm: LLM) -> bool:
        """Do what is to be done, and wait until there is a step to compute; False once it is to end."""
        engine = llm.engine
        while True:
            with self._changed:
                while not (self._commands or self._closing or engine.has_unfinished or engine.has_deferred):
                    self._changed.wait()
                if self._closing:
                    return False
                commands, self._commands = self._commands, deque()
            engine.ranks.liveness.raise_failure()
            for command in commands:
                command()
            if engine.has_unfinished:
                return True
            if not commands:
                engine.prepare_next()

    def _end(self, llm: LLM) -> None:
        """Nothing more is computed: close the engine, and tell all that wait."""
        with self._changed:
            self._ended = True
            commands, self._commands = self._commands, deque()
        for reader in self._readers.values():
            self._put(reader, None, self._end_error)
        self._readers.clear()
        for command in commands:
            command()
        llm.close()

    def _begin(self, request: Request, reader: _Reader[Any]) -> None:
        """Give the engine a request, once its grammar is compiled."""
        if self._ended:
            self._put(reader, None, self._end_error)
            return
        if request.request_id in self._readers:
            self._put(reader, None, InvalidRequestError(f"request id {request.request_id!r} is in use"))
            return
        self._readers[request.request_id] = reader
        future = None if request.pooling is not None else self._llm.engine.grammars.compile(request.params)
        if future is None or future.done():
            self._add(request, reader, future)
        else:
            reader.compiling = request.params
            future.add_done_callback(lambda done: self._wake(lambda: self._add(request, reader, done)))

    def _add(self, request: Request, reader: _Reader[Any], grammar: "Future[Grammar] | None") -> None:
        if self._readers.get(request.request_id) is not reader:
            return  # it was withdrawn, or the engine has ended
        reader.compiling = None
        try:
            self._llm.engine.add(request, stream=True, grammar=None if grammar is None else grammar.result())
        except Exception as error:  # nothing is queued, so whatever it is ends this request alone
            del self._readers[request.request_id]
            self._put(reader, None, error)

    def _abort(self, request_id: str) -> None:
        reader = self._readers.pop(request_id, None)
        if reader is None:
            return
        output = self._withdraw(request_id, reader)
        if output is None:
            self._put(reader, None, EngineError(f"request {request_id} was withdrawn"))
        else:
            self._put(reader, replace(output_copy(output), finished=True), None)

    def _leave(self, request_id: str, reader: _Reader[Any]) -> None:
        """Nobody reads a request any more."""
        if self._readers.get(request_id) is reader:
            del self._readers[request_id]
            self._withdraw(request_id, reader)

    def _withdraw(self, request_id: str, reader: _Reader[Any]) -> RequestOutput | None:
        if reader.compiling is not None:
            self._llm.engine.grammars.withdraw(reader.compiling)
            return None
        return self._llm.engine.abort(request_id)

    def _deliver(self, outputs: list[Output]) -> None:
        """Give the outputs of a step to those who read them, in one call for each event loop."""
        taken = defaultdict[asyncio.AbstractEventLoop, list[tuple[_Reader[Any], Output]]](list)
        for output in outputs:
            reader = self._readers.get(output.request_id)
            if reader is None:
                continue
            if output.finished:
                del self._readers[output.request_id]
            copied = output_copy(output) if isinstance(output, RequestOutput) else output
            taken[reader.loop].append((reader, copied))
        for loop, pairs in taken.items():
            try:
                loop.call_soon_threadsafe(_put_all, pairs)
            except RuntimeError:  # the loop is closed, and with it whoever read
                for reader, output in pairs:
                    self._leave(output.request_id, reader)

    def _put(self, reader: _Reader[Any], output: Output | None, error: Exception | None) -> None:
        with suppress(RuntimeError):  # the loop is closed
            reader.loop.call_soon_threadsafe(reader.put, output, error)


def _nothing() -> None:
    """What wakes the engine's thread."""


def _put_all(pairs: list[tuple[_Reader[Any], Output]]) -> None:
    for reader, output in pairs:
        reader.put(output, None)


def _single(given: list[_Item]) -> list[_Item]:
    """A list of one; InvalidRequestError where there are several prompts."""
    if len(given) != 1:
        raise InvalidRequestError(f"a request has one prompt, got {len(given)}; make a request of each")
    return given
