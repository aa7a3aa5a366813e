"""Who may ask, and how much: API keys, TLS, and the bytes of bodies, of each and of all in flight."""

import hashlib
import hmac
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hasten.core.errors import ConfigError
from hasten.core.files import reading
from hasten.core.text import utf8_lines
from hasten.server.http_errors import error_response, service_error_response
from hasten.server.inflight import Claim, InflightBytes
from hasten.server.types import ServiceError

NO_KEY = "a valid API key is required: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
OPEN_PATHS = frozenset({"/v2/health/live", "/v2/health/ready", "/health", "/ping"})
OPEN_CALLS = frozenset({"ServerLive", "ServerReady", "Check"})
"""What needs no key, over HTTP and over gRPC: a cluster's probes have none."""


class ApiKeys:
    """The keys that may ask. How long a check takes says nothing of them."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def from_file(cls, name: str) -> "ApiKeys":
        """Read a file of one key per line; lines that are empty or begin with # are left out."""
        with reading(f"API keys from {name}"):
            lines = utf8_lines(Path(name).read_bytes())
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise ConfigError(f"{name} has no API key: write one per line")
        return cls(keys)

    def admit(self, authorization: str, key: str = "") -> bool:
        """Whether one of them is in a header `Authorization: Bearer KEY`, or is the `key` of an `x-api-key`."""
        scheme, _, token = authorization.partition(" ")
        given = _digest(key or (token.strip() if scheme.lower() == "bearer" else ""))
        # every key is compared, in full: no early end
        return sum([hmac.compare_digest(given, digest) for digest in self._digests]) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


@dataclass(frozen=True)
class TlsFiles:
    """Names of PEM files."""

    certificate: str
    key: str
    client_ca: str | None = None
    """Where it is given, clients must show a certificate that this authority signed."""

    @classmethod
    def create(cls, certificate: str | None, key: str | None, client_ca: str | None) -> "TlsFiles | None":
        """From the options; None without any. ConfigError where one is missing or cannot be read."""
        if certificate is None and key is None and client_ca is None:
            return None
        if certificate is None or key is None:
            raise ConfigError("TLS needs both --tls-certificate and --tls-key")
        files = cls(certificate, key, client_ca)
        files.read()
        files.check()
        return files

    def read(self) -> tuple[bytes, bytes, bytes | None]:
        """Certificate, key and the clients' authority."""
        return _read(self.certificate), _read(self.key), _read(self.client_ca) if self.client_ca else None

    def check(self) -> None:
        """ConfigError unless the key is that of the certificate, and all are what they should be."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            # without a password OpenSSL would ask for one
            context.load_cert_chain(self.certificate, self.key, password="")
            if self.client_ca:
                context.load_verify_locations(self.client_ca)
        except ssl.SSLError as error:
            raise ConfigError(f"the TLS certificate, key or authority cannot be used: {error}") from error


def _read(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}") from error


class Guard:
    """ASGI middleware: refuses requests without a key, bodies that are too large, and those there is no room for.

    What a request holds is in its state, as `claim`, for what is unpacked or read of it besides its body.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys | None,
        max_request_bytes: int,
        open_paths: frozenset[str],
        inflight: InflightBytes,
    ) -> None:
        self._app = app
        self._keys = keys
        self._limit = max_request_bytes
        self._open_paths = open_paths
        self._inflight = inflight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served")
        with self._inflight.claim() as claim:
            refusal = self._refusal(scope, claim)
            if refusal is not None:
                await refusal(scope, receive, send)
                return
            scope.setdefault("state", {})["claim"] = claim
            await self._app(scope, self._limited(receive, claim), send)

    def _refusal(self, scope: Scope, claim: Claim) -> Response | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if self._keys is not None and scope["path"] not in self._open_paths:
            texts = [headers.get(name, b"").decode("latin-1") for name in (b"authorization", b"x-api-key")]
            if not self._keys.admit(*texts):
                return error_response(scope["path"], 401, NO_KEY, {"www-authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limit:
            return error_response(scope["path"], 413, self._too_large(int(length)))
        try:
            claim.check(int(length) if length.isdigit() else 0)
        except ServiceError as error:
            return service_error_response(scope["path"], error)
        return None

    def _too_large(self, size: int) -> str:
        return f"the request body has {size} bytes or more, the limit is {self._limit}; see --max-request-bytes"

    def _limited(self, receive: Receive, claim: Claim) -> Receive:
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            size = len(message.get("body", b""))
            received += size
            if received > self._limit:
                raise HTTPException(413, self._too_large(received))
            claim.grow(size)
            return message

        return limited
