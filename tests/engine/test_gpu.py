"""The engine on real GPUs, beside itself on the CPU and beside transformers."""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine_logits import DECODED, engine_logits
from torch import Tensor

from hasten import LLM, CapacityError, EngineError, RankError, RequestOutput, SamplingParams
from hasten.bench import lambada
from hasten.bench.engines import HastenEngine
from hasten.engine.graphs import Prepare, StepGraphs, StepOutput
from hasten.engine.step_message import StepMessage
from hasten.parallel.peer_ring import PeerRing

pytestmark = pytest.mark.gpu

MakeBloom = Callable[..., Path]
MakeModel = Callable[..., Path]
Tokens = list[list[int]]

EXAMPLES = Path(__file__).parents[2] / "examples"
DEMO, STORIES = EXAMPLES / "demo-model", EXAMPLES / "stories" / "test.jsonl"
NUM_STORIES = 100
MOST_DIFFERING = NUM_STORIES // 100
"""Stories that may end otherwise in half precision: 1%."""

COUNT = 24
BLOCK = 16
LENGTHS = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 64, 65, 70, 130, 300)
"""On both sides of a block's border, and of a tile's."""
GREEDY = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
SMALL: dict[str, Any] = {"kv_cache_memory": 256 << 20, "max_num_seqs": 16, "max_model_len": 512}
"""A cache and graphs for what the tests ask, and not for what the device could hold."""

MODELS: dict[str, dict[str, Any]] = {
    "8 heads of 8": {},
    # narrower weights the wider the model is, so that scores are as large
    "12 heads of 64": {"n_head": 12, "hidden_size": 768, "initializer_range": 0.06},
    "4 heads of 128, untied": {
        "n_head": 4,
        "hidden_size": 512,
        "initializer_range": 0.07,
        "vocab_size": 509,
        "tie_word_embeddings": False,
        "apply_residual_connection_post_layernorm": True,
    },
}
NAMES = [*MODELS, "demo"]
_WIDE = {"hidden_size": 256, "max_position_embeddings": 512, "initializer_range": 0.1}
_KEYS = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "neox": ("GPTNeoX", _WIDE | _KEYS),
    "gptj": ("GPTJ", {"n_embd": 256, "n_positions": 512, "rotary_dim": 32, "initializer_range": 0.1}),
    "falcon 40b": ("Falcon", _WIDE | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon rw": ("Falcon", _WIDE | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "stablelm": ("StableLm", _WIDE | _KEYS | {"qk_layernorm": True, "use_parallel_residual": True}),
    "olmo2": ("Olmo2", _WIDE),
}
"""What BLOOM has not: parallel residuals, other rotations, and norms of heads of every kind."""


def random_prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0, vocab: int = 490) -> Tokens:
    rng = random.Random(seed)
    return [[rng.randrange(4, vocab) for _ in range(length)] for length in lengths]


PROMPTS = random_prompts()


def tokens_of(outputs: list[RequestOutput]) -> Tokens:
    return [completion.token_ids for output in outputs for completion in output.outputs]


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    """What a closed engine held must not be missing to the next one."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def folder(make_model: MakeModel) -> Callable[[str], Path]:
    def made(name: str) -> Path:
        family, options = FAMILIES[name] if name in FAMILIES else ("Bloom", MODELS[name])
        return make_model(family, **options)

    return lambda name: DEMO if name == "demo" else made(name)


@pytest.fixture(scope="module")
def on_cpu(folder: Callable[[str], Path]) -> Callable[[str], Tokens]:
    """The greedy tokens of `PROMPTS` by the CPU, in fp32."""

    @cache
    def tokens(name: str) -> Tokens:
        with LLM(folder(name), device="cpu", dtype="fp32", **SMALL) as llm:
            return tokens_of(llm.generate(PROMPTS, GREEDY))

    return tokens


def on_gpu(model: Path, **options: Any) -> LLM:
    return LLM(model, **{"device": "cuda", "dtype": "fp32", **SMALL, **options})


# --- the same tokens --------------------------------------------------------------------------------------------------

CHUNKED = {"max_num_batched_tokens": 40}
ALL_OPTIONS: list[dict[str, Any]] = [
    {
        "enforce_eager": eager,
        "overlap_steps": overlap,
        "enable_prefix_caching": prefix_cache,
        # half of all combinations: any four of the five options occur in every combination
        "block_size": 32 if eager ^ overlap ^ chunked ^ prefix_cache else 16,
        **(CHUNKED if chunked else {}),
    }
    for eager, overlap, chunked, prefix_cache in product((False, True), repeat=4)
]
SOME_OPTIONS: list[dict[str, Any]] = [
    {},
    {"enforce_eager": True},
    {"overlap_steps": False},
    {"enforce_eager": True, "overlap_steps": False, "enable_prefix_caching": False},
    {"block_size": 32, **CHUNKED},
    {"block_size": 32, "enable_prefix_caching": False},
    {"block_size": 5, **CHUNKED},
]
CASES = [
    *(("12 heads of 64", options) for options in ALL_OPTIONS),
    *((name, options) for name in NAMES if name != "12 heads of 64" for options in SOME_OPTIONS),
    *((name, options) for name in FAMILIES for options in ({}, {"enforce_eager": True, **CHUNKED})),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_greedy_tokens_are_those_of_the_cpu(
    name: str, options: dict[str, Any], folder: Callable[[str], Path], on_cpu: Callable[[str], Tokens]
) -> None:
    right = on_cpu(name)
    with on_gpu(folder(name), **options) as llm:
        for _ in range(2):  # the second time out of the prefix cache, where there is one
            assert tokens_of(llm.generate(PROMPTS, GREEDY)) == right
        assert tokens_of(llm.generate(PROMPTS[-1], GREEDY)) == right[-1:]
        worker, scheduler = llm.engine.worker, llm.engine.scheduler
        assert llm.device.type == "cuda"
        assert worker.overlap == options.get("overlap_steps", True)
        graphs = not options.get("enforce_eager", False)
        assert (worker.runner._graphs is not None) == graphs
        assert (worker.runner._output is not None) == graphs  # the last step, of single tokens, was one
        assert (scheduler.blocks.prefix_hits > 0) == options.get("enable_prefix_caching", True)
        assert scheduler.blocks.num_used == 0
        assert scheduler.stats.preemptions == 0


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 100}, {"block_size": 5}], ids=str)
def test_steps_with_prompts_are_replayed(
    options: dict[str, Any],
    folder: Callable[[str], Path],
    on_cpu: Callable[[str], Tokens],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unlike steps of single tokens, whose answers the other tests compare, they could all be eager unnoticed."""
    seen: Counter[tuple[bool, bool]] = Counter()
    replay = StepGraphs.replay

    def counted(self: StepGraphs, message: StepMessage, prepare: Prepare) -> StepOutput | None:
        output = replay(self, message, prepare)
        seen[message.num_tokens > len(message.rows), output is not None] += 1
        return output

    monkeypatch.setattr(StepGraphs, "replay", counted)
    with on_gpu(folder("12 heads of 64"), **options) as llm:
        for _ in range(2):
            assert tokens_of(llm.generate(PROMPTS, GREEDY)) == on_cpu("12 heads of 64")
        for prompt, right in zip(PROMPTS, on_cpu("12 heads of 64"), strict=True):
            assert tokens_of(llm.generate([prompt], GREEDY)) == [right]
    assert seen[True, True]
    assert not seen[True, False]


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("overlap", [False, True], ids=["steps", "overlapped"])
def test_preempted_requests_make_the_same_tokens(
    overlap: bool, eager: bool, folder: Callable[[str], Path], on_cpu: Callable[[str], Tokens]
) -> None:
    name = "8 heads of 8"
    with on_gpu(folder(name), enforce_eager=True) as llm:
        memory = 24 * llm.engine.worker.runner.block_bytes
    options: dict[str, Any] = {"kv_cache_memory": memory, "max_model_len": 340, "overlap_steps": overlap}
    with on_gpu(folder(name), **options, enforce_eager=eager) as llm:
        assert tokens_of(llm.generate(PROMPTS, GREEDY)) == on_cpu(name)
        assert llm.engine.scheduler.stats.preemptions > 0
        assert llm.engine.scheduler.blocks.num_used == 0


@pytest.mark.parametrize("options", [{}, {"overlap_steps": False}, {"enforce_eager": True}], ids=str)
def test_steps_are_timed_on_the_device_where_there_is_a_target(
    options: dict[str, Any], folder: Callable[[str], Path], on_cpu: Callable[[str], Tokens]
) -> None:
    name = "8 heads of 8"
    with on_gpu(
        folder(name), itl_target=1e-3, max_num_seqs=2, enable_prefix_caching=False, **CHUNKED, **options
    ) as llm:
        for _ in range(3):  # in chunks, beside what has begun to decode
            assert tokens_of(llm.generate(PROMPTS, GREEDY)) == on_cpu(name)
        stats = llm.engine.stats
        assert stats.mixed_steps > 0
        assert 0 < stats.mixed_seconds < 1.0 * stats.mixed_steps
        assert stats.predicted_mixed_seconds > 0


def test_a_gpu_is_taken_by_default_with_all_that_makes_it_fast(
    folder: Callable[[str], Path], on_cpu: Callable[[str], Tokens]
) -> None:
    with LLM(folder("8 heads of 8"), dtype="fp32") as llm:
        assert llm.device.type == "cuda"
        assert llm.engine.worker.overlap
        assert llm.engine.worker.runner._graphs is not None
        assert tokens_of(llm.generate(PROMPTS, GREEDY)) == on_cpu("8 heads of 8")
    with LLM(DEMO) as llm:
        assert llm.dtype == torch.float16  # as config.json says
        assert llm.generate("That year the spring came early.")[0].outputs[0].token_ids


SAMPLED: list[dict[str, Any]] = [
    {},
    {"top_k": 20},
    {"top_p": 0.9, "temperature": 1.5},
    {"min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 0},
    {"n": 3},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5, "logprobs": 1},
    {"min_tokens": 5},
    {"logprobs": 2, "prompt_logprobs": 1},
]


@pytest.mark.parametrize("name", ["12 heads of 64", "demo"])
def test_a_seed_gives_the_same_tokens_with_graphs_and_without(name: str, folder: Callable[[str], Path]) -> None:
    params = [SamplingParams(**{"seed": 7, "max_tokens": COUNT, "ignore_eos": True, **chosen}) for chosen in SAMPLED]
    prompts = PROMPTS[-len(params) :]
    with LLM(folder(name), device="cpu", dtype="fp32", **SMALL) as llm:
        right = tokens_of(llm.generate(prompts, params))
    for eager, overlap in product((False, True), (False, True)):
        with on_gpu(folder(name), enforce_eager=eager, overlap_steps=overlap) as llm:
            assert tokens_of(llm.generate(prompts, params)) == right
            alone = [llm.generate(prompt, chosen)[0] for prompt, chosen in zip(prompts, params, strict=True)]
            assert tokens_of(alone) == right
    assert len(set(map(tuple, right))) == len(right)


BEAMS: list[dict[str, Any]] = [
    {"beam_width": 4},
    {"beam_width": 3, "n": 2, "length_penalty": 2.0},
    {"beam_width": 4, "beam_search_diversity_rate": 0.7},
    {"beam_width": 6, "n": 6, "ignore_eos": False, "early_stopping": True},
    {"temperature": 0},
]


@pytest.mark.parametrize("name", ["12 heads of 64", "demo"])
def test_beams_are_those_of_the_cpu(name: str, folder: Callable[[str], Path]) -> None:
    """Searches beside each other and beside a request without one, which share steps and graphs."""
    params = [SamplingParams(**{"max_tokens": COUNT, "ignore_eos": True, **chosen}) for chosen in BEAMS]
    prompts = PROMPTS[-len(params) :]
    small = {**SMALL, "max_num_seqs": 32}
    with LLM(folder(name), device="cpu", dtype="fp32", **small) as llm:
        right = llm.generate(prompts, params)
    scores = [item.cumulative_logprob for output in right[:-1] for item in output.outputs]
    for eager, overlap in product((False, True), (False, True)):
        with on_gpu(folder(name), **small, enforce_eager=eager, overlap_steps=overlap) as llm:
            found = llm.generate(prompts, params)
            assert tokens_of(found) == tokens_of(right)
            assert [item.cumulative_logprob for output in found[:-1] for item in output.outputs] == pytest.approx(
                scores, abs=1e-3
            )
            assert llm.engine.scheduler.blocks.num_used == 0


# --- near transformers ------------------------------------------------------------------------------------------------

WIDE: dict[str, Any] = {
    "hidden_size": 1024,
    "n_head": 16,
    "n_layer": 4,
    "vocab_size": 5000,
    "initializer_range": 0.05,
    "seq_length": 2048,
}
FP32_BOUND = 5e-4
"""Most that a logit may differ in fp32. Their standard deviation is 1.6; transformers itself, in fp32 on a CPU, is
1.3e-5 from fp64, and a GPU adds in other orders."""
HALF_BOUNDS = {"fp16": 6e-3, "bf16": 5e-2}
"""Most that logits may lie from those of fp32, as a share of their length. With transformers' own fp16 and bf16 it is
5.4e-3 and 4.2e-2 on a CPU."""


def their_logits(model: Path, texts: Tokens, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Logits [t, v] of each text alone, on the GPU: no padding, no cache."""
    from transformers import BloomForCausalLM

    reference = BloomForCausalLM.from_pretrained(model, dtype=dtype).eval().cuda()
    with torch.inference_mode():
        return [reference(torch.tensor([text], device="cuda")).logits[0].float() for text in texts]


LOGIT_OPTIONS: list[dict[str, Any]] = [
    {},
    {"enforce_eager": True},
    {"block_size": 32, "max_num_batched_tokens": 100},
]


@pytest.mark.parametrize(
    ("sequences", "options"),
    [*((n, {}) for n in (1, 3, 40, 70)), *((17, options) for options in LOGIT_OPTIONS)],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_logits_are_near_those_of_transformers(
    dtype: str, sequences: int, options: dict[str, Any], make_bloom: MakeBloom
) -> None:
    model = make_bloom(**WIDE)
    lengths = tuple(1 + 37 * number % 150 for number in range(sequences))
    prompts, following = random_prompts(lengths, vocab=5000), random_prompts((DECODED,) * sequences, 1, vocab=5000)
    limits: dict[str, Any] = {"max_num_seqs": 80, "max_num_batched_tokens": 4096, "kv_cache_memory": 1 << 30}
    ours = engine_logits(model, prompts, following, "cuda", dtype=dtype, **(limits | options))
    theirs = their_logits(model, [a + b for a, b in zip(prompts, following, strict=True)])
    for found, right in zip(ours, theirs, strict=True):
        assert found.shape == right.shape
        if dtype == "fp32":
            assert (found - right).abs().max() <= FP32_BOUND
    # over all of them: of one token alone the error may be larger by chance
    found, right = torch.cat(ours), torch.cat(theirs)
    error = float((found - right).norm() / right.norm())
    assert error <= HALF_BOUNDS.get(dtype, 1e-5)
    # and no row of them has gone astray
    of_rows = (found - right).norm(dim=1) / right.norm(dim=1)
    assert float(of_rows.max()) <= 4 * HALF_BOUNDS.get(dtype, 1e-5)


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 1000}, {"block_size": 32}], ids=str)
def test_a_long_context_is_that_of_transformers(options: dict[str, Any], make_bloom: MakeBloom) -> None:
    from transformers import BloomForCausalLM

    model = make_bloom(n_head=12, hidden_size=768, n_layer=2, initializer_range=0.06)
    long, short = random_prompts((5300, 40), seed=3)
    limits: dict[str, Any] = {"max_model_len": 6000, "kv_cache_memory": 1 << 30}
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, prompt_logprobs=0)
    with on_gpu(model, **(limits | options)) as llm:
        output, beside = llm.generate([long, short], params)
        alone = llm.generate(long, GREEDY)
    tokens = output.outputs[0].token_ids
    assert tokens_of(alone) == [tokens]
    reference = BloomForCausalLM.from_pretrained(model, dtype=torch.float32).eval().cuda()
    for prompt, found in ((long, output), (short, beside)):
        text = prompt + found.outputs[0].token_ids
        with torch.inference_mode():
            logprobs = reference(torch.tensor([text], device="cuda")).logits[0].log_softmax(-1).cpu()
        assert logprobs[len(prompt) - 1 : -1].argmax(-1).tolist() == found.outputs[0].token_ids
        assert found.prompt_logprobs is not None
        ours = [top[token].logprob for top, token in zip(found.prompt_logprobs[1:], prompt[1:], strict=True) if top]
        right = logprobs[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
        # transformers adds slope * position to the scores, up to 3700 here, which fp32 rounds to 2e-4
        assert (torch.tensor(ours) - right).abs().max() <= 5e-3


# --- the demo model's stories -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answered() -> Callable[..., lambada.LambadaResult]:
    """What the demo model makes of the first stories."""

    @cache
    def answer(device: str, dtype: str, batch_size: int, eager: bool = False) -> lambada.LambadaResult:
        options: dict[str, Any] = {"kv_cache_memory": 256 << 20, "enforce_eager": eager}
        with LLM(DEMO, device=device, dtype=dtype, **options) as llm:
            samples = lambada.read_samples(str(STORIES), llm.tokenizer)[:NUM_STORIES]
            (result,) = lambada.run([HastenEngine(llm)], samples, llm.tokenizer, batch_size=batch_size)
        assert result.total == NUM_STORIES
        return result

    return answer


@pytest.mark.parametrize(("batch_size", "eager"), [(1, False), (16, False), (16, True), (NUM_STORIES, False)])
def test_stories_end_as_on_the_cpu(
    eager: bool, batch_size: int, answered: Callable[..., lambada.LambadaResult]
) -> None:
    right, found = answered("cpu", "fp32", 16), answered("cuda", "fp32", batch_size, eager)
    assert [answer.answer_ids for answer in found.answers] == [answer.answer_ids for answer in right.answers]
    assert found.right == right.right > NUM_STORIES / 2


@pytest.mark.parametrize("batch_size", [1, 16, NUM_STORIES])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_hardly_a_story_ends_otherwise_in_half_precision(
    dtype: str, batch_size: int, answered: Callable[..., lambada.LambadaResult]
) -> None:
    found = answered("cuda", dtype, batch_size)
    assert lambada.differing(answered("cpu", "fp32", 16), found) <= MOST_DIFFERING


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_cache_larger_than_the_device_is_an_error_that_says_what_to_lower(
    folder: Callable[[str], Path], on_cpu: Callable[[str], Tokens]
) -> None:
    model, sequences = folder("8 heads of 8"), 64
    with on_gpu(model, enforce_eager=True) as llm:
        token_bytes = llm.engine.worker.runner.block_bytes // BLOCK
    total = torch.cuda.mem_get_info()[1]
    length = 2 * total // token_bytes // sequences  # such sequences fill the device twice
    limits: dict[str, Any] = {"max_num_seqs": sequences, "max_model_len": length, "kv_cache_memory": 4 * total}
    with pytest.raises(CapacityError) as caught:
        on_gpu(model, **limits)
    message = str(caught.value)
    assert "memory ran out" in message
    assert "lower" in message
    assert "kv_cache_memory" in message
    assert "\n" not in message
    with on_gpu(model) as llm:  # and the device is none the worse for it
        assert tokens_of(llm.generate(PROMPTS, GREEDY)) == on_cpu("8 heads of 8")


# --- two ranks --------------------------------------------------------------------------------------------------------

LIMIT_S = 30.0
"""How soon a run must end after a rank has died."""


def ranks_of(parent: int) -> list[int]:
    """Processes of this parent that are ranks; a compiler that runs for a moment is none."""
    found = []
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        try:
            command = Path(f"/proc/{child}/cmdline").read_bytes()
        except FileNotFoundError:
            continue
        if b"hasten.engine.follower" in command:
            found.append(int(child))
    return found


RANKED: list[dict[str, Any]] = [{"enforce_eager": True}, {"overlap_steps": False}, {"block_size": 32, **CHUNKED}]


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in NAMES), *(("12 heads of 64", options) for options in RANKED)],
    ids=str,
)
def test_two_ranks_choose_the_tokens_of_one(
    options: dict[str, Any], name: str, folder: Callable[[str], Path], on_cpu: Callable[[str], Tokens]
) -> None:
    with on_gpu(folder(name), **options) as alone:
        expected = tokens_of(alone.generate(PROMPTS, GREEDY))
    assert expected == on_cpu(name)
    with on_gpu(folder(name), tensor_parallel_size=2, **options) as llm:
        for _ in range(2):
            assert tokens_of(llm.generate(PROMPTS, GREEDY)) == expected
        assert llm.engine.scheduler.blocks.num_used == 0
    assert ranks_of(os.getpid()) == []


STAGED = [
    {},
    {"enforce_eager": True},
    {"overlap_steps": False},
    {"block_size": 5, **CHUNKED},
    {"pipeline_layers": "1,2", "max_num_seqs": 3},
]


@pytest.mark.multi_gpu
@pytest.mark.parametrize("options", STAGED, ids=str)
def test_two_stages_choose_the_tokens_of_one(
    options: dict[str, Any], folder: Callable[[str], Path], on_cpu: Callable[[str], Tokens]
) -> None:
    params = [SamplingParams(**{"seed": 7, "max_tokens": COUNT, "ignore_eos": True, **chosen}) for chosen in SAMPLED]
    prompts = PROMPTS[-len(params) :]
    model = folder("12 heads of 64")
    alone_options = {name: value for name, value in options.items() if name != "pipeline_layers"}
    with on_gpu(model, **alone_options) as alone:
        drawn = tokens_of(alone.generate(prompts, params))
    with on_gpu(model, pipeline_parallel_size=2, **options) as llm:
        link = llm.engine.worker.stage.link
        assert link is not None
        reach = torch.cuda.can_device_access_peer(0, 1)
        assert [isinstance(each, PeerRing) for each in link.connections] == [reach] * 2
        for _ in range(2):
            assert tokens_of(llm.generate(PROMPTS, GREEDY)) == on_cpu("12 heads of 64")
        assert tokens_of(llm.generate(prompts, params)) == drawn
        assert llm.engine.scheduler.blocks.num_used == 0
        stream = llm.stream(PROMPTS, GREEDY)
        next(stream)  # the engine ends with steps under way
    assert ranks_of(os.getpid()) == []


@pytest.mark.multi_gpu
def test_two_ranks_draw_the_tokens_of_one(folder: Callable[[str], Path]) -> None:
    params = [SamplingParams(**{"seed": 7, "max_tokens": COUNT, "ignore_eos": True, **chosen}) for chosen in SAMPLED]
    prompts = PROMPTS[-len(params) :]
    with on_gpu(folder("12 heads of 64")) as alone:
        expected = tokens_of(alone.generate(prompts, params))
    with on_gpu(folder("12 heads of 64"), tensor_parallel_size=2) as llm:
        assert tokens_of(llm.generate(prompts, params)) == expected


@pytest.mark.multi_gpu
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_sums_through_the_memory_of_peers_are_the_same_every_time(dtype: str, folder: Callable[[str], Path]) -> None:
    if not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("the first two GPUs cannot reach each other")
    found = []
    # without a prefix cache: the same steps each time, and so the same roundings
    options: dict[str, Any] = {"dtype": dtype, "tensor_parallel_size": 2, "enable_prefix_caching": False}
    for _ in range(2):
        with on_gpu(folder("12 heads of 64"), **options) as llm:
            group = llm.engine.worker.runner.head.group
            assert group.peers is not None
            assert group.peers.size == 2
            found += [tokens_of(llm.generate(PROMPTS, GREEDY)) for _ in range(2)]
            assert int(group.peers.exchanges.max()) > 0
    assert [len(tokens) for tokens in found[0]] == [COUNT] * len(PROMPTS)
    assert found[1:] == found[:1] * 3


@pytest.mark.multi_gpu
def test_sums_through_the_memory_of_peers_are_those_of_one_rank(make_bloom: MakeBloom) -> None:
    """As near to fp32 as one rank's: an exchange that took the wrong rows would be far off."""
    model = make_bloom(**WIDE)
    prompt = random_prompts((200,), vocab=5000)[0]  # fewer rows than a mailbox has: prefill goes through it too
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, prompt_logprobs=0, logprobs=0)
    worst = {}
    for ranks in (1, 2):
        with on_gpu(model, dtype="fp16", tensor_parallel_size=ranks) as llm:
            output = llm.generate(prompt, params)[0]
        tokens = output.outputs[0].token_ids
        right = their_logits(model, [prompt + tokens])[0].log_softmax(-1).cpu()
        assert output.prompt_logprobs is not None
        assert output.outputs[0].logprobs is not None
        tops = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        text = [*prompt, *tokens][1:]
        ours = torch.tensor([top[token].logprob for top, token in zip(tops, text, strict=True) if top])
        worst[ranks] = float((ours - right[torch.arange(len(text)), torch.tensor(text)]).abs().max())
    # on a CPU fp16 is 0.01 away; one rank rounds less often than two
    assert worst[1] < 0.1
    assert worst[2] < 0.15


@pytest.mark.multi_gpu
@pytest.mark.parametrize("option", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_a_rank_that_dies_between_calls_ends_the_next_one(option: str, folder: Callable[[str], Path]) -> None:
    for stops in (False, True):  # the program goes on with another LLM
        with on_gpu(folder("8 heads of 8"), **{option: 2}) as llm:
            llm.generate("the")
            (child,) = ranks_of(os.getpid())
            if stops:  # it is not ready for the next step when it dies
                os.kill(child, signal.SIGSTOP)
                threading.Timer(1, os.kill, (child, signal.SIGKILL)).start()
            else:
                os.kill(child, signal.SIGKILL)
            start = time.monotonic()
            with pytest.raises(RankError, match=r"rank 1 of 2 on .* \(process \d+\) died: killed by SIGKILL"):
                llm.generate("the")
            with pytest.raises(EngineError):
                llm.generate("the")
            seconds = time.monotonic() - start
        assert seconds < LIMIT_S
        assert ranks_of(os.getpid()) == []


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is surely gone afterwards."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    "options",
    [
        ["--tensor-para-size", "2"],
        ["--tensor-para-size", "2", "--enforce-eager"],
        ["--tensor-para-size", "2", "--no-overlap-steps"],
        ["--pipeline-para-size", "2"],
    ],
    ids=" ".join,
)
def test_a_killed_rank_ends_the_run_with_its_name(options: list[str], folder: Callable[[str], Path]) -> None:
    """In the middle of a step, where NCCL would wait for ever."""
    endless = ["--max-new-tokens", "100000", "--max-model-len", "200000", "--ignore-eos", "--stream", "--json"]
    small = ["--kv-cache-memory", str(1 << 30), "--max-num-seqs", "4", "--device", "cuda"]
    command = [sys.executable, "-m", "hasten", "generate", str(folder("8 heads of 8")), "--prompt", "the"]
    with running([*command, *endless, *small, *options]) as process:
        assert process.stdout is not None
        assert process.stdout.readline(), process.communicate()[1]
        (child,) = ranks_of(process.pid)
        os.kill(child, signal.SIGKILL)
        since = time.monotonic()
        error = process.communicate(timeout=2 * LIMIT_S)[1]
        assert time.monotonic() - since < LIMIT_S
        code = process.returncode
    assert code == 1
    assert f"rank 1 of 2 on {socket.gethostname()} (process {child}) died: killed by SIGKILL" in error
