"""The order in which ops add up: as their device computes fastest, or one that no other row of the batch can change."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_fixed: ContextVar[bool] = ContextVar("fixed_order", default=False)


@contextmanager
def fixed_order(wanted: bool = True) -> Iterator[None]:
    """Weights packed inside are multiplied in a fixed order: each row's sums have the same bits in any batch."""
    token = _fixed.set(wanted)
    try:
        yield
    finally:
        _fixed.reset(token)


def order_is_fixed() -> bool:
    """Whether weights that are packed now are to be multiplied in a fixed order."""
    return _fixed.get()
