"""A service over the demo model, shared by the tests of the data plane, and what it takes to ask it."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.server.loop_thread import LoopThread
from tests.waiting import attempts

from hasten.core.config import EngineConfig
from hasten.core.errors import HastenError
from hasten.core.types import SamplingParams
from hasten.engine.text import Tokenizer
from hasten.server.create import model_configs
from hasten.server.engine.counters import LanguageCounters
from hasten.server.engine.queue import DEFAULT_QUEUEING, Queueing
from hasten.server.engine.ticket import Ticket
from hasten.server.engine.wire import CompletionDelta, EngineInfo, Output
from hasten.server.protocol.tensors import NUMPY
from hasten.server.repository import MemoryRepository
from hasten.server.service import Service
from hasten.server.types import InferRequest, InferResponse, RequestedOutput, ServiceError, Tensor

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
LONGEST = 192
Outputs = dict[str, Any]


def tensor(name: str, datatype: str, values: Any) -> Tensor:
    """A tensor of nested lists; BYTES may be given as str."""
    data = np.array(values, NUMPY[datatype])
    if datatype == "BYTES":
        flat = [item.encode() if isinstance(item, str) else item for item in data.ravel().tolist()]
        data = np.empty(data.shape, object)
        data.ravel()[:] = flat
    return Tensor(name, datatype, data.shape, data)


TYPES = {
    **dict.fromkeys(("runtime_top_p", "temperature", "repetition_penalty", "presence_penalty", "len_penalty"), "FP32"),
    **dict.fromkeys(("beam_search_diversity_rate", "top_p_decay", "top_p_min"), "FP32"),
    **dict.fromkeys(("is_return_log_probs", "is_return_context_embeddings"), "BOOL"),
    "random_seed": "UINT64",
    "request_prompt_embedding": "FP16",
    "stop_words_list": "INT32",
    "bad_words_list": "INT32",
}


def token_request(
    prompts: Sequence[Sequence[int]], lengths: int | Sequence[int], model: str = "fastertransformer", **inputs: Any
) -> InferRequest:
    """A batch for the token model: prompts of any lengths, and for each other input one value or one for each item."""
    count, longest = len(prompts), max(map(len, prompts))
    each = [lengths] * count if isinstance(lengths, int) else lengths
    result = [
        tensor("input_ids", "UINT32", [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]),
        tensor("input_lengths", "UINT32", [[len(prompt)] for prompt in prompts]),
        tensor("request_output_len", "UINT32", [[length] for length in each]),
    ]
    for name, value in inputs.items():
        values = value if isinstance(value, list | np.ndarray) else [[value]] * count
        result.append(tensor(name, TYPES.get(name, "UINT32"), values))
    return InferRequest(model, result)


def values(response: InferResponse) -> Outputs:
    """A response's outputs as lists, by name; BYTES as text."""
    made: Outputs = {}
    for output in response.outputs:
        assert output.data.shape == output.shape
        assert output.data.dtype == NUMPY[output.datatype]
        made[output.name] = _decoded(output.data.tolist())
    return made


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value


class Running(LoopThread):
    """An event loop in a thread, and a service that lives in it."""

    def __init__(self, make: Callable[[], Coroutine[Any, Any, Service]] | None = None) -> None:
        super().__init__()
        self._service = self.run(make()) if make is not None else None

    @property
    def service(self) -> Service:
        assert self._service is not None
        return self._service

    def infer(self, request: InferRequest, outputs: Iterable[str] = ()) -> Outputs:
        """The outputs of the one response."""
        request.outputs = [RequestedOutput(name) for name in outputs]
        response = self.run(self.service.infer(request))
        assert response.final
        return values(response)

    def stream(self, request: InferRequest) -> list[tuple[Outputs, bool]]:
        """The outputs of each response, and whether it is the last."""

        async def collect() -> list[InferResponse]:
            return [response async for response in self.service.stream(request)]

        return [(values(response), response.final) for response in self.run(collect())]

    def streamed(self, request: InferRequest) -> list[tuple[Outputs, bool]]:
        """The same of a request that is answered in pieces: several, unless the reader is slower than the engine."""
        for _ in attempts("more than two responses"):
            responses = self.stream(request)
            if len(responses) > 2:
                break
        return responses

    def refused(self, request: InferRequest) -> ServiceError:
        """The error of a request that fails."""
        with pytest.raises(ServiceError) as caught:
            self.run(self.service.infer(request))
        return caught.value

    def close(self) -> None:
        try:
            if self._service is not None:
                self.run(self._service.close(5))
        finally:
            super().close()


_SHARED = pytest.StashKey[dict[bool, Running]]()


def _shared(request: pytest.FixtureRequest, decoupled: bool) -> Running:
    """One for all modules: a fixture that is imported is another one in each."""
    known = request.config.stash.setdefault(_SHARED, {})
    if decoupled not in known:

        async def start() -> Service:
            engine = EngineConfig.create(str(DEMO), max_model_len=LONGEST)
            service = Service(MemoryRepository(model_configs(engine, text_name="demo", decoupled=decoupled)))
            await service.start()
            assert not service.failures
            return service

        known[decoupled] = Running(start)
        request.config.add_cleanup(known[decoupled].close)
    return known[decoupled]


@pytest.fixture(scope="session")
def demo(request: pytest.FixtureRequest) -> Running:
    """All models over the demo model; the token model gives one response."""
    return _shared(request, decoupled=False)


@pytest.fixture(scope="session")
def streaming(request: pytest.FixtureRequest) -> Running:
    """The same, but the token model streams."""
    return _shared(request, decoupled=True)


class CountingEngine:
    """In place of an EngineClient where only its coming and going matters: gives prompt + 1, prompt + 2 and so on."""

    started: list["CountingEngine"]

    def __init__(self, config: EngineConfig, name: str) -> None:
        self.config = config
        self.name = name
        self.ready = True
        self.closed = False
        self.replicas = ()
        self.counters = LanguageCounters()
        self.pause = 0.0
        """Seconds before each token."""
        self.go = asyncio.Event()
        """Cleared, no tokens come until it is set."""
        self.go.set()
        self.begun = 0
        """Requests."""
        self.fault: Exception | None = None
        self._computing: dict[Ticket, asyncio.Task[None]] = {}
        self.tokenizer = Tokenizer.from_folder(DEMO)
        self.info = EngineInfo(
            vocab_size=1024,
            max_model_len=config.scheduler.max_model_len or 128,
            eos_token_ids=(2,),
            bos_token_id=1,
            pad_token_id=3,
            num_blocks=100,
            block_size=16,
            max_num_seqs=8,
            dtype="fp32",
            device="cpu",
            ranks=1,
            tokenizer_folder=str(DEMO),
            model_type="counting",
        )

    async def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        queueing: Queueing = DEFAULT_QUEUEING,
        *,
        stream: bool = True,
        listener: Callable[[], None] | None = None,
    ) -> Ticket:
        if self.fault is not None:
            raise self.fault
        self.begun += 1
        ids = tuple(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        ticket = Ticket(self.begun, ids, 1, bytearray(), listener=listener)
        assert params.max_tokens is not None
        self._computing[ticket] = asyncio.create_task(self._compute(ticket, params.max_tokens, stream=stream))
        return ticket

    async def _compute(self, ticket: Ticket, count: int, *, stream: bool) -> None:
        first, held = ticket.prompt_token_ids[-1] + 1, list[int]()
        for token in range(first, first + count):
            await asyncio.sleep(self.pause)
            await self.go.wait()
            if self.closed:
                ticket.fail(HastenError("a request was lost"))
                return
            held.append(token)
            finished = token == first + count - 1
            if stream or finished:
                ticket.push(Output(ticket.number, [CompletionDelta(0, held, "x" * len(held))], finished))
                ticket.wake()
                held = []

    def withdraw(self, ticket: Ticket) -> None:
        self._computing[ticket].cancel()

    async def drain(self, timeout: float) -> bool:
        return True

    async def close(self) -> None:
        self.closed, self.ready = True, False
