"""Lines of a batch's output, in OpenAI's form."""

import msgspec
from msgspec import Raw

from hasten.batch.requests import RowRequest
from hasten.batch.shards import REQUEST_PREFIX
from hasten.batch.source import Row, id_of
from hasten.core.errors import HastenError
from hasten.core.types import CompletionOutput, Logprob, RequestOutput
from hasten.server.engine.ticket import Progress
from hasten.server.engine.wire import CompletionDelta
from hasten.server.engine.wire import Logprob as WireLogprob
from hasten.server.errors import OpenAIErrors
from hasten.server.openai.answer import CompletionForm, Usage, check_completions
from hasten.server.openai.choices import Choice
from hasten.server.openai.handling import error_object

_encode = msgspec.json.Encoder().encode


class Answer:
    """The answer of one row, while its prompts are computed."""

    def __init__(self, row: Row, name: str, request: RowRequest) -> None:
        self.row = row
        self.name = name
        """The row's custom_id."""
        self.request = request
        self.usage = Usage(prompts_only=request.prompts_only)
        self._choices: list[Choice] = []
        self._left = len(request.prompts)

    def take(self, index: int, output: RequestOutput) -> bytes | None:
        """Take the finished output of one prompt; the row's line once all have come. HastenError where one failed."""
        progress = _progress(output)
        check_completions(progress, self.request.params[index])
        self.usage.count(progress)
        self._choices += self.request.choices.take(index, progress)
        self.usage.reasoning_tokens = self.request.choices.reasoning_tokens
        self._left -= 1
        if self._left:
            return None
        form = CompletionForm(self.request.call, self.request.model, unique=f"{self.row.number}")
        return _line(self.row, self.name, 200, form.whole(self._choices, self.usage))


def _progress(output: RequestOutput) -> Progress:
    return Progress(
        completions=[_delta(completion) for completion in output.outputs],
        finished=True,
        prompt_token_ids=tuple(output.prompt_token_ids),
        prompt_logprobs=None if output.prompt_logprobs is None else [_entries(each) for each in output.prompt_logprobs],
        tokens=sum(len(completion.token_ids) for completion in output.outputs),
    )


def _delta(completion: CompletionOutput) -> CompletionDelta:
    return CompletionDelta(
        index=completion.index,
        token_ids=completion.token_ids,
        text=completion.text,
        logprobs=None if completion.logprobs is None else [_known(each) for each in completion.logprobs],
        cumulative_logprob=completion.cumulative_logprob,
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
    )


def _entries(position: dict[int, Logprob] | None) -> dict[int, WireLogprob] | None:
    return None if position is None else _known(position)


def _known(position: dict[int, Logprob]) -> dict[int, WireLogprob]:
    return {token: WireLogprob(each.logprob, each.rank, each.decoded_token) for token, each in position.items()}


def _line(row: Row, name: str, status: int, body: bytes, error: dict[str, str] | None = None) -> bytes:
    response = {"status_code": status, "request_id": f"req_{row.number}", "body": Raw(body)}
    line = {"id": f"{REQUEST_PREFIX}{row.number}", "custom_id": name, "response": response, "error": error}
    return _encode(line) + b"\n"


def error_line(row: Row, error: HastenError) -> bytes:
    """One line of the errors: what the API would answer, and the reason with the row's line in the input."""
    status, said = error_object(error)
    code: str | None = getattr(error, "code", None)
    reason = {"code": code or _code(status), "message": f"{row.where}: {error}"}
    return _line(row, id_of(row), status, _encode(OpenAIErrors(said)), reason)


def _code(status: int) -> str:
    return "invalid_request" if status < 500 else "server_error"
