from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hasten.bench.evaluation.accuracy import accuracy
from hasten.bench.intervals import Interval, bootstrap, wilson
from hasten.bench.lambada import Answer, LambadaResult
from hasten.engine.llm import LLM
from hasten.engine.text import Tokenizer

TEXT = "Anna opened the window before the evening storm"


def test_wilsons_interval() -> None:
    found = wilson(112, 128)
    assert (found.low, found.high) == pytest.approx((80.6574, 92.1574), abs=1e-4)
    assert wilson(0, 10).low == 0
    assert wilson(0, 10).high == pytest.approx(27.7533, abs=1e-4)
    assert wilson(10, 10).high == pytest.approx(100)
    assert wilson(500, 1000).high - wilson(500, 1000).low < wilson(50, 100).high - wilson(50, 100).low


def test_the_bootstrap_interval_holds_the_mean() -> None:
    values = [100.0] * 10 + [-100.0] * 4 + [0.0] * 86
    found = bootstrap(values)
    assert found.low < 6 < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * 3.7, rel=0.15), "as the normal distribution has it"
    assert bootstrap(values) == found
    assert bootstrap([0.0] * 5) == Interval(0.0, 0.0)


def test_a_difference_is_located_and_its_margin_is_the_models_own(tiny_bloom: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_folder(tiny_bloom)
    ids = tokenizer.encode(TEXT)
    prompt, target = ids[:-3], ids[-3:]
    other = [target[0], (target[1] + 7) % 400, target[2]]
    answer = Answer(
        prompt=TEXT, model_answer="x", target="x", prompt_ids=prompt, answer_ids=target, target_ids=target, right=True
    )
    theirs = replace(answer, answer_ids=other, right=False)
    ours = LambadaResult("hasten", 100.0, 2, 2, 1.0, [answer, answer], [0.9, 1.1])
    reference = LambadaResult("HF", 50.0, 1, 2, 3.0, [answer, theirs], [3.6, 2.2])
    with LLM(tiny_bloom, device="cpu") as llm:
        found = accuracy([reference, ours], llm, tokenizer, dataset="texts.jsonl", batch_size=2)
    (comparison,) = found.comparisons
    assert (comparison.engine, comparison.speedup) == ("HF", 3.0)
    assert comparison.speedup_range == Interval(2.0, 4.0)
    assert comparison.accuracy_difference == 50.0
    (difference,) = comparison.differing
    assert (difference.number, difference.position) == (2, 1)
    assert (difference.their_token_id, difference.our_token_id) == (other[1], target[1])
    assert difference.their_token == tokenizer.decode([other[1]])
    assert difference.our_token == tokenizer.decode([target[1]])
    model = AutoModelForCausalLM.from_pretrained(tiny_bloom)
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, target[0]]])).logits[0, -1]
    expected = logits[target[1]] - logits[other[1]]
    assert difference.margin == pytest.approx(float(expected), abs=1e-4)
