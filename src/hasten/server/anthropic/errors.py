"""Errors of the Messages API."""

import msgspec

from hasten.server.http_errors import message_error
from hasten.server.openai.errors import error_answer


def message_error_answer(error: Exception) -> tuple[int, bytes]:
    """HTTP status and body for an error."""
    status, body = error_answer(error)
    return status, message_error(status, msgspec.json.decode(body)["error"]["message"])
