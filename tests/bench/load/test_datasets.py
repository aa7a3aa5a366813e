import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hasten.bench.load.datasets import Exchange, TraceEntry, read_conversations, read_prompts, read_trace
from hasten.core.errors import ConfigError

SHAREGPT = [
    {"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    {"conversations": [{"from": "gpt", "value": "Nobody asked."}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "1"},
            {"role": "user", "content": "Two?"},
        ]
    },
]
CONVERSATIONS = [[Exchange("Hi", "Hello.")], [Exchange("One?", "1"), Exchange("Two?")]]


def lines(tmp_path: Path, *entries: Any) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in entries) + "\n")
    return str(path)


def test_conversations_as_an_array_or_as_lines(tmp_path: Path) -> None:
    array = tmp_path / "sharegpt.json"
    array.write_text(json.dumps(SHAREGPT, indent=1))
    assert read_conversations(str(array)) == CONVERSATIONS
    assert read_conversations(lines(tmp_path, *SHAREGPT)) == CONVERSATIONS


def test_prompts(tmp_path: Path) -> None:
    path = lines(tmp_path, {"prompt": "once", "output_length": 7}, "", {"prompt": [1, 2]}, {"text": "more"})
    assert read_prompts(path) == [
        [Exchange("once", output_length=7)],
        [Exchange([1, 2])],
        [Exchange("more")],
    ]


def test_a_trace_is_sorted_by_time(tmp_path: Path) -> None:
    path = lines(
        tmp_path,
        {"timestamp": 2500, "input_length": 600, "output_length": 4, "hash_ids": [0, 7]},
        {"timestamp": 1000.5, "prompt": "once", "output_length": 3},
    )
    assert read_trace(path) == [TraceEntry(1.0005, 3, "once"), TraceEntry(2.5, 4, None, 600, (0, 7))]


BAD: list[tuple[Callable[[str], Any], Any, str]] = [
    (read_prompts, "not json", "line 2: not JSON"),
    (read_prompts, "[1]", "line 2: not a JSON object"),
    (read_prompts, {"promt": "once"}, 'line 2: "prompt" is neither a text nor a list of token ids'),
    (read_prompts, {"prompt": [1, "two"]}, 'line 2: "prompt" is neither a text nor a list of token ids'),
    (read_prompts, {"prompt": "a \ud800"}, "line 2: the text is not valid UTF-8"),
    (
        read_prompts,
        {"prompt": "once", "output_length": 0},
        'line 2: "output_length" is not a whole number of at least 1',
    ),
    (read_conversations, {"turns": []}, 'line 2: no list "conversations" or "messages"'),
    (read_conversations, {"messages": [{"role": "user"}]}, "line 2: a message is not an object with strings"),
    (read_trace, {"output_length": 1, "input_length": 1}, 'line 2: "timestamp" is not a number of milliseconds'),
    (read_trace, {"timestamp": -1, "output_length": 1, "input_length": 1}, 'line 2: "timestamp" is not a number'),
    (read_trace, {"timestamp": 0, "input_length": 1}, 'line 2: "output_length" is not a whole number of at least 1'),
    (read_trace, {"timestamp": 0, "output_length": 1}, 'line 2: "input_length" is not a whole number of at least 1'),
    (
        read_trace,
        {"timestamp": 0, "output_length": 1, "input_length": 1, "hash_ids": ["a"]},
        'line 2: "hash_ids" is not a list of whole numbers',
    ),
]
GOOD: dict[Callable[[str], Any], Any] = {
    read_prompts: {"prompt": "once"},
    read_conversations: SHAREGPT[0],
    read_trace: {"timestamp": 0, "output_length": 1, "input_length": 1},
}


@pytest.mark.parametrize(("read", "entry", "message"), BAD)
def test_a_wrong_line_is_named(tmp_path: Path, read: Callable[[str], Any], entry: Any, message: str) -> None:
    path = lines(tmp_path, GOOD[read], entry)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, {message}")


def test_a_wrong_entry_of_an_array_is_named(tmp_path: Path) -> None:
    path = lines(tmp_path, "[{}]")
    with pytest.raises(ConfigError, match='entry 1: no list "conversations" or "messages"'):
        read_conversations(path)
    with pytest.raises(ConfigError, match="entry 1: not a JSON object"):
        read_conversations(lines(tmp_path, "[7]"))


@pytest.mark.parametrize("read", GOOD)
def test_files_that_are_empty_or_missing(tmp_path: Path, read: Callable[[str], Any]) -> None:
    with pytest.raises(ConfigError, match="has no"):
        read(lines(tmp_path, ""))
    with pytest.raises(ConfigError, match=r"cannot read the dataset .*: No such file or directory"):
        read(str(tmp_path / "missing"))
