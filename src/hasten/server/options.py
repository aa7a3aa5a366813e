"""Options of `hasten serve`. Where tritonserver has an option of that meaning, it has its name.

Imports nothing heavy: the command line is made of these.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError
from hasten.core.option_fields import option

LOG_FORMATS = ("default", "ISO8601", "text", "json")
CONTROL_MODES = ("none", "poll", "explicit")
_LARGEST_PORT = 65535
_MOST_CALLS = 1024
"""Under way on one gRPC connection; further ones wait at the client."""
_LARGEST_INFLIGHT = 8
"""Requests of the largest size that may be in flight at once."""


def _check_least(options: object, **least: float) -> None:
    """ConfigError where an option is below its least value."""
    for name, value in least.items():
        given = getattr(options, name)
        if given is not None and not given >= value:
            shown = f"{given:g}" if isinstance(given, float) else given
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {value:g}, got {shown}")


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """Where the server listens."""

    allow_http: bool = option(True, "serve HTTP: Triton's protocol, OpenAI's API and a page")
    http_address: str = option(
        "127.0.0.1",
        "address of HTTP: of this machine alone by default; 0.0.0.0 or :: for any client",
        aliases=("host",),
    )
    http_port: int = option(8000, "port of HTTP; 0 is any free one", aliases=("port",))
    allow_grpc: bool = option(True, "serve Triton's protocol over gRPC")
    grpc_address: str = option("", "address of gRPC (default: that of HTTP)")
    grpc_port: int = option(8001, "port of gRPC; 0 is any free one")
    allow_metrics: bool = option(True, "serve metrics for Prometheus, on their own port always as plain HTTP")
    metrics_address: str = option("", "address of metrics (default: that of HTTP)")
    metrics_port: int = option(8002, "port of metrics; 0 is any free one")
    allow_gpu_metrics: bool = option(True, "export GPU metrics")
    allow_cpu_metrics: bool = option(True, "export CPU metrics")
    http_max_connections: int = option(4096, "maximum open connections per port; more are refused with 503")
    http_idle_timeout_secs: float = option(75.0, "maximum seconds of a connection without a request")
    http_header_timeout_secs: float = option(30.0, "maximum seconds for the headers of a request to arrive")
    http_body_timeout_secs: float = option(60.0, "maximum seconds between two pieces of a request's body")
    http_write_timeout_secs: float = option(300.0, "maximum seconds for which a client reads nothing of its answer")
    metrics_interval_ms: float = option(2000.0, "interval of hardware metrics, in ms")
    grpc_max_connections: int = option(4096, "maximum open gRPC connections; more are closed")
    grpc_keepalive_time: int = option(7_200_000, "ms without traffic after which a gRPC client is pinged")
    grpc_keepalive_timeout: int = option(20_000, "ms that it has to answer the ping")
    grpc_keepalive_permit_without_calls: bool = option(False, "ping also when no call is in flight")
    grpc_http2_max_pings_without_data: int = option(2, "maximum pings without data in between; 0: any number")
    grpc_http2_min_recv_ping_interval_without_data: int = option(
        300_000, "minimum ms between pings of a client without data in between"
    )
    grpc_http2_max_ping_strikes: int = option(2, "pings above that which are forgiven; 0: any number")
    grpc_max_connection_idle: int = option(
        3_600_000, "ms without a call after which a gRPC connection is ended; 0: never"
    )
    grpc_max_connection_age: int = option(0, "ms after which a gRPC connection is ended gracefully; 0: never")
    grpc_max_connection_age_grace: int = option(0, "ms that its calls have then; 0: any time")

    def __post_init__(self) -> None:
        for name in ("http_port", "grpc_port", "metrics_port"):
            port = getattr(self, name)
            if not 0 <= port <= _LARGEST_PORT:
                raise ConfigError(f"--{name.replace('_', '-')} must be from 0 to {_LARGEST_PORT}, got {port}")
        timeouts = (f"http_{name}_timeout_secs" for name in ("idle", "header", "body", "write"))
        _check_least(self, http_max_connections=1, **dict.fromkeys(timeouts, 0.1))
        _check_least(self, grpc_max_connections=1, metrics_interval_ms=0)

    def grpc_channel(self, security: "SecurityOptions") -> list[tuple[str, int]]:
        """Options of gRPC's own."""
        options = [
            ("grpc.max_receive_message_length", min(security.max_request_bytes, security.max_grpc_message_bytes)),
            ("grpc.max_metadata_size", security.max_header_bytes),
            ("grpc.absolute_max_metadata_size", security.max_header_bytes),
            ("grpc.max_allowed_incoming_connections", self.grpc_max_connections),
            ("grpc.max_concurrent_streams", _MOST_CALLS),
            ("grpc.server_handshake_timeout_ms", round(self.http_header_timeout_secs * 1e3)),
            ("grpc.max_send_message_length", -1),
            ("grpc.keepalive_time_ms", self.grpc_keepalive_time),
            ("grpc.keepalive_timeout_ms", self.grpc_keepalive_timeout),
            ("grpc.keepalive_permit_without_calls", int(self.grpc_keepalive_permit_without_calls)),
            ("grpc.http2.max_pings_without_data", self.grpc_http2_max_pings_without_data),
            (
                "grpc.http2.min_recv_ping_interval_without_data_ms",
                self.grpc_http2_min_recv_ping_interval_without_data,
            ),
            ("grpc.http2.max_ping_strikes", self.grpc_http2_max_ping_strikes),
        ]
        limits = [
            ("grpc.max_connection_idle_ms", self.grpc_max_connection_idle),
            ("grpc.max_connection_age_ms", self.grpc_max_connection_age),
            ("grpc.max_connection_age_grace_ms", self.grpc_max_connection_age_grace),
        ]
        return options + [(name, limit) for name, limit in limits if limit]


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """What the server writes about itself."""

    log_verbose: int = option(0, "0: no details; 1 and more: a line for each call, and all options at the start")
    log_info: bool = option(True, "write informational messages")
    log_warning: bool = option(True, "write warnings")
    log_error: bool = option(True, "write errors")
    log_format: str = option(
        "default",
        "form of the log's lines: Triton's, with ISO8601 for other times, or json for an object per line; text is "
        "default",
        choices=LOG_FORMATS,
    )
    log_file: str = option("", "file to append the log to (default: standard error)", kind="path")
    log_requests: bool = option(
        False,
        "write a line for each call of a model: its status, time, id and tokens",
        aliases=("enable_log_requests",),
    )
    otlp_traces_endpoint: str = option(
        "", "URL that takes OpenTelemetry's traces over HTTP, such as http://localhost:4318/v1/traces"
    )
    otlp_metrics_endpoint: str = option(
        "", "URL that takes OpenTelemetry's metrics over HTTP, such as http://localhost:4318/v1/metrics"
    )


@dataclass(frozen=True, kw_only=True)
class SecurityOptions:
    """Who may ask, and how much."""

    tls_certificate: str | None = option(None, "PEM file of the server's certificate, for HTTP and gRPC", kind="path")
    tls_key: str | None = option(None, "PEM file of its key", kind="path")
    tls_client_ca: str | None = option(
        None, "PEM file of the authority whose certificates clients must show", kind="path"
    )
    api_key_file: str | None = option(
        None, "file of API keys, one per line; health checks and the port of metrics need none", kind="path"
    )
    metrics_key_file: str | None = option(
        None, "file of keys for /metrics, which then needs one of them, or an API key, on all ports", kind="path"
    )
    allowed_host: Sequence[str] = option(
        (),
        "name that clients may reach the server by, * for any; may be given more than once (default: any on an address "
        "that other machines reach, else localhost and addresses)",
    )
    allow_client_shm: bool = option(False, "let clients on this machine register system shared memory")
    cache_salt_per_key: bool = option(True, "let no client's prompts be found in the prefix cache by another API key")
    max_request_bytes: int = option(64 << 20, "maximum bytes of a request, unpacked, such as 64MiB", kind="size")
    max_grpc_message_bytes: int = option(
        32 << 20, "maximum bytes of a message over gRPC, at most --max-request-bytes", kind="size"
    )
    max_inflight_bytes: int | None = option(
        None, "maximum bytes of all requests in flight (default: 8 times --max-request-bytes)", kind="size"
    )
    max_header_bytes: int = option(64 << 10, "maximum bytes of a request's headers, its URL included", kind="size")
    max_url_bytes: int = option(8 << 10, "maximum bytes of a request's URL", kind="size")
    max_text_bytes: int = option(
        1 << 20, "maximum bytes of a text for tokenizers of which a token may stand for any number of them", kind="size"
    )
    max_queue_bytes: int = option(64 << 20, "maximum bytes of the requests of a model that wait", kind="size")
    max_prompt_tokens: int | None = option(
        None, "maximum tokens per prompt (default: what --max-model-len leaves)", type=int
    )

    def __post_init__(self) -> None:
        names = ("max_request_bytes", "max_header_bytes", "max_url_bytes", "max_text_bytes", "max_queue_bytes")
        _check_least(self, **dict.fromkeys((*names, "max_grpc_message_bytes", "max_prompt_tokens"), 1))
        if self.inflight_bytes < self.max_request_bytes:
            least = f"--max-request-bytes ({self.max_request_bytes})"
            raise ConfigError(f"--max-inflight-bytes must be at least {least}, got {self.inflight_bytes}")

    @property
    def inflight_bytes(self) -> int:
        """Bytes of all requests in flight."""
        given = self.max_inflight_bytes
        return _LARGEST_INFLIGHT * self.max_request_bytes if given is None else given


@dataclass(frozen=True, kw_only=True)
class RepositoryOptions:
    """Which models there are, with --model-repository."""

    model_control_mode: str = option(
        "none",
        "none: all models are loaded at the start; poll: and changes are followed; explicit: those that --load-model "
        "names, and then what clients load and unload",
        choices=CONTROL_MODES,
    )
    load_model: Sequence[str] = option(
        (), "with explicit control: a model to load at the start, * for all; may be given more than once"
    )
    repository_poll_secs: float = option(15.0, "with poll: seconds between looks at the repository")
    disable_auto_complete_config: bool = option(False, "a model without config.pbtxt is an error")

    def __post_init__(self) -> None:
        if self.repository_poll_secs <= 0:
            raise ConfigError(f"--repository-poll-secs must be above 0, got {self.repository_poll_secs:g}")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How one MODEL is served, without a repository."""

    name: str = option("fastertransformer", "name of the token-id model")
    text_name: str | None = option(
        None, "name of the text model (default: the folder's)", aliases=("served_model_name",)
    )
    data_parallel_size: int = option(
        1,
        "number of engines that serve the model, each on GPUs of its own, or with its part of a machine's CPUs",
        short="-dp",
    )
    decoupled: bool = option(False, "the token-id model streams: its clients must use ModelStreamInfer")
    max_batch: int | None = option(None, "maximum prompts per request (default: 1024)", type=int)
    max_queue_size: int = option(0, "maximum waiting requests, more are refused; 0: any number")
    queue_timeout_secs: float = option(
        0.0, "maximum seconds of waiting; a request whose estimated wait is longer is refused at once; 0: any time"
    )

    def __post_init__(self) -> None:
        _check_least(self, data_parallel_size=1, max_batch=1, max_queue_size=0, queue_timeout_secs=0)


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How the server lives."""

    server_id: str = option("hasten", "name of the server in its metadata", flag="--id")
    strict_readiness: bool = option(True, "ready only while all models are")
    exit_timeout_secs: float = option(30.0, "seconds for in-flight requests at shutdown")
    stall_timeout_secs: float = option(60.0, "seconds without a step after which an engine with requests is not ready")
    exit_on_error: bool = option(True, "end where a model cannot be loaded at the start")
    enable_per_request_metrics: bool = option(False, "report the times of requests in answers of OpenAI's API")

    def __post_init__(self) -> None:
        _check_least(self, exit_timeout_secs=0)
        if not self.stall_timeout_secs > 0:
            raise ConfigError(f"--stall-timeout-secs must be above 0, got {self.stall_timeout_secs:g}")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """All of it. Either `engine` or `model_repository` is given."""

    engine: EngineConfig | None = None
    model_repository: tuple[str, ...] = ()
    endpoints: EndpointOptions = field(default_factory=EndpointOptions)
    repository: RepositoryOptions = field(default_factory=RepositoryOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    server: ServerOptions = field(default_factory=ServerOptions)
    log: LogOptions = field(default_factory=LogOptions)
    security: SecurityOptions = field(default_factory=SecurityOptions)

    def __post_init__(self) -> None:
        if (self.engine is None) == (not self.model_repository):
            raise ConfigError("give either a MODEL or --model-repository")
        if self.repository.load_model and self.repository.model_control_mode != "explicit":
            raise ConfigError("--load-model needs --model-control-mode explicit")
        if "*" in self.repository.load_model and len(self.repository.load_model) > 1:
            raise ConfigError("--load-model=* loads all models; remove the other ones")
        if not (self.endpoints.allow_http or self.endpoints.allow_grpc):
            raise ConfigError("nothing is served: allow HTTP or gRPC")
