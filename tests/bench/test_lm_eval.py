"""The model for lm-evaluation-harness gives transformers' numbers.

The package itself brings half a gigabyte: of it there are its three names here that the model is written with.
"""

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).parents[2] / "examples/demo-model"
TEXT = "That year the spring came early. Lydia wanted a crimson door and painted it at once."


class TemplateLM:
    """What lm-evaluation-harness' class of this name has that models use."""

    def __init__(self) -> None:
        self.cached: list[tuple[str, Any, Any]] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *entry: self.cached.append(entry))


def register_model(name: str) -> Callable[[type], type]:
    def registered(model: type) -> type:
        REGISTERED[name] = model
        return model

    return registered


REGISTERED: dict[str, Any] = {}


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    parts: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.__main__": {"cli_evaluate": None},
        "lm_eval.api": {},
        "lm_eval.api.model": {"TemplateLM": TemplateLM},
        "lm_eval.api.registry": {"register_model": register_model},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, names in parts.items():
            module = types.ModuleType(name)
            vars(module).update(names)
            patch.setitem(sys.modules, name, module)
        import hasten.bench.lm_eval  # noqa: F401 - it registers the model

        result = REGISTERED["hasten"](str(DEMO), device="cpu", batch_size=1, max_length=64)
        yield result
        result.llm.close()
        del sys.modules["hasten.bench.lm_eval"]


@pytest.fixture(scope="module")
def theirs() -> Callable[[list[int]], torch.Tensor]:
    """Log-probabilities [t, v] of what follows each token, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)

    def logprobs(tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        return found

    return logprobs


def scored(theirs: Callable[[list[int]], torch.Tensor], context: list[int], tokens: list[int]) -> tuple[float, bool]:
    rows = theirs([*context, *tokens])[len(context) - 1 : -1]
    return sum(rows[index, token].item() for index, token in enumerate(tokens)), rows.argmax(-1).tolist() == tokens


def request(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def test_log_likelihoods_are_those_of_transformers(model: Any, theirs: Callable[[list[int]], torch.Tensor]) -> None:
    encode = AutoTokenizer.from_pretrained(DEMO).encode
    whole = encode(TEXT)
    assert model.tok_encode(TEXT) == whole
    greedy = theirs(whole[:12])[-1].argmax().item()
    requested = [
        (("a", "b"), whole[:12], whole[12:]),
        (None, whole[:12], [greedy]),
        (None, [model.prefix_token_id], whole),
    ]
    found = model._loglikelihood_tokens(requested, disable_tqdm=True)
    for (_, context, tokens), (logprob, is_greedy) in zip(requested, found, strict=True):
        expected, was_greedy = scored(theirs, context, tokens)
        assert logprob == pytest.approx(expected, abs=1e-4)
        assert is_greedy == was_greedy
    assert found[1][1] is True
    assert model.cached[-1] == ("loglikelihood", ("a", "b"), found[0])
    # of a text that is too long the end is scored, behind as much of its context as there is room for
    long = (whole * 6)[:80]
    ((logprob, _),) = model._loglikelihood_tokens([(None, long, whole[:5])], disable_tqdm=True)
    assert logprob == pytest.approx(scored(theirs, long[-(63 - 5) :], whole[:5])[0], abs=1e-4)


def test_whole_texts_are_scored_in_windows_side_by_side(
    model: Any, theirs: Callable[[list[int]], torch.Tensor]
) -> None:
    text = " ".join([TEXT] * 7)
    tokens = model.tok_encode(text)
    assert len(tokens) > 2 * 62
    found = model.loglikelihood_rolling([request(text), request("")], disable_tqdm=True)
    expected = scored(theirs, [model.prefix_token_id], tokens[:62])[0]
    for begin in range(62, len(tokens), 62):
        end = min(begin + 62, len(tokens))
        expected += scored(theirs, tokens[end - 63 : begin], tokens[begin:end])[0]
    assert found == [pytest.approx(expected, abs=1e-3), 0.0]


def test_completions_end_where_a_task_says(model: Any) -> None:
    first, second = model.generate_until(
        [
            request(TEXT, {"until": ["."], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}),
            request(TEXT, {"max_new_tokens": 3}),
        ],
        disable_tqdm=True,
    )
    assert "." not in first
    assert len(model.tok_encode(second)) <= 3
    assert second == model.generate_until([request(TEXT, {"max_gen_toks": 3})], disable_tqdm=True)[0]
    assert model.tokenizer_name.endswith("demo-model")
