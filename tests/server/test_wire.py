import json
import subprocess
import sys
from typing import Any

import msgspec
import numpy as np
import pytest

from hasten.core.config import EngineConfig
from hasten.core.types import FinishReason, PoolingParams, SamplingParams
from hasten.engine.stats import EngineStats
from hasten.server.engine.wire import (
    Acknowledge,
    Add,
    CompletionDelta,
    EngineInfo,
    Frames,
    FromEngine,
    Logprob,
    Output,
    PooledData,
    Refusal,
    Start,
    Step,
    ToEngine,
    framed,
)


def bodies(frames: list[bytearray], piece: int) -> list[bytes]:
    """What comes out at the other end where the socket gives so many bytes at a time."""
    splitter, data = Frames(), b"".join(frames)
    return [body for at in range(0, len(data), piece) for body in splitter.feed(data[at : at + piece])]


@pytest.mark.parametrize("piece", [1, 7, 8, 9, 100, 10_000])
def test_messages_arrive_however_the_bytes_are_cut(piece: int) -> None:
    messages = [
        Start(EngineConfig.create("somewhere", max_num_seqs=3, kv_cache_memory=2**40, block_size=4)),
        Add(1, (5, 6), {"seed": 2**64 - 1, "n": 2}, stream=True),
        Add(2, (), {"beam_width": 4, "length_penalty": 0.5}, stream=False),
        Acknowledge(3, 0.25),
    ]
    decoder = msgspec.msgpack.Decoder(ToEngine)
    assert [decoder.decode(body) for body in bodies(list(map(framed, messages)), piece)] == messages


def test_outputs_keep_their_types() -> None:
    top = {3: Logprob(-0.5, 1, " a"), 7: Logprob(float("-inf"), 1024, None)}
    delta = CompletionDelta(1, [3, 7], " a", [top, top], -1.0, FinishReason.STOP, "word")
    step = Step(EngineStats(running=1, steps=9), [Output(4, [delta], True, [None, top])], {4: 1.5})
    (body,) = bodies([framed(step)], 1000)
    again = msgspec.msgpack.Decoder(FromEngine).decode(body)
    assert again == step
    assert isinstance(again, Step)
    assert again.outputs[0].completions[0].finish_reason is FinishReason.STOP


def test_a_text_and_what_is_made_of_it() -> None:
    params = PoolingParams(dimensions=3, truncate_prompt_tokens=-1)
    text = Add(3, (5, 6), None, False, params, (0, 1), 1)
    step = Step(EngineStats(), [Output(3, [], True, pooled=PooledData(b"abcd", rows=1))])
    added, stepped = bodies([framed(text), framed(step)], 1000)
    assert msgspec.msgpack.Decoder(ToEngine).decode(added) == text
    assert msgspec.msgpack.Decoder(FromEngine).decode(stepped) == step


def test_sampling_parameters_arrive_as_they_were() -> None:
    words: dict[str, Any] = {"stop": ("a", "b"), "stop_words_ids": [[1, 2]], "allowed_token_ids": [3]}
    params = SamplingParams(seed=2**64 - 1, n=2, logit_bias={5: -1.5}, **words)
    (body,) = bodies([framed(Add(1, (5,), params.given(), stream=True))], 1000)
    again = msgspec.msgpack.Decoder(Add).decode(body)
    assert again.params is not None
    assert SamplingParams(**again.params) == params


def test_numbers_of_numpy_are_taken() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_p=np.float64(0.25))  # type: ignore[arg-type]
    (body,) = bodies([framed(Add(1, (5,), params.given(), stream=False))], 1000)
    again = msgspec.msgpack.Decoder(Add).decode(body)
    assert again.params is not None
    assert SamplingParams(**again.params) == SamplingParams(temperature=0.5, top_p=0.25)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (Add(1, (5,), SamplingParams(top_k=2**64).given(), stream=False), OverflowError),
        (Refusal(1, "ConfigError", "\ud800"), ValueError),
    ],
)
def test_what_does_not_fit_is_an_error(message: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        framed(message)


def test_the_servers_process_gets_no_torch() -> None:
    code = "import json, sys, hasten.server.engine.client; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert not {"torch", "transformers", "triton"} & set(json.loads(done.stdout))


@pytest.mark.parametrize(("quantization", "shown"), [(None, "fp16"), ("int8", "fp16, int8 weights")])
def test_what_an_engine_computes_in_is_shown_with_what_its_weights_are(quantization: str | None, shown: str) -> None:
    tokens: dict[str, Any] = {"eos_token_ids": (2,), "bos_token_id": 1, "pad_token_id": 3, "tokenizer_folder": None}
    sizes: dict[str, Any] = {
        "vocab_size": 9,
        "max_model_len": 64,
        "num_blocks": 4,
        "block_size": 16,
        "max_num_seqs": 8,
        "ranks": 1,
    }
    info = EngineInfo(**tokens, **sizes, dtype="fp16", device="cpu", model_type="bloom", quantization=quantization)
    assert info.types == shown
