"""Chat templates: what transformers makes of them is what they are."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.server.openai_site import DEMO, TEMPLATE
from tests.server.tool_model import TOOL_TEMPLATE, TOOLS

from hasten.core.errors import CheckpointError, InvalidRequestError
from hasten.engine.chat import ChatTemplate, RenderLimits, chat_prompt
from hasten.server.openai.prompts import chat_text
from hasten.server.openai.types import ChatRequest

MESSAGES = [
    {"role": "system", "content": "You tell stories.\n"},
    {"role": "user", "content": "  Who was Anna? <&> \"é☃'"},
    {"role": "assistant", "content": "A gardener."},
    {"role": "user", "content": "And then?"},
]
TEMPLATES = {
    "plain": TEMPLATE,
    "chatml": """
        {%- for message in messages %}
            {{- '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>' + '\n' }}
        {%- endfor %}
        {%- if add_generation_prompt %}
            {{- '<|im_start|>assistant\n' }}
        {%- endif %}
    """,
    "blocks": """{% set ns = namespace(system='') %}
    {% for message in messages %}
        {% if message['role'] == 'system' %}
            {% set ns.system = message['content'] %}
            {% continue %}
        {% elif message['role'] == 'assistant' %}
            {% generation %}
{{ message['content'] }}{{ eos_token }}
            {% endgeneration %}
        {% else %}
[INST] {{ ns.system }}{{ message['content'] | trim }} [/INST]
        {% endif %}
    {% endfor %}
""",
    "json": "{{ messages | tojson }}{{ {'b': 1, 'a': ['é']} | tojson(indent=2) }}{{ pad_token }}{{ unk_token }}",
    "python": "{{ messages[1]['content'].strip()[:8].upper() }}{{ messages[1:] | length }}{{ strftime_now('%Y') }}",
    "tools": "{% if tools is not none and tools %}tools{% else %}none{% endif %}{{ tools is defined }}",
}


def folder_of(path: Path, **config: Any) -> Path:
    """A tokenizer's folder with something in its configuration."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, path / name)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return path


def template_of(path: Path, **config: Any) -> ChatTemplate:
    folder = ChatTemplate.from_folder(folder_of(path, **config))
    assert folder is not None
    return folder


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("begins_answer", [False, True])
def test_prompts_are_those_of_transformers(name: str, begins_answer: bool, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    template = template_of(tmp_path, chat_template=TEMPLATES[name])
    oracle = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    right = oracle.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=begins_answer)
    assert template.render(MESSAGES, add_generation_prompt=begins_answer) == right
    assert right


def test_prompts_with_tools_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    several = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": TOOL_TEMPLATE}]
    arguments = {"city": "Oslo", "days": [1, None]}
    call: dict[str, Any] = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages: list[Any] = [*MESSAGES, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "é"}]
    template = template_of(tmp_path, chat_template=several)
    oracle = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    right = oracle.apply_chat_template(messages, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert template.render(messages, tools=TOOLS) == right
    call["function"]["arguments"] = json.dumps(arguments)
    assert chat_prompt(messages, template, tools=TOOLS) == right
    assert template.render(messages) == oracle.apply_chat_template(messages, tokenize=False) == "plain"


def test_results_of_tools_have_the_names_of_their_functions() -> None:
    template = ChatTemplate("{% for m in messages if m.role == 'tool' %}{{ m.name }} {% endfor %}", {})
    calls = [{"id": name, "type": "function", "function": {"name": f"call {name}"}} for name in ("a", "b")]
    results = [{"role": "tool", "content": "", "tool_call_id": name} for name in ("b", "a", "c")]
    results.append({"role": "tool", "content": "", "tool_call_id": "a", "name": "own"})
    assert chat_prompt([{"role": "assistant", "tool_calls": calls}, *results], template) == "call b call a  own "


def test_templates_stand_in_three_places(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(folder_of(tmp_path)) is None
    several = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "default"}]
    assert template_of(tmp_path, chat_template=several).render([]) == "default"
    assert ChatTemplate.from_folder(folder_of(tmp_path, chat_template=several[:1])) is None
    (tmp_path / "chat_template.jinja").write_text("file é")
    assert template_of(tmp_path, chat_template="configuration").render([]) == "file é"
    found = ChatTemplate.from_folder(tmp_path / "tokenizer.json")
    assert found is not None
    assert found.render([]) == "file é"


def test_special_tokens_are_texts_or_objects_and_may_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<from map>", "cls_token": "<cls>"}))
    bos = {"content": "<bos>", "lstrip": False}
    result = template_of(tmp_path, chat_template="{{ bos_token }}{{ cls_token }}{{ mask_token }}", bos_token=bos)
    assert result.render([]) == "<bos><cls>"


def test_variables_reach_the_template_but_do_not_replace_what_it_is_given(tmp_path: Path) -> None:
    result = template_of(tmp_path, chat_template="{{ mood }}{{ messages | length }}{{ add_generation_prompt }}")
    assert result.render([], variables={"mood": "kind"}) == "kind0True"
    with pytest.raises(InvalidRequestError, match="chat_template_kwargs cannot set 'messages'"):
        result.render([], variables={"mood": "kind", "messages": [1, 2, 3]})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9]['content'].strip() }}", "no element 9"),
        ("{{ messages + 1 }}", "refuses these messages"),
    ],
)
def test_what_a_template_refuses_is_the_callers_fault(template: str, message: str, tmp_path: Path) -> None:
    result = template_of(tmp_path, chat_template=template)
    with pytest.raises(InvalidRequestError, match=message):
        result.render(MESSAGES)


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1] }}", "{{ cycler.__init__.__globals__['os'] }}", "{{ messages.append(1) }}"],
)
def test_a_template_cannot_leave_its_sandbox(template: str, tmp_path: Path) -> None:
    result = template_of(tmp_path, chat_template=template)
    with pytest.raises(CheckpointError, match="what no template may do"):
        result.render([])


def test_a_template_or_a_file_that_is_none_is_the_checkpoints_fault(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="chat template is not valid"):
        template_of(tmp_path, chat_template="{% for %}")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=re.escape("tokenizer_config.json is not valid JSON")):
        ChatTemplate.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds no JSON object"):
        ChatTemplate.from_folder(tmp_path)


def asked(messages: list[Any], **fields: Any) -> ChatRequest:
    return msgspec.convert({"model": "m", "messages": messages} | fields, ChatRequest)


def test_parts_become_one_text_and_an_answer_is_begun() -> None:
    template = ChatTemplate(TEMPLATE, {"bos_token": "<s>"})
    parts = [{"type": "text", "text": "Who"}, {"type": "text", "text": "was it?"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts, "name": "Ben"}]
    assert chat_text(asked(messages), template) == "<s>developer: Be brief.\nuser: Who\nwas it?\nassistant:"
    assert chat_text(asked(messages, add_generation_prompt=False), template).endswith("was it?\n")


def test_an_answer_can_be_continued() -> None:
    template = ChatTemplate(TEMPLATE, {"bos_token": "<s>"})
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It was "}]
    assert chat_text(asked(messages, continue_final_message=True), template) == "<s>user: Who?\nassistant: It was"
    with pytest.raises(InvalidRequestError, match="cannot go with add_generation_prompt"):
        chat_text(asked(messages, continue_final_message=True, add_generation_prompt=True), template)
    with pytest.raises(InvalidRequestError, match="no text that could be continued"):
        chat_text(asked([{"role": "assistant", "content": " "}], continue_final_message=True), template)


def test_what_the_assistant_said_before_may_come_back_as_it_was() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}{{ m.tool_calls is defined }} {% endfor %}", {})
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    said: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None}
    messages = [said | {"tool_calls": [call]}, {"role": "tool", "content": "2", "tool_call_id": "1"}]
    assert chat_text(asked(messages), template) == "assistantTrue toolFalse "


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "robot", "content": "a"}, r"messages\[0\].role must be one of system,.* got 'robot'"),
        ({"role": "user"}, r"messages\[0\].content is missing"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]},
            r"messages\[0\].content\[0\] is of type 'image_url': the model reads text alone",
        ),
    ],
)
def test_messages_that_no_model_here_reads_are_refused(message: dict[str, Any], error: str) -> None:
    with pytest.raises(InvalidRequestError, match=error):
        chat_text(asked([message]), ChatTemplate(TEMPLATE, {}))


def test_a_chat_without_messages_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="messages is empty"):
        chat_text(asked([]), ChatTemplate(TEMPLATE, {}))


def test_what_a_template_makes_of_messages_is_limited() -> None:
    template = ChatTemplate("{% for a in messages %}{% for b in messages %}{{ b.content }}{% endfor %}{% endfor %}", {})
    many = asked([{"role": "user", "content": "x" * 10}] * 100)
    assert len(chat_text(many, template, RenderLimits(100_000, 60))) == 100_000
    with pytest.raises(InvalidRequestError, match="a prompt of more than 99999 characters: too long"):
        chat_text(many, template, RenderLimits(99_999, 60))
    with pytest.raises(InvalidRequestError, match="take more than 0 s to become a prompt"):
        chat_text(many, template, RenderLimits(100_000, 0))
