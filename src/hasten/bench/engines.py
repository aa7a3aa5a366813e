"""hasten and Hugging Face behind one small interface, so that a benchmark treats both alike."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from hasten.checkpoint.hub import resolve_engine
from hasten.checkpoint.plan import stored_config
from hasten.core.config import EngineConfig
from hasten.core.errors import CapacityError, CheckpointError, ConfigError, EngineError, UnsupportedError
from hasten.core.model_config import ModelConfig
from hasten.core.types import CompletionOutput, FinishReason, SamplingParams
from hasten.engine.llm import LLM
from hasten.engine.model_loading import compute_dtype
from hasten.engine.rank_device import rank_device
from hasten.ops import TORCH_DTYPES
from hasten.parallel.groups import TensorGroup
from hasten.parallel.threads import limit_threads

GREEDY = SamplingParams(temperature=0)


def clock(device: torch.device) -> float:
    """Seconds, read once the device has done all that was launched: a GPU works on after a call has returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Generation:
    """New tokens of each prompt, and the seconds that the generate call alone took."""

    token_ids: list[list[int]]
    seconds: float


class Engine(Protocol):
    """What a benchmark needs of an engine."""

    label: str
    device: torch.device
    dtype: torch.dtype

    def generate(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Generation:
        """Continue each prompt by exactly its length, whatever the model's end token says."""
        ...


class HastenEngine:
    """hasten: all prompts of a call at once, or in batches of `batch_size`."""

    label = "hasten"

    def __init__(self, llm: LLM, sampling: SamplingParams = GREEDY, batch_size: int | None = None) -> None:
        self._llm = llm
        llm.engine.prepare()  # a benchmark's first batch would else compute and prepare in turns
        self.device = llm.device
        self.dtype = llm.dtype
        self._batch_size = batch_size
        # Hugging Face's generate gives token ids, not text: neither engine is timed for making text
        self._sampling = replace(sampling, ignore_eos=True, detokenize=False)

    def generate(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Generation:
        """Continue each prompt by exactly its length."""
        return in_batches(self._generate_batch, prompts, lengths, self._batch_size)

    def _generate_batch(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Generation:
        params = [replace(self._sampling, max_tokens=length) for length in lengths]
        start = clock(self.device)
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = clock(self.device) - start
        completions = [output.outputs[0] for output in outputs]
        for completion, length in zip(completions, lengths, strict=True):
            _require_length(completion, length)
        return Generation([completion.token_ids for completion in completions], seconds)


_COMPARABLE = frozenset(
    {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "ignore_eos", "detokenize", "max_tokens", "seed"}
    | {"beam_width", "n", "length_penalty", "early_stopping"}
)


def require_comparable(sampling: SamplingParams) -> None:
    """Refuse what Hugging Face's `generate` does not do, or does not do in the same way, by its name."""
    for field in fields(sampling):
        value, default = getattr(sampling, field.name), getattr(SamplingParams(), field.name)
        if field.name not in _COMPARABLE and value != default:
            raise ConfigError(f"{field.name} cannot be compared with Hugging Face; leave it or --compare out")


class HuggingFaceEngine:
    """Hugging Face's `generate` as its users use it: padding on the left, or for an encoder on the right, KV cache.

    Prompts go through it in batches of `batch_size`, or all at once; a batch runs until its longest output is done,
    and what is beyond a prompt's own length is dropped, so beams want outputs of one length. `threads` are the CPU
    threads that it may use (default: as many as torch uses now).
    """

    label = "HF"

    def __init__(
        self,
        folder: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        load_format: str = "auto",
        revision: str | None = None,
        download_dir: str | None = None,
        sampling: SamplingParams = GREEDY,
        batch_size: int | None = None,
        threads: int | None = None,
    ) -> None:
        self.threads = threads or limit_threads()
        engine = resolve_engine(
            EngineConfig.create(
                folder, device=device, load_format=load_format, revision=revision, download_dir=download_dir
            )
        )
        folder = engine.model
        self.device = rank_device(engine, TensorGroup(), 1)
        config = stored_config(Path(folder), 1, dummy=load_format == "dummy")
        self.dtype = TORCH_DTYPES[compute_dtype(dtype, config, self.device)]
        self._batch_size = batch_size
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        self.has_encoder = config.encoder is not None
        kind = AutoModelForSeq2SeqLM if self.has_encoder else AutoModelForCausalLM
        self.model = load_hugging_face(kind, folder, self.dtype, self.device, load_format).eval()
        self.model.generation_config.eos_token_id = None
        draws = sampling.beam_width == 1 and not sampling.greedy
        self.options: dict[str, Any] = {"do_sample": draws, "num_beams": sampling.beam_width}
        self.options |= {"use_cache": True, "pad_token_id": 0}
        if draws:
            self.options |= {
                "temperature": sampling.temperature,
                "top_k": max(0, sampling.top_k),
                "top_p": sampling.top_p,
                "min_p": sampling.min_p or None,
            }
        if sampling.repetition_penalty != 1:
            self.options["repetition_penalty"] = sampling.repetition_penalty

    def generate(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Generation:
        """Continue each prompt by exactly its length."""
        with num_threads(self.threads):
            return in_batches(self._generate_batch, prompts, lengths, self._batch_size)

    def _generate_batch(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Generation:
        input_ids, attention_mask = _padded(prompts, left=not self.has_encoder)
        input_ids, attention_mask = input_ids.to(self.device), attention_mask.to(self.device)
        start = clock(self.device)
        with torch.inference_mode():
            output: Tensor = self.model.generate(
                input_ids, attention_mask=attention_mask, max_new_tokens=max(lengths), **self.options
            )
        seconds = clock(self.device) - start
        # what an encoder's prompt is answered with begins behind one token of the decoder
        new: list[list[int]] = output[:, 1 if self.has_encoder else input_ids.shape[1] :].tolist()
        return Generation([ids[:length] for ids, length in zip(new, lengths, strict=True)], seconds)


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads; ranks of hasten on one machine divide its cores, Hugging Face has them all."""
    before = torch.get_num_threads()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_batches(
    generate: Callable[[Sequence[Sequence[int]], Sequence[int]], Generation],
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    size: int | None,
) -> Generation:
    """Generate for `size` prompts at a time, or for all at once; the seconds are those of all calls."""
    size = len(prompts) if size is None else size
    parts = [generate(prompts[i : i + size], lengths[i : i + size]) for i in range(0, len(prompts), size)]
    return Generation([ids for part in parts for ids in part.token_ids], sum(part.seconds for part in parts))


def _require_length(completion: CompletionOutput, length: int) -> None:
    if completion.finish_reason is FinishReason.ERROR:
        raise EngineError(f"a request could not be continued: {completion.stop_reason}")
    if len(completion.token_ids) != length:
        raise ConfigError(
            f"a request ended after {len(completion.token_ids)} of {length} tokens, at the longest sequence that the "
            "model may have; raise --max-model-len"
        )


def text_model(engine: EngineConfig, what: str) -> ModelConfig:
    """The configuration of a model's folder, before its weights are looked at.

    UnsupportedError if it generates no text: `what` is for models that do.
    """
    ranks, is_dummy = engine.parallel.tensor_parallel_size, engine.load_format == "dummy"
    config = stored_config(Path(engine.model), ranks, dummy=is_dummy)
    if config.task != "generate":
        raise UnsupportedError(f"{config.architecture} generates no text; {what} is for models that do")
    return config


def load_hugging_face(auto_class: Any, folder: str, dtype: torch.dtype, device: torch.device, load_format: str) -> Any:
    """A model of one of transformers' automatic classes on its device; HastenError where it cannot be loaded."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        if load_format == "dummy":
            # a CPU takes minutes to draw the random numbers of a large model, a GPU no time
            with torch.device(device):
                return auto_class.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
        return auto_class.from_pretrained(folder, dtype=dtype).to(device)
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"Hugging Face cannot load {folder}: {_first_line(error)}; where hasten is loaded beside it, lower "
            "gpu_memory_utilization or set kv_cache_memory"
        ) from error
    except (KeyError, ValueError) as error:
        raise UnsupportedError(f"Hugging Face cannot load {folder}: {_first_line(error)}") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"Hugging Face cannot load {folder}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _padded(prompts: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [prompts, longest], zeros on one side of shorter prompts."""
    width = max(map(len, prompts))

    def whole(values: Sequence[int]) -> list[int]:
        more = [0] * (width - len(values))
        return [*more, *values] if left else [*values, *more]

    ids = torch.tensor([whole(prompt) for prompt in prompts])
    return ids, torch.tensor([whole([1] * len(prompt)) for prompt in prompts])
