import gc
import json
import random
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.bench.report_form import form_errors

from hasten.bench import engines, report
from hasten.core.errors import ConfigError
from hasten.engine.runner import Runner

pytestmark = pytest.mark.any_python

if TYPE_CHECKING:
    from tests.cli.conftest import Hasten

ACCURACY = re.compile(r"Accuracy: (\d+\.\d{4})% \((\d+)/(\d+)\) \(elapsed time: \d+\.\d{4} sec\)")

CPU_PHASES = ["device", "config", "compile", "weights", "memory", "cache"]

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
    output, plot = tmp_path / "results.json", tmp_path / "plot.svg"
    done = hasten_here(*lambada(tiny_bloom, dataset), "--compare", "--output-path", output, "--plot", plot)
    assert done.status == 0, done.err
    assert "<title>hasten: " in plot.read_text()
    hf, ours, summary, without = done.out.splitlines()
    assert hf.startswith("HF ")
    assert ours.startswith("hasten ")
    assert all(ACCURACY.search(line) and line.endswith(" sec)") for line in (hf, ours))
    assert re.fullmatch(r"hasten is \d+\.\d\d times as fast as HF; the answers differ on 0 of 5 samples", summary)
    assert without.startswith("HF generate_batch is not measured: BloomForCausalLM's attention")
    report = json.loads(output.read_text())
    assert [result["engine"] for result in report["results"]] == ["HF", "hasten"]
    assert form_errors(report) == []
    assert report["differing_samples"] == 0
    assert [each["engine"] for each in report["not_measured"]] == ["HF generate_batch"]
    assert report["environment"]["dtype"] == "float32"
    for result in report["results"]:
        assert [answer["prompt"] + answer["target"] for answer in result["answers"]] == list(TEXTS)
        for answer in result["answers"]:
            assert answer["right"] == (answer["answer_ids"] == answer["target_ids"])
            assert len(answer["answer_ids"]) == len(answer["target_ids"])
            assert isinstance(answer["model_answer"], str)
            assert answer["prompt_ids"]


def test_a_model_of_another_family_is_compared(
    make_model: Callable[..., Path], dataset: Path, hasten_here: "Hasten"
) -> None:
    done = hasten_here(*lambada(make_model("Qwen3", head_dim=20), dataset), "--compare", "--json")
    assert done.status == 0, done.err
    report = json.loads(done.out)
    assert form_errors(report) == []
    assert [result["engine"] for result in report["results"]] == ["HF", "HF generate_batch", "hasten"]
    assert [each["differing_samples"] for each in report["comparisons"]] == [0, 0]
    fastest = min(report["results"][:2], key=lambda result: result["seconds"])
    assert report["compared_with"] == report["comparisons"][-1]["engine"] == fastest["engine"]
    assert report["speedup"] == fastest["seconds"] / report["results"][-1]["seconds"]


def test_both_search_with_beams(tiny_bloom: Path, dataset: Path, hasten_here: "Hasten") -> None:
    def answers(*options: str) -> list[list[list[int]]]:
        done = hasten_here(*lambada(tiny_bloom, dataset), *options, "--json")
        assert done.status == 0, done.err
        return [[answer["answer_ids"] for answer in result["answers"]] for result in json.loads(done.out)["results"]]

    words = ("zyxwvutsrq", "qqjjxxzzkk")  # of many tokens: a search for one finds what greed does
    dataset.write_text("".join(json.dumps({"text": f"{text} {words[0]} {words[1]}"}) + "\n" for text in TEXTS))
    hf, ours = answers("--compare", "--beam-width", "3")
    assert hf == ours
    assert answers() != [ours]


def test_hugging_face_alone(tiny_bloom: Path, dataset: Path, hasten_here: "Hasten") -> None:
    done = hasten_here(*lambada(tiny_bloom, dataset), "--test-hf", "--json")
    assert done.status == 0, done.err
    (result,) = json.loads(done.out)["results"]
    assert (result["engine"], result["total"]) == ("HF", 5)


def test_a_threshold_decides_the_status(tiny_bloom: Path, dataset: Path, hasten_here: "Hasten") -> None:
    done = hasten_here(*lambada(tiny_bloom, dataset), "--acc-threshold", "100.5")
    assert done.status == 1
    assert ACCURACY.fullmatch(done.out.strip())
    assert "below the threshold of 100.5%" in done.err
    as_in_scripts = ("--acc-threshold", "0", "--lib-path", "lib/libth_transformer.so")
    done = hasten_here(*lambada(tiny_bloom, dataset), *as_in_scripts)
    assert done.status == 0
    assert "hasten: --lib-path lib/libth_transformer.so is not read" in done.err


def test_ranks_of_two_give_the_answers_of_one(
    tiny_bloom: Path, dataset: Path, tmp_path: Path, hasten_process: "Hasten"
) -> None:
    output = tmp_path / "results.json"
    done = hasten_process(
        *lambada(tiny_bloom, dataset), "--compare", "--tensor-para-size", "2", "--output-path", output
    )
    assert done.status == 0, done.err
    assert len(done.out.splitlines()) == 4
    assert json.loads(output.read_text())["differing_samples"] == 0


def test_results_that_cannot_be_written_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"No space left on device; they are on standard output instead$"):
        report.write_json("/dev/full", {"accuracy": 57.5})
    assert json.loads(capsys.readouterr().out) == {"accuracy": 57.5}


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
        (("--beam-width", "0"), "argument --beam-width: '0' is not a whole number of at least 1"),
        (("--beam-width", "4", "--top-k", "5"), "--beam-width above 1 searches and draws nothing: leave --top-k"),
        (("--test-hf", "--compare"), "not allowed with argument"),
        (("--test-hf", "--hf-engine", "generate_batch"), "--hf-engine generate_batch cannot run"),
        (("--hf-engine", "generate_batch"), "--hf-engine needs --compare"),
        (("--output-path", "/nowhere/results.json"), "cannot write the results"),
        (("--checkpoint-path", "/nowhere"), "/nowhere"),
        (("--acc-threshold", "high"), "'high' is not a number of per cent"),
        (("--acc-threshold", "nan"), "'nan' is not a number of per cent"),
        (("--temperature", "nan"), "--temperature must be finite"),
        (("--output-path", "/tmp/x.svg", "--plot", "/tmp/../tmp/x.svg"), "is given for two results"),
        (("--plot", "/tmp/x.pdf"), "cannot draw /tmp/x.pdf: pictures are SVG or PNG"),
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


def test_speed_with_sampling_options(tiny_bloom: Path, hasten_here: "Hasten") -> None:
    sampling = ("--temperature", "0.8", "--top-p", "0.9", "--repetition-penalty", "1.1", "--logprobs", "2")
    lengths = ("--batch-sizes", "2", "--prompt-length", "5", "--output-length", "3", "--repetitions", "1")
    done = hasten_here("bench", "latency", tiny_bloom, *lengths, *sampling, "--json")
    assert done.status == 0, done.err
    options = json.loads(done.out)["options"]
    given = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "logprobs": 2}
    assert {name: options[name] for name in given} == given
    compared = hasten_here("bench", "throughput", tiny_bloom, "--num-requests", "2", *sampling, "--compare")
    assert (compared.status, compared.out) == (2, "")
    assert "logprobs cannot be compared with Hugging Face" in compared.err


@pytest.mark.parametrize(
    "command",
    [
        ("latency", "--output-length", "1"),
        ("latency", "--batch-sizes", "0"),
        ("throughput", "--num-requests", "0"),
        ("throughput", "--hf-batch-size", "0", "--compare"),
        ("throughput", "--batch-size", "0"),
        ("suite", "--num-requests", "0"),
        ("suite", "--batch-sizes", "0"),
        ("suite", "--repetitions", "0"),
        ("suite", "--hf-max-batch-size", "0"),
        ("suite", "--tests", "lat,nonsense"),
    ],
)
def test_counts_that_make_no_sense(tiny_bloom: Path, hasten_here: "Hasten", command: tuple[str, ...]) -> None:
    done = hasten_here("bench", command[0], tiny_bloom, *command[1:])
    assert (done.status, done.out) == (2, "")
    assert done.err.count("\n") == 1


@pytest.fixture
def config_only(tiny_bloom: Path, tmp_path: Path) -> Path:
    """A folder with a config.json and nothing else."""
    folder = tmp_path / "config-only"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_bloom / "config.json").read_bytes())
    return folder


SUITE_FIGURES = {
    "lat_b1": {"e2e_s", "tok_s_e2e", "ttft_s", "tok_s_decode", "ms_per_tok"},
    "fixed_b2": {"e2e_s", "tok_s_e2e", "prefill_s", "tok_s_decode", "ms_per_step"},
    "fixed_b3": {"e2e_s", "tok_s_e2e", "prefill_s", "tok_s_decode", "ms_per_step"},
    "lambada": {"s", "req_s", "prompt_tok", "prompt_tok_s", "new_tok"},
    "tput": {"s", "out_tok", "out_tok_s", "prompt_tok", "total_tok_s", "req_s", "max_num_seqs"},
}


def test_suite_beside_hugging_face(
    config_only: Path, tmp_path: Path, hasten_here: "Hasten", monkeypatch: pytest.MonkeyPatch
) -> None:
    def count_runners() -> int:
        return sum(type(thing) is Runner for thing in gc.get_objects())

    gc.collect()
    of_other_tests = count_runners()
    runners_left: list[int] = []
    make = engines.HuggingFaceEngine.__init__

    def count_then_make(self: engines.HuggingFaceEngine, *args: Any, **options: Any) -> None:
        runners_left.append(count_runners() - of_other_tests)
        make(self, *args, **options)

    monkeypatch.setattr(engines.HuggingFaceEngine, "__init__", count_then_make)
    written: list[dict[str, Any]] = []
    write = report.write_json

    def note_and_write(path: str, results: Mapping[str, Any]) -> None:
        write(path, results)
        written.append(json.loads(Path(path).read_text()))

    monkeypatch.setattr(report, "write_json", note_and_write)
    output = tmp_path / "results.json"
    done = hasten_here(
        *("bench", "suite", config_only, "--load-format", "dummy", "--compare", "--json", "--output-path", output),
        *("--batch-sizes", "2", "3", "--hf-max-batch-size", "2", "--num-requests", "2", "--repetitions", "1"),
        *("--max-model-len", "1000"),  # which cuts tput's outputs, so that this takes no longer than it must
    )
    assert done.status == 0, done.err
    assert runners_left == [0], "hasten's engine must be gone before Hugging Face's model is made"
    assert len(written) == 4 + 3, "what is measured is on disk at once"
    assert all(before.items() <= after.items() for before, after in pairwise(map(_ours, written)))
    (line,) = done.out.splitlines()
    last = json.loads(line)
    assert json.loads(output.read_text()) == last == written[-1]
    assert {name: set(last[name]) for name in SUITE_FIGURES} == SUITE_FIGURES
    assert last["environment"]["dtype"] == "float32"
    assert last["init_s"] > 0
    _check_counts(last)
    _check_speedups(last)


def _ours(report: dict[str, Any]) -> dict[str, str]:
    """What hasten's workloads gave, as text that can be compared as a set."""
    return {name: json.dumps(report[name]) for name in SUITE_FIGURES if name in report}


def _check_counts(report: dict[str, Any]) -> None:
    rng = random.Random(0)
    lengths = [min(230, max(20, round(rng.gauss(87, 25)))) for _ in range(2)]
    assert (report["lambada"]["prompt_tok"], report["lambada"]["new_tok"]) == (sum(lengths), 8)
    assert report["hf"]["lambada"]["prompt_tok"] == sum(lengths)
    rng = random.Random(0)
    inputs, drawn = ([rng.randint(100, 1024) for _ in range(2)] for _ in range(2))
    outputs = [min(o, 1000 - i) for i, o in zip(inputs, drawn, strict=True)]
    tput = report["tput"]
    assert (tput["prompt_tok"], tput["out_tok"], tput["max_num_seqs"]) == (sum(inputs), sum(outputs), 256)


def _check_speedups(report: dict[str, Any]) -> None:
    hf = report["hf"]
    assert hf["left_out"] == ["fixed_b3", "tput"]
    assert set(report["speedup"]) == {"lat_b1", "fixed_b2", "lambada"}
    for name, ratios in report["speedup"].items():
        assert set(hf[name]) == SUITE_FIGURES[name]
        assert ratios == {key: hf[name][key] / report[name][key] for key in ratios}
    assert set(report["speedup"]["lat_b1"]) == {"e2e_s", "ttft_s", "ms_per_tok"}
    assert set(report["speedup"]["fixed_b2"]) == {"e2e_s", "prefill_s", "ms_per_step"}
    assert set(report["speedup"]["lambada"]) == {"s"}


def test_suite_goes_on_after_a_workload_that_fails(config_only: Path, tmp_path: Path, hasten_here: "Hasten") -> None:
    # lat needs 256 tokens a sequence, tput still more; lambada's two requests need less than 200
    done = hasten_here(
        *("bench", "suite", config_only, "--load-format", "dummy", "--max-model-len", "200"),
        *("--tests", "lat,lambada,tput", "--num-requests", "2", "--repetitions", "1"),
        *("--output-path", tmp_path / "results.json"),
    )
    assert done.status == 1
    last = json.loads((tmp_path / "results.json").read_text())
    assert "raise --max-model-len" in last["lat_error"]
    assert "tput_error" in last
    assert last["lambada"]["new_tok"] == 8
    assert [line.split(":")[1].strip() for line in done.err.splitlines()] == ["lat_error", "tput_error"]
    assert any(line.split()[:2] == ["lambada", "hasten"] for line in done.out.splitlines())
    assert "{" not in done.out


def _shape(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 500, **config}))
    return folder


@pytest.fixture
def few_positions(tmp_path: Path) -> Path:
    """A GPT-2 with 300 learned positions."""
    sizes = {"n_embd": 32, "n_head": 2, "n_layer": 1, "n_positions": 300}
    return _shape(tmp_path / "gpt2", architectures=["GPT2LMHeadModel"], model_type="gpt2", **sizes)


@pytest.mark.parametrize("bench", ["latency", "throughput", "suite", "serving", "startup"])
def test_a_model_that_generates_no_text_is_refused_before_it_is_loaded(
    bench: str, tmp_path: Path, hasten_here: "Hasten", monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    folder = _shape(tmp_path / "bert", architectures=["BertModel"], model_type="bert", **sizes)
    monkeypatch.setattr("hasten.engine.llm.LLM", None)
    done = hasten_here("bench", bench, folder, "--load-format", "dummy")
    wanted = f"hasten: error: BertModel generates no text; hasten bench {bench} is for models that do\n"
    assert (done.status, done.err) == (2, wanted)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["latency", "--prompt-length", "200"],
            "hasten bench latency has sequences of 328 tokens, but the model has learned 300 positions; "
            "lower --prompt-length or --output-length",
        ),
        (
            ["serving", "--prompt-length", "300"],
            "hasten bench serving has sequences of 332 tokens, but the model has learned 300 positions; "
            "lower --prompt-length or --output-length",
        ),
        (
            ["throughput"],
            "workload mixed has sequences of 482 tokens, but the model has learned 300 positions; "
            "choose --workload lambada",
        ),
        (
            ["suite", "--tests", "lat,tput,long"],
            "tput, long: longer sequences than the 300 positions that the model has learned; say --tests lat",
        ),
        (["suite", "--max-model-len", "301"], "--max-model-len 301 is more than the 300 positions"),
    ],
    ids=" ".join,
)
def test_what_does_not_fit_learned_positions_is_said_by_its_option(
    few_positions: Path, hasten_here: "Hasten", argv: list[str], message: str
) -> None:
    done = hasten_here("bench", argv[0], few_positions, "--load-format", "dummy", *argv[1:])
    assert done.status == 2
    assert done.err.startswith(f"hasten: error: {message}"), done.err


def test_the_suite_leaves_out_what_does_not_fit_learned_positions(few_positions: Path, hasten_here: "Hasten") -> None:
    done = hasten_here(
        *("bench", "suite", few_positions, "--load-format", "dummy", "--json"),
        *("--num-requests", "2", "--repetitions", "1", "--batch-sizes", "2"),
    )
    assert done.status == 0, done.err
    why = "longer sequences than the 300 positions that the model has learned"
    assert done.err == f"hasten: left out: tput ({why})\n"
    last = json.loads(done.out)
    assert last["left_out"] == ["tput"]
    assert last["options"]["max_model_len"] == 300
    assert {"lat_b1", "fixed_b2", "lambada"} <= set(last)
    assert "tput" not in last


def test_suite_tells_when_hugging_face_cannot_load_the_model(
    tiny_bloom: Path, tmp_path: Path, hasten_here: "Hasten"
) -> None:
    done = hasten_here(
        *("bench", "suite", tiny_bloom, "--tests", "lambada", "--num-requests", "2", "--json"),
        *("--compare", "--hf-model", tmp_path),
    )
    assert done.status == 1
    last = json.loads(done.out)
    assert last["lambada"]["new_tok"] == 8
    assert str(tmp_path) in last["hf"]["init_error"]
    assert done.err.startswith("hasten: hf init_error: ")


def test_suite_that_leaves_nothing_to_hugging_face(tiny_bloom: Path, hasten_here: "Hasten") -> None:
    done = hasten_here(
        *("bench", "suite", tiny_bloom, "--tests", "tput", "--num-requests", "1", "--json", "--compare"),
    )
    assert done.status == 0, done.err
    last = json.loads(done.out)
    assert (last["hf"], last["speedup"]) == ({"left_out": ["tput"]}, {})
    wanted = {
        "max_model_len": 2048,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
        "enable_prefix_caching": False,
    }
    assert wanted.items() <= last["options"].items()


@pytest.mark.slow
def test_startup_has_the_phases_of_cold_and_warm_starts(
    tiny_bloom: Path, hasten_here: "Hasten", tmp_path: Path
) -> None:
    output, plot = tmp_path / "results.json", tmp_path / "plot.svg"
    options = ("--repetitions", "1", "--device", "cpu", "--max-num-seqs", "4", "--output-path", output)
    done = hasten_here("bench", "startup", tiny_bloom, *options, "--plot", plot)
    assert (done.status, done.err) == (0, "")
    assert "import torch</text>" in plot.read_text()
    assert re.search(r"phase +cold +warm", done.out)
    found = json.loads(output.read_text())
    assert form_errors(found) == []
    assert found["environment"]["dtype"] == "float32"
    assert [start["kind"] for start in found["results"]] == ["cold", "warm"]
    for start in found["results"]:
        phases = start["phases"]
        before, behind = ["python", "import torch", "import hasten"], ["other", "first token"]
        assert list(phases) == [*before, *CPU_PHASES, *behind]
        assert all(seconds >= 0 for seconds in phases.values())
        assert sum(phases.values()) == pytest.approx(start["total_s"])
        assert start["totals_s"] == [start["total_s"]]
        assert start["deferred_s"] >= 0
    cold, warm = (start["phases"]["compile"] for start in found["results"])
    assert cold > warm, "kernels are compiled in the one and read in the other"
