"""The engine for Python programs: `LLM`, with the names that vLLM's users know."""

import gc
import inspect
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Unpack

import torch

from hasten.checkpoint.files import read_json
from hasten.core.config import EngineConfig, engine_fields
from hasten.core.engine_options import EngineOptions
from hasten.core.errors import ConfigError, EngineError, InvalidRequestError
from hasten.core.model_config import ModelConfig
from hasten.core.progress import ProgressBar, progress_bar
from hasten.core.types import Request, RequestOutput, SamplingParams
from hasten.core.vllm_arguments import OF_CHAT, OF_GENERATE, with_accepted_names
from hasten.engine import launch
from hasten.engine.engine import Engine
from hasten.engine.llm_pooling import PoolingMethods
from hasten.engine.prompts import ParsedPrompt, Prompt, params_for_each, parse_prompts
from hasten.engine.request_state import Output
from hasten.engine.text import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_DEFAULTS = {name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
_DEFAULTS |= {"max_new_tokens": "max_tokens"}
"""Settings of generation_config.json that are parameters of a request."""
_NOT_OFFERED = {
    "reward": "give classify a model of rewards, with activation=False",
    "beam_search": "give generate SamplingParams(beam_width=..., n=...)",
}
"""Methods of vLLM's LLM that there are not, and why."""
_NOTE_EVERY_S = 0.2
_TEXTS_QUEUED_TOGETHER = 16
"""Texts: more would be checked while a GPU waits for the first step."""


def output_copy(output: RequestOutput) -> RequestOutput:
    """A copy of an output that does not grow with it."""
    outputs = [replace(each, token_ids=each.token_ids.copy(), logprobs=copy(each.logprobs)) for each in output.outputs]
    return replace(output, prompt_token_ids=output.prompt_token_ids.copy(), outputs=outputs)


class LLM(PoolingMethods):
    """A model ready to generate, or to make vectors or scores of texts.

    With `tensor_parallel_size` above 1 it starts the other ranks itself. In a program that torchrun or mpirun started
    it is the driver, on rank 0; the other ranks call `run_worker` instead.

    The options are the fields of EngineConfig (hasten.core.config says what each does), most of them under vLLM's
    names; options of vLLM that choose nothing here are accepted where they ask for what hasten does anyway.

    Raises ConfigError, CheckpointError, UnsupportedError or CapacityError where the model cannot be loaded, and
    RankError where a rank dies.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Unpack[EngineOptions]) -> None:
        config = EngineConfig.create(model, **options)
        self._model = config.model
        self._engine: Engine | None = None
        self._closed_because = "it did not start"
        self._next_id = 0
        self._queueing = threading.Lock()
        """Held while a call begins, which it does only where no other call is under way."""
        self._coming: Iterator[object] | None = None
        """Texts of a call under way that are still to be queued; the engine may have none of its others."""
        info = launch.launched_rank(config)
        if info is not None and info.rank > 0:
            raise ConfigError(
                f"this process is rank {info.rank} of {info.size}, and LLM is rank 0's; call "
                "hasten.run_worker(model, ...) with the same options first, and go on only where it returns False"
            )
        start = time.perf_counter()
        # What imports left is not garbage. With it, a full collection takes the time of 20 steps, and results of many
        # objects, such as log-probabilities, start one about every second.
        gc.freeze()
        self._engine = launch.start_engine(config, info)
        _log.info("%s is ready after %.1f s: %s", self._model, time.perf_counter() - start, self._description())

    def __repr__(self) -> str:
        about = "closed" if self._engine is None else self._description()
        return f"LLM({self._model!r}: {about})"

    if not TYPE_CHECKING:  # checkers know that these are missing

        def __getattr__(self, name: str) -> NoReturn:
            reason = f" is not supported: {_NOT_OFFERED[name]}" if name in _NOT_OFFERED else " does not exist"
            raise AttributeError(f"LLM.{name}{reason}")

    def _description(self) -> str:
        engine = self.engine
        quantization = engine.worker.quantization
        weights = "" if quantization is None else f" with {quantization} weights"
        return (
            f"{engine.model_config.architecture} in {str(self.dtype).removeprefix('torch.')}{weights} "
            f"on {self.device}, "
            f"{engine.ranks.world.size} rank(s), max_model_len {engine.max_model_len}, {self._purpose()}"
        )

    def _purpose(self) -> str:
        engine = self.engine
        blocks, pooler = engine.scheduler.blocks, engine.worker.pooler
        if pooler is not None:
            return f"to {' and '.join(pooler.tasks)}"
        cache_dtype = engine.config.cache.eight_bits
        kind = "key/value cache" if cache_dtype is None else f"{cache_dtype} key/value cache"
        return (
            f"{kind} of {blocks.num_blocks} blocks of {blocks.block_size} tokens "
            f"({blocks.num_blocks * engine.worker.runner.block_bytes / 2**20:.0f} MiB per rank)"
        )

    @property
    def engine(self) -> Engine:
        """The engine below; EngineError after `close`."""
        if self._engine is None:
            raise EngineError(f"this LLM is closed: {self._closed_because}")
        return self._engine

    @property
    def model(self) -> str:
        """The folder or Hugging Face id that it was given."""
        return self._model

    @property
    def config(self) -> ModelConfig:
        """What the model looks like."""
        return self.engine.model_config

    @property
    def dtype(self) -> torch.dtype:
        """The type that it computes in."""
        return self.engine.worker.runner.dtype

    @property
    def device(self) -> torch.device:
        """The device that rank 0 computes on."""
        return self.engine.worker.device

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; ConfigError where it has none."""
        if self.engine.tokenizer is None:
            raise ConfigError("the model's folder has no tokenizer; name one with tokenizer=")
        return self.engine.tokenizer

    def get_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer as transformers has it; ConfigError where it has none. The first call takes seconds."""
        return self._transformers_tokenizer

    @cached_property
    def _transformers_tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        path = self._tokenizer_path()
        if path.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, local_files_only=True)
        return loaded

    def _tokenizer_path(self) -> Path:
        engine, _ = self.engine, self.tokenizer
        return Path(engine.config.tokenizer or engine.worker.tokenizer_folder or self._model)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json proposes; ConfigError where it is not valid.

        `generate` does not use it by itself: parameters that are left out are SamplingParams' own defaults.
        """
        file = Path(self.engine.worker.tokenizer_folder or self._model) / "generation_config.json"
        raw = read_json(file) if file.is_file() else {}
        given = {ours: raw[theirs] for theirs, ours in _DEFAULTS.items() if raw.get(theirs) is not None}
        try:
            return SamplingParams(**given)
        except InvalidRequestError as error:
            raise ConfigError(f"{file}: {error}") from None

    def reset_prefix_cache(self) -> bool:
        """Forget what the cache holds of earlier prompts; True, as nothing can keep it from that."""
        self.engine.reset_prefix_cache()
        return True

    @with_accepted_names(OF_GENERATE)
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt, text or token ids; the outputs are in the order of the prompts.

        Where more are given than are computed at once, those with the greatest `max_tokens` begin first.
        `sampling_params` is one for all or one for each. For several prompts a bar on standard error shows how far
        they are, if that is a terminal; `use_tqdm=False` does without. Raises InvalidRequestError, before anything is
        computed, where a prompt cannot be served.
        """
        ids = self._submit(prompts, sampling_params, stream=False)
        outputs = self._finished(ids, "generating", show_progress=use_tqdm)
        return [output for output in outputs if isinstance(output, RequestOutput)]

    def _finished(self, ids: Sequence[str], doing: str, *, show_progress: bool) -> list[Output]:
        """The outputs of requests, in order, once all are finished."""
        finished: dict[str, Output] = {}
        start = time.perf_counter()
        try:
            with progress_bar(doing, len(ids), show=show_progress and len(ids) > 1) as bar:
                meter = _Meter(self.engine, bar)
                while len(finished) < len(ids):
                    outputs = self.engine.step()
                    finished.update((output.request_id, output) for output in outputs)
                    meter.advance(len(outputs))
        finally:
            self._abandon(ids, finished)
        _log.debug("%d prompts in %.2f s", len(ids), time.perf_counter() - start)
        return [finished[request_id] for request_id in ids]

    @with_accepted_names(OF_CHAT)
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answer a chat, or several: messages are dicts with `role` and `content`, rendered by the chat template.

        `chat_template` stands in for the tokenizer's own; `tools` are functions, as OpenAI's API describes them, that
        the prompt tells the model about. Raises InvalidRequestError where the messages are not valid
        or there is no template.
        """
        from hasten.engine.chat import ChatTemplate, chat_prompt

        template = ChatTemplate.from_folder(self._tokenizer_path(), chat_template)
        if template is None:
            raise InvalidRequestError("the model's tokenizer has no chat template; give chat_template or use generate")
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise InvalidRequestError(f"messages must be a list of dicts or of such lists, got {messages!r:.80}")
        several = bool(messages) and isinstance(messages[0], Sequence) and not isinstance(messages[0], str)
        chats: Any = messages if several else [messages]
        texts = [
            chat_prompt(
                chat,
                template,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=chat_template_kwargs,
            )
            for chat in chats
        ]
        # The template writes special tokens itself.
        encode = self.tokenizer.encode
        prompts: list[Prompt] = [
            {"prompt": text, "prompt_token_ids": encode(text, add_special_tokens=False)} for text in texts
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    @with_accepted_names(OF_GENERATE)
    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams | None] | None = None,
    ) -> Iterator[RequestOutput]:
        """Complete each prompt and yield outputs as they grow, each with all of its text and tokens so far.

        Closing the iterator withdraws what is not finished.
        """
        ids = self._submit(prompts, sampling_params, stream=True)
        open_ids, finished = set(ids), set[str]()
        try:
            while len(finished) < len(ids):
                for output in self.engine.step():
                    if output.request_id in open_ids and isinstance(output, RequestOutput):
                        if output.finished:
                            finished.add(output.request_id)
                        yield output_copy(output)
        finally:
            self._abandon(ids, finished)

    def abort(self) -> None:
        """Withdraw what is under way, such as a stream that an interrupted loop left open."""
        self.engine.abort_all()

    def close(self) -> None:
        """End the ranks and free the model; a second call does nothing."""
        if self._engine is not None:
            self._engine.close()
            self._closed_because = f"{self._engine.closed_because}; create a new LLM"
            self._engine = None
            gc.unfreeze()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _submit(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None,
        *,
        stream: bool,
    ) -> list[str]:
        self._check_free()
        parsed = parse_prompts(prompts)
        each = params_for_each(len(parsed), params, SamplingParams())
        return self._queue(
            [
                (prompt.where, prompt_request(prompt, ids, chosen))
                for prompt, ids, chosen in zip(parsed, self._token_ids(parsed), each, strict=True)
            ],
            stream=stream,
        )

    def _check_free(self) -> None:
        if self.engine.has_unfinished or self._coming is not None:
            raise EngineError("another call of this LLM is under way; finish, close or abort it first")

    def _queue(self, requests: Sequence[tuple[str, Request]], *, stream: bool) -> list[str]:
        """Queue requests, each behind what messages call its prompt; their ids. All of them or none."""
        with self._queueing:
            self._check_free()  # another thread's call may have begun while prompts were tokenized
            ids = [str(self._next_id + number) for number in range(len(requests))]
            self._next_id += len(ids)
            try:
                for request_id, (where, request) in zip(ids, requests, strict=True):
                    self._add(replace(request, request_id=request_id), where, stream=stream)
                if not stream:
                    self.engine.begin_longest_first()
            except BaseException:
                self._abandon(ids, ())
                raise
        return ids

    def _add(self, request: Request, where: str, *, stream: bool) -> None:
        try:
            self.engine.add(request, stream=stream)
        except InvalidRequestError as error:
            raise _located(error, {request.request_id: where}) from None

    def _finished_texts(
        self, requests: Iterable[tuple[str, Request]], count: int, doing: str, *, show_progress: bool
    ) -> list[tuple[str, Output]]:
        """The outputs of texts, `count` of them, in order, each behind what messages call it.

        Requests, whose ids count from the next, are queued for a step while the device computes the one before. Once
        one is refused, all are withdrawn.
        """
        coming, positions, finished = iter(requests), dict[str, str](), dict[str, Output]()
        try:
            with self._queueing:
                self._check_free()
                self._coming = coming
            with progress_bar(doing, count, show=show_progress and count > 1) as bar:
                meter = _Meter(self.engine, bar)
                while len(finished) < count:
                    self._queue_texts(coming, positions)
                    outputs = self.engine.step()
                    finished.update((output.request_id, output) for output in outputs)
                    meter.advance(len(outputs))
        finally:
            if self._coming is coming:
                self._coming = None
            self._abandon(list(positions), finished)
        return [(where, finished[request_id]) for request_id, where in positions.items()]

    def _queue_texts(self, coming: Iterator[tuple[str, Request]], positions: dict[str, str]) -> None:
        """Queue texts until they fill a step, and add what messages call them to `positions`, by their ids."""
        while self.engine.has_room_for_texts and (group := list(islice(coming, _TEXTS_QUEUED_TOGETHER))):
            positions |= {request.request_id: where for where, request in group}
            self._next_id += len(group)
            try:
                self.engine.add_texts(request for _, request in group)
            except InvalidRequestError as error:
                raise _located(error, positions) from None

    def _token_ids(self, prompts: list[ParsedPrompt]) -> list[tuple[int, ...]]:
        texts = [prompt.text for prompt in prompts if prompt.token_ids is None and prompt.text is not None]
        encoded = iter(self.tokenizer.encode_batch(texts) if texts else ())
        return [tuple(next(encoded)) if prompt.token_ids is None else prompt.token_ids for prompt in prompts]

    def _abandon(self, ids: Sequence[str], finished: Any) -> None:
        if self._engine is not None:
            for request_id in ids:
                if request_id not in finished:
                    self._engine.abort(request_id)


class _Meter:
    """A bar of finished prompts, with the tokens per second behind it."""

    def __init__(self, engine: Engine, bar: ProgressBar) -> None:
        self._engine = engine
        self._bar = bar
        self._start = self._noted = time.perf_counter()
        self._before = engine.stats.generation_tokens

    def advance(self, count: int) -> None:
        """Note that `count` more prompts are finished."""
        now = time.perf_counter()
        if count:
            self._bar.advance(count)
        if now - self._noted >= _NOTE_EVERY_S:
            self._noted = now
            rate = (self._engine.stats.generation_tokens - self._before) / (now - self._start)
            self._bar.note(f"{rate:.0f} tokens/s")


def _located(error: InvalidRequestError, positions: Mapping[str, str]) -> InvalidRequestError:
    """The error with what messages call its request's prompt, of requests by id, in place of that."""
    head, colon, message = str(error).partition(": ")
    where = positions.get(head.removeprefix("request "))
    if not colon or where is None:
        return error
    return InvalidRequestError(message if message.startswith(where) or where == "the prompt" else f"{where}: {message}")


def prompt_request(prompt: ParsedPrompt, ids: tuple[int, ...], params: SamplingParams) -> Request:
    """A request of a prompt with these tokens; its id is still to be given."""
    return Request(request_id="", prompt_token_ids=ids, params=params, prompt=prompt.text, cache_salt=prompt.cache_salt)


def _signature() -> inspect.Signature:
    """Of `LLM`, with every option and its default: what `help` and completion show."""
    kind = inspect.Parameter
    model = kind("model", kind.POSITIONAL_OR_KEYWORD, annotation="str | os.PathLike[str]")
    options = [kind(f.name, kind.KEYWORD_ONLY, default=f.default, annotation=f.type) for f in engine_fields()]
    return inspect.Signature([model, *options])


LLM.__signature__ = _signature()  # type: ignore[attr-defined]


def run_worker(model: str | os.PathLike[str], **options: Unpack[EngineOptions]) -> bool:
    """Compute for rank 0 until that ends, where this process is another rank of torchrun, mpirun or an operator.

    True once rank 0 has ended: there is nothing left to do. False, at once, on rank 0 and in a process that is alone:
    those go on with `LLM` and the same options. Raises as `LLM` does.
    """
    return launch.run_worker(EngineConfig.create(model, **options))
