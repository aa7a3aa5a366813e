"""Rules of a sampling parameter besides its type, its default and its help text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Literal


class Entrance(StrEnum):
    """A way that requests come in by, which calls sampling parameters by its own names."""

    COMMAND = "command"
    """Options of `hasten generate`."""
    OPENAI = "openai"
    """Fields of a request of OpenAI's API, and of a row of a batch."""
    TEXT = "text"
    """Keys of a text model's `sampling_parameters`, or parameters of a request for it."""
    TENSORRT_LLM = "tensorrt_llm"
    """Inputs of a text model under TensorRT-LLM's names."""
    TOKEN = "token"
    """FasterTransformer's inputs of a token model; parameters of the request where there is none."""


_NO_NAMES: Mapping[Entrance, str] = MappingProxyType({})
IDS_ALONE = "its answers are token ids"
_NO_INPUT = "TensorRT-LLM has no input for it; sampling_parameters takes it"


@dataclass(frozen=True)
class Rule:
    """What is to be known of a parameter besides its type, its default and its help text."""

    holds: Callable[[Any], bool] | None = None
    """Whether a value is in range."""
    wanted: str = ""
    """What messages say of the range, after "must"."""
    most: int | None = None
    """Maximum number of entries in a request to a server, since each is looked at for each token."""
    beams: Literal["only", "never"] | None = None
    """Whether it has an effect with beam search alone, or must be left at its default with it."""
    grammar: bool = True
    """Whether it may be combined with a grammar: False for what could leave no token that the grammar allows."""
    names: Mapping[Entrance, str] = field(default_factory=dict)
    """Where an entrance does not call it as SamplingParams does."""
    absent: Mapping[Entrance, str] = field(default_factory=dict)
    """Why an entrance does not have it."""


def parameter(
    default: Any,
    text: str = "",
    must: tuple[Callable[[Any], bool], str] | None = None,
    *,
    openai: str = "",
    trt: str = "",
    ft: str = "",
    absent: Mapping[Entrance, str] = _NO_NAMES,
    most: int | None = None,
    beams: Literal["only", "never"] | None = None,
    grammar: bool = True,
    **metadata: Any,
) -> Any:
    """A field of SamplingParams with its rule. Without a help text, no command offers it."""
    names = {Entrance.OPENAI: openai, Entrance.TENSORRT_LLM: trt, Entrance.TOKEN: ft}
    absent = absent if trt else {Entrance.TENSORRT_LLM: _NO_INPUT, **absent}
    holds, wanted = must or (None, "")
    named = {entrance: name for entrance, name in names.items() if name}
    rule = Rule(holds, wanted, most, beams, grammar, named, absent)
    metadata |= {"rule": rule, "help": text}
    if isinstance(default, dict):
        return field(default_factory=dict, hash=False, metadata=metadata)
    return field(default=default, metadata=metadata)
