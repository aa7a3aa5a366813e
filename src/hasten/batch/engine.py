"""The interface of a batch's engine: `LLM`, or anything with the same few calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from hasten.core.errors import UnsupportedError
from hasten.core.types import Request, RequestOutput
from hasten.engine.chat import ChatTemplate
from hasten.engine.text import Tokenizer

if TYPE_CHECKING:
    from hasten.engine.llm import LLM

_WINDOWS = 2
"""Prompts that are in the engine, for each that it may compute at once: as many wait, so that no step has room left."""


@dataclass(frozen=True)
class Refused:
    """A prompt that an engine which is not in this process could not take."""

    request_id: str
    reason: str


class BatchEngine(Protocol):
    """What a batch needs of an engine."""

    @property
    def window(self) -> int:
        """Maximum prompts that are in the engine at once, waiting ones included."""
        ...

    def no_more(self) -> None:
        """No prompt will be added."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        ...

    @property
    def seed(self) -> int:
        """What the seeds of rows without one are derived from."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it has one."""
        ...

    @property
    def template(self) -> ChatTemplate | None:
        """The tokenizer's chat template, if it has one."""
        ...

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """The model's end tokens."""
        ...

    @property
    def tool_call_parser(self) -> str:
        """The option of this name."""
        ...

    @property
    def reasoning_parser(self) -> str:
        """The option of this name."""
        ...

    def add(self, request: Request) -> None:
        """Queue a prompt; InvalidRequestError where it cannot be served."""
        ...

    def abort(self, request_id: str) -> object:
        """Withdraw a prompt."""
        ...

    def step(self) -> Sequence[RequestOutput | Refused]:
        """Compute a step; what came of the prompts that it finished."""
        ...


class LLMEngine:
    """An `LLM` as a batch sees it."""

    def __init__(self, llm: "LLM") -> None:
        self._engine = llm.engine
        self.capacity = self._engine.scheduler.config.max_num_seqs
        """Prompts that it computes at once."""
        self.window = _WINDOWS * self.capacity
        self.max_model_len = self._engine.max_model_len
        self.seed = self._engine.config.seed
        self.tokenizer = self._engine.tokenizer
        self.eos_token_ids = self._engine.model_config.eos_token_ids
        self.tool_call_parser = self._engine.config.tool_call_parser
        self.reasoning_parser = self._engine.config.reasoning_parser
        self.add, self.abort = self._engine.add, self._engine.abort
        if self._engine.worker.pooler is not None:
            name = self._engine.model_config.architecture
            raise UnsupportedError(f"{name} generates no text; give hasten batch a model that does")

    def no_more(self) -> None:
        """No prompt will be added, which changes nothing here."""

    def step(self) -> list[RequestOutput]:
        """Compute a step; the outputs of prompts that it finished."""
        return [output for output in self._engine.step() if isinstance(output, RequestOutput)]

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The tokenizer's chat template; CheckpointError where it is not valid."""
        folder = self._engine.config.tokenizer or self._engine.worker.tokenizer_folder
        return None if folder is None else ChatTemplate.from_folder(folder)
