"""Bytes of the requests that the server holds at once, over all connections and transports.

A request counts from the arrival of its bytes until it has its answer: what is read of it lies over them. What would go
beyond the limit is refused, so that no number of connections decides the server's memory.
"""

import threading

from hasten.server.by_size import SMALL
from hasten.server.options import SecurityOptions
from hasten.server.types import ErrorKind, ServiceError

_DEFAULT_LIMIT = SecurityOptions().inflight_bytes


class InflightBytes:
    """The bytes of all requests in flight."""

    def __init__(self, limit: int = _DEFAULT_LIMIT) -> None:
        self.limit = limit
        self.held = 0
        self.refusals = 0
        """Requests that were refused since the start."""
        self._lock = threading.Lock()

    def claim(self) -> "Claim":
        """A request's part, nothing at first; to be released by using it as a context."""
        return Claim(self)

    def hold(self, size: int) -> None:
        """Count more bytes, or fewer; ServiceError of kind EXHAUSTED, and none of them, where they are too many."""
        with self._lock:
            if size > 0 and self.held + size > self.limit:
                self.refusals += 1
                raise ServiceError(
                    ErrorKind.EXHAUSTED,
                    f"requests of {self.held} bytes are in flight, and the limit is {self.limit} "
                    "(--max-inflight-bytes); try again later",
                )
            self.held += size


class Claim:
    """What one request holds. Its first 64 KiB are not counted: probes and small requests never lack room."""

    def __init__(self, inflight: InflightBytes) -> None:
        self._inflight = inflight
        self._bytes = 0
        self._counted = 0
        self._released = False
        self._lock = threading.Lock()

    def check(self, size: int) -> None:
        """ServiceError where there is no room for a request of this size in bytes."""
        if (counted := max(0, size - SMALL)) > 0:
            self._inflight.hold(counted)
            self._inflight.hold(-counted)

    def grow(self, size: int) -> None:
        """Hold more bytes. ServiceError where all requests together have too many; may be called from any thread.

        CANCELLED once it is released: a thread may still read a message whose client has left.
        """
        with self._lock:
            if self._released:
                raise ServiceError(ErrorKind.CANCELLED, "the request was given up")
            counted = max(0, self._bytes + size - SMALL) - self._counted
            if counted:
                self._inflight.hold(counted)
            self._bytes, self._counted = self._bytes + size, self._counted + counted

    def release(self) -> None:
        """Hold nothing any more, for good."""
        with self._lock:
            self._released = True
            if self._counted:
                self._inflight.hold(-self._counted)
            self._bytes = self._counted = 0

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
