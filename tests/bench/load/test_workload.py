import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hasten.bench.load.lengths import Lengths
from hasten.bench.load.prompts import PromptWriter
from hasten.bench.load.workload import Conversation, Schedule, Workload, WorkloadOptions
from hasten.core.errors import ConfigError
from hasten.engine.text import Tokenizer

DEMO = Path(__file__).parents[3] / "examples" / "demo-model"


@pytest.fixture(scope="module")
def writer() -> PromptWriter:
    return PromptWriter(Tokenizer.from_folder(DEMO))


def plan(
    writer: PromptWriter, run: int = 0, *, takes_ids: bool = True, schedule: Schedule | None = None, **options: Any
) -> list[Conversation]:
    lengths = ("prompt_length", "output_length", "turns")
    parsed: dict[str, Any] = {
        name: Lengths.parse(value) if name in lengths else value for name, value in options.items()
    }
    workload = Workload(WorkloadOptions(**parsed), writer, takes_ids=takes_ids)
    return workload.plan(run, schedule or Schedule(rate=float("inf"), num_prompts=20))


@pytest.mark.parametrize("length", [1, 2, 17, 300])
def test_texts_have_as_many_tokens_as_they_should(writer: PromptWriter, length: int) -> None:
    for seed in range(20):
        assert writer.count(writer.text(length, random.Random(seed))) == length
    longer = writer.text(length + 5, random.Random(3))
    assert longer.startswith(writer.text(length, random.Random(3)))


def test_random_prompts_of_ids() -> None:
    many = Schedule(rate=float("inf"), num_prompts=200)
    options: dict[str, Any] = {"prompt_length": "3:9", "output_length": "2:4", "shared_prefix": 6}
    result = plan(PromptWriter(None, 500), schedule=many, **options)
    prompts = [each.turns[0].prompt for each in result]
    assert {len(prompt) for prompt in prompts} == set(range(9, 16))
    assert {each.turns[0].output_length for each in result} == {2, 3, 4}
    assert len({tuple(prompt[:6]) for prompt in prompts}) == 1
    assert len({tuple(prompt[6:]) for prompt in prompts}) == 200
    assert all(0 <= int(token) < 500 for prompt in prompts for token in prompt)


def test_runs_have_prompts_of_their_own_and_seeds_repeat_them(writer: PromptWriter) -> None:
    options: dict[str, Any] = {"prompt_length": "8", "shared_prefix": 4}
    assert plan(writer, 0, **options) == plan(writer, 0, **options)
    first, second = (plan(writer, run, **options)[0].turns[0].prompt for run in (0, 1))
    assert first[:4] == second[:4]
    assert first != second
    assert plan(writer, 0, **options) != plan(writer, 0, seed=1, **options)


def test_conversations_are_texts(writer: PromptWriter) -> None:
    result = plan(writer, turns="2:3", prompt_length="5", shared_prefix=7)
    assert {len(each.turns) for each in result} == {2, 3}
    prompts = [str(each.turns[0].prompt) for each in result]
    assert [writer.count(prompt) for prompt in prompts] == [12] * 20
    assert all(writer.count(str(each.turns[1].prompt)) == 5 for each in result)


def test_ids_without_a_tokenizer_need_the_size_of_the_vocabulary() -> None:
    with pytest.raises(ConfigError, match="random prompts need --tokenizer, or --vocab-size for the API openai"):
        plan(PromptWriter(None))
    with pytest.raises(ConfigError, match="prompts that are texts need --tokenizer: a folder, or a Hugging Face id"):
        plan(PromptWriter(None, 500), takes_ids=False)


def test_a_schedule_ends_at_its_number_or_its_duration(writer: PromptWriter) -> None:
    def times(**options: Any) -> list[float]:
        return [each.at for each in plan(writer, schedule=Schedule(process="constant", **options), prompt_length="1")]

    assert times(rate=4.0, num_prompts=3) == [0, 0.25, 0.5]
    assert times(rate=4.0, duration=1.0) == [0, 0.25, 0.5, 0.75]
    assert times(rate=4.0, duration=1.0, num_prompts=2) == [0, 0.25]
    assert len(times(rate=4.0)) == 100
    with pytest.raises(ConfigError, match="give --num-prompts, too"):
        Schedule(rate=float("inf"), duration=1.0)


@pytest.fixture
def sharegpt(tmp_path: Path) -> str:
    path = tmp_path / "sharegpt.json"
    said = [("human", "The river"), ("gpt", "was quiet and cold"), ("human", "Why"), ("gpt", "Because")]
    turns = [{"from": role, "value": text} for role, text in said]
    path.write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:2]}]))
    return str(path)


def test_answers_of_a_data_set_say_how_long_outputs_are(writer: PromptWriter, sharegpt: str) -> None:
    result = plan(writer, dataset="sharegpt", path=sharegpt, turns="2")
    assert [len(each.turns) for each in result[:4]] == [2, 1, 2, 1]
    assert result[0].turns[0].output_length == writer.count("was quiet and cold")
    single = plan(PromptWriter(None), dataset="sharegpt", path=sharegpt, output_length="9")
    assert [(turn.prompt, turn.output_length) for turn in single[0].turns] == [("The river", 9)]
    with pytest.raises(ConfigError, match="give --output-length, or --tokenizer to count their tokens"):
        plan(PromptWriter(None), dataset="sharegpt", path=sharegpt)


def test_prompts_are_not_repeated_before_the_data_set_ends(writer: PromptWriter, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"text {n}", "output_length": n + 1}) + "\n" for n in range(5)))
    workload = Workload(WorkloadOptions(dataset="prompts", path=str(path)), writer, takes_ids=False)
    schedule = Schedule(rate=float("inf"), num_prompts=2)
    found = [each.turns[0].prompt for run in range(3) for each in workload.plan(run, schedule)]
    assert found == ["text 0", "text 1", "text 2", "text 3", "text 4", "text 0"]


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.jsonl"
    entries = [(5000, 1500, [1, 2, 3]), (5500, 1030, [1, 2, 9]), (9000, 20, [])]
    path.write_text(
        "".join(
            json.dumps({"timestamp": at, "input_length": length, "output_length": 2, "hash_ids": ids}) + "\n"
            for at, length, ids in entries
        )
    )
    return str(path)


def test_a_trace_keeps_its_times_and_shares_its_blocks(trace: str) -> None:
    own = Schedule(rate=None)
    result = plan(PromptWriter(None, 500), schedule=own, dataset="trace", path=trace)
    assert [each.at for each in result] == [0, 0.5, 4]
    first, second, third = (each.turns[0].prompt for each in result)
    assert [len(first), len(second), len(third)] == [1500, 1030, 20]
    assert first[:1024] == second[:1024]
    assert first[1024:1030] != second[1024:]
    again = plan(PromptWriter(None, 500), 1, schedule=own, dataset="trace", path=trace)
    assert again[0].turns[0].prompt != first
    assert [
        each.at for each in plan(PromptWriter(None, 500), schedule=Schedule(rate=4.0), dataset="trace", path=trace)
    ] == [
        *(0, 0.0625, 0.5),
    ]
    short = Schedule(rate=None, duration=0.5)
    assert len(plan(PromptWriter(None, 500), schedule=short, dataset="trace", path=trace)) == 1


def test_a_trace_as_texts(writer: PromptWriter, trace: str) -> None:
    result = plan(writer, schedule=Schedule(rate=None), dataset="trace", path=trace, takes_ids=False)
    first, second = (str(each.turns[0].prompt) for each in result[:2])
    assert [writer.count(first), writer.count(second)] == [1500, 1030]
    same = next(index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert writer.count(first[:same]) == pytest.approx(1024, abs=2)


def test_token_ids_cannot_be_sent_to_every_api(writer: PromptWriter, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": [1, 2], "output_length": 1}\n')
    assert plan(writer, dataset="prompts", path=str(path))[0].turns[0].prompt == [1, 2]
    with pytest.raises(ConfigError, match="has prompts of token ids, which the API openai alone takes"):
        plan(writer, dataset="prompts", path=str(path), takes_ids=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "prompts"}, "--dataset-path is the file"),
        ({"path": "x"}, "--dataset-path is the file"),
        ({"dataset": "trace", "path": "x", "shared_prefix": 3}, "are of random prompts"),
        ({"dataset": "prompts", "path": "x", "turns": Lengths(2, 2)}, "--turns has no meaning for the dataset prompts"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorkloadOptions(**options)


def test_times_are_sorted(writer: PromptWriter) -> None:
    times = [each.at for each in plan(writer, schedule=Schedule(rate=50.0, num_prompts=30), prompt_length="1")]
    assert all(before <= after for before, after in pairwise(times))
