"""The token model: FasterTransformer's tensors in front of an engine of its own.

The items of a batch are requests of their own to the engine, so how long one is or takes is nothing to the others.
A decoupled model sends with each response all that there is so far.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import numpy as np
from tritonclient.grpc import model_config_pb2

from hasten.core.types import SamplingParams
from hasten.server.by_size import by_size
from hasten.server.engine.client import EngineClient, Progress
from hasten.server.models.config import interface_of, is_decoupled, parameter
from hasten.server.models.interfaces import DEFAULT_MODEL_TYPE, ENCODER_DECODER_TYPE, INPUT_NAMES, Kind
from hasten.server.models.model import EngineModel
from hasten.server.models.token_inputs import Item, TokenRequest, read_items
from hasten.server.models.token_outputs import BatchOutput
from hasten.server.models.work import Outcome, Work
from hasten.server.together import together, whenever
from hasten.server.types import Tensor

_ITEM_BYTES = 1024
"""Of its tensors: what reading an item costs, in bytes of copying (about 50 us)."""


class TokenModel(EngineModel):
    """A version of a token model."""

    def __init__(self, config: model_config_pb2.ModelConfig, engine: EngineClient) -> None:
        super().__init__(engine)
        self._decoupled = is_decoupled(config)
        model_type = parameter(config, "model_type", DEFAULT_MODEL_TYPE)
        self._names = INPUT_NAMES.get(model_type, {})
        self._datatypes = {rule.name: rule.datatype for rule in interface_of(config, Kind.TOKEN).outputs}
        self._with_prompts = model_type != ENCODER_DECODER_TYPE

    async def execute(self, work: Work) -> AsyncGenerator[Outcome, None]:
        """One response, or if decoupled one whenever there is more."""
        size = sum(tensor.data.nbytes for tensor in work.inputs.values()) + _ITEM_BYTES * work.batch_size
        request, output = await by_size(size, self._read, work)
        work.clock.prepare()
        changed = asyncio.Event()
        all_items = self._follow_all(request, output, changed, work)
        if not self._decoupled:
            await all_items
            work.clock.compute()
            yield await self._outcome(output, work, final=True)
            return
        async with aclosing(whenever(changed, all_items)) as moments:
            async for done in moments:
                work.clock.compute()
                yield await self._outcome(output, work, final=done)

    def _read(self, work: Work) -> tuple[TokenRequest, BatchOutput]:
        request = read_items(work, self.engine.info, self._names)
        return request, BatchOutput(request, with_prompts=self._with_prompts)

    async def _follow_all(self, request: TokenRequest, output: BatchOutput, changed: asyncio.Event, work: Work) -> None:
        items = list(enumerate(request.items))
        await together([self._follow(item, index, output, changed, work) for index, item in items])

    async def _follow(self, item: Item, index: int, output: BatchOutput, changed: asyncio.Event, work: Work) -> None:
        """Put what becomes known of one item into the batch's output."""
        async with aclosing(self._generate(item.prompt, item.params, work)) as progresses:
            async for progress in progresses:
                work.clock.wait(progress.queue_seconds)
                for delta in progress.completions:
                    output.take(index, delta)
                changed.set()

    def _generate(self, prompt: list[int], params: SamplingParams, work: Work) -> AsyncGenerator[Progress, None]:
        return self.engine.generate(
            prompt,
            params,
            stream=self._decoupled,
            priority=work.priority,
            queue_timeout=work.queue_timeout,
            salt=work.cache_salt,
        )

    async def _outcome(self, output: BatchOutput, work: Work, *, final: bool) -> Outcome:
        now = output.snapshot()
        tensors = await by_size(now.nbytes, now.tensors, work.outputs)
        return Outcome([self._typed(tensor) for tensor in tensors], final)

    def _typed(self, tensor: Tensor) -> Tensor:
        """A tensor in the data type that this backend gives it: token ids and lengths are signed in some."""
        datatype = self._datatypes.get(tensor.name, tensor.datatype)
        if datatype == tensor.datatype:
            return tensor
        return Tensor.of(tensor.name, datatype, tensor.data.view(np.int32))
