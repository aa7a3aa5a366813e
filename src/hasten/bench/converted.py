"""CTranslate2, where it is installed, with a checkpoint that it converts."""

import json
import tempfile
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from hasten.bench.engines import GREEDY, Generation, clock, in_batches
from hasten.core.errors import ConfigError, EngineError, UnsupportedError
from hasten.core.types import SamplingParams

_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def require_ctranslate2() -> None:
    """ConfigError where the package is missing."""
    if find_spec("ctranslate2") is None:
        raise ConfigError("--compare-with needs ctranslate2, which is not installed; run: pip install ctranslate2")


class CTranslate2Engine:
    """A checkpoint converted for CTranslate2, into a folder that lasts as long as the conversion.

    A batch runs until its longest output is done, and what is beyond a prompt's own length is dropped.
    """

    def __init__(
        self,
        label: str,
        folder: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
        threads: int,
        sampling: SamplingParams = GREEDY,
        batch_size: int | None = None,
    ) -> None:
        """UnsupportedError if the checkpoint cannot be converted."""
        self.label, self.device, self.dtype = label, device, dtype
        self._batch_size = batch_size
        self._options = _sampling_options(sampling)
        kind = "int8" if label.endswith("int8") else _TYPES[dtype]
        self._generator, self._vocabulary = _converted(folder, kind, device, threads)

    def generate(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Generation:
        """Continue each prompt by exactly its length."""
        return in_batches(self._generate_batch, prompts, lengths, self._batch_size)

    def _generate_batch(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Generation:
        if min(map(len, prompts)) == 1 < max(map(len, prompts)):
            raise EngineError("ctranslate2 returns prompts for answers where another prompt of the batch is one token")
        texts = [[self._vocabulary[token] for token in prompt] for prompt in prompts]
        start = clock(self.device)
        results = self._generator.generate_batch(
            texts, max_length=max(lengths), end_token=[], include_prompt_in_result=False, **self._options
        )
        seconds = clock(self.device) - start
        pairs = zip(results, lengths, strict=True)
        return Generation([result.sequences_ids[0][:length] for result, length in pairs], seconds)


def _sampling_options(sampling: SamplingParams) -> dict[str, Any]:
    if sampling.beam_width > 1 or sampling.min_p or sampling.repetition_penalty != 1:
        raise ConfigError("beams, min_p and repetition_penalty cannot be compared with ctranslate2; leave one out")
    if sampling.greedy:
        return {"sampling_topk": 1}
    return {
        "sampling_topk": max(0, sampling.top_k),
        "sampling_topp": sampling.top_p,
        "sampling_temperature": sampling.temperature,
    }


def _converted(folder: str, kind: str, device: torch.device, threads: int) -> tuple[Any, Sequence[str]]:
    """The generator, and the text of each token."""
    ctranslate2, converters = import_module("ctranslate2"), import_module("ctranslate2.converters")
    with tempfile.TemporaryDirectory(prefix="hasten-ctranslate2-") as parent:
        target = Path(parent) / "model"
        try:
            converters.TransformersConverter(folder).convert(str(target), quantization=kind)
            generator = ctranslate2.Generator(
                str(target), device=device.type, compute_type=kind, intra_threads=threads, inter_threads=1
            )
            return generator, json.loads((target / "vocabulary.json").read_text(encoding="utf-8"))
        except Exception as error:  # whatever transformers and ctranslate2 raise for a model that they do not know
            reason = str(error).strip().partition("\n")[0]
            raise UnsupportedError(f"ctranslate2 cannot convert {folder}: {reason}") from error
