"""The standard workloads of other engines' benchmarks, one after the other on one engine.

Lengths, seeds, their order and the names of the figures are those of the peers' benchmark, so that results lie side by
side. Prompts are random token ids; each measurement is one generate call whose requests all arrive at once:

- `lat`: one request, 128 tokens in and 128 out, and the same with 1 out; after an untimed call, the least of some
  repetitions of each. A further token takes the difference of the two over 127.
- `fixed`: the same for batches.
- `lambada`: many requests of about 87 tokens in and 4 out, once.
- `tput`: many requests of 100 to 1024 tokens in and out, once.
- `long`: as `fixed`, 8 requests of 16,384 tokens in and 64 out. Only where it is named: such sequences need memory.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NotRequired, TypedDict

import torch

from hasten.bench.engines import Engine, Generation, in_batches
from hasten.bench.report import Environment, print_table
from hasten.bench.workloads import Workload, fixed, lambada, long, tput
from hasten.core.errors import ConfigError, HastenError

TESTS = ("lat", "fixed", "lambada", "tput", "long")
DEFAULT_TESTS = TESTS[:4]
FAILURES = (HastenError, torch.OutOfMemoryError)
"""What ends one workload and not the whole suite."""

_LENGTH = 128
_HF_LAMBADA_BATCH = 16

Figures = dict[str, float]
"""What was measured on one workload, under the peers' names."""


class SuiteReport(TypedDict):
    """What is written: besides these, the figures of each workload under its name, such as `lat_b1`."""

    engine: str
    model: str
    init_s: float
    vocab_size: int
    environment: Environment
    left_out: NotRequired[list[str]]
    hf: NotRequired[dict[str, Any]]
    speedup: NotRequired[dict[str, dict[str, float]]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure; the defaults are what peers are measured on."""

    tests: tuple[str, ...] = DEFAULT_TESTS
    batch_sizes: tuple[int, ...] = (16, 64, 256)
    """Of `fixed`."""
    num_requests: int | None = None
    """Of `lambada` and `tput`; None is 5153 and 1000."""
    repetitions: int = 3
    """Of `lat`, `fixed` and `long`."""
    max_model_len: int = 2048
    """Outputs of `tput` end there."""
    max_num_seqs: int = 256
    lambada_batch_size: int | None = None
    """Requests in one generate call of `lambada`; None is all of them."""

    def __post_init__(self) -> None:
        for test in self.tests:
            if test not in TESTS:
                raise ConfigError(f"{test!r} is no test of the suite; choose among {', '.join(TESTS)}")
        if self.repetitions < 1:
            raise ConfigError(f"repetitions must be at least 1, got {self.repetitions}")
        if "long" in self.tests and self.max_model_len < long().max_len:
            raise ConfigError(f"long needs a max_model_len of {long().max_len} or more, got {self.max_model_len}")


def fitting(plan: Plan, learned: int | None) -> tuple[Plan, list[str]]:
    """What of a plan a model can compute that has learned so many positions, and the tests that are left out."""
    if learned is None or learned >= plan.max_model_len:
        return plan, []
    least = {
        "lat": 2 * _LENGTH,
        "fixed": 2 * _LENGTH,
        "lambada": lambada(plan.num_requests).max_len,
        "tput": max(tput(plan.num_requests).prompt_lengths) + 1,  # its outputs end where sequences do
        "long": long().max_len,
    }
    left_out = [test for test in plan.tests if least[test] > learned]
    tests = tuple(test for test in plan.tests if test not in left_out)
    return replace(plan, tests=tests, max_model_len=learned), left_out


def hf_plan(plan: Plan, largest_batch: int) -> tuple[Plan, list[str]]:
    """What of a plan Hugging Face is measured on, and the workloads that are left out.

    It computes a batch's padding as well and frees nothing before the longest output ends: `tput` would take hours, so
    would large batches. `long` exceeds what most GPUs hold without a paged cache.
    """
    sizes = tuple(size for size in plan.batch_sizes if size <= largest_batch)
    too_large = {"tput", "long"}
    without = too_large if sizes else too_large | {"fixed"}
    left_out = [f"fixed_b{size}" for size in plan.batch_sizes if size > largest_batch and "fixed" in plan.tests]
    left_out += [test for test in plan.tests if test in too_large]
    tests = tuple(test for test in plan.tests if test not in without)
    return replace(plan, tests=tests, batch_sizes=sizes, lambada_batch_size=_HF_LAMBADA_BATCH), left_out


def measure(engine: Engine, plan: Plan, vocab_size: int) -> Iterator[dict[str, Any]]:
    """Run the tests of a plan in order, after a small untimed batch; yields what each adds to a report.

    A test that fails adds its error as `NAME_error`, with what it had measured until then.
    """
    run = _Run(engine, plan, vocab_size)
    failed = _entries("warmup", run.warm_up())
    if failed:
        yield failed
        return
    tests: dict[str, Callable[[], Iterable[tuple[str, Figures]]]] = {
        "lat": run.lat,
        "fixed": run.fixed,
        "lambada": run.lambada,
        "tput": run.tput,
        "long": run.long,
    }
    for test in plan.tests:
        yield _entries(test, tests[test]())


def _entries(test: str, parts: Iterable[tuple[str, Figures]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    try:
        for name, figures in parts:
            entries[name] = figures
    except FAILURES as error:
        entries[f"{test}_error"] = describe(error)
    return entries


def describe(error: BaseException) -> str:
    """An error as a report has it: kind and message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class _Run:
    """The tests on one engine. One random stream goes through all prompts, in the order of the peers' benchmark."""

    def __init__(self, engine: Engine, plan: Plan, vocab_size: int) -> None:
        self._engine = engine
        self._plan = plan
        self._vocab_size = vocab_size
        self._rng = random.Random(0)

    def warm_up(self) -> Iterator[tuple[str, Figures]]:
        """Yield nothing: what an engine does once, it does here."""
        self._generate(fixed(4, _LENGTH, 8))
        yield from ()

    def lat(self) -> Iterator[tuple[str, Figures]]:
        """Yield the figures of a single request."""
        yield "lat_b1", self._equal(fixed(1, _LENGTH, _LENGTH), first="ttft_s", step="ms_per_tok")

    def fixed(self) -> Iterator[tuple[str, Figures]]:
        """Yield the figures of each batch."""
        for size in self._plan.batch_sizes:
            yield f"fixed_b{size}", self._equal(fixed(size, _LENGTH, _LENGTH), first="prefill_s", step="ms_per_step")

    def long(self) -> Iterator[tuple[str, Figures]]:
        """Yield the figures of a batch of long prompts."""
        yield "long", self._equal(long(), first="prefill_s", step="ms_per_step")

    def lambada(self) -> Iterator[tuple[str, Figures]]:
        """Yield the figures of many short requests."""
        workload = lambada(self._plan.num_requests)
        generation = self._generate(workload, self._plan.lambada_batch_size)
        prompt_tokens = sum(workload.prompt_lengths)
        yield (
            "lambada",
            {
                "s": generation.seconds,
                "req_s": len(workload.prompt_lengths) / generation.seconds,
                "prompt_tok": prompt_tokens,
                "prompt_tok_s": prompt_tokens / generation.seconds,
                "new_tok": _count(generation),
            },
        )

    def tput(self) -> Iterator[tuple[str, Figures]]:
        """Yield the figures of many requests of mixed lengths."""
        workload = tput(self._plan.num_requests, self._plan.max_model_len)
        generation = self._generate(workload)
        prompt_tokens, output_tokens = sum(workload.prompt_lengths), _count(generation)
        yield (
            "tput",
            {
                "s": generation.seconds,
                "out_tok": output_tokens,
                "out_tok_s": output_tokens / generation.seconds,
                "prompt_tok": prompt_tokens,
                "total_tok_s": (prompt_tokens + output_tokens) / generation.seconds,
                "req_s": len(workload.prompt_lengths) / generation.seconds,
                "max_num_seqs": self._plan.max_num_seqs,
            },
        )

    def _equal(self, whole: Workload, *, first: str, step: str) -> Figures:
        short = replace(whole, output_lengths=(1,) * len(whole.output_lengths))
        self._generate(whole)
        to_last, to_first = [], []
        for _ in range(self._plan.repetitions):
            to_last.append(self._generate(whole).seconds)
            to_first.append(self._generate(short).seconds)
        total, batch_size, output_length = min(to_last), len(whole.output_lengths), whole.output_lengths[0]
        decoding = total - min(to_first)
        return {
            "e2e_s": total,
            "tok_s_e2e": batch_size * output_length / total,
            first: min(to_first),
            "tok_s_decode": batch_size * (output_length - 1) / decoding,
            step: 1000 * decoding / (output_length - 1),
        }

    def _generate(self, workload: Workload, batch_size: int | None = None) -> Generation:
        prompts = workload.prompts(self._vocab_size, self._rng)
        return in_batches(self._engine.generate, prompts, workload.output_lengths, batch_size)


def _count(generation: Generation) -> int:
    return sum(map(len, generation.token_ids))


_TIMES = ("e2e_s", "ttft_s", "prefill_s", "ms_per_tok", "ms_per_step", "s")
"""Names of the figures that are times."""


def speedups(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Figures]:
    """How many times as fast the first is, in each time of each workload that both were measured on."""
    return {
        name: {key: figures[key] / ours[name][key] for key in _TIMES if key in figures}
        for name, figures in theirs.items()
        if isinstance(figures, dict) and name in ours
    }


def errors(report: Mapping[str, Any]) -> dict[str, str]:
    """What failed, Hugging Face's failures included."""
    ours = {name: text for name, text in report.items() if name.endswith("_error")}
    theirs = {f"hf {name}": text for name, text in report.get("hf", {}).items() if name.endswith("_error")}
    return ours | theirs


_COLUMNS = {
    "seconds": ("e2e_s", "s"),
    "first token s": ("ttft_s", "prefill_s"),
    "ms a step": ("ms_per_tok", "ms_per_step"),
    "output tokens/s": ("tok_s_e2e", "out_tok_s"),
    "prompt tokens/s": ("prompt_tok_s",),
    "requests/s": ("req_s",),
}
"""Columns of the table, and the figures that stand in them."""


def show(report: Mapping[str, Any]) -> None:
    """Print a table."""
    hf = report.get("hf", {})
    title = f"{report['model']}: ready after {report['init_s']:.1f} s"
    if hf.get("left_out"):
        title += f"; Hugging Face left out of {', '.join(hf['left_out'])}"
    rows = []
    for name in (name for name, figures in report.items() if _is_workload(name, figures)):
        rows.append(_row(name, report["engine"], report[name]))
        if name in hf:
            rows += [_row(name, "HF", hf[name]), _row(name, "speedup", report["speedup"][name])]
    print_table(title, ("workload", "engine", *_COLUMNS), rows)


def _is_workload(name: str, figures: Any) -> bool:
    return name.partition("_")[0] in TESTS and isinstance(figures, dict)


def _row(name: str, engine: str, figures: Mapping[str, float]) -> tuple[str, ...]:
    cells = [next((_number(figures[key]) for key in keys if key in figures), "") for keys in _COLUMNS.values()]
    return name, engine, *cells


def _number(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.4g}"
