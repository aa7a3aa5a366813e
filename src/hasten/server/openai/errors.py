"""Errors of OpenAI's API: the status and the error object of each."""

import re

import msgspec

from hasten.core.errors import EngineError, HastenError, InvalidRequestError
from hasten.core.text import shortened
from hasten.server.engine.queue import QueueError
from hasten.server.errors import INTERNAL
from hasten.server.openai.params import OpenAIError
from hasten.server.openai.types import ChatRequest, CompletionRequest
from hasten.server.pooling.texts import TextLengthError
from hasten.server.pooling.types import EmbeddingRequest, PoolingRequest, RerankRequest, ScoreRequest
from hasten.server.types import LONGEST_MESSAGE, ServiceError

_REQUESTS = (CompletionRequest, ChatRequest, EmbeddingRequest, PoolingRequest, ScoreRequest, RerankRequest)
_FIELDS = {name for request in _REQUESTS for name in request.__struct_fields__}


def error_answer(error: Exception) -> tuple[int, bytes]:
    """HTTP status and body for an error."""
    status, kind, code, param = _classified(error)
    if isinstance(error, OpenAIError):
        status, code, param = error.status, error.code, error.param
        kind = "invalid_request_error" if status < 500 else "server_error"
    message = str(error) if isinstance(error, HastenError) else INTERNAL
    message = shortened(message, LONGEST_MESSAGE)
    return status, msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def _field(error: InvalidRequestError) -> str | None:
    """The field that a message begins with."""
    named = re.split(r"\W", str(error), maxsplit=1)[0]
    return named if named in _FIELDS else None


def _classified(error: Exception) -> tuple[int, str, str | None, str | None]:
    """Status, type, code and parameter."""
    if isinstance(error, TextLengthError):
        return 400, "invalid_request_error", "context_length_exceeded", _field(error)
    if isinstance(error, InvalidRequestError):
        return 400, "invalid_request_error", None, _field(error)
    if isinstance(error, QueueError):
        return 429, "rate_limit_error", error.reason, None
    if isinstance(error, EngineError) or (isinstance(error, ServiceError) and error.is_temporary):
        return 503, "server_error", "service_unavailable", None
    return 500, "server_error", None, None
