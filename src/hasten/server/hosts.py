"""Names under which clients may reach an HTTP port, so that no foreign page can use a browser to ask the server.

Two ways are closed. A page of another site sends its own `Origin` with whatever it asks in its reader's name: such a
request may change nothing. A page whose name is made to stand for this machine's address (DNS rebinding) sends that
name as `Host`: a server that this machine alone reaches knows its names, and answers to no other.
"""

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

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
        self._own = frozenset({"localhost", _plain(address)})

    def refusal(self, method: str, host: str, origin: str | None) -> str | None:
        """Why a request with these headers is refused, or None. A request without a `Host` is of no browser."""
        if host and not self._may_be(_name(host)):
            return (
                f"the host {host[:_LONGEST_SHOWN]!r} is none of this server's names; its operator allows it with "
                "--allowed-host"
            )
        if origin is None or method in _SAFE_METHODS or self._is_own(origin, host):
            return None
        return (
            f"a page of {origin[:_LONGEST_SHOWN]!r} may not use this server; its operator allows it with --allowed-host"
        )

    def _may_be(self, name: str) -> bool:
        if self._any_host or name in self._names or name in self._own or name.endswith(".localhost"):
            return True
        return _is_address(name)

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


def _name(host: str) -> str:
    """The name or address in a `Host`, without a port."""
    try:
        return _plain(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return ""


def _plain(name: str) -> str:
    return name.lower().rstrip(".").strip("[]")


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
