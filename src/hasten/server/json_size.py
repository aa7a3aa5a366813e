"""How much JSON is read at once: the parser holds Python's lock, and with it the server's event loop.

Measured with msgspec: an empty list or object takes as long as twenty numbers, a text as two, and the bytes of one long
text hardly any time. A body of 64 MiB of empty lists would take ten seconds.
"""

from hasten.core.errors import InvalidRequestError
from hasten.server.by_size import SMALL

MAX_JSON_BYTES = 8 << 20
_MAX_COST = 1_000_000
"""About the cost of a million numbers, which take 25 ms."""
_COSTS = ((b",", 1), (b'"', 1), (b"[", 20), (b"{", 20))
_PIECE = 1 << 20


def check_declared_size(content_length: str | None, *, max_bytes: int = MAX_JSON_BYTES) -> None:
    """InvalidRequestError where a body of JSON says that it is too large, before it is read."""
    if content_length is not None and content_length.isdigit() and int(content_length) > max_bytes:
        raise _too_large(int(content_length), max_bytes)


def _too_large(size: int, most: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"the JSON has {size} bytes, the limit is {most}; send less at once, or tensors in binary form"
    )


def check_json_size(body: bytes | memoryview, *, max_bytes: int = MAX_JSON_BYTES) -> None:
    """InvalidRequestError where a text of JSON is too large to be parsed without holding up other requests."""
    if len(body) <= SMALL:
        return
    if len(body) > max_bytes:
        raise _too_large(len(body), max_bytes)
    cost = 0
    for begin in range(0, len(body), _PIECE):  # what is much too large shows early
        piece = bytes(body[begin : begin + _PIECE])
        cost += sum(each * piece.count(mark) for mark, each in _COSTS)
        if cost > _MAX_COST:
            raise InvalidRequestError(
                f"the JSON has too many values to be read at once (the limit is {_MAX_COST}, where a comma or quote "
                "counts 1 and a list or object 20); send less at once, or tensors in binary form"
            )
