"""The engines that a report compares hasten with, by name; and vLLM in this process."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from hasten.bench.engines import Generation, clock
from hasten.bench.load.target import address_of
from hasten.core.errors import ConfigError

IN_PROCESS = ("hf", "vllm", "ctranslate2")
_FORM = "hf, vllm, ctranslate2, openai=URL or none, separated by commas"
VLLM_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
"""vLLM's names of types."""


@dataclass(frozen=True)
class Against:
    """Whom hasten is compared with."""

    engines: tuple[str, ...] = ()
    """Of `IN_PROCESS`, on the same prompts as hasten."""
    urls: tuple[str, ...] = ()
    """Servers of OpenAI's API, under the same load as hasten's."""

    @classmethod
    def parse(cls, text: str) -> "Against":
        """From names separated by commas; ConfigError for an unknown name, and for a package that is not installed."""
        engines: list[str] = []
        urls: list[str] = []
        names = [part.strip() for part in text.split(",")]
        for part in names:
            name, _, url = part.partition("=")
            if name == "openai" and url:
                address_of("openai", url)
                urls.append(url)
            elif part in IN_PROCESS and part not in engines:
                engines.append(part)
            elif part != "none":
                raise ConfigError(f"{part!r} is no engine to compare with; give {_FORM}")
        if "none" in names and len(names) > 1:
            raise ConfigError(f"{text!r} has none beside others; give {_FORM}")
        for engine in engines:
            if engine != "hf" and find_spec(engine) is None:
                raise ConfigError(f"{engine} is not installed; run: pip install {engine}, or leave it out of --against")
        return cls(tuple(engines), tuple(urls))

    def __str__(self) -> str:
        return ",".join([*self.engines, *(f"openai={url}" for url in self.urls)]) or "none"


class VllmEngine:
    """vLLM as its users run it offline, without its prefix cache, on the part of a GPU's memory that it is given."""

    label = "vLLM"

    def __init__(
        self, folder: str, *, dtype: torch.dtype, device: torch.device, max_len: int, memory: float, ranks: int = 1
    ) -> None:
        import vllm

        self.device, self.dtype = device, dtype
        self._package = vllm
        self._llm = vllm.LLM(
            model=folder,
            dtype=VLLM_DTYPES[dtype],
            max_model_len=max_len,
            tensor_parallel_size=ranks,
            gpu_memory_utilization=memory,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )

    def generate(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Generation:
        """Continue each prompt by exactly its length."""
        inputs: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        params = [
            self._package.SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
            for length in lengths
        ]
        start = clock(self.device)
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        seconds = clock(self.device) - start
        return Generation([list(output.outputs[0].token_ids) for output in outputs], seconds)

    def close(self) -> None:
        """Free the GPU's memory."""
        del self._llm
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
