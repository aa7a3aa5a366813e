"""ModelStreamInfer: many requests over one stream, computed side by side.

The responses to a request come in order. Of models that answer once, the answers come in the order of their requests.
An error is a message in the stream, which stays open. When the client cancels, misses its deadline or disconnects, all
of its requests are withdrawn.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tritonclient.grpc import service_pb2 as pb

from hasten.server.by_size import by_size
from hasten.server.errors import client_error
from hasten.server.inflight import Claim, InflightBytes
from hasten.server.models.validation import EMPTY_FINAL
from hasten.server.protocol.placement import deliver, placements
from hasten.server.protocol.proto import (
    FINAL,
    infer_request,
    infer_response,
    parsed_infer,
    stream_response,
)
from hasten.server.protocol.shared_memory import SharedMemory
from hasten.server.protocol.tensors import byte_size
from hasten.server.types import ErrorKind, InferRequest, InferResponse, ServiceError

if TYPE_CHECKING:
    from hasten.server.service import Service

_MOST_REQUESTS = 1024
"""Under way in one stream; no more are read from it before one ends."""
_REFUSED = (ErrorKind.INVALID, ErrorKind.NOT_FOUND, ErrorKind.UNSUPPORTED)
_log = logging.getLogger(__name__)

Delivery = Callable[[InferResponse], set[str]]
"""Puts a response's outputs where the client wants them; names of those in shared memory."""


@dataclass(frozen=True)
class ReceivedInfer:
    """A request as it came over gRPC, and what is to be done with its outputs."""

    request: InferRequest
    decoupled: bool
    """Whether its model may answer any number of times."""
    deliver: Delivery


def received_infer(
    message: Any, tensors: Sequence[bytes | memoryview], service: "Service", memory: SharedMemory, claim: Claim
) -> ReceivedInfer:
    """A ModelInferRequest and its raw tensors as a request; ServiceError where it is wrong, or its model unknown."""
    decoupled = service.is_decoupled(message.model_name, message.model_version)
    request = infer_request(message, tensors, memory.reading(claim))
    config = service.model_config(message.model_name, message.model_version)
    wanted = placements(request.outputs, memory)
    return ReceivedInfer(request, decoupled, partial(deliver, wanted=wanted, batched=config.max_batch_size > 0))


async def stream_infer(
    service: "Service",
    memory: SharedMemory,
    requests: Any,
    context: Any,
    inflight: InflightBytes,
    *,
    max_bytes: int,
    ends_with_error: bool = False,
) -> ServiceError | None:
    """Serve one stream; `requests` gives ModelInferRequest messages as bytes, `context` takes serialized answers.

    Requests under way have at most `max_bytes`, or are one; no more are read before one ends. Those that `inflight` has
    no room for are refused. With `ends_with_error` the first error of a model ends the stream, and is returned;
    otherwise, and where a request is refused, errors are answers.
    """
    stream = _Stream(service, memory, context, inflight, max_bytes)
    reading = asyncio.ensure_future(_serve_all(stream, requests))
    try:
        if not ends_with_error:
            await reading
            return None
        stream.failed = asyncio.get_running_loop().create_future()
        both: set[asyncio.Future[Any]] = {reading, stream.failed}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if stream.failed.done():
            return stream.failed.result()
        await reading
        return None
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await stream.withdraw()


async def _serve_all(stream: "_Stream", requests: Any) -> None:
    async for raw in requests:
        await stream.begin(raw)
    await stream.finish()


class _UnsentError(Exception):
    """The client did not take an answer: it is gone."""


class _Turn:
    """A place in the order of the answers of models that answer once. Taken when it is made, passed on at the end."""

    def __init__(self, before: "_Turn | None") -> None:
        self._before = before
        self._over = asyncio.Event()

    async def come(self) -> None:
        """Wait until all that came before have answered."""
        if self._before is not None:
            await self._before._over.wait()
            self._before = None

    def __enter__(self) -> "_Turn":
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()


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


@dataclass(frozen=True)
class _Refused:
    """What is wrong with a request, and its id where it has one."""

    error: Exception
    request_id: str


class _Stream:
    def __init__(
        self, service: "Service", memory: SharedMemory, context: Any, inflight: InflightBytes, max_bytes: int
    ) -> None:
        self._service = service
        self._memory = memory
        self._context = context
        self._inflight = inflight
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = _Room(max_bytes)
        self._writing = asyncio.Lock()
        self._last_turn: _Turn | None = None
        self.failed: asyncio.Future[ServiceError] | None = None
        """The error that ends the stream, where one does."""

    async def begin(self, raw: bytes) -> None:
        """Start to serve one request, once there is room."""
        await self._room.enter(len(raw))
        claim = self._inflight.claim()
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

    async def finish(self) -> None:
        """Wait for what is under way: the client has said all."""
        while self._tasks:
            await asyncio.wait(tuple(self._tasks))

    async def withdraw(self) -> None:
        """End what is under way."""
        for task in (tasks := tuple(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _turn(self) -> _Turn:
        self._last_turn = _Turn(self._last_turn)
        return self._last_turn

    def _read(self, raw: bytes, claim: Claim) -> ReceivedInfer | _Refused:
        message = pb.ModelInferRequest()
        try:
            message, tensors = parsed_infer(raw)
            claim.grow(len(raw))
            return received_infer(message, tensors, self._service, self._memory, claim)
        except Exception as error:
            return _Refused(error, message.id)

    async def _serve(self, received: ReceivedInfer | _Refused) -> None:
        # no await before a turn is taken: tasks begin in the order of their requests
        if isinstance(received, _Refused):
            with self._turn() as turn:
                await turn.come()
                refusal = pb.ModelInferResponse(id=received.request_id)
                await self._write_error(received.error, refusal, refused=True)
        elif received.decoupled:
            await self._serve_many(received.request, received.deliver)
        else:
            with self._turn() as turn:
                await self._serve_one(received.request, received.deliver, turn)

    async def _serve_one(self, request: InferRequest, deliver: Delivery, turn: _Turn) -> None:
        try:
            answer = await self._service.infer(request)
            response = await by_size(byte_size(answer.outputs), _stream_response, answer, deliver)
        except Exception as error:
            known = client_error(error, "a streamed request")
            await turn.come()
            await self._write_error(known, _closing(known, request), refused=known.kind in _REFUSED)
        else:
            await turn.come()
            await self._send(response)

    async def _serve_many(self, request: InferRequest, deliver: Delivery) -> None:
        empty_final = request.parameters.get(EMPTY_FINAL) is True
        started = False
        try:
            async with aclosing(self._service.stream(request)) as responses:
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
            closing = pb.ModelInferResponse(model_name=request.model, id=request.id)
            closing.parameters[FINAL].bool_param = refused or not empty_final
            await self._write_error(known, closing, refused=refused)
            if empty_final and not refused:
                closing.parameters[FINAL].bool_param = True
                await self._send(_serialized(closing))

    async def _write_error(self, error: Exception, response: Any, *, refused: bool = False) -> None:
        known = client_error(error, "a streamed request")
        if self.failed is None or refused:
            await self._send(_serialized(response, str(known)))
        elif not self.failed.done():
            self.failed.set_result(known)

    async def _send(self, message: bytes) -> None:
        async with self._writing:
            if self.failed is not None and self.failed.done():
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


def _closing(error: ServiceError, request: InferRequest) -> Any:
    """What goes with the error of a model that answers once: of a request that it took, that this was all."""
    closing = pb.ModelInferResponse(id=request.id)
    if error.kind not in _REFUSED:
        closing.model_name = request.model
        closing.parameters[FINAL].bool_param = True
    return closing
