"""One request of OpenAI's API on its way: from its prompts to its answer, whole or as events."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from hasten.core.errors import HastenError
from hasten.core.types import SamplingParams
from hasten.server.by_size import by_size
from hasten.server.engine.client import CompletionDelta, EngineClient, Progress
from hasten.server.openai.answer import Usage, answer_head, check_completions, whole_answer
from hasten.server.openai.choices import Choice, Choices
from hasten.server.openai.errors import error_answer
from hasten.server.openai.types import GenerationRequest
from hasten.server.statistics import LanguageCounters
from hasten.server.together import running

_encode = msgspec.json.Encoder().encode
_News = tuple[int, Progress | Exception | None]
"""A prompt's number with its progress, with the error that ended it, or with None at its end."""


def _shows(delta: CompletionDelta) -> bool:
    """Whether there is anything to see: a token may be the beginning of a character, or of a stop string."""
    return bool(delta.text or delta.logprobs) or delta.finish_reason is not None


@dataclass
class Call:
    """One request on its way: its prompts, and the form of its answer."""

    request: GenerationRequest
    client: EngineClient
    counters: LanguageCounters | None
    prompts: Sequence[list[int]]
    params: SamplingParams
    choices: Choices
    kind: str
    """text_completion or chat.completion."""
    queue_timeout: float | None = None
    """Seconds that its prompts may wait before they are begun; None: as long as the engine lets them."""
    prompts_only: bool = False
    """Whether prompts are to be given back and nothing is to follow them."""

    def head(self, kind: str) -> bytes:
        """How each JSON object of the answer begins."""
        return answer_head(self.kind, kind, self.request.model, secrets.token_hex(12))

    async def answer(self) -> bytes:
        """The whole answer."""
        usage, found, size = Usage(prompts_only=self.prompts_only), list[Choice](), 0
        async with aclosing(self._run(stream=False)) as run:
            async for number, progress in run:
                usage.count(progress)
                size += progress.size
                found += await by_size(progress.size, self._used_up, number, progress)
        return await by_size(size, whole_answer, self.head(self.kind), found, usage)

    def _used_up(self, number: int, progress: Progress) -> Sequence[Choice]:
        """The choices of a progress, whose log-probabilities are freed one completion after the other."""
        made = self._taken(number, progress)
        for delta in progress.completions:
            delta.logprobs = None
        return made

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as events. What is wrong with the request shows before the first of them."""
        usage, options = Usage(prompts_only=self.prompts_only), self.request.stream_options
        with_usage = options is not None and bool(options.include_usage)
        kind = "text_completion" if self.kind == "text_completion" else "chat.completion.chunk"
        begin, end = b"data: " + self.head(kind), b'],"usage":null}\n\n' if with_usage else b"]}\n\n"
        begun, left = False, len(self.prompts)
        try:
            async with aclosing(self._run(stream=True)) as run:
                async for number, progress in run:
                    usage.count(progress)
                    progress.completions = [delta for delta in progress.completions if _shows(delta)]
                    event = await by_size(progress.size, self._events, number, progress, begin, end)
                    left -= progress.finished
                    if left == 0:  # its end goes with it, in one write
                        if with_usage:
                            event += begin + b'],"usage":' + _encode(usage.as_json()) + b"}\n\n"
                        event += b"data: [DONE]\n\n"
                    if event:
                        begun = True
                        yield event
        except HastenError as error:
            if not begun:
                raise
            yield b"data: " + error_answer(error)[1] + b"\n\n"

    def _events(self, number: int, progress: Progress, begin: bytes, end: bytes) -> bytes:
        return b"".join([begin + _encode(piece) + end for piece in self._taken(number, progress)])

    def _taken(self, number: int, progress: Progress) -> Sequence[Choice]:
        check_completions(progress, self.params)
        return self.choices.take(number, progress)

    def _run(self, *, stream: bool) -> AsyncGenerator[tuple[int, Progress], None]:
        return _merged([self._generate(prompt, stream=stream) for prompt in self.prompts])

    def _generate(self, prompt: list[int], *, stream: bool) -> AsyncGenerator[Progress, None]:
        priority, timeout = self.request.priority or 0, self.queue_timeout
        made = self.client.generate(prompt, self.params, stream=stream, priority=priority, queue_timeout=timeout)
        if self.counters is not None:
            return self.counters.measured(made, stream=stream)
        return made


async def _merged(runs: Sequence[AsyncGenerator[Progress, None]]) -> AsyncGenerator[tuple[int, Progress], None]:
    """What comes of several prompts, each with its number; closing it closes them all."""
    if len(runs) == 1:
        async with aclosing(runs[0]) as run:
            async for progress in run:
                yield 0, progress
        return
    queue: asyncio.Queue[_News] = asyncio.Queue(len(runs))
    async with running([_feed(number, run, queue) for number, run in enumerate(runs)]):
        left = len(runs)
        while left:
            number, news = await queue.get()
            if isinstance(news, Exception):
                raise news
            if news is None:
                left -= 1
            else:
                yield number, news
            await asyncio.sleep(0)  # a queue that has more would be emptied in one turn of the event loop


async def _feed(number: int, run: AsyncGenerator[Progress, None], queue: "asyncio.Queue[_News]") -> None:
    try:
        async with aclosing(run):
            async for progress in run:
                await queue.put((number, progress))
        await queue.put((number, None))
    except Exception as error:
        await queue.put((number, error))
