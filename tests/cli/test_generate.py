import io
import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.conftest import save_tokenizer
from tests.encoder_decoders import save_encoder_decoder
from tests.waiting import LIMIT_S

if TYPE_CHECKING:
    from tests.cli.conftest import Hasten

PROMPT = "Anna walked to the river"


def hf_greedy(folder: Path, prompt: str, count: int) -> list[int]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        outputs = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=3
        )
    tokens: list[int] = outputs[0, ids.shape[1] :].tolist()
    return tokens


def objects(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_json_has_the_tokens_that_hugging_face_makes(tiny_bloom: Path, hasten_process: "Hasten") -> None:
    done = hasten_process("generate", tiny_bloom, "--prompt", PROMPT, "--max-new-tokens", "12", "--json")
    assert done.status == 0, done.err
    (result,) = objects(done.out)
    assert set(result) == {"prompt", "prompt_token_ids", "token_ids", "text", "finish_reason"}
    assert result["prompt"] == PROMPT
    assert result["token_ids"] == hf_greedy(tiny_bloom, PROMPT, 12)
    assert result["finish_reason"] == "length"


def test_prompts_of_all_sources_in_order(
    tiny_bloom: Path, hasten_here: "Hasten", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Ben found\n\nClara opened\n")))
    done = hasten_here(
        "generate", tiny_bloom, "--prompt", PROMPT, "--prompts-file", "-", "--json", "--max-new-tokens", "2"
    )
    assert [result["prompt"] for result in objects(done.out)] == [PROMPT, "Ben found", "Clara opened"]


def test_a_prompt_that_an_encoder_reads_is_not_shown(hasten_here: "Hasten", tmp_path: Path) -> None:
    size = save_tokenizer(tmp_path)
    save_encoder_decoder(tmp_path, "t5", vocab_size=size, decoder_start_token_id=3, eos_token_id=2, pad_token_id=3)
    options = ("generate", tmp_path, "--prompt", PROMPT, "--max-new-tokens", "4")
    (result,) = objects(hasten_here(*options, "--json").out)
    assert result["prompt"] == PROMPT
    for more in ((), ("--stream",)):
        assert hasten_here(*options, *more).out == f"{result['text']}\n"


def test_prompts_file(tiny_bloom: Path, hasten_here: "Hasten", tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("the café\n", encoding="utf-8")
    done = hasten_here("generate", tiny_bloom, "--prompts-file", tmp_path / "prompts", "--max-new-tokens", "1")
    assert done.out.startswith("the café")


def test_a_prompt_of_the_file_ends_at_a_line_feed_alone(
    tiny_bloom: Path, hasten_here: "Hasten", tmp_path: Path
) -> None:
    lines = ["page one\fpage two", "first half\u2028 second\x85 half", "a\u2029b\x0bc\x1cd\x1de\x1ef"]
    (tmp_path / "prompts").write_bytes("\ufeff".encode() + "\r\n".join([*lines, ""]).encode())
    done = hasten_here(
        "generate", tiny_bloom, "--prompts-file", tmp_path / "prompts", "--json", "--max-new-tokens", "1"
    )
    assert [result["prompt"] for result in map(json.loads, done.out.rstrip("\n").split("\n"))] == lines


def test_logprobs_are_shown_or_refused(tiny_bloom: Path, hasten_here: "Hasten") -> None:
    for option in ("--logprobs", "--prompt-logprobs"):
        done = hasten_here("generate", tiny_bloom, "--prompt", PROMPT, option, "2")
        assert (done.status, done.out) == (2, "")
        assert f"{option} is shown with --json alone; add --json" in done.err


@pytest.mark.parametrize(
    "locale", [{}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=["utf8", "posix"]
)
def test_text_is_utf8_whatever_the_locale(tiny_bloom: Path, locale: dict[str, str]) -> None:
    command = [sys.executable, "-m", "hasten", "generate", str(tiny_bloom), "--max-new-tokens", "2"]
    environment = {**os.environ, **locale}

    def run(*options: str | bytes, given: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run([*command, *options], env=environment, input=given, capture_output=True, timeout=LIMIT_S)

    text = "caf\u00e9 \u65e5\u672c"
    good = run(
        "--prompt", text.encode(), "--stop", "\u00fc".encode(), "--prompts-file", "-", given=text.encode() + b"\n"
    )
    assert good.returncode == 0, good.stderr
    first, second = good.stdout.decode().rstrip("\n").split("\n")
    assert first.startswith(text)
    assert first == second
    for bad in (run("--prompt", b"abc\xff"), run("--prompts-file", "-", given=b"abc\xff\n")):
        assert bad.returncode == 2
        assert bad.stderr.count(b"\n") == 1, bad.stderr
        assert b"--prompt is not valid UTF-8" in bad.stderr or b"cannot read prompts from -" in bad.stderr


def test_streamed_text_is_the_text(tiny_bloom: Path, hasten_here: "Hasten") -> None:
    command = ("generate", tiny_bloom, "--prompt", PROMPT, "--max-new-tokens", "12")
    plain, streamed = hasten_here(*command), hasten_here(*command, "--stream")
    assert (plain.status, streamed.status) == (0, 0)
    assert plain.out == streamed.out
    assert plain.out.startswith(PROMPT)


def test_streamed_json_grows_to_the_whole(tiny_bloom: Path, hasten_here: "Hasten") -> None:
    command = ("generate", tiny_bloom, "--prompt", PROMPT, "--max-new-tokens", "6", "--json")
    (whole,) = objects(hasten_here(*command).out)
    parts = objects(hasten_here(*command, "--stream").out)
    assert [part["finished"] for part in parts] == [False] * (len(parts) - 1) + [True]
    for before, after in pairwise(parts):
        assert after["token_ids"][: len(before["token_ids"])] == before["token_ids"]
    assert parts[-1] == whole | {"finished": True}


def test_several_completions_and_logprobs(tiny_bloom: Path, hasten_here: "Hasten") -> None:
    done = hasten_here(
        *("generate", tiny_bloom, "--prompt", PROMPT, "--max-new-tokens", "3", "--json"),
        *("--n", "2", "--temperature", "1", "--seed", "5", "--logprobs", "2", "--prompt-logprobs", "0"),
    )
    (result,) = objects(done.out)
    assert len(result["outputs"]) == 2
    for output in result["outputs"]:
        assert len(output["logprobs"]) == 3
        for token, position in zip(output["token_ids"], output["logprobs"], strict=True):
            assert token in [entry["token_id"] for entry in position]
            assert all(entry["logprob"] <= 0 for entry in position)
    assert result["prompt_logprobs"][0] is None
    assert len(result["prompt_logprobs"]) == len(result["prompt_token_ids"])


def test_beams_best_first(tiny_bloom: Path, hasten_here: "Hasten") -> None:
    command = ("generate", tiny_bloom, "--prompt", PROMPT, "--max-new-tokens", "6", "--beam-width", "4")
    done = hasten_here(*command, "--n", "3", "--length-penalty", "0.5", "--json")
    assert done.status == 0, done.err
    (result,) = objects(done.out)
    scores = [output["cumulative_logprob"] / len(output["token_ids"]) ** 0.5 for output in result["outputs"]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    plain = hasten_here(*command, "--n", "3", "--length-penalty", "0.5")
    assert plain.out == "".join(f"{PROMPT}{output['text']}\n" for output in result["outputs"])
    (best,) = objects(hasten_here(*command, "--length-penalty", "0.5", "--json").out)
    assert best["token_ids"] == result["outputs"][0]["token_ids"]


def test_the_same_seed_gives_the_same_text(tiny_bloom: Path, hasten_here: "Hasten") -> None:
    command = ("generate", tiny_bloom, "--prompt", PROMPT, "--temperature", "1", "--seed")
    first, again, other = (hasten_here(*command, seed).out for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_stop_text_ends_it(tiny_bloom: Path, hasten_here: "Hasten") -> None:
    command = ("generate", tiny_bloom, "--prompt", "Ben found", "--max-new-tokens", "8", "--json")
    (whole,) = objects(hasten_here(*command).out)
    stop = whole["text"][2:5]
    (cut,) = objects(hasten_here(*command, "--stop", stop).out)
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]


def test_under_torchrun_only_the_first_rank_prints(tiny_bloom: Path, hasten_process: "Hasten") -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", sys.executable)
    done = hasten_process(
        "generate", tiny_bloom, "--prompt", PROMPT, "--max-new-tokens", "12", "--json", launcher=launcher
    )
    assert done.status == 0, done.err
    (result,) = objects(done.out)
    assert result["token_ids"] == hf_greedy(tiny_bloom, PROMPT, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--block-size", "0"], "--block-size must be at least 1, got 0"),
        (["--device", "abacus"], "device 'abacus' is not known"),
        (["-dt", "fp7"], "data type 'fp7' is not known"),
        (["--tensor-para-size", "3"], "tensor parallel size 3 does not divide"),
        (["--max-model-len", "4"], "longest sequence of 4"),
        (["--beam-width", "2", "--n", "3"], "n must be at most --beam-width (2), got 3"),
        (["--beam-width", "2", "--temperature", "0.5"], "temperature must be left at 1.0 with --beam-width above 1"),
    ],
)
def test_bad_options(tiny_bloom: Path, hasten_here: "Hasten", options: list[str], message: str) -> None:
    done = hasten_here("generate", tiny_bloom, "--prompt", PROMPT, *options)
    assert done.status == 2
    assert done.out == ""
    assert message in done.err
    assert done.err.count("\n") == 1


def test_a_folder_without_a_model(tmp_path: Path, hasten_process: "Hasten") -> None:
    done = hasten_process("generate", tmp_path, "--prompt", PROMPT)
    assert done.status == 2
    assert done.err.startswith("hasten: error: ")
    assert "config.json" in done.err
    assert "Traceback" not in done.err


def test_an_empty_prompt(tiny_bloom: Path, hasten_here: "Hasten") -> None:
    done = hasten_here("generate", tiny_bloom, "--prompt", "")
    assert (done.status, done.out) == (2, "")
    assert "no tokens" in done.err


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_json_that_is_nested_too_deeply_is_one_line(
    name: str, tiny_bloom: Path, tmp_path: Path, hasten_here: "Hasten"
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_bloom, model)
    (model / name).write_text("[" * 100_000)
    done = hasten_here("generate", model, "--prompt", "x", "--device", "cpu")
    assert (done.status, done.out) == (2, "")
    assert f"{model / name} " in done.err
    assert done.err.count("\n") == 1
