"""Errors of OpenAI's API: the status and the error object of each."""

import re

from hasten.core.errors import HastenError, InvalidRequestError
from hasten.core.text import shortened
from hasten.server.engine.client import QueueError
from hasten.server.errors import INTERNAL, kind_of
from hasten.server.http_errors import openai_error
from hasten.server.openai.params import OpenAIError
from hasten.server.openai.types import ChatRequest, CompletionRequest
from hasten.server.pooling.texts import TextLengthError
from hasten.server.pooling.types import EmbeddingRequest, PoolingRequest, RerankRequest, ScoreRequest
from hasten.server.types import LONGEST_MESSAGE

_REQUESTS = (CompletionRequest, ChatRequest, EmbeddingRequest, PoolingRequest, ScoreRequest, RerankRequest)
_FIELDS = {name for request in _REQUESTS for name in request.__struct_fields__}


def error_answer(error: Exception) -> tuple[int, bytes]:
    """HTTP status and body for an error."""
    message = shortened(str(error) if isinstance(error, HastenError) else INTERNAL, LONGEST_MESSAGE)
    if isinstance(error, OpenAIError):
        return error.status, openai_error(error.status, message, error.param, error.code)
    codes = kind_of(error).value
    status = codes.openai or codes.http
    param = _field(error) if isinstance(error, InvalidRequestError) else None
    return status, openai_error(status, message, param, _code(error))


def _field(error: InvalidRequestError) -> str | None:
    """The field that a message begins with."""
    named = re.split(r"\W", str(error), maxsplit=1)[0]
    return named if named in _FIELDS else None


def _code(error: Exception) -> str | None:
    if isinstance(error, TextLengthError):
        return "context_length_exceeded"
    if isinstance(error, QueueError):
        return error.reason
    return "service_unavailable" if kind_of(error).is_temporary else None
