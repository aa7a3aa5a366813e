"""One request for vectors or scores on its way: its texts to the engine, and what was made of them back, in order."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import HastenError, InvalidRequestError
from hasten.core.types import PoolingParams, Request
from hasten.engine.pooling_info import PoolingInfo
from hasten.engine.texts import Instruction
from hasten.server.engine.client import EngineClient
from hasten.server.engine.group import REQUESTS_PER_TURN, RequestGroup
from hasten.server.engine.queue import Queueing
from hasten.server.engine.ticket import Progress
from hasten.server.openai.answer import Usage
from hasten.server.pooling.texts import Pair, TextReader

if TYPE_CHECKING:
    from hasten.server.statistics import Tally

_MOST_NUMBERS = 1 << 24
"""Of an answer: 64 MiB, and about five times that as JSON."""
Numbers = NDArray[np.float32]


@dataclass(frozen=True)
class Result:
    """What was made of a text."""

    numbers: Numbers
    """Its vector or scores [w], or those of each of its tokens [t, w]."""
    prompt_token_ids: tuple[int, ...]
    queue_seconds: float
    """Time that it waited before it was begun."""


class PoolingCall:
    """Has a model make vectors and scores of texts, for one request."""

    def __init__(
        self,
        client: EngineClient,
        queueing: Queueing,
        *,
        tally: "Callable[[int], Tally] | None" = None,
    ) -> None:
        """`tally` gives what counts a request by its number of texts; None: it is counted already."""
        self.usage = Usage()
        self.client = client
        self._queueing = queueing
        self._tally = tally

    @property
    def info(self) -> PoolingInfo:
        """What the model makes of texts; InvalidRequestError where it generates text."""
        info = self.client.info
        if info.pooling is None:
            info.check_task(PoolingParams())
        assert info.pooling is not None, "refused above"
        return info.pooling

    async def prompts(
        self,
        prompts: Sequence[str | list[int]],
        params: PoolingParams,
        before: Instruction | None = None,
        *,
        name: str = "input",
    ) -> list[Result]:
        """The result of each text, or list of token ids; errors, which call them `name`, are those of TextReader."""
        self.info.check(params)
        reader = TextReader(self.client, params, name)
        return await self.results(await reader.prompts(prompts, before or Instruction()), params)

    async def pairs(self, pairs: Sequence[Pair], params: PoolingParams, name: str) -> list[Result]:
        """The same of each pair of texts, which are read together."""
        self.info.check(params)
        return await self.results(await TextReader(self.client, params, name).pairs(pairs), params)

    async def scores(self, pairs: Sequence[Pair], truncate: int | None, name: str) -> list[float]:
        """How well each document answers its query: by a cross-encoder, or as the cosine of vectors."""
        if "embed" not in self.info.tasks:
            params = PoolingParams(task="score", truncate_prompt_tokens=truncate)
            return [float(result.numbers[0]) for result in await self.pairs(pairs, params, name)]
        params = PoolingParams(normalize=True, truncate_prompt_tokens=truncate)
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        results = await self.prompts(texts, params, name=name)
        vectors = {text: result.numbers for text, result in zip(texts, results, strict=True)}
        return [float(vectors[first] @ vectors[second]) for first, second in pairs]

    async def results(self, requests: Sequence[Request], params: PoolingParams) -> list[Result]:
        """What is made of texts by their requests, all of which have these parameters."""
        self._check_size(requests, params)
        found: list[Result | None] = [None] * len(requests)
        tally = None if self._tally is None else self._tally(len(requests))
        with closing(RequestGroup(self.client, self.usage, tally)) as running:
            await running.submit([partial(self.client.submit_text, each, self._queueing) for each in requests])
            while running.unfinished:
                number, progress = await running.read()
                found[number] = _result(progress)
                if running.unfinished % REQUESTS_PER_TURN == 0:
                    await asyncio.sleep(0)  # a step ends many at once
        return [result for result in found if result is not None]

    def _check_size(self, requests: Sequence[Request], params: PoolingParams) -> None:
        """InvalidRequestError where the answer would be too large."""
        if params.task == "fill_mask":  # each word comes with the text that it makes
            numbers = sum(params.top_k * len(each.masks) * (2 + len(each.prompt_token_ids)) for each in requests)
        else:
            of_tokens = params.task in ("token_embed", "token_classify")
            rows = sum(len(request.prompt_token_ids) for request in requests) if of_tokens else len(requests)
            numbers = rows * self.info.width
        if numbers > _MOST_NUMBERS:
            raise InvalidRequestError(
                f"the answer would have {numbers} numbers, the limit is {_MOST_NUMBERS}; send fewer texts at once"
            )


def _result(progress: Progress) -> Result:
    pooled = progress.pooled
    assert pooled is not None, "it is a text's"
    if pooled.error is not None:
        raise HastenError(pooled.error)
    numbers: Numbers = np.frombuffer(pooled.data, np.float32)
    if pooled.rows is not None:
        numbers = numbers.reshape(pooled.rows, -1)
    return Result(numbers, progress.prompt_token_ids, progress.queue_seconds or 0.0)
