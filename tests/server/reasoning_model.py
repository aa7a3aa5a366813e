"""A server of models that reason: the demo model, with marks among its tokens that logit_bias makes it write."""

import json
from collections.abc import Mapping
from pathlib import Path

from tests.server.openai_site import Site, models, with_template

THINK = {"<think>": 1016, "</think>": 1017}
CHANNELS = {
    "<|start|>": 1010,
    "<|channel|>": 1011,
    "<|message|>": 1012,
    "<|end|>": 1013,
    "<|constrain|>": 1014,
    "<|call|>": 1015,
}
SAID = (
    "{% for message in messages %}{{ message.role }}: {% if message.reasoning_content %}"
    "({{ message.reasoning_content }}) {% endif %}{{ message.content or '' }}\n{% endfor %}"
)
THINK_TEMPLATE = (
    f"{SAID}{{% if tools %}}<tool_call>\n<function=...>{{{{ tools | length }}}} tools\n{{% endif %}}"
    "{% if add_generation_prompt %}assistant: {% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)
CHANNEL_TEMPLATE = (
    f"{SAID}{{% if tools %}}{{{{ tools | length }}}} tools\n{{% endif %}}effort: {{{{ reasoning_effort }}}}\n"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}{# <|channel|>analysis<|message|> #}"
)


def with_marks(folder: Path, template: str, marks: Mapping[str, int], *, special: bool) -> Path:
    """A copy of the demo model with a template, and with marks in place of some of its words."""
    result = with_template(folder, template)
    file = result / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary, left_out = tokenizer["model"]["vocab"], set(marks.values())
    words = {word for word, number in vocabulary.items() if number in left_out}
    tokenizer["model"]["vocab"] = {word: number for word, number in vocabulary.items() if word not in words}
    tokenizer["model"]["vocab"] |= marks
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [pair for pair in merges if not words & {*pair, "".join(pair)}]
    for mark, number in marks.items():
        token = {"id": number, "content": mark, "single_word": False, "lstrip": False, "rstrip": False}
        tokenizer["added_tokens"].append({**token, "normalized": False, "special": special})
    file.write_text(json.dumps(tokenizer))
    return result


def serve_thinker(folder: Path) -> Site:
    """A server whose model `story` reasons between Qwen's marks, which its prompts open."""
    return Site(models(with_marks(folder, THINK_TEMPLATE, THINK, special=False), "tokens", "story"))


def serve_channels(folder: Path) -> Site:
    """A server whose model `story` writes in channels."""
    return Site(models(with_marks(folder, CHANNEL_TEMPLATE, CHANNELS, special=True), "tokens", "story"))
