"""The parser of one HTTP connection, which stays with HTTP/1.1 whatever its client would rather speak."""

from typing import Any

import httptools

_HOP_HEADERS = frozenset({b"upgrade", b"http2-settings"})
"""Headers that are about the other protocol alone."""


class HttpParser:
    """Parses requests that offer to change the protocol as if they did not; a server may do so (RFC 9110, 7.8).

    Java's HttpClient and `curl --http2` offer h2c with the first request of a connection. httptools takes what follows
    the head of such a request for the other protocol, its body included; so the head is parsed again without the offer.
    """

    def __init__(self, protocol: Any) -> None:
        """`protocol` gets httptools' callbacks, and has the `url` and `headers` of the request that is being parsed."""
        self._protocol = protocol
        self._parser = self._new()

    def _new(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self._protocol)
        # what comes behind `connection: close` is left unanswered, and is no error of the request before
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    @property
    def offers_upgrade(self) -> bool:
        """Whether the request whose head was parsed offers another protocol: its head will be parsed once more."""
        return self._parser.should_upgrade()

    def feed_data(self, data: bytes) -> None:
        """Parse the next bytes. HttpParserError for what is no request, and for CONNECT, which only proxies serve."""
        while True:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                (parsed,) = offer.args
                if self._parser.get_method() == b"CONNECT":
                    raise httptools.HttpParserInvalidMethodError("CONNECT is not served") from None
                data = self._head_without_offer() + data[parsed:]
                self._parser = self._new()
            else:
                return

    def _head_without_offer(self) -> bytes:
        protocol, parser = self._protocol, self._parser
        lines = [b"%b %b HTTP/%b" % (parser.get_method(), protocol.url, parser.get_http_version().encode())]
        for name, value in protocol.headers:
            if name == b"connection":
                tokens = (token.strip() for token in value.split(b","))
                value = b", ".join(token for token in tokens if token.lower() not in _HOP_HEADERS)
            if name not in _HOP_HEADERS:
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join([*lines, b"", b""])

    def should_upgrade(self) -> bool:
        """Never: part of httptools' interface, as are the following."""
        return False

    def should_keep_alive(self) -> bool:
        """Whether another request may come on the connection."""
        return self._parser.should_keep_alive()

    def get_http_version(self) -> str:
        """Such as 1.1."""
        return self._parser.get_http_version()

    def get_method(self) -> bytes:
        """Such as GET."""
        return self._parser.get_method()
