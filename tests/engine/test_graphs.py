"""Which graph a step is, and that padding changes nothing.

A CPU has no graphs: here padded steps are computed kernel by kernel, and not replayed.
"""

import logging
from collections import Counter
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten import LLM, RequestOutput, SamplingParams, ops
from hasten.engine import graphs
from hasten.engine import runner as runner_module
from hasten.engine.batch import Batch
from hasten.engine.cache_setup import CacheSetup
from hasten.engine.deferred import Budget
from hasten.engine.graphs import Prepare, Size, Sizes, StepOutput
from hasten.engine.inputs import Inputs, Step
from hasten.engine.runner import Runner
from hasten.engine.sequence import Sequence
from hasten.engine.step_message import StepMessage, TableRows
from hasten.ops.packed import PackedLinear
from hasten.ops.partial_sum import PartialSum
from hasten.ops.plan import Planner

pytest.importorskip("triton")

import tests.interpreter  # noqa: F401  # kernels run on it where there is no GPU
from tests.bench.compile_cases import launchers
from tests.engine.deferring import Recomputing

MakeModel = Callable[..., Path]
MakeSequence = Callable[..., Sequence]

LENGTHS = (1, 2, 15, 16, 17, 40, 64, 65, 90)
"""On both sides of a block's border and of a window."""
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("Bloom", {}),
    "llama": ("Llama", {}),
    "learned positions": ("GPT2", {}),
    "parallel residuals": ("GPTNeoX", {"num_attention_heads": 6}),
    "experts": ("Mixtral", {}),
    "windows and caps": ("Gemma2", {"sliding_window": 9, "head_dim": 16, "query_pre_attn_scalar": 20}),
}


class PaddedSteps:
    """In the place of graphs: the same steps, padded in the same way, computed as they are."""

    def __init__(self, runner: Runner, sizes: Sizes) -> None:
        self.runner = runner
        self.sizes = sizes
        self.seen: Counter[bool | None] = Counter()

    def replay(self, message: StepMessage, prepare: Prepare) -> StepOutput | None:
        size = self.sizes.of(message)
        self.seen[None if size is None else size.outputs is None] += 1
        if size is None:
            return None
        inputs = self.runner._inputs
        step = inputs.step(message)
        padded = step.padded(size.tokens, size.outputs)
        tokens = inputs.sent(padded)
        if inputs.planner is not None:
            tokens = inputs.seen(padded, in_sections(inputs, size, step))
        prepare(message, tokens.meta.block_tables.view(-1)[: step.tables.size].view(step.tables.shape))
        compute = self.runner._decode if size.outputs is None else self.runner._mixed
        return compute(tokens).first(sum(message.needed))


def in_sections(inputs: Inputs, size: Size, step: Step) -> dict[str, Tensor]:
    """The numbers of a step as a graph reads them, in memory that held others."""
    sections = inputs.sections(size.tokens, size.outputs, inputs.tables.array.shape[0])
    arrays = size.arrays(inputs, step)
    assert sections.hold(arrays)
    whole = torch.full((sections.total,), 1 << 30, dtype=torch.int32)
    host = sections.packed(arrays, inputs.device)
    whole[: len(host)] = host
    return sections.views(whole)


def results(outputs: list[RequestOutput]) -> list[tuple[list[int], list[float]]]:
    return [
        (one.token_ids, [step[token].logprob for token, step in zip(one.token_ids, one.logprobs or [], strict=False)])
        for output in outputs
        for one in output.outputs
    ]


@pytest.mark.any_python
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_steps_give_what_the_steps_give(family: str, make_model: MakeModel) -> None:
    name, options = FAMILIES[family]
    folder = make_model(name, **options)
    prompts = [[(7 * n + place) % 90 + 4 for place in range(n)] for n in LENGTHS]
    params = [
        SamplingParams(max_tokens=5 + 3 * n, temperature=0, ignore_eos=True, logprobs=0, n=1 + n % 2)
        for n in range(len(prompts))
    ]
    params[5] = SamplingParams(max_tokens=20, beam_width=3, n=3, ignore_eos=True)
    limits: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 48, "enable_prefix_caching": False}
    with LLM(folder, device="cpu", kv_cache_memory=1 << 20, **limits) as llm:
        expected = results(llm.generate(prompts, params))
        runner = llm.engine.worker.runner
        padded = runner._graphs = PaddedSteps(runner, Sizes.up_to(5, 40))  # type: ignore[assignment]
        found = results(llm.generate(prompts, params))
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    for (_, logprobs), (_, right) in zip(found, expected, strict=True):
        assert logprobs == pytest.approx(right, abs=1e-5)
    assert min(padded.seen[kind] for kind in (True, False, None)) > 1


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let models compute with the kernels of a GPU, on the interpreter, from now on."""

    def take() -> None:
        for name, launcher in launchers().items():
            if callable(getattr(ops, name, None)):
                monkeypatch.setattr(ops, name, with_defaults(getattr(ops, name), launcher))
        monkeypatch.setattr(ops, "add_linear", add_linear)
        monkeypatch.setattr(Planner, "of", lambda _device, heads, kv_heads, **_: Planner(heads, kv_heads, 4))

    return take


def with_defaults(op: Callable[..., Any], launcher: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher with the defaults of the op, which knows them alone."""
    arguments = signature(op)

    def call(*args: Any, **options: Any) -> Any:
        bound = arguments.bind(*args, **options)
        bound.apply_defaults()
        return launcher(*bound.args, **bound.kwargs)

    return call


def add_linear(
    x_th: Tensor, weight: PackedLinear, bias_o: Tensor | None, residual_to: Tensor | None, rows_t: Tensor | None = None
) -> PartialSum:
    return PartialSum(ops.linear_parts(x_th, weight), bias_o, residual_to, rows_t)


@pytest.mark.any_python
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/engine/test_gpu.py replays such steps")
def test_padded_steps_of_kernels_give_what_the_steps_give(make_model: MakeModel, kernels: Callable[[], None]) -> None:
    """A whole model: chunks, mixtures and single tokens, some of which wait for others' blocks."""
    folder = make_model("Bloom", n_head=2, hidden_size=128, n_layer=2, initializer_range=0.08)
    prompts = [[(7 * n + place) % 90 + 4 for place in range(n)] for n in (1, 17, 50)]
    params = [SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)] * 3
    params[1] = SamplingParams(max_tokens=3, beam_width=2, n=2, ignore_eos=True)
    limits: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "enable_prefix_caching": False}
    options: dict[str, Any] = {"device": "cpu", "dtype": "fp16", "kv_cache_memory": 1 << 20, "max_model_len": 128}
    options |= {"overlap_steps": True}
    with LLM(folder, **options, **limits) as llm:
        expected = results(llm.generate(prompts, params))
    kernels()
    with LLM(folder, **options, **limits) as llm:
        runner = llm.engine.worker.runner
        padded = runner._graphs = PaddedSteps(runner, Sizes.up_to(2, 32))  # type: ignore[assignment]
        found = results(llm.generate(prompts, params))
    assert found == expected
    assert padded.seen[True] > 1
    assert padded.seen[False] > 2
    assert not padded.seen[None]


@pytest.mark.any_python
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/engine/test_gpu.py replays such steps")
def test_steps_give_the_same_with_few_graphs_and_with_all(
    make_model: MakeModel,
    kernels: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Chunks, mixtures, single tokens and beams, by steps that are computed anew in the place of replays."""
    folder = make_model("Bloom", n_head=2, hidden_size=128, n_layer=2, initializer_range=0.08)
    prompts = [[(7 * n + place) % 90 + 4 for place in range(n)] for n in (1, 17, 20)]
    params = [SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)] * 3
    params[1] = SamplingParams(max_tokens=3, beam_width=2, n=2, ignore_eos=True)
    options: dict[str, Any] = {"device": "cpu", "dtype": "fp16", "kv_cache_memory": 1 << 20, "max_model_len": 64}
    options |= {"overlap_steps": True, "max_num_seqs": 4, "max_num_batched_tokens": 32, "enable_prefix_caching": False}
    sizes = Sizes([Size(1, None), Size(2, None), Size(4, None)], [Size(8, 4), Size(16, 4), Size(32, 4)])
    assert sizes.later == [Size(2, None), Size(16, 4)]
    with LLM(folder, **options) as llm:
        expected = results(llm.generate(prompts, params))
    kernels()
    monkeypatch.setattr(graphs, "_FIRST_APART", 8)
    captures: list[Recomputing] = []

    def capturing(setup: CacheSetup) -> tuple[int, int]:
        made = make(setup)
        setup.runner.capture_graphs(sizes)
        return made

    def capture_of(_device: Any) -> Recomputing:
        captures.append(Recomputing(fails=frozenset({5})))
        return captures[-1]

    make = CacheSetup.make
    monkeypatch.setattr(CacheSetup, "make", capturing)
    monkeypatch.setattr(runner_module, "CudaCapture", capture_of)
    with LLM(folder, **options) as llm:
        worker, deferred = llm.engine.worker, llm.engine.worker.runner.deferred
        assert captures[0].captured == 4
        worker._budget = Budget(interactive=True)
        worker._budget.spend(1e9)
        assert results(llm.generate(prompts, params)) == expected, "padded to larger steps"
        assert captures[0].captured == 4
        worker._budget = Budget(interactive=False)
        with caplog.at_level(logging.WARNING, "hasten"):
            assert results(llm.generate(prompts, params)) == expected, "captured when they are needed"
        assert captures[0].captured == 5
        assert "preparing the CUDA graph of steps " in caplog.text
        assert caplog.text.count("the engine goes on without it") == 1
        llm.engine.prepare()
        assert results(llm.generate(prompts, params)) == expected
        assert deferred.next is None
        assert captures[0].captured == 6


def batch(make: MakeSequence, work: list[tuple[int, int]]) -> Batch:
    """Sequences with these numbers of tokens to compute, of which these need hidden states."""
    made = Batch()
    for count, needed in work:
        made.add(make(range(1, 1 + count + (needed == 0))), count, [])
        made.needed[-1] = needed
    return made


@pytest.mark.parametrize(
    ("work", "size"),
    [
        ([(1, 1)], Size(1, None)),
        ([(1, 1)] * 5, Size(8, None)),
        ([(1, 1)] * 33, None),
        ([(1, 1), (1, 0)], Size(32, 32)),
        ([(40, 0)], Size(64, 32)),
        ([(60, 1), *[(1, 1)] * 5], Size(80, 32)),
        ([(100, 1)], Size(100, 32)),
        ([(101, 1)], None),
        ([(3, 3), (1, 1)], None),
    ],
    ids=["one", "padded", "too many", "a chunk of one", "a chunk", "mixture", "largest", "too large", "prompt logits"],
)
def test_the_size_of_a_step(work: list[tuple[int, int]], size: Size | None, make_sequence: MakeSequence) -> None:
    made = batch(make_sequence, work)
    assert Sizes.up_to(32, 100).of(StepMessage.of(made, TableRows(40))) == size
