import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from hasten.bench import lambada
from hasten.bench.engines import Engine, Generation, HastenEngine, HuggingFaceEngine
from hasten.core.errors import ConfigError
from hasten.engine.llm import LLM
from hasten.engine.text import Tokenizer


def write(folder: Path, *texts: str) -> str:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


TEXTS = (
    "Anna walked to the river",
    "Ben had opened the old window before the evening storm",
    "Clara said that she never promised  him  the violin",
    "the café was quietly closed and David found his coat",
    "he remembered the garden",
)


def test_texts_are_cut_before_their_last_word(tmp_path: Path) -> None:
    cut = list(lambada.read_texts(write(tmp_path, *TEXTS)))
    assert cut[0] == ("Anna walked to the", " river")
    assert [context + target for context, target in cut] == list(TEXTS)
    assert all(target.startswith(" ") and target.count(" ") == 1 for _, target in cut)


def test_blank_lines_are_no_texts(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a b"}\n\n{"text": "c d", "domain": "x"}\n\n')
    assert list(lambada.read_texts(str(path))) == [("a", " b"), ("c", " d")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", "line 2: not JSON"),
        ('{"txt": "a b"}', 'line 2: not an object with a string "text"'),
        ('{"text": 5}', 'line 2: not an object with a string "text"'),
        ('["text"]', 'line 2: not an object with a string "text"'),
        ('{"text": "word"}', "line 2: a text needs at least two words"),
        ('{"text": " word"}', "line 2: a text needs at least two words"),
        ('{"text": ""}', "line 2: a text needs at least two words"),
        ('{"text": "two words "}', "no space behind the last"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a b"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        list(lambada.read_texts(str(path)))


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_no_dataset(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the dataset"):
        list(lambada.read_texts(str(tmp_path / name)))


def test_an_empty_dataset(tmp_path: Path, tiny_bloom: Path) -> None:
    with pytest.raises(ConfigError, match="holds no text"):
        lambada.read_samples(write(tmp_path), Tokenizer.from_folder(tiny_bloom))


def test_samples_are_encoded_as_pairs(tmp_path: Path, tiny_bloom: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tiny_bloom)
    for sample in lambada.read_samples(write(tmp_path, *TEXTS), Tokenizer.from_folder(tiny_bloom)):
        assert sample.prompt_ids + sample.target_ids == reference(sample.prompt, sample.target).input_ids
        assert sample.target_ids == reference(sample.target).input_ids


@dataclass
class Oracle:
    """Knows the targets, but for the samples in `wrong`, of which it gets the last token wrong."""

    samples: Sequence[lambada.Sample]
    wrong: Sequence[int] = ()
    label: str = "oracle"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    lengths: list[list[int]] = field(default_factory=list)

    def generate(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Generation:
        self.lengths.append(list(lengths))
        answers = {tuple(sample.prompt_ids): list(sample.target_ids) for sample in self.samples}
        for index in self.wrong:
            answers[tuple(self.samples[index].prompt_ids)][-1] = 0
        output = [(answers[tuple(p)] + [9] * n)[:n] for p, n in zip(prompts, lengths, strict=True)]
        return Generation(output, seconds=1.5)


@pytest.fixture
def samples(tmp_path: Path, tiny_bloom: Path) -> list[lambada.Sample]:
    return lambada.read_samples(write(tmp_path, *TEXTS), Tokenizer.from_folder(tiny_bloom))


def test_right_means_all_tokens_of_the_target(samples: list[lambada.Sample], tiny_bloom: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_bloom)
    first, second = Oracle(samples), Oracle(samples, wrong=[1, 3])
    all_right, some_wrong = lambada.run([first, second], samples, tokenizer, batch_size=2)
    assert (all_right.right, all_right.accuracy) == (5, 100.0)
    assert [answer.right for answer in some_wrong.answers] == [True, False, True, False, True]
    assert [answer.model_answer for answer in all_right.answers] == [sample.target for sample in samples]
    assert lambada.differing(all_right, some_wrong) == 2
    # three batches of 1.5 s; the untimed one before them does not count
    assert some_wrong.line == "Accuracy: 60.0000% (3/5) (elapsed time: 4.5000 sec)"


def test_a_batch_makes_as_many_tokens_as_its_longest_target(samples: list[lambada.Sample], tiny_bloom: Path) -> None:
    oracle = Oracle(samples)
    lambada.run([oracle], samples, Tokenizer.from_folder(tiny_bloom), batch_size=2)
    longest = [max(len(s.target_ids) for s in samples[i : i + 2]) for i in (0, 2, 4)]
    assert oracle.lengths[1:] == [[longest[0]] * 2, [longest[1]] * 2, [longest[2]]]


def test_the_time_of_repetitions_is_the_median(samples: list[lambada.Sample], tiny_bloom: Path) -> None:
    done: list[int] = []
    (result,) = lambada.run(
        [Oracle(samples)],
        samples,
        Tokenizer.from_folder(tiny_bloom),
        batch_size=5,
        repetitions=3,
        advance=done.append,
    )
    assert result.seconds == 1.5
    assert done == [5, 5, 5]
    assert result.total == 5


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 1, "repetitions": 0}])
def test_bad_counts(samples: list[lambada.Sample], tiny_bloom: Path, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        lambada.run([Oracle(samples)], samples, Tokenizer.from_folder(tiny_bloom), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_both_engines_give_the_same_answers(samples: list[lambada.Sample], tiny_bloom: Path, batch_size: int) -> None:
    with LLM(tiny_bloom) as llm:
        engines: list[Engine] = [HuggingFaceEngine(str(tiny_bloom)), HastenEngine(llm)]
        hf, ours = lambada.run(engines, samples, Tokenizer.from_folder(tiny_bloom), batch_size=batch_size)
    assert lambada.differing(hf, ours) == 0
    assert hf.right == ours.right
    assert min(hf.seconds, ours.seconds) > 0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("one\u2028 two three", ("one\u2028 two", " three")),
        ("one\u0085 two\u2029 three", ("one\u0085 two\u2029", " three")),
        ("one\f two three", ("one\f two", " three")),
        ("one two three\n", ("one two", " three")),
        ("\n\none two\nthree\n\n", ("one", " two\nthree")),
        ("one two three\r", ("one two", " three\r")),
    ],
)
def test_texts_are_cut_as_the_reference_cuts_them(tmp_path: Path, text: str, wanted: tuple[str, str]) -> None:
    file = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=ascii_alone) for ascii_alone in (False, True)]
    file.write_bytes("\r\n".join([*lines, ""]).encode())
    assert list(lambada.read_texts(str(file))) == [wanted, wanted]
    # FasterTransformer's bloom_lambada.py: text.strip("\n").rsplit(" ", 1), with the space before the target
    context, word = text.strip("\n").rsplit(" ", 1)
    assert (context, " " + word) == wanted


@pytest.mark.parametrize("line", ['{"text": "one \\ud83d two"}', "[" * 100_000])
def test_lines_that_hold_no_text_are_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "one two"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"texts\.jsonl, line 2: "):
        list(lambada.read_texts(str(file)))
