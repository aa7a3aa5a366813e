"""The routes of Anthropic's Messages API."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hasten.core.types import SamplingParams
from hasten.server.anthropic.chat import as_chat
from hasten.server.anthropic.errors import message_error_answer
from hasten.server.anthropic.form import MessageForm
from hasten.server.anthropic.types import CountRequest, MessagesRequest
from hasten.server.openai.chat_call import ChatCalls
from hasten.server.openai.handlers import guarded, json_response, read_body
from hasten.server.openai.params import OpenAIError
from hasten.server.openai.reading import AnswerReading
from hasten.server.openapi.operation import Operation

_MESSAGES, _COUNT = msgspec.json.Decoder(MessagesRequest), msgspec.json.Decoder(CountRequest)


def message_routes(chats: ChatCalls) -> list[Route]:
    """POST /v1/messages and /v1/messages/count_tokens."""

    async def messages(request: Request) -> Response:
        body = await read_body(request, _MESSAGES)

        def form(_: SamplingParams) -> MessageForm:
            return MessageForm(body.model)

        def check(reading: AnswerReading | None) -> None:
            if body.wants_thinking and (reading is None or reading.reasoning is None):
                raise OpenAIError("thinking is not supported by this model; leave it out", param="thinking")

        return await chats.answer(request, as_chat(body), form, check)

    async def count(request: Request) -> Response:
        body = await read_body(request, _COUNT)
        return json_response(msgspec.json.encode({"input_tokens": await chats.prompt_tokens(as_chat(body))}))

    answered = Operation("Answer a chat, as a message", MessagesRequest, streams=True)
    counted = Operation("Count the tokens of a chat", CountRequest)
    return [
        Route("/v1/messages", guarded(messages, answered, message_error_answer), methods=["POST"]),
        Route("/v1/messages/count_tokens", guarded(count, counted, message_error_answer), methods=["POST"]),
    ]
