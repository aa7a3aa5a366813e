"""The token model: FasterTransformer's tensors in front of an engine of its own.

The items of a batch are requests of their own to the engine, so how long one is or takes is nothing to the others.
A decoupled model sends with each response all that there is so far.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from tritonclient.grpc import model_config_pb2

from hasten.core.types import SamplingParams
from hasten.server.by_size import by_size
from hasten.server.engine.client import EngineClient, Progress
from hasten.server.models.config import is_decoupled
from hasten.server.models.token_inputs import Item, TokenRequest, read_items
from hasten.server.models.token_outputs import Beam, outputs
from hasten.server.models.work import Outcome, Work
from hasten.server.statistics import LanguageCounters
from hasten.server.together import together, whenever

_TOKEN_BYTES = 4


class TokenModel:
    """One version of a token model. It owns its engine."""

    def __init__(self, config: model_config_pb2.ModelConfig, engine: EngineClient, language: LanguageCounters) -> None:
        self._decoupled = is_decoupled(config)
        self._engine = engine
        self._language = language

    @property
    def ready(self) -> bool:
        """Whether the engine's process lives and has loaded the model."""
        return self._engine.ready

    @property
    def engine(self) -> EngineClient:
        """The engine."""
        return self._engine

    @property
    def language(self) -> LanguageCounters:
        """What its requests are counted by."""
        return self._language

    async def execute(self, work: Work) -> AsyncGenerator[Outcome, None]:
        """One response, or if decoupled one whenever there is more."""
        work.known_parameters()
        size = sum(tensor.data.nbytes for tensor in work.inputs.values())
        asked = await by_size(size, read_items, work.inputs, work.batch_size, self._engine.info)
        work.clock.prepare()
        rows = [[Beam() for _ in range(asked.beam_width)] for _ in asked.items]
        changed = asyncio.Event()
        all_items = self._follow_all(asked, rows, changed, work)
        if not self._decoupled:
            await all_items
            work.clock.compute()
            pairs = zip(asked.items, rows, strict=True)
            tokens = sum(len(item.prompt) + len(beam.token_ids) for item, row in pairs for beam in row)
            yield Outcome(await by_size(_TOKEN_BYTES * tokens, outputs, asked, rows, work.outputs), final=True)
            return
        async with aclosing(whenever(changed, all_items)) as moments:
            async for done in moments:
                work.clock.compute()
                yield Outcome(outputs(asked, rows, work.outputs), final=done)

    async def _follow_all(
        self, asked: TokenRequest, rows: list[list[Beam]], changed: asyncio.Event, work: Work
    ) -> None:
        pairs = zip(asked.items, rows, strict=True)
        await together([self._follow(item, row, changed, work) for item, row in pairs])
        if asked.log_probs and asked.beam_width > 1 and "output_log_probs" in work.outputs:
            pairs = zip(asked.items, rows, strict=True)
            await together([self._score(item, beam, work) for item, row in pairs for beam in row])

    async def _follow(self, item: Item, row: list[Beam], changed: asyncio.Event, work: Work) -> None:
        """Put what becomes known of one item into its row."""
        async with aclosing(self._generate(item.prompt, item.params, work, self._language)) as progresses:
            async for progress in progresses:
                work.clock.wait(progress.queue_seconds)
                for delta in progress.completions:
                    row[delta.index].take(delta)
                changed.set()

    def _generate(
        self, prompt: list[int], params: SamplingParams, work: Work, counters: LanguageCounters
    ) -> AsyncGenerator[Progress, None]:
        progresses = self._engine.generate(
            prompt, params, stream=self._decoupled, priority=work.priority, queue_timeout=work.queue_timeout
        )
        return counters.measured(progresses, stream=self._decoupled)

    async def _score(self, item: Item, beam: Beam, work: Work) -> None:
        """Log-probabilities of a beam's tokens, which its search keeps the sum of: those of a prompt that has them."""
        longest = self._engine.info.max_model_len - 1
        prompt = [*item.prompt, *beam.token_ids][:longest]
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        uncounted = LanguageCounters()  # it is a part of a request that is counted already
        async with aclosing(self._generate(prompt, params, work, uncounted)) as progresses:
            async for progress in progresses:
                entries = (progress.prompt_logprobs or [])[len(item.prompt) :]
                known = zip(beam.token_ids, entries, strict=False)
                beam.log_probs += [entry[token].logprob for token, entry in known if entry is not None]
        if len(beam.log_probs) < len(beam.token_ids):  # a sequence as long as can be: its last token was no prompt
            beam.log_probs.append(beam.cumulative - sum(beam.log_probs))

    async def close(self, timeout: float) -> None:
        """Wait, for so many seconds, for what other doors still compute with the engine, and end it."""
        await self._engine.drain(timeout)
        await self._engine.close()
