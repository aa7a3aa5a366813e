"""The route of OpenAI's Responses API."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hasten.core.types import SamplingParams
from hasten.server.openai.chat_call import ChatCalls
from hasten.server.openai.handlers import guarded, read_body
from hasten.server.openai.params import OpenAIError
from hasten.server.openai.reading import AnswerReading
from hasten.server.openapi.operation import Operation
from hasten.server.responses.chat import as_chat
from hasten.server.responses.form import ResponseForm
from hasten.server.responses.types import LOGPROBS, ResponsesRequest

_RESPONSES = msgspec.json.Decoder(ResponsesRequest)


def responses_route(chats: ChatCalls, *, with_metrics: bool) -> Route:
    """POST /v1/responses. `with_metrics`: answers have the times of their requests."""

    async def responses(request: Request) -> Response:
        body = await read_body(request, _RESPONSES)

        def form(params: SamplingParams) -> ResponseForm:
            return ResponseForm(body, params if with_metrics else None)

        def check(reading: AnswerReading | None) -> None:
            if body.with_logprobs and reading is not None:
                message = f"include cannot have {LOGPROBS} where the answer may have reasoning or calls of tools"
                raise OpenAIError(message, param="include")

        return await chats.answer(request, as_chat(body), form, check)

    operation = Operation("Answer a chat, as a response", ResponsesRequest, streams=True)
    return Route("/v1/responses", guarded(responses, operation), methods=["POST"])
