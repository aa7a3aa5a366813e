"""Text models of Triton's protocol: which inputs they take, in vLLM's form or in TensorRT-LLM's."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.core.errors import ConfigError
from hasten.core.sampling import names_at
from hasten.core.sampling_rules import Entrance

TEXT_INPUT = "text_input"
_SAMPLING = "sampling_parameters"
_OTHER_VALUES = ("stop_token_ids", "ignore_eos", "logprobs")
_TENSORRT_LLM = {name: theirs for name, theirs in names_at(Entrance.TENSORRT_LLM).items() if name not in _OTHER_VALUES}
"""Inputs of TensorRT-LLM's models for sampling parameters, where their values are the same."""
_FLAGS = ("exclude_input_in_output", "return_num_input_tokens", "return_num_output_tokens")
"""Inputs that are set where a model has them: the new text alone, and its number of tokens."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a model, with the batch axis if it has one."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TextModelInputs:
    """The inputs of one text model, and what all requests of a load give to them."""

    inputs: Mapping[str, TensorSpec]
    fixed: Mapping[str, Any]
    sampling: Mapping[str, Any]
    """What `sampling_parameters` has, where the model has this input."""

    @classmethod
    def of(cls, model: str, inputs: Sequence[TensorSpec], sampling: Mapping[str, Any]) -> "TextModelInputs":
        """For a model with these inputs; ConfigError where it takes no text, or not these sampling parameters."""
        named = {each.name: each for each in inputs}
        if TEXT_INPUT not in named:
            names = ", ".join(named) or "none"
            raise ConfigError(f"the model {model!r} has no input {TEXT_INPUT!r}; its inputs are: {names}")
        fixed: dict[str, Any] = {flag: True for flag in ("stream", *_FLAGS) if flag in named}
        if _SAMPLING in named:
            return cls(named, fixed, sampling)
        if "max_tokens" not in named:
            raise ConfigError(
                f"the model {model!r} has neither an input {_SAMPLING!r}, as vLLM's have, nor 'max_tokens', as "
                "TensorRT-LLM's"
            )
        for name, value in sampling.items():
            known = _TENSORRT_LLM.get(name)
            if known is None or known not in named:
                raise ConfigError(f"the model {model!r} has no input for {name}; leave it out")
            fixed[known] = value
        return cls(named, fixed, {})

    def values(self, prompt: str, output_length: int) -> dict[str, Any]:
        """Values by the names of the inputs."""
        values = {TEXT_INPUT: prompt, **self.fixed}
        if _SAMPLING in self.inputs:
            return values | {_SAMPLING: json.dumps({**self.sampling, "max_tokens": output_length})}
        return values | {"max_tokens": output_length}
