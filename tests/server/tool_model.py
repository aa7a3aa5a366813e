"""A model with a chat template that describes tools, in the form of Hermes."""

from pathlib import Path
from typing import Any

from tests.server.openai_site import Site, models, with_template

TOOL_TEMPLATE = """{{ bos_token }}{% if tools %}tools: {{ tools | tojson }}
{% endif %}{% for message in messages %}{{ message.role }}: {{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How the weather is.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Paris", "Oslo"]}},
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]


def serve_tools(folder: Path) -> Site:
    """A server whose model `story` takes tools; its answers have the times of their requests."""
    return Site(models(with_template(folder, TOOL_TEMPLATE), "tokens", "story"), with_metrics=True)
