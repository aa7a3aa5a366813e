"""What users of vLLM's LLM expect beside generate."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten import LLM, ConfigError, InvalidRequestError, SamplingParams

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT = [{"role": "user", "content": "Who was Anna?"}]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tiny_bloom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template and settings for generating."""
    path = tmp_path_factory.mktemp("model") / "chat"
    shutil.copytree(tiny_bloom, path)
    (path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (path / "generation_config.json").write_text(
        '{"eos_token_id": 2, "temperature": 0.7, "top_k": 5, "repetition_penalty": 1.2, "max_new_tokens": 9}'
    )
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> Any:
    with LLM(folder) as engine:
        yield engine


def test_a_chat_is_what_transformers_renders(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    (output,) = llm.chat(CHAT, GREEDY)
    rendered: Any = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert output.prompt == rendered
    assert output.prompt_token_ids == llm.tokenizer.encode(rendered, add_special_tokens=False)
    assert output.outputs == llm.generate(output.prompt_token_ids, GREEDY)[0].outputs
    both = llm.chat([CHAT, [*CHAT, {"role": "assistant", "content": "A"}]], [GREEDY, None], use_tqdm=False)
    assert both[0].outputs == output.outputs
    assert both[1].prompt == rendered.removesuffix("assistant:") + "assistant: A\nassistant:"
    (left_open,) = llm.chat(
        [*CHAT, {"role": "assistant", "content": "A gar"}],
        GREEDY,
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert (left_open.prompt or "").endswith("assistant: A gar")
    (own,) = llm.chat(
        CHAT, GREEDY, chat_template="{{ messages[0].content }}{{ mood }}", chat_template_kwargs={"mood": "!"}
    )
    assert own.prompt == "Who was Anna?!"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    (described,) = llm.chat(CHAT, GREEDY, chat_template="{{ tools | tojson }}", tools=tools)
    assert described.prompt == json.dumps(tools)
    with pytest.raises(InvalidRequestError, match=r"^tools cannot be described to this model"):
        llm.chat(CHAT, GREEDY, tools=tools)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who"}, {"type": "text", "text": "was it?"}]}]
    assert "user: Who\nwas it?" in (llm.chat(parts, GREEDY)[0].prompt or "")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("hello", "messages must be a list of dicts or of such lists, got 'hello'"),
        (["hello"], r"messages\[0\] must be a dict with role and content, got 'hello'"),
        ([{"content": "a"}], r"messages\[0\].role must be one of system, .*, got None"),
        ([{"role": "user"}], r"messages\[0\].content is missing"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content must be a text or a list of parts, got 5"),
        ([{"role": "user", "content": "\ud83d"}], r"messages\[0\].content is not valid UTF-8"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"messages\[0\].content\[0\] is of type 'image'"),
    ],
)
def test_messages_that_are_no_chat(llm: LLM, messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{message}"):
        llm.chat(messages, GREEDY)


def test_a_model_without_a_chat_template(tiny_bloom: Path) -> None:
    with LLM(tiny_bloom) as plain:
        with pytest.raises(InvalidRequestError, match="has no chat template; give chat_template or use generate"):
            plain.chat(CHAT)
        assert plain.chat(CHAT, GREEDY, chat_template=TEMPLATE)[0].outputs
        assert plain.get_default_sampling_params() == SamplingParams()


def test_parameters_that_the_checkpoint_proposes(llm: LLM, folder: Path, tmp_path: Path) -> None:
    wanted = SamplingParams(temperature=0.7, top_k=5, repetition_penalty=1.2, max_tokens=9)
    assert llm.get_default_sampling_params() == wanted
    shutil.copytree(folder, tmp_path / "wrong")
    (tmp_path / "wrong" / "generation_config.json").write_text('{"temperature": "hot"}')
    with (
        LLM(tmp_path / "wrong") as wrong,
        pytest.raises(ConfigError, match=r"generation_config\.json: temperature must be"),
    ):
        wrong.get_default_sampling_params()


def test_the_tokenizer_of_transformers(llm: LLM, folder: Path) -> None:
    text = "the lamp and the river"
    assert llm.get_tokenizer().encode(text) == llm.tokenizer.encode(text)
    assert llm.get_tokenizer() is llm.get_tokenizer()
    with LLM(folder, tokenizer=folder / "tokenizer.json") as by_file:
        assert by_file.get_tokenizer().encode(text) == llm.tokenizer.encode(text)


@pytest.mark.any_python
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_prefix_cache_that_is_reset_finds_nothing(tiny_bloom: Path, ranks: int) -> None:
    prompt = list(range(5, 60))
    with LLM(tiny_bloom, tensor_parallel_size=ranks, device="cpu") as llm:
        hits = [0]
        for reset in (False, False, True, False):
            if reset:
                assert llm.reset_prefix_cache()
            result = llm.generate(prompt, GREEDY)[0].outputs[0].token_ids
            hits.append(llm.engine.stats.prefix_hit_tokens)
            assert len(result) == 6
        assert [after - before for before, after in pairwise(hits)] == [0, 48, 0, 48]
        salts = ["a", "a", "b", "", "b"]
        for salt in salts:
            llm.generate({"prompt_token_ids": prompt, "cache_salt": salt}, GREEDY)
            hits.append(llm.engine.stats.prefix_hit_tokens)
        assert [after - before for before, after in pairwise(hits[-len(salts) - 1 :])] == [0, 48, 0, 48, 48]


@pytest.mark.parametrize(
    ("method", "given", "value", "message"),
    [
        ("generate", "lora_request", object(), "merge the adapter into the checkpoint"),
        ("generate", "priority", [1, 2], "requests begin as they come"),
        ("generate", "prompt_token_ids", [[5]], "give token ids as prompts, a list for each"),
        ("generate", "prompt_token_ids", np.array([[5]]), "give token ids as prompts, a list for each"),
        ("chat", "lora_request", object(), "merge the adapter"),
        ("chat", "chat_template_content_format", "openai", "templates get the content of a message as one text"),
        ("embed", "tokenization_kwargs", {"truncation": True}, "give the token ids of texts"),
        ("classify", "lora_request", 1, "merge the adapter"),
        ("encode", "lora_request", 1, "merge the adapter"),
    ],
)
def test_arguments_that_it_lacks_are_refused_with_a_reason(
    llm: LLM, method: str, given: str, value: Any, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{given} is not supported: {message}"):
        getattr(llm, method)(CHAT if method == "chat" else "Anna", **{given: value})


def test_arguments_that_ask_for_nothing_are_accepted(llm: LLM) -> None:
    prompts: Any = {"lora_request": None, "tokenization_kwargs": None}
    more: Any = {"priority": None, "prompt_token_ids": None}
    format_: Any = {"chat_template_content_format": "auto"}
    assert llm.generate("Anna", GREEDY, **prompts, **more)[0].outputs[0] == llm.generate("Anna", GREEDY)[0].outputs[0]
    assert llm.chat(CHAT, GREEDY, **prompts, **format_)[0].outputs[0] == llm.chat(CHAT, GREEDY)[0].outputs[0]
    with pytest.raises(TypeError, match="unexpected keyword argument 'lora_requests'"):
        llm.generate("Anna", GREEDY, lora_requests=None)  # type: ignore[call-arg]


def test_what_it_is_and_what_it_does_not_do(llm: LLM, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert repr(llm).startswith(f"LLM({str(folder)!r}: BloomForCausalLM in float32 on cpu, 1 rank(s), max_model_len ")
    with caplog.at_level(logging.DEBUG, logger="hasten"), LLM(folder) as other:
        other.generate([[5], [6]], GREEDY)
    assert repr(other) == f"LLM({str(folder)!r}: closed)"
    ready, summary = [record for record in caplog.records if record.name == "hasten.engine.llm"]
    assert ready.levelno == logging.INFO
    assert "is ready after" in ready.getMessage()
    assert "key/value cache of" in ready.getMessage()
    assert summary.levelno == logging.DEBUG
    assert summary.getMessage().startswith("2 prompts in ")
    for name, reason in (("reward", "classify"), ("beam_search", "beam_width")):
        with pytest.raises(AttributeError, match=rf"LLM\.{name} is not supported: .*{reason}"):
            getattr(llm, name)
    for method in (llm.embed, llm.classify, llm.encode):
        with pytest.raises(InvalidRequestError, match="needs a model that gives vectors"):
            method("Anna")
    with pytest.raises(InvalidRequestError, match="needs a model that gives vectors"):
        llm.score("Anna", "Ben")
    with pytest.raises(AttributeError, match=r"LLM\.foo does not exist"):
        llm.foo  # type: ignore[attr-defined]  # noqa: B018


def test_a_bar_is_shown_on_a_terminal_for_several_prompts(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[Any, ...]] = []

    def bar(description: str, total: int, *, show: bool) -> Any:
        shown.append((description, total, show))
        return original(description, total, show=show)

    original = sys.modules["hasten.engine.llm"].progress_bar
    monkeypatch.setattr("hasten.engine.llm.progress_bar", bar)
    llm.generate([[5], [6]], GREEDY)
    llm.generate([[5], [6]], GREEDY, use_tqdm=False)
    llm.generate([5], GREEDY)
    assert shown == [("generating", 2, True), ("generating", 2, False), ("generating", 1, False)]


def test_the_example_of_the_docs_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2]
    text = root.joinpath("docs", "python.md").read_text(encoding="utf-8")
    block = text.partition("\n\n")[2].partition("\n`LLM`, ")[0]
    monkeypatch.chdir(root)
    exec(textwrap.dedent(block), {})
    assert capsys.readouterr().out.strip()
