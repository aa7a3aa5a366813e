"""The forms in which models write calls of tools, and which of them a chat template asks for."""

from dataclasses import dataclass

from hasten.core.config import TOOL_CALL_PARSERS
from hasten.core.errors import InvalidRequestError
from hasten.engine.chat import ChatTemplate
from hasten.server.tools.reasoning import is_harmony


@dataclass(frozen=True)
class ToolForm:
    """How a model writes calls."""

    name: str
    """As `--tool-call-parser` has it."""
    opening: str
    """Mark in front of calls."""
    closing: str = ""
    """Mark behind each call, if there is one."""
    arguments_key: str = "arguments"
    begins_bare: bool = False
    """Whether an answer that is an object from its first character on is a call without the mark."""
    is_single: bool = False
    """Whether chat templates take back one call of an answer alone: no more are asked for."""
    is_list: bool = False
    """Whether calls may be the elements of a JSON list behind one mark, or names with their arguments behind them."""
    between: str = ""
    """Mark between a function's name and its arguments, where the model was trained to write them so."""
    is_xml: bool = False
    """Whether functions and parameters stand between marks, with values as they are."""
    id_length: int | None = None
    """Letters and digits that a call's id must have for the chat template."""

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks, which an answer's text has to have for its reader."""
        return self.opening, self.closing, self.between


HERMES = ToolForm("hermes", "<tool_call>", "</tool_call>")
LLAMA = ToolForm("llama3_json", "<|python_tag|>", arguments_key="parameters", begins_bare=True, is_single=True)
MISTRAL = ToolForm("mistral", "[TOOL_CALLS]", is_list=True, id_length=9)
MISTRAL_NAMED = ToolForm("mistral", "[TOOL_CALLS]", is_list=True, between="[ARGS]", id_length=9)
QWEN_CODER = ToolForm("qwen3_coder", "<tool_call>", "</tool_call>", is_xml=True)
SEED = ToolForm("seed_oss", "<seed:tool_call>", "</seed:tool_call>", is_xml=True)
HARMONY_CALLS = ToolForm("openai", "<|channel|>", is_single=True)
_NAMED = {form.name: form for form in (HERMES, LLAMA, MISTRAL, QWEN_CODER, SEED, HARMONY_CALLS)}
assert set(TOOL_CALL_PARSERS) == {"auto", *_NAMED}


def form_of(template: ChatTemplate, parser: str) -> ToolForm:
    """The form for `--tool-call-parser`, of which `auto` looks for the marks in the template.

    InvalidRequestError where it has none of them.
    """
    form = _shown_by(template.tool_source) if parser == "auto" else _NAMED[parser]
    return MISTRAL_NAMED if form is MISTRAL and MISTRAL_NAMED.between in template.tool_source else form


def _shown_by(source: str) -> ToolForm:
    if is_harmony(source):
        return HARMONY_CALLS
    if SEED.opening in source:
        return SEED
    if HERMES.opening in source:
        return QWEN_CODER if "<function=" in source else HERMES
    if MISTRAL.opening in source:
        return MISTRAL
    if LLAMA.opening in source or '"name": function name, "parameters"' in source:
        return LLAMA
    raise InvalidRequestError(
        "tools: the model's chat template does not show in which form the model writes calls; "
        f"name it with --tool-call-parser, which is one of {', '.join(TOOL_CALL_PARSERS[1:])}"
    )
