"""ModelStreamInfer: many requests over one stream, computed side by side.

The responses to a request come in order. Of models that answer once, the answers come in the order of their requests.
An error is a message in the stream, which stays open. When the client cancels, misses its deadline or disconnects, all
of its requests are withdrawn.
"""

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tritonclient.grpc import service_pb2 as pb

from hasten.server.by_size import by_size
from hasten.server.errors import client_error
from hasten.server.inflight import Claim
from hasten.server.models.validation import EMPTY_FINAL
from hasten.server.protocol.proto import (
    FINAL,
    infer_response,
    parsed_infer,
    stream_response,
)
from hasten.server.protocol.shared_memory import Delivery
from hasten.server.protocol.tensors import byte_size
from hasten.server.types import ErrorKind, InferRequest, InferResponse, ServiceError

if TYPE_CHECKING:
    from hasten.server.protocol.grpc import GrpcCalls

_MOST_REQUESTS = 1024
"""Under way in one stream; no more are read from it before one ends."""
_REFUSED = (ErrorKind.INVALID, ErrorKind.NOT_FOUND, ErrorKind.UNSUPPORTED)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReceivedInfer:
    """A request as it came over gRPC, and what is to be done with its outputs."""

    request: InferRequest
    decoupled: bool
    """Whether its model may answer any number of times."""
    deliver: Delivery


class _UnsentError(Exception):
    """The client did not take an answer: it is gone."""


class _Room:
    """What the requests under way in one stream take."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._count = self._bytes = 0
        self._left = asyncio.Event()

    async def enter(self, size: int) -> None:
        """Wait for room for a request, the only one that waits."""
        while self._count and (self._count >= _MOST_REQUESTS or self._bytes + size > self._max_bytes):
            self._left.clear()
            await self._left.wait()
        self._count, self._bytes = self._count + 1, self._bytes + size

    def leave(self, size: int) -> None:
        """A request has ended."""
        self._count, self._bytes = self._count - 1, self._bytes - size
        self._left.set()

    async def emptied(self) -> None:
        """Wait until no request is under way."""
        while self._count:
            self._left.clear()
            await self._left.wait()


@dataclass(frozen=True)
class _Refused:
    """What is wrong with a request, and its id where it has one."""

    error: Exception
    request_id: str


class InferStream:
    """One stream; `context` takes serialized answers.

    Requests under way have at most the bytes that there may be in a stream, or are one; no more are read before one
    ends. Those that there is no room for are refused.
    """

    def __init__(self, calls: "GrpcCalls", context: Any, *, ends_with_error: bool = False) -> None:
        """With `ends_with_error` the first error of a model ends the stream; else errors are answers."""
        self._calls = calls
        self._context = context
        self._ends_with_error = ends_with_error
        self._serving: asyncio.Task[Any] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = _Room(calls.max_stream_bytes)
        self._writing = asyncio.Lock()
        self._answered = asyncio.Event()
        """Set once all that came before have answered, of models that answer once."""
        self._answered.set()
        self._failure: ServiceError | None = None
        """The error that ends the stream, where one does."""

    async def serve(self, requests: Any) -> ServiceError | None:
        """Serve all ModelInferRequest messages, each once there is room; the error that ended the stream, if any."""
        self._serving = asyncio.current_task()
        assert self._serving is not None, "a call is served by a task"
        try:
            async for raw in requests:
                await self._begin(raw)
            await self._room.emptied()
        except asyncio.CancelledError:
            if self._failure is None or self._serving.uncancel():
                raise
        finally:
            for task in (tasks := tuple(self._tasks)):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return self._failure

    async def _begin(self, raw: bytes) -> None:
        await self._room.enter(len(raw))
        claim = self._calls.inflight.claim()
        try:
            # read here, not by the task, so that the turns are those of the requests
            received = await by_size(len(raw), self._read, raw, claim)
        except BaseException:
            claim.release()
            raise
        task = asyncio.create_task(self._serve(received))
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, len(raw), claim))

    def _ended(self, size: int, claim: Claim, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.leave(size)
        claim.release()
        if not task.cancelled() and task.exception() is not None:
            _log.debug("a stream's response could not be sent", exc_info=task.exception())

    def _read(self, raw: bytes, claim: Claim) -> ReceivedInfer | _Refused:
        message = pb.ModelInferRequest()
        try:
            message, tensors = parsed_infer(raw)
            claim.grow(len(raw))
            return self._calls.received(message, tensors, claim)
        except Exception as error:
            return _Refused(error, message.id)

    async def _serve(self, received: ReceivedInfer | _Refused) -> None:
        if isinstance(received, ReceivedInfer) and received.decoupled:
            await self._serve_many(received.request, received.deliver)
            return
        # no await before a turn is taken: tasks begin in the order of their requests
        before, self._answered = self._answered, asyncio.Event()
        over = self._answered
        try:
            await self._serve_one(received, before)
        finally:
            over.set()

    async def _serve_one(self, received: ReceivedInfer | _Refused, before: asyncio.Event) -> None:
        """Answer once, behind the answers before it."""
        try:
            if isinstance(received, _Refused):
                raise received.error
            answer = await self._calls.service.infer(received.request)
            response = await by_size(byte_size(answer.outputs), _stream_response, answer, received.deliver)
        except Exception as error:
            known = client_error(error, "a streamed request")
            if isinstance(received, _Refused) or known.kind in _REFUSED:
                request_id = received.request_id if isinstance(received, _Refused) else received.request.id
                closing, refused = pb.ModelInferResponse(id=request_id), True
            else:  # a request that was taken, and this was all
                closing, refused = _closing(received.request, final=True), False
            await before.wait()
            await self._write_error(known, closing, refused=refused)
        else:
            await before.wait()
            await self._send(response)

    async def _serve_many(self, request: InferRequest, deliver: Delivery) -> None:
        empty_final = request.parameters.get(EMPTY_FINAL) is True
        started = False
        try:
            async with aclosing(self._calls.service.stream(request)) as responses:
                async for response in responses:
                    started = True
                    if response.outputs or (response.final and empty_final):
                        await self._send(
                            await by_size(byte_size(response.outputs), _stream_response, response, deliver)
                        )
        except _UnsentError:
            raise
        except Exception as error:
            known = client_error(error, "a streamed request")
            refused = not started and known.kind in _REFUSED
            await self._write_error(known, _closing(request, final=refused or not empty_final), refused=refused)
            if empty_final and not refused:
                await self._send(_serialized(_closing(request, final=True)))

    async def _write_error(self, error: ServiceError, response: Any, *, refused: bool) -> None:
        if refused or not self._ends_with_error:
            await self._send(_serialized(response, str(error)))
        elif self._failure is None and self._serving is not None:
            self._failure = error
            self._serving.cancel()

    async def _send(self, message: bytes) -> None:
        async with self._writing:
            if self._failure is not None:
                return
            try:
                await self._context.write(message)
            except Exception as error:
                raise _UnsentError from error


def _stream_response(response: InferResponse, deliver: Delivery) -> bytes:
    return stream_response(infer_response(response, deliver(response), final=response.final))


def _serialized(response: Any, error: str = "") -> bytes:
    message = pb.ModelStreamInferResponse(error_message=error, infer_response=response)
    raw: bytes = message.SerializeToString()
    return raw


def _closing(request: InferRequest, *, final: bool) -> Any:
    """What goes with the error of a model that took a request; `final`: whether this is all."""
    closing = pb.ModelInferResponse(model_name=request.model, id=request.id)
    closing.parameters[FINAL].bool_param = final
    return closing
