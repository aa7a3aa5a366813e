"""Overhead of serving: requests over gRPC compared with the same requests to an engine in this process.

Server and engine take turns, after one untimed round each, and must give the same tokens.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, TypedDict

import numpy as np
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as aioclient
from tritonclient.utils import InferenceServerException

from hasten.bench.report import Environment, Spread, print_table
from hasten.bench.served import CALL_S, HOST, TEXT_MODEL, TOKEN_MODEL, Served, channel_options
from hasten.bench.workloads import random_prompt
from hasten.core.errors import EngineError
from hasten.core.types import SamplingParams
from hasten.engine.llm import LLM

_NO_END = 2**32 - 1
"""An end token that does not come."""
_EVENT, _LAST_EVENT = b"data: ", b"data: [DONE]"

Tokens = list[list[int]]


@dataclass(frozen=True)
class Load:
    """What is asked for."""

    concurrency: int
    prompt_length: int
    output_length: int
    requests: int
    """Single requests, one after the other."""
    rounds: int
    """Times that `concurrency` requests come at once."""


@dataclass(frozen=True)
class Turns:
    """One measure of several, taken in turns."""

    name: str
    unit: str
    """`ms` (less is better) or `tokens/s`."""
    values: dict[str, Spread]
    """By who was measured; the engine or server that others are compared with comes first."""
    ratios: dict[str, float]
    """Median of the others divided by the median of the first."""


class ServingReport(TypedDict):
    """What is written: a server beside its engine."""

    environment: Environment
    start_s: float
    results: list[Turns]


def measure(llm: LLM, server: Served, load: Load, peer: str | None = None) -> list[Turns]:
    """Measure single requests, requests that come at once, and streams.

    `peer` is the gRPC address of another server that has the model's tokens as `fastertransformer`; it is measured on
    requests that come at once. EngineError if anyone gives other tokens.
    """
    rng, vocab_size = random.Random(0), llm.config.vocab_size
    prompts = [random_prompt(load.prompt_length, vocab_size, rng) for _ in range(load.concurrency)]
    addresses = {"hasten": server.address} | ({"peer": peer} if peer else {})
    return [
        _single(llm, server, prompts[0], load),
        _at_once(llm, addresses, prompts, load),
        _streams(llm, server, prompts, load),
    ]


def _single(llm: LLM, server: Served, prompt: list[int], load: Load) -> Turns:
    params = _params(load)
    with grpcclient.InferenceServerClient(server.address, channel_args=channel_options(server.address)) as client:

        def over_grpc() -> Tokens:
            inputs = _token_inputs(grpcclient, prompt, load.output_length)
            found = client.infer(TOKEN_MODEL, inputs, client_timeout=CALL_S)
            return [_new_tokens(found, len(prompt))]

        callers = {"engine": lambda: _tokens(llm, [prompt], params), "hasten, gRPC": over_grpc}
        return _in_turns("one request", "ms", callers, load.requests, lambda seconds: 1000 * seconds)


def _at_once(llm: LLM, addresses: dict[str, str], prompts: list[list[int]], load: Load) -> Turns:
    params = _params(load)

    async def infer(address: str) -> Tokens:
        async with aioclient.InferenceServerClient(address, channel_args=channel_options(address)) as client:
            inputs = [_token_inputs(aioclient, prompt, load.output_length) for prompt in prompts]
            calls = [client.infer(TOKEN_MODEL, each, client_timeout=CALL_S) for each in inputs]
            return [_new_tokens(result, load.prompt_length) for result in await asyncio.gather(*calls)]

    def ask(address: str) -> Tokens:
        return asyncio.run(infer(address))

    callers: dict[str, Callable[[], Tokens]] = {"engine": lambda: _tokens(llm, prompts, params)}
    callers |= {f"{name}, gRPC": partial(ask, address) for name, address in addresses.items()}
    return _throughput(f"{len(prompts)} requests at once", callers, load)


def _streams(llm: LLM, server: Served, prompts: list[list[int]], load: Load) -> Turns:
    """Each request a stream of its own that gives every token as soon as it is there, as text."""
    assert llm.tokenizer is not None
    texts = [llm.tokenizer.decode(prompt) for prompt in prompts]
    params = replace(_params(load), detokenize=True)

    async def over_grpc() -> list[str]:
        options = channel_options(server.address)
        async with aioclient.InferenceServerClient(server.address, channel_args=options) as client:
            return list(await asyncio.gather(*(_stream(client, text, load.output_length) for text in texts)))

    async def over_http() -> list[str]:
        events = (_events(server.http_port, text, load.output_length) for text in texts)
        try:
            return list(await asyncio.wait_for(asyncio.gather(*events), CALL_S))
        except TimeoutError:
            raise EngineError(f"the server did not end its streams over HTTP within {CALL_S:.0f} s") from None

    callers: dict[str, Callable[[], Any]] = {
        "engine": lambda: [output.outputs[0].text for output in llm.generate(texts, params)],
        "hasten, gRPC": lambda: asyncio.run(over_grpc()),
        "hasten, OpenAI's API": lambda: asyncio.run(over_http()),
    }
    return _throughput(f"{len(prompts)} streams at once", callers, load)


async def _stream(client: aioclient.InferenceServerClient, text: str, length: int) -> str:
    options = {"max_tokens": length, "temperature": 0, "ignore_eos": True}

    async def message() -> AsyncIterator[dict[str, Any]]:
        inputs = [_tensor(aioclient, "text_input", np.array([text.encode()], object), "BYTES")]
        inputs.append(_tensor(aioclient, "stream", np.array([True]), "BOOL"))
        yield {"model_name": TEXT_MODEL, "inputs": inputs, "parameters": options}

    pieces = []
    async for found, error in client.stream_infer(message(), stream_timeout=CALL_S):
        if error is not None:
            raise EngineError(f"a stream ended: {error}")
        pieces.append(found.as_numpy("text_output")[0].decode())
    return "".join(pieces)


async def _events(port: int, text: str, length: int) -> str:
    """The text of a completion of OpenAI's API, from its server-sent events."""
    options = {"max_tokens": length, "temperature": 0, "ignore_eos": True, "stream": True}
    body = json.dumps({"model": TOKEN_MODEL, "prompt": text, **options}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise EngineError(f"a completion was refused: {status.decode().strip()}")
        pieces = []
        async for line in reader:
            if line.startswith(_EVENT) and not line.startswith(_LAST_EVENT):
                pieces += [choice["text"] for choice in json.loads(line[len(_EVENT) :])["choices"]]
        return "".join(pieces)
    finally:
        writer.close()


def _throughput(name: str, callers: dict[str, Callable[[], Any]], load: Load) -> Turns:
    tokens = load.concurrency * load.output_length
    return _in_turns(name, "tokens/s", callers, load.rounds, lambda seconds: tokens / seconds)


def _in_turns(
    name: str, unit: str, callers: dict[str, Callable[[], Any]], count: int, figure: Callable[[float], float]
) -> Turns:
    expected = None
    seconds: dict[str, list[float]] = {caller: [] for caller in callers}
    for number in range(count + 1):
        for caller, call in callers.items():
            start = time.perf_counter()
            try:
                found = call()
            except InferenceServerException as error:
                raise EngineError(f"{name}: {caller}: {error}") from error
            if number:
                seconds[caller].append(time.perf_counter() - start)
            expected = found if expected is None else expected
            if found != expected:
                raise EngineError(f"{name}: {caller} gives other tokens than the engine in this process")
    medians = {caller: figure(median(values)) for caller, values in seconds.items()}
    first, *others = callers
    return Turns(
        name=name,
        unit=unit,
        values={caller: Spread.of(values, figure) for caller, values in seconds.items()},
        ratios={caller: medians[caller] / medians[first] for caller in others},
    )


def _params(load: Load) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=load.output_length, ignore_eos=True, detokenize=False)


def _tokens(llm: LLM, prompts: Sequence[list[int]], params: SamplingParams) -> Tokens:
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]


def _tensor(client: Any, name: str, values: np.ndarray[Any, Any], datatype: str) -> Any:
    tensor = client.InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(values)
    return tensor


def _token_inputs(client: Any, prompt: list[int], length: int) -> list[Any]:
    values = {
        "input_ids": [prompt],
        "input_lengths": [[len(prompt)]],
        "request_output_len": [[length]],
        "end_id": [[_NO_END]],
    }
    return [_tensor(client, name, np.array(value, np.uint32), "UINT32") for name, value in values.items()]


def _new_tokens(found: Any, prompt_length: int) -> list[int]:
    tokens: list[int] = found.as_numpy("output_ids")[0][0].tolist()
    return tokens[prompt_length:]


def show(title: str, start_s: float, turns: Sequence[Turns]) -> None:
    """Print a table."""
    rows = [("start to ready", "hasten", f"{start_s:.2f} s", "", "")]
    for turn in turns:
        for caller, spread in turn.values.items():
            ratio = f"{turn.ratios[caller]:.2f} x" if caller in turn.ratios else ""
            rows.append((turn.name, caller, f"{spread.p50:.1f} {turn.unit}", f"{spread.best:.1f}", ratio))
    print_table(title, ("what", "of", "median", "best", "relative to the engine"), rows)
