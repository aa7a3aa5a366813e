"""A batch over a simulated engine, as a process: `python -m tests.batch.simulated IN OUT ROWS_PER_SHARD PAUSE`."""

import sys
import time
from collections import deque
from collections.abc import Callable

from hasten.batch.job import BatchJob
from hasten.core.errors import InvalidRequestError
from hasten.core.types import CompletionOutput, FinishReason, Request, RequestOutput
from hasten.engine.chat import ChatTemplate
from hasten.engine.text import Tokenizer

MODEL = "simulated"
_STEP_PROMPTS = 4


class SimulatedEngine:
    """Finishes a few prompts per step, the last ones first, with the sum of their tokens as text."""

    max_model_len = 64
    seed = 0
    tokenizer: Tokenizer | None = None
    eos_token_ids = (2,)
    tool_call_parser = "auto"
    reasoning_parser = "auto"
    text = ""
    """Of all completions, if it is not to be the sum of the prompt."""

    def __init__(self, window: int = 8, before_step: Callable[[], object] = lambda: None) -> None:
        self.window = window
        self.template: ChatTemplate | None = None
        self.most_waiting = self.added = 0
        self.ended = False
        self._before_step = before_step
        self._waiting: deque[Request] = deque()

    def add(self, request: Request) -> None:
        if len(request.prompt_token_ids) >= self.max_model_len:
            raise InvalidRequestError(f"request {request.request_id}: the prompt is too long")
        self._waiting.append(request)
        self.added += 1
        self.most_waiting = max(self.most_waiting, len(self._waiting))

    def no_more(self) -> None:
        self.ended = True

    def abort(self, request_id: str) -> None:
        self._waiting = deque(request for request in self._waiting if request.request_id != request_id)

    def step(self) -> list[RequestOutput]:
        self._before_step()
        return [self._finished(self._waiting.pop()) for _ in range(min(_STEP_PROMPTS, len(self._waiting)))]

    def _finished(self, request: Request) -> RequestOutput:
        text = self.text or str(sum(request.prompt_token_ids))
        failed = request.prompt_token_ids[-1] == 0
        reason = FinishReason.ERROR if failed else FinishReason.LENGTH
        outputs = [CompletionOutput(n, text, [n + 1], 0.0, None, reason, "no room") for n in range(request.params.n)]
        return RequestOutput(request.request_id, None, list(request.prompt_token_ids), outputs, finished=True)


def main(source: str, output: str, rows_per_shard: str, pause: str) -> None:
    """Run a batch to its end."""
    engine = SimulatedEngine(before_step=lambda: time.sleep(float(pause)))
    with BatchJob(source, output, model=MODEL, rows_per_shard=int(rows_per_shard)) as job:
        job.run(engine, show_progress=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
