"""One version of a model, from its loading to its end."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum

from hasten.core.errors import HastenError, exit_status
from hasten.server.errors import service_error
from hasten.server.models.config import is_decoupled, parameter
from hasten.server.models.interfaces import Kind
from hasten.server.models.model import Model
from hasten.server.models.parameters import TOKEN_MODEL
from hasten.server.models.text_model import DEFAULT_TOKEN_MODEL
from hasten.server.models.validation import Rules
from hasten.server.models.work import Outcome
from hasten.server.repository import Description
from hasten.server.statistics import ModelCounters
from hasten.server.types import ErrorKind, InferRequest, ServiceError

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
    """One version of a model. What began before its end goes on to its own."""

    def __init__(self, description: Description, number: int, counters: ModelCounters) -> None:
        self.name = description.name
        self.number = number
        self.config = description.config
        self.description = description
        self.dependencies = dependencies(description)
        """The models that it needs, and which version of each, -1 for the newest."""
        self.state = State.LOADING
        self.reason = ""
        """Why it is not available."""
        self._rules = Rules(description.config)
        self._counters = counters
        self._model: Model | None = None
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    @property
    def model(self) -> Model:
        """What computes its requests, once it is loaded."""
        assert self._model is not None, "it is loaded before it serves"
        return self._model

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

    @contextmanager
    def use(self) -> Iterator[None]:
        """Keep it from ending meanwhile."""
        self._users += 1
        self._unused.clear()
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                self._unused.set()

    async def run(self, request: InferRequest) -> AsyncGenerator[Outcome, None]:
        """Compute a request, checked and counted. Raises ServiceError alone."""
        work, decoupled = self._rules.work(request), is_decoupled(self.config)
        with self.use():
            tracked = self._counters.track(work)
            try:
                async with aclosing(self.model.execute(work)) as outcomes:
                    async for outcome in outcomes:
                        tracked.respond(decoupled=decoupled)
                        if outcome.final:
                            tracked.succeed()
                        yield outcome
            except HastenError as error:
                tracked.fail(error)
                raise service_error(error, request.id) from error
            except Exception as error:
                tracked.fail(error)
                _log.exception("model %s version %d failed on a request", self.name, self.number)
                raise ServiceError(
                    ErrorKind.INTERNAL, f"model '{self.name}' failed; the server's log says more"
                ) from error
            except BaseException as error:  # the client left
                tracked.fail(error)
                raise

    async def end(self, timeout: float) -> None:
        """Let its requests finish, for so many seconds, and free what it holds."""
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
    return ServiceError(ErrorKind.INVALID, f"load failed for model '{name}': {' '.join(reasons)}\n")


def dependencies(description: Description) -> list[tuple[str, int]]:
    """The models that a model needs, and which version of each, -1 for the newest."""
    config = description.config
    if description.kind is Kind.ENSEMBLE:
        return [(step.model_name, step.model_version or -1) for step in config.ensemble_scheduling.step]
    default = DEFAULT_TOKEN_MODEL if description.kind is Kind.TEXT else ""
    name = "" if description.kind is Kind.TOKEN else parameter(config, TOKEN_MODEL, default)
    return [(name, -1)] if name else []


def version_number(version: str) -> int:
    """-1 for no version; ServiceError with Triton's text for what is no number."""
    if version == "":
        return -1
    # `int` would take digits of any script, and underscores between them
    number = version.removeprefix("-")
    if not (version.isascii() and number.isdigit() and len(number) < _MOST_DIGITS):
        raise ServiceError(
            ErrorKind.INVALID,
            f"failed to get model version from specified version string '{version}' (details: stol), "
            "version should be an integral value > 0",
        )
    if int(version) < 0:
        raise ServiceError(
            ErrorKind.INVALID,
            f"invalid model version specified '{version}' , version should be an integral value > 0",
        )
    return int(version)
