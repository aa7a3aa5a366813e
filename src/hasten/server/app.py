"""The server as a whole: models, transports and their lives from the first port to the last request."""

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from hasten.core.cpus import available_cpus
from hasten.core.errors import ConfigError, EngineError, HastenError
from hasten.server.access import AccessLog
from hasten.server.create import model_configs
from hasten.server.engine.client import EngineClient
from hasten.server.engine.queue import QueueLimits
from hasten.server.inflight import InflightBytes
from hasten.server.listeners import GrpcListener, HttpListener, joined
from hasten.server.machine import raise_descriptor_limit, watch_descriptors
from hasten.server.metrics import Machine, Metrics
from hasten.server.openai.prompts import ChatPrompts
from hasten.server.openai.routes import openai_routes
from hasten.server.openapi.description import docs_routes
from hasten.server.options import ServeOptions
from hasten.server.page.routes import page_routes
from hasten.server.protocol.grpc import GrpcCalls
from hasten.server.protocol.http import http_app, http_routes
from hasten.server.protocol.operations import Operations
from hasten.server.protocol.settings import LogSettings, TraceSettings
from hasten.server.protocol.shared_memory import SharedMemory
from hasten.server.repository import FolderRepository, MemoryRepository, Repository
from hasten.server.security import OPEN_PATHS, Admission, ApiKeys, Hosts, Tls
from hasten.server.service import ControlMode, Service
from hasten.server.tables import backend_table, engine_table, model_table, option_table
from hasten.server.tracing import OtelMetrics, Tracing

SUCCESS, FAILED = 0, 1
_CLOSE_TIMEOUT_S = 2.0
"""For answers on their way once nothing is computed any more."""
_YOUNG_OBJECTS = 10_000
"""Between two garbage collections. A step of many streams makes a few thousand objects, which are gone after it."""
_log = logging.getLogger(__name__)


class Server:
    """All parts of one server. Its ports are open once it is made; `start` begins to serve."""

    def __init__(self, options: ServeOptions, logs: LogSettings) -> None:
        self.options = options
        security = options.security
        self.service = Service(
            _repository(options),
            mode=ControlMode(options.repository.model_control_mode),
            server_id=options.server.server_id,
            strict_readiness=options.server.strict_readiness,
            start_engine=partial(EngineClient.start, stall_timeout=options.server.stall_timeout_secs),
            limits=QueueLimits(
                max_prompt_tokens=security.max_prompt_tokens,
                max_text_bytes=security.max_text_bytes,
                max_queue_bytes=security.max_queue_bytes,
            ),
        )
        ends = options.endpoints
        self._machine = Machine(
            cpu=ends.allow_metrics and ends.allow_cpu_metrics,
            gpus=ends.allow_metrics and ends.allow_gpu_metrics,
            interval=ends.metrics_interval_ms / 1e3,
        )
        self._descriptors = raise_descriptor_limit()
        self._watch: asyncio.Task[None] | None = None
        traces_to, metrics_to = options.log.otlp_traces_endpoint, options.log.otlp_metrics_endpoint
        self._tracing = Tracing(traces_to) if traces_to else None
        self._otel_metrics = OtelMetrics(metrics_to) if metrics_to else None
        self._access = AccessLog(self._tracing, self._otel_metrics, log_requests=options.log.log_requests)
        self._inflight = InflightBytes(security.inflight_bytes)
        self._metrics = Metrics(self.service, self._machine, self._access, self._inflight)
        limit = security.max_request_bytes
        memory = SharedMemory(allowed=security.allow_client_shm, max_request_bytes=limit)
        salts = security.cache_salt_per_key
        self._keys = ApiKeys.from_file(security.api_key_file, salts=salts) if security.api_key_file else None
        files = security.metrics_key_file, security.api_key_file
        self._metrics_keys = ApiKeys.from_file(*files) if security.metrics_key_file else None
        self._tls = Tls.create(security.tls_certificate, security.tls_key, security.tls_client_ca)
        operations = Operations(self.service, memory, TraceSettings(), logs)
        self._routes = http_routes(operations, limit)
        self.http: HttpListener | None = None
        self.metrics: HttpListener | None = None
        self.grpc: GrpcListener | None = None
        with contextlib.ExitStack() as opened:
            self._open(GrpcCalls(operations, self._inflight, max_stream_bytes=limit), opened)
            opened.pop_all()

    def _open(self, calls: GrpcCalls, opened: contextlib.ExitStack) -> None:
        """Open all ports. What is `opened` is to be closed if one of them cannot be had."""
        ends, security = self.options.endpoints, self.options.security
        if ends.allow_http:
            where = ends.http_address, ends.http_port, "--http-port"
            self.http = HttpListener(*where, self._tls, ends, security)
            opened.callback(self.http.close)
        if ends.allow_metrics:
            where = ends.metrics_address or ends.http_address, ends.metrics_port, "--metrics-port"
            self.metrics = HttpListener(*where, None, ends, security)
            opened.callback(self.metrics.close)
        if ends.allow_grpc:
            self.grpc = GrpcListener(
                *(ends.grpc_address or ends.http_address, ends.grpc_port, "--grpc-port", calls),
                keys=self._keys,
                tls=self._tls,
                options=ends.grpc_channel(security),
                access=self._access,
            )

    async def start(self) -> None:
        """Answer at once that the server lives, load the models, and tell that they are there.

        ConfigError, or EngineError where it is not what was given, where a model cannot be loaded and that is to be an
        end.
        """
        limit, ends = self.options.security.max_request_bytes, self.options.endpoints
        self._watch = asyncio.create_task(watch_descriptors(self._descriptors))
        if self.grpc is not None:
            await self.grpc.start()
        if self.http is not None:
            # tried one after the other: those of which there are few come first
            prompts = ChatPrompts()
            routes = [
                *openai_routes(self.service, prompts, with_metrics=self.options.server.enable_per_request_metrics),
                *self._routes,
                *page_routes(self.service, prompts),
            ]
            if self.metrics is not None:
                routes += self._metrics.routes()
            routes += docs_routes(routes)
            admission = replace(self._admission(ends.http_address), keys=self._keys)
            app = http_app(routes, admission, limit, self._inflight)
            await self.http.start(self._access.http(app))
        if self.metrics is not None:
            admission = self._admission(ends.metrics_address or ends.http_address)
            await self.metrics.start(http_app(self._metrics.routes(), admission, limit, self._inflight))
        _log.debug("\n%s", option_table(self.options, self.service.server_metadata()))
        _log.info("loading %s ...", ", ".join(self._sources()))
        repository = self.options.repository
        await self.service.start(repository.load_model, repository_poll_secs=repository.repository_poll_secs)
        if self.service.failures and self.options.server.exit_on_error:
            raise self._failure()
        self._log_models()
        self._log_endpoints()

    def _admission(self, address: str) -> Admission:
        """Whose requests a port at this address takes, but for keys that all paths need."""
        security = self.options.security
        return Admission(
            open_paths=OPEN_PATHS | {"/", "/docs"},
            metrics_keys=self._metrics_keys,
            hosts=Hosts(address, security.allowed_host),
        )

    def _sources(self) -> list[str]:
        """Folders that models are loaded from."""
        engine = self.options.engine
        return [engine.model] if engine is not None else list(self.options.model_repository)

    def _failure(self) -> HastenError:
        """Why models could not be loaded; of the one model that the command named, by its folder."""
        failures = sorted(self.service.failures.items())
        kind = ConfigError if all(failure.exit_status == 2 for _, failure in failures) else EngineError
        reasons = {name: " ".join(failure.reason.split()) for name, failure in failures}
        for entry in self.service.index():
            if entry.name in reasons and entry.reason:
                reasons[entry.name] = " ".join(entry.reason.split())
        engine = self.options.engine
        if engine is not None and self.options.model.name in reasons:
            return kind(f"cannot load {engine.model}: {reasons[self.options.model.name]}")
        return kind("not all models could be loaded: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))

    def _log_models(self) -> None:
        models = self.service.index()
        if not models:
            _log.warning("no model in %s: each is a folder NAME with config.pbtxt", ", ".join(self._sources()))
        _log.info("\n%s", backend_table(self.service.backends()))
        _log.info("\n%s", model_table(models))
        _log.info("\n%s", engine_table(self.service.engines()))
        for source in self._machine.sources():
            _log.info("Collecting %s", source)
        _log.info("CPUs: %d; file descriptors: at most %d", available_cpus(), self._descriptors)

    def _log_endpoints(self) -> None:
        for name, listener in (
            ("GRPCInferenceService", self.grpc),
            ("HTTPService", self.http),
            ("Metrics Service", self.metrics),
        ):
            if listener is not None:
                _log.info("Started %s at %s", name, listener.address)
        if self.http is not None:
            address = self.options.endpoints.http_address
            host = "localhost" if address in ("0.0.0.0", "::", "127.0.0.1", "::1") else address
            url = f"http{'s' if self._tls else ''}://{joined(host, self.http.port)}/"
            _log.info("ready: page at %s, OpenAI's API at %sv1", url, url)

    async def stop(self, timeout: float) -> None:
        """Take no more requests, let those in flight finish for up to `timeout` seconds, and close the ports."""
        if self._watch is not None:
            self._watch.cancel()
        await self.service.close(timeout)
        listeners = [each for each in (self.http, self.metrics, self.grpc) if each is not None]
        await asyncio.gather(*(listener.stop(min(timeout, _CLOSE_TIMEOUT_S)) for listener in listeners))
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        if self._otel_metrics is not None:
            await asyncio.to_thread(self._otel_metrics.close)


def run_server(options: ServeOptions) -> int:
    """`serve`, on uvloop where there is one: it takes half the time for each message."""
    gc.freeze()  # modules stay: to look through them again in each collection would hold up the loop for up to 50 ms
    gc.set_threshold(_YOUNG_OBJECTS)
    try:
        import uvloop
    except ImportError:
        return asyncio.run(serve(options))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(options))


async def serve(options: ServeOptions) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status.

    A second signal ends at once what is still under way.
    """
    logs = LogSettings(options.log)
    logs.start()
    try:
        server = Server(options, logs)
        with _signals() as signals:
            return await _live(server, signals)
    finally:
        logs.stop()


async def _live(server: Server, signals: "asyncio.Queue[signal.Signals]") -> int:
    exit_timeout = server.options.server.exit_timeout_secs
    shutdown = asyncio.ensure_future(signals.get())
    again: asyncio.Future[signal.Signals] | None = None
    try:
        await _unless(shutdown, server.start())
        name = (await shutdown).name
        _log.info("%s received: no new requests, those under way have %g seconds", name, exit_timeout)
        again = asyncio.ensure_future(signals.get())
        if await _unless(again, server.stop(exit_timeout)):
            return SUCCESS
        _log.warning("%s received again: ending at once", (await again).name)
        return FAILED
    finally:
        for waiting in (shutdown, again):
            if waiting is not None:
                waiting.cancel()
        await server.stop(0)


async def _unless(received: "asyncio.Future[signal.Signals]", work: Coroutine[Any, Any, None]) -> bool:
    """Whether the work was done before a signal came; else it is cancelled."""
    task = asyncio.ensure_future(work)
    await asyncio.wait((task, received), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False


@contextlib.contextmanager
def _signals() -> "Iterator[asyncio.Queue[signal.Signals]]":
    """SIGTERM and SIGINT, as they come."""
    loop = asyncio.get_running_loop()
    came: asyncio.Queue[signal.Signals] = asyncio.Queue()
    kinds = (signal.SIGTERM, signal.SIGINT)
    for kind in kinds:
        loop.add_signal_handler(kind, came.put_nowait, kind)
    try:
        yield came
    finally:
        for kind in kinds:
            loop.remove_signal_handler(kind)


def _repository(options: ServeOptions) -> Repository:
    if options.engine is None:
        complete = not options.repository.disable_auto_complete_config
        return FolderRepository(options.model_repository, auto_complete=complete)
    model, limits = options.model, None
    if model.max_queue_size or model.queue_timeout_secs:
        limits = QueueLimits(max_queue_size=model.max_queue_size, default_timeout=model.queue_timeout_secs)
    configs = model_configs(
        options.engine, token_name=model.name, text_name=model.text_name, decoupled=model.decoupled, limits=limits
    )
    configs[0].instance_group[0].count = model.data_parallel_size
    for config in configs:
        if config.max_batch_size and model.max_batch is not None:
            config.max_batch_size = model.max_batch
    return MemoryRepository(configs)
