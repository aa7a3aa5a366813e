"""Other engines for vectors: transformers, sentence-transformers and vLLM, each used as its users would for speed.

The first two get texts sorted by length, in padded batches: the longest first, as sentence-transformers does itself.
vLLM gets all texts at once, as hasten does.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hasten.bench.against import VLLM_DTYPES
from hasten.bench.engines import clock, load_hugging_face, num_threads
from hasten.bench.peers import NotMeasured
from hasten.checkpoint.pooling import PoolingConfig
from hasten.core.errors import CheckpointError, UnsupportedError
from hasten.core.model_config import Pooling
from hasten.parallel.threads import limit_threads

_SENTENCE_TRANSFORMERS, _VLLM = "sentence_transformers", "vllm"
_VLLM_MEMORY = 0.5
"""Part of a GPU's memory, which hasten's model is in too."""
_BEFORE_DENSE = "the benchmark compares poolings without Dense modules"


class _Padded:
    """Runs batches of a model that takes padded texts."""

    def __init__(self, device: torch.device, batch_size: int, threads: int | None) -> None:
        self._device = device
        self._batch_size = batch_size
        self._threads = threads or limit_threads()

    def run(
        self, prompts: Sequence[Sequence[int]], forward: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, float]:
        """Vectors [s, w] of texts in their order, by `forward` of ids and mask [batch, longest], and seconds."""
        order = sorted(range(len(prompts)), key=lambda at: -len(prompts[at]))
        start = clock(self._device)
        parts = []
        with num_threads(self._threads), torch.inference_mode():
            for begin in range(0, len(order), self._batch_size):
                ids, mask = padded([prompts[at] for at in order[begin : begin + self._batch_size]])
                parts.append(forward(ids.to(self._device), mask.to(self._device)).float())
            vectors = torch.cat(parts).cpu()
        seconds = clock(self._device) - start
        found = torch.empty_like(vectors)
        found[torch.tensor(order)] = vectors
        return found, seconds


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [prompts, longest], zeros behind shorter ones."""
    width = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts])
    return ids, mask


class TransformersEmbedder:
    """transformers' model, and the pooling of its padded hidden states."""

    label = "transformers"

    def __init__(
        self,
        folder: str,
        pooling: PoolingConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        load_format: str = "auto",
        batch_size: int = 32,
        threads: int | None = None,
    ) -> None:
        if pooling.dense:
            raise UnsupportedError(f"{folder}: {_BEFORE_DENSE}; leave --compare out")
        from transformers import AutoModel

        self._pooling = pooling
        self._padded = _Padded(device, batch_size, threads)
        self._model = load_hugging_face(AutoModel, folder, dtype, device, load_format).eval()

    def embed(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, float]:
        """Vectors, and seconds."""
        return self._padded.run(prompts, self._forward)

    def _forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        parts = [pooled(hidden, mask, mode) for mode in self._pooling.modes]
        return F.normalize(torch.cat(parts, dim=-1).float(), dim=-1)


def pooled(hidden: Tensor, mask: Tensor, mode: Pooling) -> Tensor:
    """One vector of each text [s, h] from padded hidden states [s, longest, h]."""
    if mode == "cls":
        return hidden[:, 0]
    lengths, inside = mask.sum(1, keepdim=True), mask.unsqueeze(-1).to(hidden.dtype)
    if mode == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths.squeeze(1) - 1]
    if mode == "max":
        return hidden.masked_fill(inside == 0, -torch.inf).max(1).values
    if mode == "weightedmean":
        inside = inside * torch.arange(1, hidden.shape[1] + 1, device=hidden.device).view(1, -1, 1)
        return (hidden * inside).sum(1) / inside.sum(1)
    total = (hidden * inside).sum(1)
    return total / (lengths.sqrt() if mode == "mean_sqrt_len" else lengths)


class SentenceTransformersEmbedder:
    """sentence-transformers' modules; texts are token ids already, so its tokenizer is not timed."""

    label = "sentence-transformers"

    def __init__(
        self,
        folder: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int = 32,
        threads: int | None = None,
    ) -> None:
        module: Any = import_module(_SENTENCE_TRANSFORMERS)  # which hasten does without
        self._padded = _Padded(device, batch_size, threads)
        try:
            self._model: Any = module.SentenceTransformer(
                folder, device=str(device), model_kwargs={"dtype": dtype}
            ).eval()
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(f"sentence-transformers cannot load {folder}: {reason}") from error

    def embed(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, float]:
        """Vectors, and seconds."""
        return self._padded.run(prompts, self._forward)

    def _forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        vectors: Tensor = self._model({"input_ids": ids, "attention_mask": mask})["sentence_embedding"]
        return F.normalize(vectors.float(), dim=-1)


class VllmEmbedder:
    """vLLM as its users run it offline; texts are token ids already."""

    label = "vLLM"

    def __init__(
        self, folder: str, *, device: torch.device, dtype: torch.dtype, max_len: int, load_format: str
    ) -> None:
        module: Any = import_module(_VLLM)
        self._device = device
        self._llm: Any = module.LLM(
            model=folder,
            runner="pooling",
            dtype=VLLM_DTYPES[dtype],
            max_model_len=max_len,
            load_format=load_format,
            skip_tokenizer_init=True,  # a folder of a model with dummy weights need not have one
            gpu_memory_utilization=_VLLM_MEMORY,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )

    def embed(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, float]:
        """Vectors, and seconds."""
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        start = clock(self._device)
        outputs = self._llm.embed(inputs, use_tqdm=False)
        seconds = clock(self._device) - start
        vectors = torch.tensor([output.outputs.embedding for output in outputs])
        return F.normalize(vectors, dim=-1), seconds


def vllm_embedder(folder: str, **options: Any) -> VllmEmbedder | NotMeasured:
    """The engine of vLLM, or why it cannot be had: whatever it raises ends its own part of the benchmark alone."""
    if find_spec(_VLLM) is None:
        return NotMeasured(VllmEmbedder.label, "it is not installed")
    try:
        return VllmEmbedder(folder, **options)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return NotMeasured(VllmEmbedder.label, reason)


def has_sentence_transformers() -> bool:
    """Whether it is installed."""
    return find_spec(_SENTENCE_TRANSFORMERS) is not None
