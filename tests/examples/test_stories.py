"""The story generator and the test stories that are shipped."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
from tests.waiting import LIMIT_S

STORIES = Path(__file__).resolve().parents[2] / "examples" / "stories"
TEST_FILE = STORIES / "test.jsonl"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The generator, imported the way that its own folder's scripts import it."""
    sys.path.insert(0, str(STORIES))
    try:
        return importlib.import_module("generate")
    finally:
        sys.path.remove(str(STORIES))


@pytest.fixture(scope="module")
def shipped(generate: ModuleType) -> list[str]:
    """The texts of the shipped test file."""
    texts: list[str] = generate.read_stories(TEST_FILE)
    return texts


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


def _templates(generate: ModuleType) -> list[str]:
    plots = importlib.import_module("plots")
    shared = [*plots.OPENERS, *plots.FILLERS, *(t for ts in plots.DISTRACTIONS.values() for t in ts)]
    reported = [
        template
        for plot in plots.PLOTS
        for phrasings in (*plot.facts, plot.bridge, plot.endings)
        for template in phrasings
    ]
    return [*shared, *reported]


def test_same_seed_same_stories(generate: ModuleType) -> None:
    first = list(islice(generate.stories(5), 50))
    assert first == list(islice(generate.stories(5), 50))
    assert first != list(islice(generate.stories(6), 50))


def test_shipped_file_is_what_the_documented_command_writes(tmp_path: Path) -> None:
    output = tmp_path / "test.jsonl"
    command = [sys.executable, str(STORIES / "generate.py")]
    command += ["--count", "512", "--seed", "2024", "--output", str(output)]
    subprocess.run(command, check=True, timeout=LIMIT_S)
    assert output.read_bytes() == TEST_FILE.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["test.jsonl"]


def test_shipped_stories_are_512_and_distinct(shipped: list[str]) -> None:
    assert len(shipped) == 512
    assert len(set(shipped)) == 512


def test_shipped_lines_are_lambada_records() -> None:
    for line in TEST_FILE.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        assert list(record) == ["text"]


def test_last_word_is_said_sentences_earlier_and_not_since(generate: ModuleType, shipped: list[str]) -> None:
    for text in [*shipped, *islice(generate.stories(11), 2000)]:
        sentences = text.split(". ")
        answer = _words(text)[-1]
        assert text.endswith(f" {answer}")
        assert any(answer in _words(sentence) for sentence in sentences[:-3]), text
        assert not any(answer in _words(sentence) for sentence in sentences[-3:-1]), text
        assert _words(sentences[-1]).count(answer) == 1, text


def test_length(generate: ModuleType, shipped: list[str]) -> None:
    for text in [*shipped, *islice(generate.stories(12), 2000)]:
        assert 50 <= len(text.split(" ")) <= 90
        assert 4 <= len(text.split(". ")) <= 8
        assert text == " ".join(text.split())


def test_every_story_names_another_word_of_the_answers_kind(generate: ModuleType, shipped: list[str]) -> None:
    kinds = {str(word): kind for kind, words in generate.LEXICON.items() for word in words}
    for text in shipped:
        words = set(_words(text))
        kind = kinds[_words(text)[-1]]
        assert sum(kinds.get(word) == kind for word in words) >= 2, text


def test_lexicon_is_large_and_apart_from_the_templates(generate: ModuleType) -> None:
    lexicon = generate.LEXICON
    words = [str(word).lower() for kind in lexicon.values() for word in kind]
    assert len(words) == len(set(words))
    assert len(lexicon["name"]) >= 60
    assert len(lexicon["object"]) >= 120
    assert len(lexicon["place"]) >= 40
    for template in _templates(generate):
        plain = re.sub(r"\{[^}]*\}", "", template).lower()
        assert not set(_words(plain)) & set(words), template


def test_every_phrasing_can_be_told(generate: ModuleType) -> None:
    """No template names a slot that its plot lacks, and an ending ends with its answer."""
    plots = importlib.import_module("plots")
    for plot in plots.PLOTS:
        slots = {*plot.slots, "Z"}
        for template in [t for ts in (*plot.facts, plot.bridge, plot.endings) for t in ts]:
            assert set(re.findall(r"\{(\w+)", template)) <= slots, (plot.name, template)
        for ending in plot.endings:
            assert re.search(rf" \{{{plot.answer}(\.a)?\}}$", ending), (plot.name, ending)
            assert ending.count(f"{{{plot.answer}") == 1, (plot.name, ending)
        for template in plot.bridge:
            assert f"{{{plot.answer}" not in template, (plot.name, template)


def test_a_cast_has_a_different_word_for_every_slot(generate: ModuleType) -> None:
    rng = random.Random(3)
    for plot in generate.PLOTS:
        for _ in range(100):
            cast = generate._cast(rng, plot)
            assert len(set(cast.values())) == len(cast) == len(plot.slots) + 1
            assert cast["Z"] in generate.LEXICON[generate.answer_kind(plot)]


def test_excluded_stories_are_left_out(generate: ModuleType, tmp_path: Path) -> None:
    excluded = list(islice(generate.stories(5), 10))
    left = list(islice(generate.stories(5, exclude=excluded), 40))
    assert left == list(islice(generate.stories(5), 50))[10:]

    exclude, output = tmp_path / "exclude.jsonl", tmp_path / "out.jsonl"
    generate.write_stories(exclude, excluded)
    arguments = ["--count", "40", "--seed", "5", "--exclude", str(exclude), "--output", str(output)]
    assert generate.main(arguments) == 0
    assert generate.read_stories(output) == left


def test_a_word_follows_the_right_article(generate: ModuleType, shipped: list[str]) -> None:
    for text in shipped:
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", text), text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json\n", "line 1: not JSON"),
        ('{"text": "One two"}\n["x"]\n', 'line 2: expected {"text": "..."}'),
        ('{"words": 3}\n', 'line 1: expected {"text": "..."}'),
        (None, "cannot read"),
    ],
)
def test_bad_exclude_file_is_one_line_and_status_2(
    generate: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    message: str,
) -> None:
    exclude, output = tmp_path / "exclude.jsonl", tmp_path / "out.jsonl"
    if content is not None:
        exclude.write_text(content, encoding="utf-8")
    arguments = ["--count", "1", "--seed", "1", "--exclude", str(exclude), "--output", str(output)]
    assert generate.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(exclude) in error
    assert error.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize("count", ["0", "-3"])
def test_bad_count_is_one_line_and_status_2(
    generate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: str
) -> None:
    output = tmp_path / "out.jsonl"
    assert generate.main(["--count", count, "--seed", "1", "--output", str(output)]) == 2
    assert f"--count must be at least 1, got {count}" in capsys.readouterr().err
    assert not output.exists()


def test_missing_output_folder_is_one_line_and_status_2(
    generate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "nowhere" / "out.jsonl"
    assert generate.main(["--count", "1", "--seed", "1", "--output", str(output)]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_output_that_is_not_a_regular_file_is_left_alone(
    generate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "pipe"
    os.mkfifo(output)
    assert generate.main(["--count", "1", "--seed", "1", "--output", str(output)]) == 2
    assert "not a regular file" in capsys.readouterr().err
    assert output.is_fifo()
    assert list(tmp_path.iterdir()) == [output]
