import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Hasten

ACCURACY = re.compile(r"Accuracy: (\d+\.\d{4})% \((\d+)/(\d+)\) \(elapsed time: \d+\.\d{4} sec\)")

TEXTS = (
    "Anna walked to the river",
    "Ben had opened the old window before the evening storm",
    "Clara said that she never promised him the violin",
    "the café was quietly closed and David found his coat",
    "he remembered the garden",
)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def lambada(folder: Path, dataset: Path) -> tuple[Any, ...]:
    return ("bench", "lambada", "--tokenizer-path", folder, "--dataset-path", dataset, "--batch-size", "2")


def test_lambada_ends_with_the_line_of_the_reference(tiny_bloom: Path, dataset: Path, hasten_process: "Hasten") -> None:
    done = hasten_process(*lambada(tiny_bloom, dataset), "--show-progress")
    assert done.status == 0, done.err
    match = ACCURACY.fullmatch(done.out.splitlines()[-1])
    assert match
    assert match[3] == "5"
    assert "5/5" in done.err


def test_compare_prints_both_lines_and_writes_every_answer(
    tiny_bloom: Path, dataset: Path, tmp_path: Path, hasten_here: "Hasten"
) -> None:
    output = tmp_path / "results.json"
    done = hasten_here(*lambada(tiny_bloom, dataset), "--compare", "--output-path", output)
    assert done.status == 0, done.err
    hf, ours, summary = done.out.splitlines()
    assert hf.startswith("HF ")
    assert ours.startswith("hasten ")
    assert all(ACCURACY.search(line) and line.endswith(" sec)") for line in (hf, ours))
    assert re.fullmatch(r"hasten is \d+\.\d\d times as fast; the answers differ on 0 of 5 samples", summary)
    report = json.loads(output.read_text())
    assert [result["engine"] for result in report["results"]] == ["HF", "hasten"]
    assert report["differing_samples"] == 0
    assert report["environment"]["dtype"] == "float32"
    for result in report["results"]:
        assert [answer["prompt"] + answer["target"] for answer in result["answers"]] == list(TEXTS)
        for answer in result["answers"]:
            assert answer["right"] == (answer["answer_ids"] == answer["target_ids"])
            assert len(answer["answer_ids"]) == len(answer["target_ids"])
            assert isinstance(answer["model_answer"], str)
            assert answer["prompt_ids"]


def test_hugging_face_alone(tiny_bloom: Path, dataset: Path, hasten_here: "Hasten") -> None:
    done = hasten_here(*lambada(tiny_bloom, dataset), "--test-hf", "--json")
    assert done.status == 0, done.err
    (result,) = json.loads(done.out)["results"]
    assert (result["engine"], result["total"]) == ("HF", 5)


def test_a_missed_threshold_is_status_1(tiny_bloom: Path, dataset: Path, hasten_here: "Hasten") -> None:
    done = hasten_here(*lambada(tiny_bloom, dataset), "--acc-threshold", "100.5")
    assert done.status == 1
    assert ACCURACY.fullmatch(done.out.strip())
    assert "below the threshold of 100.5%" in done.err
    assert hasten_here(*lambada(tiny_bloom, dataset), "--acc-threshold", "0").status == 0


def test_ranks_of_two_give_the_answers_of_one(
    tiny_bloom: Path, dataset: Path, tmp_path: Path, hasten_process: "Hasten"
) -> None:
    output = tmp_path / "results.json"
    done = hasten_process(
        *lambada(tiny_bloom, dataset), "--compare", "--tensor-para-size", "2", "--output-path", output
    )
    assert done.status == 0, done.err
    assert len(done.out.splitlines()) == 3
    assert json.loads(output.read_text())["differing_samples"] == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 6: not JSON"),
        ('{"txt": "a b"}', 'line 6: not an object with a string "text"'),
        ('{"text": "word"}', "line 6: a text needs at least two words"),
    ],
)
def test_bad_datasets(tiny_bloom: Path, dataset: Path, hasten_here: "Hasten", line: str, message: str) -> None:
    with dataset.open("a") as file:
        file.write(line + "\n")
    done = hasten_here(*lambada(tiny_bloom, dataset))
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch-size", "0"), "argument --batch-size: '0' is not a whole number of at least 1"),
        (("--repetitions", "many"), "argument --repetitions: 'many' is not a whole number of at least 1"),
        (("--top-k", "4", "--temperature", "-1"), "temperature must be finite and not negative"),
        (("--beam-width", "4"), "beam search is not supported"),
        (("--test-hf", "--compare"), "not allowed with argument"),
        (("--output-path", "/nowhere/results.json"), "cannot write the results"),
        (("--checkpoint-path", "/nowhere"), "/nowhere"),
        (("--acc-threshold", "high"), "invalid float value: 'high'"),
    ],
)
def test_bad_options(
    tiny_bloom: Path, dataset: Path, hasten_here: "Hasten", options: tuple[str, ...], message: str
) -> None:
    done = hasten_here(*lambada(tiny_bloom, dataset), *options)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1


def test_a_tokenizer_folder_without_one(dataset: Path, tmp_path: Path, hasten_here: "Hasten") -> None:
    done = hasten_here(*lambada(tmp_path, dataset))
    assert done.status == 2
    assert "tokenizer" in done.err


def test_throughput(tiny_bloom: Path, tmp_path: Path, hasten_here: "Hasten") -> None:
    output = tmp_path / "results.json"
    command = ("bench", "throughput", tiny_bloom, "--num-requests", "3", "--workload", "lambada", "--compare")
    done = hasten_here(*command, "--hf-batch-size", "2", "--output-path", output)
    assert done.status == 0, done.err
    assert "lambada: 3 requests" in done.out
    report = json.loads(output.read_text())
    assert [result["engine"] for result in report["results"]] == ["HF", "hasten"]
    assert all(result["output_tokens"] == 12 for result in report["results"])
    assert report["speedup"] > 0


def test_latency_on_random_weights(tiny_bloom: Path, tmp_path: Path, hasten_here: "Hasten") -> None:
    (tmp_path / "config.json").write_bytes((tiny_bloom / "config.json").read_bytes())
    done = hasten_here(
        *("bench", "latency", tmp_path, "--load-format", "dummy", "--batch-sizes", "1", "2", "--json", "--compare"),
        *("--prompt-length", "5", "--output-length", "3", "--repetitions", "2"),
    )
    assert done.status == 0, done.err
    report = json.loads(done.out)
    assert [(r["batch_size"], r["engine"]) for r in report["results"]] == [
        (1, "HF"),
        (1, "hasten"),
        (2, "HF"),
        (2, "hasten"),
    ]
    assert [entry["batch_size"] for entry in report["speedups"]] == [1, 2]


@pytest.mark.parametrize(
    "command",
    [
        ("latency", "--output-length", "1"),
        ("latency", "--batch-sizes", "0"),
        ("throughput", "--num-requests", "0"),
        ("throughput", "--hf-batch-size", "0", "--compare"),
        ("throughput", "--batch-size", "0"),
    ],
)
def test_counts_that_make_no_sense(tiny_bloom: Path, hasten_here: "Hasten", command: tuple[str, ...]) -> None:
    done = hasten_here("bench", command[0], tiny_bloom, *command[1:])
    assert (done.status, done.out) == (2, "")
    assert done.err.count("\n") == 1
