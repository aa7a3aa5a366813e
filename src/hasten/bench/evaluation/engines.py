"""The engines of a report that run in its own process."""

from contextlib import ExitStack
from functools import cached_property
from typing import Any

from hasten.bench.against import VllmEngine
from hasten.bench.continuous import ContinuousEngine
from hasten.bench.converted import CTranslate2Engine
from hasten.bench.engines import Engine, HastenEngine, HuggingFaceEngine
from hasten.bench.evaluation.options import ReportOptions
from hasten.bench.peers import NotMeasured, Peer, failed
from hasten.checkpoint.hub import resolve_model
from hasten.core.config import EngineConfig
from hasten.core.errors import UnsupportedError
from hasten.engine.llm import LLM

_MEMORY = 0.9
"""Of a GPU, that the engines use together."""


class Engines:
    """The engines of this process, loaded when they are first needed; the stack closes them."""

    def __init__(
        self, stack: ExitStack, options: ReportOptions, engine: EngineConfig, max_len: int, threads: int
    ) -> None:
        self._stack, self._options, self._engine = stack, options, engine
        self._max_len, self._threads = max_len, threads
        self._unsupported: list[NotMeasured] = []

    @cached_property
    def llm(self) -> LLM:
        """Hasten's engine, with its part of a GPU's memory."""
        options: dict[str, Any] = {
            # the others have no cache between calls; with it on, the untimed batch would also pay for a timed one
            "enable_prefix_caching": False,
            "gpu_memory_utilization": self._memory,
            "max_model_len": self._max_len,
            "progress_bars": False,
            **self._options.engine,
        }
        for name in ("revision", "download_dir"):
            options.pop(name, None)
        if self._engine.tokenizer is not None:
            options["tokenizer"] = self._engine.tokenizer
        return self._stack.enter_context(LLM(self._engine.model, **options))

    @cached_property
    def all(self) -> list[Engine]:
        """Those that hasten is compared with, and hasten as the last."""
        own = HastenEngine(self.llm)
        others = [engine for name in self._options.against.engines for engine in self._loaded(name, own)]
        return [*map(Peer, others), own]

    def _loaded(self, name: str, own: HastenEngine) -> list[Engine]:
        """The engines of a name; none, which is noted, where they cannot be loaded."""
        try:
            return self._others(name, own)
        except Exception as error:  # whatever another engine raises for a model that it does not know
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            self._unsupported.append(NotMeasured(name, reason))
            return []

    @property
    def not_measured(self) -> list[NotMeasured]:
        """Engines without results so far."""
        return [*self._unsupported, *failed(self.all)]

    @property
    def _memory(self) -> float:
        return _MEMORY / (1 + len(self._options.against.engines))

    def _others(self, name: str, own: HastenEngine) -> list[Engine]:
        """The engines of a name: transformers has two."""
        folder = str(resolve_model(self._options.hf_model or self._engine.model))
        if name == "hf":
            return self._hugging_face(folder, own)
        if self._engine.load_format == "dummy":
            raise UnsupportedError("it has no dummy weights")
        if name == "vllm":
            vllm = VllmEngine(
                folder,
                dtype=own.dtype,
                device=own.device,
                max_len=self._max_len,
                memory=self._memory,
                ranks=self._engine.parallel.tensor_parallel_size,
            )
            self._stack.callback(vllm.close)
            return [vllm]
        return [CTranslate2Engine(name, folder, dtype=own.dtype, device=own.device, threads=self._threads)]

    def _hugging_face(self, folder: str, own: HastenEngine) -> list[Engine]:
        load_format = self._engine.load_format
        padded = HuggingFaceEngine(
            folder, dtype=str(own.dtype), device=str(own.device), load_format=load_format, threads=self._threads
        )
        try:
            return [padded, ContinuousEngine(padded)]
        except UnsupportedError as error:
            self._unsupported.append(NotMeasured(ContinuousEngine.label, str(error)))
            return [padded]
