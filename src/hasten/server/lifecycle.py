"""All models: loaded, found, replaced while they serve, and unloaded.

A version that is to be replaced serves until the new one is ready, if there is memory for both. A request belongs to
the version that it came to, and a version ends when its last request has.
"""

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from typing import Any

from hasten.core.errors import CapacityError, HastenError
from hasten.server.engine.client import EngineClient
from hasten.server.engine.queue import QueueLimits
from hasten.server.models.encoder_model import EncoderModel, PooledTextModel, check_model_type
from hasten.server.models.ensemble import Ensemble
from hasten.server.models.interfaces import POOLING_KINDS, Kind
from hasten.server.models.model import Model
from hasten.server.models.parameters import queue_limits
from hasten.server.models.text_model import TextModel
from hasten.server.models.text_processing import Postprocessing, Preprocessing
from hasten.server.models.token_model import TokenModel
from hasten.server.repository import Description, Repository
from hasten.server.statistics import Counters
from hasten.server.types import ErrorKind, ServiceError, invalid
from hasten.server.version import UNLOADED, LoadFailure, State, Version, dependencies, load_error

StartEngine = Callable[..., Awaitable[EngineClient]]
Files = Mapping[str, bytes]
_LONGEST_END_S = 3600.0
"""How long the requests of an unloaded version may go on."""
_LONGEST_SHOWN = 256
"""Characters of a model's name in an error: no longer one is a model's."""
_log = logging.getLogger(__name__)


class Registry:
    """The models of one repository, by name and version."""

    def __init__(
        self, repository: Repository, counters: Counters, start_engine: StartEngine, limits: QueueLimits
    ) -> None:
        self.repository = repository
        self.failures: dict[str, LoadFailure] = {}
        """Models that could not be loaded when that was last tried, and why."""
        self._counters = counters
        self._start_engine = start_engine
        self._limits = limits
        self.changes = 0
        """How often it has changed what serves."""
        self._models: dict[str, dict[int, Version]] = {}
        self._found: dict[tuple[str, int], Version] = {}
        """What `find` gave since the last change."""
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._requested: set[str] = set()
        """Models that were loaded for their own sake and not for another's."""
        self._stamps: dict[str, int] = {}
        self._tasks: dict[asyncio.Task[None], list[str]] = {}
        """Loading and unloading, and models that each loads now or waits for its turn to."""
        self._left: set[asyncio.Task[None]] = set()
        """Those of them that nobody waits for any more."""
        self._unloading: Counter[str] = Counter()
        """Models to be unloaded, by how many calls."""
        self._ending: dict[Version, asyncio.Task[None]] = {}

    def versions(self) -> Iterable[Version]:
        """All that were ever loaded, in the order of their names and numbers."""
        return [version for _, numbers in sorted(self._models.items()) for _, version in sorted(numbers.items())]

    def serving(self) -> Iterator[Version]:
        """Those that take requests."""
        return filter(self.serves, self.versions())

    def _on_change(self) -> None:
        self.changes += 1
        self._found.clear()

    def find(self, name: str, version: int = -1) -> Version:
        """The version that serves, -1 for the newest; ServiceError with Triton's text where there is none."""
        if (known := self._found.get((name, version))) is None:
            known = self._found[name, version] = self._look_up(name, version)
        return known

    def _look_up(self, name: str, version: int) -> Version:
        numbers = self._models.get(name)
        unknown = f"Request for unknown model: '{name}'"
        if not numbers:
            raise ServiceError(ErrorKind.NOT_FOUND, f"{unknown} is not found")
        if version == -1:
            serving = [number for number, found in numbers.copy().items() if self.serves(found)]
            if not serving:
                raise ServiceError(ErrorKind.NOT_FOUND, f"{unknown} has no available versions")
            return numbers[max(serving)]
        if version not in numbers:
            raise ServiceError(ErrorKind.NOT_FOUND, f"{unknown} version {version} is not found")
        if not self.serves(numbers[version]):
            raise ServiceError(ErrorKind.UNAVAILABLE, f"{unknown} version {version} is not at ready state")
        return numbers[version]

    def serves(self, version: Version) -> bool:
        """Whether it takes requests: it is loaded, and so is all that it needs."""
        return version.state is State.READY and self.lacks(version) is None

    def lacks(self, version: Version) -> str | None:
        """The first model that it needs and that does not serve."""
        for name, number in version.dependencies:
            try:
                self.find(name, number)
            except ServiceError:
                return name
        return None

    def any_serves(self, name: str) -> bool:
        """Whether any version of a model does."""
        return any(map(self.serves, self._models.get(name, {}).values()))

    def is_ready(self, version: Version) -> bool:
        """Whether its requests can be computed now: it serves, and its engine lives."""
        return self.serves(version) and version.model.ready

    async def load(self, name: str, config_json: str | None = None, files: Files | None = None) -> None:
        """Load a model, or load it again; what it needs is loaded too.

        A caller that leaves does not stop it; but once it has, unloading one of these models gives it up.
        """
        await self._finish(self._load_requested(name, config_json, files or {}))

    async def unload(self, name: str, *, unload_dependents: bool = False) -> None:
        """Take no more requests; those under way finish. Also what was loaded for it alone, if asked."""
        await self._finish(self._unload(name, unload_dependents))

    async def load_all(self, names: Iterable[str]) -> None:
        """Load those that do not serve yet, each once; what fails is noted in `failures`."""
        failed: dict[str, ServiceError] = {}
        for name in names:
            self._requested.add(name)
            if not self.any_serves(name):
                await self._try_to_load(name, failed)

    async def poll(self) -> None:
        """Load what is new or has changed in the repository since the last look, and unload what is gone."""
        names = await asyncio.to_thread(self.repository.names)
        failed: dict[str, ServiceError] = {}
        for name in names:
            stamp = await asyncio.to_thread(self.repository.stamp, name)
            known = self._stamps.get(name)
            if stamp is None or stamp == known:
                continue
            self._stamps[name] = stamp
            self._requested.add(name)
            if known is not None or not self.any_serves(name):  # another model may have needed it already
                await self._try_to_load(name, failed)
        for name in set(self._models) - set(names):
            if any(version.state is State.READY for version in self._models[name].values()):
                await self.unload(name)
        for name in set(self._stamps) - set(names):
            del self._stamps[name]
            self.failures.pop(name, None)

    async def close(self, timeout: float) -> None:
        """End all versions: requests in flight get up to `timeout` seconds; pending loads are cancelled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for version in self.versions():
            if version.state is State.READY:
                self._retire(version)
        if self._ending:
            await asyncio.wait(self._ending.values(), timeout=timeout)
        late = list(self._ending.items())
        for version, task in late:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await version.end(0)

    async def _try_to_load(self, name: str, failed: dict[str, ServiceError]) -> None:
        """`failed`: models whose loading failed just now, which is not tried again for each that needs them."""
        if name in failed:
            return
        try:
            await self._finish(self._load(name, None, {}, (), failed))
        except ServiceError as error:
            _log.error("%s", str(error).rstrip("\n"))

    async def _finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it to its end, also if the caller is cancelled."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = []
        task.add_done_callback(self._tasks.pop)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.done():
                raise
            self._left.add(task)
            task.add_done_callback(self._left.discard)
            for name in self._unloading:
                self._give_up_loads(name)
            raise

    def _give_up_loads(self, name: str) -> None:
        """Cancel the loads of a model that is to be unloaded, but for those that a caller waits for."""
        for task in self._left:
            if name in self._tasks.get(task, ()):
                task.cancel()

    async def _load_requested(self, name: str, config_json: str | None, files: Files) -> None:
        try:
            await self._load(name, config_json, files, (), {})
        except ServiceError:
            # a name that only a client knows is not kept, and what is not there keeps no server from being ready
            if name not in self._models and name not in await asyncio.to_thread(self.repository.names):
                self.failures.pop(name, None)
            raise
        self._requested.add(name)

    async def _load(
        self,
        name: str,
        config_json: str | None,
        files: Files,
        trail: tuple[str, ...],
        failed: dict[str, ServiceError],
    ) -> None:
        task = asyncio.current_task()
        assert task is not None, "loading is a task"
        loading = self._tasks[task]
        try:
            description = await self._describe(name, config_json, files)
            for needed, _ in dependencies(description):
                if needed in (*trail, name):
                    raise invalid(f"load failed for model '{name}': it needs itself\n")
                if needed in failed:
                    raise failed[needed]
                if not self.any_serves(needed):
                    await self._load(needed, None, {}, (*trail, name), failed)
            loading.append(name)
            async with self._locks[name]:
                if not (trail and self.any_serves(name)):  # meanwhile another one may have needed it too
                    await self._replace(description)
        except ServiceError as error:
            self.failures[name] = LoadFailure.of(error)
            failed[name] = error
            raise
        finally:
            loading[:] = [each for each in loading if each != name]
        self.failures.pop(name, None)

    async def _describe(self, name: str, config_json: str | None, files: Files) -> Description:
        failed = f"failed to load '{name[:_LONGEST_SHOWN]}', failed to poll from model repository"
        sent = config_json is not None or bool(files)
        try:
            if sent:
                description = await asyncio.to_thread(self.repository.override, name, config_json, files)
            else:
                description = await asyncio.to_thread(self.repository.describe, name)
        except HastenError as error:
            raise ServiceError(ErrorKind.INVALID if sent else ErrorKind.INTERNAL, f"{failed}: {error}") from error
        if description is None:
            raise ServiceError(ErrorKind.INTERNAL, failed)
        if not description.versions:
            policy = f"at least one version must be available under the version policy of model '{name}'"
            raise invalid(f"load failed for model '{name}': {policy}\n")
        return description

    async def _replace(self, description: Description) -> None:
        """Start the versions of a description, then let them take the place of those that serve."""
        name, known = description.name, self._models.setdefault(description.name, {})
        new = {
            number: Version(description, number, self._counters[name, str(number)], self._on_change)
            for number in description.versions
        }
        serving = [version for version in known.values() if version.state is State.READY]
        known |= {number: version for number, version in new.items() if known.get(number) not in serving}
        try:
            try:
                await self._begin_all(new.values())
            except CapacityError:
                if not any(version.model.engine for version in serving):
                    raise
                text = "model %s: there is no memory for the old and the new one at once; the old one ends first"
                _log.warning(text, name)
                await asyncio.wait([self._retire(version) for version in serving])
                known |= new
                await self._begin_all(new.values())
        except HastenError as error:
            raise load_error(name, new.values()) from error
        known |= new
        self._on_change()
        for version in serving:
            if version.state is State.READY:
                self._retire(version)
        _log.info("successfully loaded '%s'", name)

    async def _begin_all(self, versions: Iterable[Version]) -> None:
        """Start all or none; the error of the first that cannot be."""
        waiting, begun = list(versions), list[Version]()
        for version in waiting:
            version.state, version.reason = State.LOADING, ""
        while waiting:
            version = waiting.pop(0)
            started = time.monotonic()
            try:
                version.begin(await self._build(version), time.monotonic() - started)
            except BaseException as error:
                version.fail(str(error) or "loading it was given up")
                for other in waiting:
                    other.fail(UNLOADED)
                for other in begun:
                    await other.end(0)
                raise
            begun.append(version)

    async def _build(self, version: Version) -> Model:
        description, config = version.description, version.config
        if description.kind is Kind.TOKEN:
            name = f"{version.name} version {version.number}"
            engine_config = description.engine_config(version.number)
            engines, limits = config.instance_group[0].count, queue_limits(config, self._limits)
            engine = await self._start_engine(engine_config, limits, name=name, engines=engines)
            try:
                check_model_type(config, engine.info)
            except HastenError:
                await engine.close()
                raise
            counters = self._counters[version.name, str(version.number)]
            engine.counters = counters.language = counters.language or engine.counters
            kind = TokenModel if engine.info.pooling is None else EncoderModel
            return kind(config, engine)
        if description.kind is Kind.ENSEMBLE:
            return Ensemble(config, self)
        if description.kind is Kind.TEXT:
            return TextModel(config, self)
        if description.kind in POOLING_KINDS:
            return PooledTextModel(config, description.kind, self)
        processing = Preprocessing if description.kind is Kind.PREPROCESSING else Postprocessing
        return processing(config, self, description.folder)

    async def _unload(self, name: str, unload_dependents: bool) -> None:
        if not any(name in known for known in (self._models, self._locks, self.failures)):
            return
        self._unloading[name] += 1
        self._give_up_loads(name)
        async with self._locks[name]:
            self._unloading -= Counter((name,))
            self._requested.discard(name)
            self.failures.pop(name, None)
            versions = list(self._models.get(name, {}).values())
            for version in versions:
                if version.state is State.READY:
                    self._retire(version)
                elif version.failed:
                    version.fail(UNLOADED)
        if unload_dependents:
            for needed in {needed for version in versions for needed, _ in version.dependencies}:
                if needed not in self._requested:
                    await self._unload(needed, unload_dependents)

    def _retire(self, version: Version) -> asyncio.Task[None]:
        """Let a version end by itself, once its requests have, whoever waits for that."""
        version.state = State.UNLOADING
        task = asyncio.get_running_loop().create_task(version.end(_LONGEST_END_S))
        self._ending[version] = task
        task.add_done_callback(lambda _: self._ending.pop(version, None))
        return task
