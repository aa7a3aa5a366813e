import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from hasten.bench import suite
from hasten.bench.engines import Generation
from hasten.core.errors import CapacityError, ConfigError

VOCAB_SIZE = 1000


@dataclass
class Clock:
    """Takes a second and a little more a call to the first token of a batch, and half a second for each further one."""

    label: str = "hasten"
    calls: list[tuple[Sequence[Sequence[int]], Sequence[int]]] = field(default_factory=list)
    refuse: Callable[[Sequence[int]], Exception | None] = lambda lengths: None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def generate(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Generation:
        error = self.refuse(lengths)
        if error is not None:
            raise error
        self.calls.append((prompts, lengths))
        # later calls are slower, so that the least is told from the last
        return Generation([[0] * n for n in lengths], 1 + len(self.calls) / 64 + (max(lengths) - 1) / 2)

    def shapes(self) -> list[tuple[int, int]]:
        return [(len(prompts), max(lengths)) for prompts, lengths in self.calls]


def run(engine: Clock, plan: suite.Plan) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for entries in suite.measure(engine, plan, VOCAB_SIZE):
        report |= entries
    return report


def lambada_lengths() -> list[int]:
    rng = random.Random(0)
    return [min(230, max(20, round(rng.gauss(87, 25)))) for _ in range(5153)]


def test_calls_are_those_of_the_peers_benchmark() -> None:
    engine = Clock()
    run(engine, suite.Plan())
    equal = [[(b, 128), *([(b, 128), (b, 1)] * 3)] for b in (1, 16, 64, 256)]
    expected = [(4, 8), *(call for calls in equal for call in calls), (5153, 4)]
    assert engine.shapes()[:-1] == expected
    assert all(len(prompt) == 128 for prompts, _ in engine.calls[:-2] for prompt in prompts)
    assert [len(prompt) for prompt in engine.calls[-2][0]] == lambada_lengths()
    rng = random.Random(0)
    inputs = [rng.randint(100, 1024) for _ in range(1000)]
    outputs = [rng.randint(100, 1024) for _ in range(1000)]
    assert [len(prompt) for prompt in engine.calls[-1][0]] == inputs
    assert list(engine.calls[-1][1]) == outputs


def test_prompts_are_one_random_stream() -> None:
    engine = Clock()
    run(engine, suite.Plan(tests=("lat", "lambada"), num_requests=3, repetitions=1))
    rng = random.Random(0)
    for prompts, _ in engine.calls:
        assert prompts == [[rng.randint(10, VOCAB_SIZE - 10) for _ in prompt] for prompt in prompts]


def test_latency_is_the_least_of_the_repetitions() -> None:
    engine = Clock()
    report = run(engine, suite.Plan(tests=("lat", "fixed"), batch_sizes=(2,), repetitions=2))
    # after the warm-up, calls 2 to 6 are lat's and 7 to 11 are fixed's; the first of each is not timed
    lat, fixed = report["lat_b1"], report["fixed_b2"]
    assert lat["e2e_s"] == 1 + 3 / 64 + 127 / 2
    assert lat["ttft_s"] == 1 + 4 / 64
    assert fixed["e2e_s"] == 1 + 8 / 64 + 127 / 2
    assert fixed["prefill_s"] == 1 + 9 / 64
    for figures, batch, first, step in ((lat, 1, "ttft_s", "ms_per_tok"), (fixed, 2, "prefill_s", "ms_per_step")):
        further = figures["e2e_s"] - figures[first]
        assert set(figures) == {"e2e_s", "tok_s_e2e", first, "tok_s_decode", step}
        assert figures["tok_s_e2e"] == pytest.approx(batch * 128 / figures["e2e_s"])
        assert figures["tok_s_decode"] == pytest.approx(batch * 127 / further)
        assert figures[step] == pytest.approx(1000 * further / 127)


def test_long_prompts_are_a_batch_of_eight() -> None:
    engine = Clock()
    report = run(engine, suite.Plan(tests=("long",), repetitions=2, max_model_len=16_448))
    assert engine.shapes() == [(4, 8), (8, 64), *([(8, 64), (8, 1)] * 2)]
    assert {len(prompt) for prompts, _ in engine.calls[1:] for prompt in prompts} == {16_384}
    figures = report["long"]
    assert figures["ms_per_step"] == pytest.approx(1000 * (figures["e2e_s"] - figures["prefill_s"]) / 63)
    assert figures["tok_s_e2e"] == pytest.approx(8 * 64 / figures["e2e_s"])


def test_figures_of_many_requests() -> None:
    report = run(Clock(), suite.Plan(tests=("lambada", "tput"), max_num_seqs=7, max_model_len=1100))
    lambada, tput = report["lambada"], report["tput"]
    prompt_tokens = sum(lambada_lengths())
    assert lambada["prompt_tok"] == prompt_tokens
    assert lambada["new_tok"] == 4 * 5153
    assert lambada["req_s"] == pytest.approx(5153 / lambada["s"])
    assert lambada["prompt_tok_s"] == pytest.approx(prompt_tokens / lambada["s"])
    rng = random.Random(0)
    inputs = [rng.randint(100, 1024) for _ in range(1000)]
    outputs = [min(rng.randint(100, 1024), 1100 - length) for length in inputs]
    assert (tput["prompt_tok"], tput["out_tok"], tput["max_num_seqs"]) == (sum(inputs), sum(outputs), 7)
    assert tput["out_tok_s"] == pytest.approx(sum(outputs) / tput["s"])
    assert tput["total_tok_s"] == pytest.approx((sum(inputs) + sum(outputs)) / tput["s"])
    assert tput["req_s"] == pytest.approx(1000 / tput["s"])


def test_lambada_in_batches_is_the_sum_of_its_calls() -> None:
    engine = Clock()
    report = run(engine, suite.Plan(tests=("lambada",), num_requests=40, lambada_batch_size=16))
    assert engine.shapes() == [(4, 8), (16, 4), (16, 4), (8, 4)]
    assert report["lambada"]["s"] == sum(1 + call / 64 + 3 / 2 for call in (2, 3, 4))
    assert report["lambada"]["new_tok"] == 160


@pytest.mark.parametrize("error", [CapacityError("no\nroom"), torch.OutOfMemoryError("no\nroom")])
def test_a_workload_that_fails_leaves_the_others(error: Exception) -> None:
    engine = Clock(refuse=lambda lengths: error if len(lengths) == 3 else None)
    report = run(engine, suite.Plan(tests=("fixed", "lambada"), batch_sizes=(2, 3, 5), num_requests=4))
    assert set(report) == {"fixed_b2", "fixed_error", "lambada"}
    assert report["fixed_error"] == f"{type(error).__name__}: no room"
    assert suite.errors(report) == {"fixed_error": report["fixed_error"]}


def test_a_warm_up_that_fails_ends_the_suite() -> None:
    report = run(Clock(refuse=lambda lengths: CapacityError("no room")), suite.Plan())
    assert report == {"warmup_error": "CapacityError: no room"}


def test_what_nobody_foresaw_is_no_result() -> None:
    with pytest.raises(ZeroDivisionError):
        run(Clock(refuse=lambda lengths: ZeroDivisionError()), suite.Plan())


def test_hugging_face_is_spared_what_would_take_hours() -> None:
    plan, left_out = suite.hf_plan(suite.Plan(), 64)
    assert (plan.tests, plan.batch_sizes, plan.lambada_batch_size) == (("lat", "fixed", "lambada"), (16, 64), 16)
    assert left_out == ["fixed_b256", "tput"]
    plan, left_out = suite.hf_plan(suite.Plan(tests=("fixed", "lambada"), batch_sizes=(2, 3)), 1)
    assert (plan.tests, left_out) == (("lambada",), ["fixed_b2", "fixed_b3"])
    assert suite.hf_plan(suite.Plan(tests=("lat",)), 64)[1] == []
    plan, left_out = suite.hf_plan(suite.Plan(tests=("long", "lat"), max_model_len=16_448), 64)
    assert (plan.tests, left_out) == (("lat",), ["long"])


@pytest.mark.parametrize(
    ("learned", "tests", "left_out"),
    [
        (None, suite.DEFAULT_TESTS, []),
        (2048, suite.DEFAULT_TESTS, []),
        (1025, suite.DEFAULT_TESTS, []),
        (1024, ("lat", "fixed", "lambada"), ["tput"]),
        (255, ("lambada",), ["lat", "fixed", "tput"]),
        (100, (), ["lat", "fixed", "lambada", "tput"]),
    ],
)
def test_what_learned_positions_hold(learned: int | None, tests: tuple[str, ...], left_out: list[str]) -> None:
    plan, found = suite.fitting(suite.Plan(), learned)
    assert (plan.tests, found, plan.max_model_len) == (tests, left_out, min(learned or 2048, 2048))
    run(Clock(), plan)


def test_speedups_are_ratios_of_times_that_both_have() -> None:
    ours = {"init_s": 1.0, "lat_b1": {"e2e_s": 2.0, "tok_s_e2e": 64.0, "ttft_s": 0.5}, "tput": {"s": 9.0}}
    theirs = {
        "init_s": 9.0,
        "left_out": ["tput"],
        "lat_b1": {"e2e_s": 3.0, "tok_s_e2e": 43.0, "ttft_s": 0.25},
        "lambada": {"s": 1.0},
        "fixed_error": "CapacityError: no room",
    }
    assert suite.speedups(ours, theirs) == {"lat_b1": {"e2e_s": 1.5, "ttft_s": 0.5}}
    assert suite.errors({**ours, "hf": theirs}) == {"hf fixed_error": "CapacityError: no room"}


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    plan = suite.Plan(tests=("lat", "tput"), num_requests=3, repetitions=1)
    ours = run(Clock(), plan)
    theirs = {"left_out": ["tput"], "lat_b1": ours["lat_b1"]}
    speedup = suite.speedups(ours, theirs)
    suite.show({"engine": "hasten", "model": "tiny", "init_s": 2.0, **ours, "hf": theirs, "speedup": speedup})
    title, _, head, _, *rows = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert title == "tiny: ready after 2.0 s; Hugging Face left out of tput"
    assert head.startswith("workload")
    assert [row.split()[:2] for row in rows if row] == [
        ["lat_b1", "hasten"],
        ["lat_b1", "HF"],
        ["lat_b1", "speedup"],
        ["tput", "hasten"],
    ]
    assert rows[2].split()[2:] == ["1", "1", "1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tests": ("lat", "lamda")}, "'lamda' is no test"),
        ({"repetitions": 0}, "repetitions must be at least 1"),
        ({"tests": ("long",)}, "long needs a max_model_len of 16448 or more, got 2048"),
    ],
)
def test_plans_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        suite.Plan(**options)
