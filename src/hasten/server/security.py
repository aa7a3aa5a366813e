"""Who may ask, and how much: API keys, TLS, and the bytes of bodies, of each and of all in flight.

HTTP ports have names under which clients may reach them, so that no foreign page can use a browser to ask the server.
Two ways are closed. A page of another site sends its own `Origin` with whatever it asks in its reader's name: such a
request may change nothing. A page whose name is made to stand for this machine's address (DNS rebinding) sends that
name as `Host`: a server that this machine alone reaches knows its names, and answers to no other.
"""

import hashlib
import hmac
import ipaddress
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hasten.core.errors import ConfigError
from hasten.core.files import reading
from hasten.core.text import utf8_lines
from hasten.server.call import set_tenant
from hasten.server.errors import error_response, service_error_response
from hasten.server.inflight import Claim, InflightBytes
from hasten.server.types import ServiceError

_ANY = "*"
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Requests that change nothing."""
_DEFAULT_PORTS = {"http": 80, "https": 443}
_LONGEST_SHOWN = 100


class Hosts:
    """The names of one port. Addresses stand for themselves: no name can be made to stand for them."""

    def __init__(self, address: str, allowed: Iterable[str] = ()) -> None:
        """`address` is what the port is bound to, `allowed` are further names; `*` stands for any."""
        names = frozenset(_plain(name) for name in allowed)
        self._any_origin = _ANY in names
        self._any_host = self._any_origin or (not names and not _is_loopback(address))
        self._names = names
        self._own = names | {"localhost", _plain(address)}

    def refusal(self, method: str, host: str, origin: str | None) -> str | None:
        """Why a request with these headers is refused, or None. A request without a `Host` is of no browser."""
        if host and not (self._any_host or self._is_own_name(_name(host))):
            return (
                f"the host {host[:_LONGEST_SHOWN]!r} is none of this server's names; its operator allows it with "
                "--allowed-host"
            )
        if origin is None or method in _SAFE_METHODS or self._is_own(origin, host):
            return None
        return (
            f"a page of {origin[:_LONGEST_SHOWN]!r} may not use this server; its operator allows it with --allowed-host"
        )

    def _is_own_name(self, name: str) -> bool:
        return name in self._own or name.endswith(".localhost") or _is_address(name)

    def _is_own(self, origin: str, host: str) -> bool:
        if self._any_origin:
            return True
        try:
            parts = urlsplit(origin)
            port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
            own = urlsplit(f"{parts.scheme}://{host}")
            same = (parts.hostname, port) == (own.hostname, own.port or _DEFAULT_PORTS.get(parts.scheme))
        except ValueError:
            return False
        return parts.hostname is not None and (same or _plain(parts.hostname) in self._names)


@lru_cache(64)
def _name(host: str) -> str:
    """The name or address in a `Host`, without a port."""
    try:
        return _plain(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return ""


def _plain(name: str) -> str:
    return name.lower().rstrip(".").strip("[]")


@lru_cache(64)
def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(address: str) -> bool:
    return address == "localhost" or (
        _is_address(_plain(address)) and ipaddress.ip_address(_plain(address)).is_loopback
    )


_PERSON = b"hasten tenant"
NO_KEY = "a valid API key is required: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
METRICS_PATH = "/metrics"
OPEN_PATHS = frozenset({"/v2/health/live", "/v2/health/ready", "/health", "/ping"})
OPEN_CALLS = frozenset({"ServerLive", "ServerReady", "Check"})
"""What needs no key, over HTTP and over gRPC: a cluster's probes have none."""


class ApiKeys:
    """The keys that may ask. How long a check takes says nothing of them."""

    def __init__(self, keys: Iterable[str], *, salts: bool = True) -> None:
        """`salts`: whether the prompts of each key are kept apart in the prefix cache."""
        self._digests = [_digest(key) for key in keys]
        self._salts = salts

    @classmethod
    def from_file(cls, *names: str | None, salts: bool = True) -> "ApiKeys":
        """Read files of one key per line, None for no file; lines that are empty or begin with # are left out."""
        keys: list[str] = []
        for name in filter(None, names):
            with reading(f"API keys from {name}"):
                lines = utf8_lines(Path(name).read_bytes())
            found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            if not found:
                raise ConfigError(f"{name} has no API key: write one per line")
            keys += found
        return cls(keys, salts=salts)

    def tenant(self, authorization: str, key: str = "") -> str | None:
        """The client, as a text that reveals no key, "" without salts; None where none of the keys is given.

        A key is in a header `Authorization: Bearer KEY`, or is the `key` of an `x-api-key`.
        """
        scheme, _, token = authorization.partition(" ")
        given = _digest(key or (token.strip() if scheme.lower() == "bearer" else ""))
        # every key is compared, in full: no early end
        known = sum([hmac.compare_digest(given, digest) for digest in self._digests]) > 0
        if not known:
            return None
        return hashlib.blake2b(given, digest_size=16, person=_PERSON).hexdigest() if self._salts else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


@dataclass(frozen=True)
class Tls:
    """What ports are encrypted with."""

    context: ssl.SSLContext
    """Of HTTP."""
    pem: tuple[bytes, bytes, bytes | None]
    """Certificate, key, and the authority whose certificates clients must show, if they must show one."""

    @classmethod
    def create(cls, certificate: str | None, key: str | None, client_ca: str | None) -> "Tls | None":
        """From names of PEM files; None without any.

        ConfigError where one is missing or cannot be read, and where they are not what they should be.
        """
        if certificate is None and key is None and client_ca is None:
            return None
        if certificate is None or key is None:
            raise ConfigError("TLS needs both --tls-certificate and --tls-key")
        pem = _read(certificate), _read(key), _read(client_ca) if client_ca else None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # without a password OpenSSL would ask for one
            context.load_cert_chain(certificate, key, password="")
            if client_ca:
                context.load_verify_locations(client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except ssl.SSLError as error:
            raise ConfigError(f"the TLS certificate, key or authority cannot be used: {error}") from error
        return cls(context, pem)


def _read(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}") from error


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Whose requests one HTTP port takes."""

    keys: ApiKeys | None = None
    """None: no key is needed."""
    open_paths: frozenset[str] = OPEN_PATHS
    """Paths that need no key."""
    metrics_keys: ApiKeys | None = None
    """Those of /metrics; None: as any other path."""
    hosts: Hosts | None = None
    """Names that clients may reach the port by; None: any."""

    def refusal(self, scope: Scope, headers: Mapping[bytes, bytes]) -> Response | None:
        """The answer to a request that is not taken; None for one that is, whose tenant is then known."""
        path = scope["path"]
        origin = _text(headers, b"origin") if b"origin" in headers else None
        foreign = self.hosts and self.hosts.refusal(scope["method"], _text(headers, b"host"), origin)
        if foreign:
            return error_response(path, 403, foreign)
        tenant: str | None = ""
        if (keys := self._keys(path)) is not None:
            tenant = keys.tenant(_text(headers, b"authorization"), _text(headers, b"x-api-key"))
            if tenant is None:
                return error_response(path, 401, NO_KEY, {"www-authenticate": "Bearer"})
        set_tenant(tenant or "")
        return None

    def _keys(self, path: str) -> ApiKeys | None:
        if path == METRICS_PATH and self.metrics_keys is not None:
            return self.metrics_keys
        return None if path in self.open_paths else self.keys


def _text(headers: Mapping[bytes, bytes], name: bytes) -> str:
    return headers.get(name, b"").decode("latin-1")


class Guard:
    """ASGI middleware: refuses requests without a key, bodies that are too large, and those there is no room for.

    What a request holds is in its state, as `claim`, for what is unpacked or read of it besides its body.
    """

    def __init__(
        self,
        app: ASGIApp,
        admission: Admission,
        max_request_bytes: int,
        inflight: InflightBytes,
    ) -> None:
        self._app = app
        self._admission = admission
        self._limit = max_request_bytes
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
        refusal = self._admission.refusal(scope, headers)
        if refusal is not None:
            return refusal
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
