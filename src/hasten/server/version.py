"""One version of a model, from its loading to its end."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

from tritonclient.grpc import service_pb2

from hasten.core.errors import HastenError, exit_status
from hasten.server.errors import service_error
from hasten.server.models.config import is_decoupled
from hasten.server.models.interfaces import Kind, datatype_name
from hasten.server.models.model import Model
from hasten.server.models.parameters import token_model_of
from hasten.server.models.validation import Rules
from hasten.server.models.work import Clock
from hasten.server.repository import Description
from hasten.server.statistics import ModelCounters, Tally
from hasten.server.types import ErrorKind, InferRequest, InferResponse, ServiceError, invalid

UNLOADED = "unloaded"
_MOST_DIGITS = 19
_log = logging.getLogger(__name__)


class State(StrEnum):
    """Where a version stands, as Triton calls it."""

    UNKNOWN = "UNKNOWN"
    READY = "READY"
    UNAVAILABLE = "UNAVAILABLE"
    LOADING = "LOADING"
    UNLOADING = "UNLOADING"


class Version:
    """One version of a model. What began before its end goes on to its own: as a context it waits with that."""

    def __init__(
        self, description: Description, number: int, counters: ModelCounters, on_change: Callable[[], None]
    ) -> None:
        """`on_change` is called whenever it may serve, or no longer."""
        self.name = description.name
        self.number = number
        self.config = description.config
        self.description = description
        self.dependencies = dependencies(description)
        """The models that it needs, and which version of each, -1 for the newest."""
        self._on_change = on_change
        self._state = State.LOADING
        self.reason = ""
        """Why it is not available."""
        self._rules = Rules(description.config, number)
        self._counters = counters
        self._model: Model | None = None
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    @property
    def state(self) -> State:
        """Where it stands."""
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self._state = state
        self._on_change()

    @property
    def model(self) -> Model:
        """What computes its requests, once it is loaded."""
        assert self._model is not None, "it is loaded before it serves"
        return self._model

    @cached_property
    def metadata(self) -> service_pb2.ModelMetadataResponse:
        """Its name, platform and tensors; not to be changed."""
        config = self.config
        message = service_pb2.ModelMetadataResponse(name=self.name, platform=config.platform or config.backend)
        batch = (-1,) if config.max_batch_size else ()
        for tensors, described in ((config.input, message.inputs), (config.output, message.outputs)):
            for tensor in tensors:
                described.add(name=tensor.name, datatype=datatype_name(tensor.data_type), shape=(*batch, *tensor.dims))
        return message

    @property
    def failed(self) -> bool:
        """Whether it could not be loaded."""
        return self.state is State.UNAVAILABLE and self.reason != UNLOADED

    def begin(self, model: Model, seconds: float) -> None:
        """It is loaded, which took so long."""
        self._model, self.state = model, State.READY
        self._counters.load_seconds = seconds

    def fail(self, reason: str) -> None:
        """It cannot be loaded."""
        self.state, self.reason = State.UNAVAILABLE, reason

    def __enter__(self) -> None:
        self._users += 1
        self._unused.clear()

    def __exit__(self, *error: object) -> None:
        self._users -= 1
        if self._users == 0:
            self._unused.set()

    async def run(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        """The responses to a request, checked and counted. Raises ServiceError alone."""
        work = self._rules.work(request)
        responses = self.model.execute(work)
        tally = Tally(self._counters, work.clock, work.batch_size, decoupled=is_decoupled(self.config))
        with self:
            try:
                async with aclosing(responses):
                    async for response in responses:
                        tally.respond()
                        if response.final:
                            tally.succeed()
                        yield response
            except BaseException as error:
                tally.fail(error)
                if isinstance(error, HastenError):
                    raise service_error(error, request.id) from error
                if not isinstance(error, Exception):  # the client has left
                    raise
                _log.error("model %s version %s failed on a request", self.name, self.number, exc_info=error)
                text = f"model '{self.name}' failed; the server's log says more"
                raise ServiceError(ErrorKind.INTERNAL, text) from error

    def tally(self, items: int, begun: int, *, stream: bool = False) -> Tally:
        """What counts a request of this number of items that an API makes of the engine past its model.

        To be closed: it keeps the version meanwhile.
        """
        clock = Clock(begun)
        clock.prepare()
        return Tally(self._counters, clock, items, decoupled=stream, using=self)

    async def end(self, timeout: float) -> None:
        """Let its requests finish, for up to `timeout` seconds, and free what it holds."""
        self.state, deadline = State.UNLOADING, time.monotonic() + timeout
        with suppress(TimeoutError):
            await asyncio.wait_for(self._unused.wait(), timeout)
        if self._model is not None:
            await self._model.close(max(0.0, deadline - time.monotonic()))
        self.description = replace(self.description, keep=None)
        self.fail(UNLOADED)


@dataclass(frozen=True)
class LoadFailure:
    """Why a model could not be loaded."""

    reason: str
    exit_status: int
    """Of a program that ends because of it: 2 for bad input, 1 otherwise."""

    @classmethod
    def of(cls, error: ServiceError) -> "LoadFailure":
        """That of an error whose cause, if it has one, is what was found wrong."""
        cause = error.__cause__
        return cls(str(error), exit_status(cause) if isinstance(cause, HastenError) else 2)


def load_error(name: str, versions: Iterable[Version]) -> ServiceError:
    """Why a model cannot be loaded: what is wrong with those versions that failed, in Triton's words."""
    reasons = [
        f"version {version.number} is at UNAVAILABLE state: {version.reason};" for version in versions if version.failed
    ]
    return invalid(f"load failed for model '{name}': {' '.join(reasons)}\n")


def dependencies(description: Description) -> list[tuple[str, int]]:
    """The models that a model needs, and which version of each, -1 for the newest."""
    if description.kind is Kind.ENSEMBLE:
        steps = description.config.ensemble_scheduling.step
        return [(step.model_name, step.model_version or -1) for step in steps]
    name = token_model_of(description.config)
    return [(name, -1)] if name else []


def version_number(version: str) -> int:
    """-1 for no version; ServiceError with Triton's text for what is no number."""
    if version == "":
        return -1
    # `int` would take digits of any script, and underscores between them
    number = version.removeprefix("-")
    if not (version.isascii() and number.isdigit() and len(number) < _MOST_DIGITS):
        raise invalid(
            f"failed to get model version from specified version string '{version}' (details: stol), "
            "version should be an integral value > 0"
        )
    if int(version) < 0:
        raise invalid(f"invalid model version specified '{version}' , version should be an integral value > 0")
    return int(version)
