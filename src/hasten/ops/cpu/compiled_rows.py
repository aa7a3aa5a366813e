"""Numbers of rows that oneDNN compiles code for."""

_EXACT = 32
"""Up to this number of rows none are added."""


def compiled_rows(rows: int) -> int:
    """How many rows to multiply so that `rows` of them are: up to an eighth more, so that there are few such numbers.

    oneDNN compiles code for each number of rows that it meets, and keeps all of it.
    """
    step = 1 << max(0, (rows - 1).bit_length() - 4)
    return rows if rows <= _EXACT else -(-rows // step) * step
