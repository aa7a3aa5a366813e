"""The engine as rank 0 runs it: requests in, steps, outputs back. Every other rank follows (`worker.py`).

A step is launched, and its tokens are collected when the device has chosen them: with overlapped steps only after the
next one is launched, so that the device has that to do while Python looks at the tokens.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from hasten import ops
from hasten.core.config import EngineConfig
from hasten.core.errors import EngineError, HastenError, InvalidRequestError
from hasten.core.types import (
    CompletionOutput,
    FinishReason,
    PooledOutput,
    PoolingRequestOutput,
    Request,
    RequestOutput,
    SamplingParams,
)
from hasten.engine.batch import Batch
from hasten.engine.beam import BeamSearch, BeamStep, Hypothesis, candidate_count
from hasten.engine.block_manager import BlockManager
from hasten.engine.constraint import Constraint
from hasten.engine.grammar import Grammar, GrammarCompiler
from hasten.engine.grammar_trial import GrammarLimits
from hasten.engine.pacing import PacedStep, Pacer
from hasten.engine.planning.step_work import EstimatedWork, WorkEstimator
from hasten.engine.pooling import Pooled, truncated
from hasten.engine.sampler import Choice, PromptLogprobs, Sampled, TextOf, mix64
from hasten.engine.scheduler import Scheduler
from hasten.engine.sequence import Sequence
from hasten.engine.stats import EngineStats, StepTally
from hasten.engine.text import TextState, Tokenizer
from hasten.engine.worker import Launched, Worker, explained_out_of_memory
from hasten.models.encoder import position_rows
from hasten.parallel.launch import Ranks

Output = RequestOutput | PoolingRequestOutput[PooledOutput]
"""What became of a request: text, or a vector or scores of it."""
_KEPT_WORDS = 1024
"""Bad words whose tokens are kept: most requests of a program ban the same ones."""


@dataclass
class _Completion:
    """One completion under way."""

    output: CompletionOutput
    text: TextState | None
    sequence: Sequence
    continues: bool
    """Whether it stands behind text, so that its first token is not decoded as a text's first."""
    hidden_tokens: int = 0
    """Tokens at the end that ended it and are no part of its text."""


@dataclass
class _RequestState:
    """A request under way, and the outputs it has so far."""

    request: Request
    output: RequestOutput
    completions: dict[int, _Completion] = field(default_factory=dict)
    """By the sequence's index."""
    unfinished: int = 0
    stream: bool = False
    continues: bool = False
    """Whether the prompt has text."""
    search: BeamSearch | None = None
    """Of a request with beams, whose completions come when it is done."""

    @property
    def keys(self) -> list[int]:
        """Of its sequences."""
        if self.search is not None:
            return self.search.keys
        return [completion.sequence.key for completion in self.completions.values()]

    def shown(self) -> RequestOutput:
        """What it has so far; unfinished completions show the text that no stop string can take back."""
        for completion in self.completions.values():
            if completion.text is not None and completion.output.finish_reason is None:
                completion.output.text = completion.text.settled
        if len(self.output.outputs) != len(self.completions):
            self.output.outputs = [completion.output for _, completion in sorted(self.completions.items())]
        if self.unfinished == 0 and not self.output.finished:
            self.output.finished, self.output.metrics.last_token_ts = True, time.monotonic()
        return self.output


@dataclass
class _TextState:
    """A text under way of which a vector or scores are to be made."""

    request: Request
    sequence: Sequence
    output: PoolingRequestOutput[PooledOutput] | None = None
    stream: bool = False

    @property
    def unfinished(self) -> int:
        """1 until it is done."""
        return 1 if self.output is None else 0

    @property
    def keys(self) -> list[int]:
        """Of its sequence."""
        return [self.sequence.key]

    def shown(self) -> PoolingRequestOutput[PooledOutput]:
        """What was made of it, once it is done."""
        assert self.output is not None
        return self.output


_State = _RequestState | _TextState


@dataclass
class _Flight:
    """A step that was launched, and whose tokens are not collected yet."""

    launched: Launched
    batch: Batch
    step: PacedStep | None
    """What its time is measured for, if it is."""
    before: "_Flight | None"
    """The step that was launched before it, if that was in flight then."""
    choice: Choice | Pooled | None = None
    """The next token of each sequence, once they are chosen, or what was made of texts; None where there are none."""

    @property
    def blocks_next(self) -> bool:
        """Whether its tokens must be known before its sequences can go on."""
        return any(sequence.reads_history for sequence in self.launched.sequences)

    @property
    def seconds(self) -> float | None:
        """How long it took the device, right after its tokens were collected; None where that is not known."""
        if self.before is not None:
            choice, earlier = self.choice, self.before.choice
            if not isinstance(choice, Choice) or not isinstance(earlier, Choice):
                return None
            return choice.seconds_after(earlier)
        return None if self.step is None else time.perf_counter() - self.step.began


def _second(pair: tuple[str, int]) -> int:
    return pair[1]


class Engine:
    """Continuous batching over one model, step by step."""

    def __init__(self, config: EngineConfig, ranks: Ranks) -> None:
        self.ranks = ranks
        with ranks.guard("loading the model"):
            self.worker = Worker(config, ranks)
        self.config = self.worker.config
        self.scheduler = self._new_scheduler()
        self.model_config = self.worker.model_config
        self.max_model_len = self.worker.max_model_len
        start = self.model_config.decoder_start_token_id
        self._start = () if start is None else (start,)
        """What a decoder begins with whose encoder reads the prompts."""
        with self.worker.start_times.phase("tokenizer"):
            self.tokenizer = self._load_tokenizer()
        self.grammars = GrammarCompiler(
            self.tokenizer,
            self.model_config.vocab_size,
            self.model_config.eos_token_ids,
            GrammarLimits(config.scheduler.max_grammar_seconds, config.scheduler.max_grammar_memory),
        )
        scheduler = self.scheduler.config
        assert scheduler.max_num_batched_tokens is not None, "the worker resolves the default"
        # a sequence is in every step, or in one of as many as there are stages
        target = 0.0
        if self.worker.pooler is None:
            target = (scheduler.itl_target or 0.0) / 1000 / self.worker.stage.size
        self._pacer = Pacer(target, scheduler.max_num_batched_tokens)
        self._is_unmeasured = False
        """Whether the last step launched chooses no tokens, whose arrival would show when it ends."""
        self._requests: dict[str, _State] = {}
        self._owners: dict[int, _State] = {}
        """Sequence key -> its request."""
        self._stages = self.worker.stage.size
        self._flights: deque[_Flight] = deque()
        """In the order in which they were launched."""
        self._words_ids = None if self.tokenizer is None else lru_cache(_KEPT_WORDS)(self.tokenizer.words_ids)
        self._token_texts: dict[int, str] = {}
        self._unseeded = 0
        self.tally = StepTally()
        self.estimator: WorkEstimator | None = None
        """Adds up what its steps take, where anybody wants to know."""
        self._closed_because: str | None = None
        """Why nothing more is computed."""
        self._failed = self._left = False
        self._changing: int | None = None
        """The thread that is changing the engine's state, for as long as that takes."""

    def _new_scheduler(self) -> Scheduler:
        cache = self.config.cache
        keeps = cache.enable_prefix_caching and self.worker.pooler is None
        blocks = BlockManager(self.worker.num_blocks, cache.block_size, enable_prefix_caching=keeps)
        return Scheduler(self.worker.scheduler_config, blocks, self.worker.stage.size)

    def _load_tokenizer(self) -> Tokenizer | None:
        folder = self.config.tokenizer or self.worker.tokenizer_folder
        return None if folder is None else Tokenizer.from_folder(folder)

    @property
    def has_unfinished(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._requests)

    @property
    def waiting(self) -> set[str]:
        """Ids of the requests that have not begun, or were preempted."""
        return {sequence.request_id for sequence in self.scheduler.waiting if sequence.index == 0}

    @property
    def stats(self) -> EngineStats:
        """What goes on between two steps, and counters since the start."""
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        waiting = len(self.waiting)
        work = EstimatedWork() if self.estimator is None else self.estimator.total
        return EngineStats(
            running=len(self._requests) - waiting,
            waiting=waiting,
            used_blocks=blocks.num_used,
            num_blocks=blocks.num_blocks,
            prefix_hit_tokens=blocks.prefix_hits,
            prefix_query_tokens=blocks.prefix_queries,
            preemptions=scheduler.stats.preemptions,
            steps=scheduler.stats.steps,
            prompt_tokens=self.tally.prompts,
            generation_tokens=self.tally.generated,
            estimated_flops=work.flops,
            estimated_read_bytes=work.read_bytes,
            estimated_write_bytes=work.write_bytes,
            **vars(self._pacer.stats),
        )

    def estimate_work(self) -> None:
        """Add up, from now on, what steps take in operations and bytes; nothing where that cannot be estimated."""
        worker, groups = self.worker, self.ranks.groups
        names = {dtype: name for name, dtype in ops.TORCH_DTYPES.items()}
        self.estimator = WorkEstimator.of(
            self.model_config,
            names[worker.runner.dtype],
            ranks=groups.tensor.size,
            stages=groups.pipeline.size,
            quantization=worker.quantization,
            cache_dtype=self.config.cache.eight_bits,
            whole_experts=self.config.parallel.expert_parallel,
        )

    def add(self, request: Request, *, stream: bool = False, grammar: Grammar | None = None) -> None:
        """Queue a request; InvalidRequestError where it cannot be served, with nothing queued.

        `step` returns its output when it is finished, and with `stream` whenever there is more of it. `grammar`: what
        `grammars` compiled of its parameters; without it, a request with a grammar waits here until that is compiled.
        """
        self._check_usable()
        if request.request_id in self._requests:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use")
        if request.pooling is not None or self.worker.pooler is not None:
            self._add_text(request)
            return
        params = self._resolve(request)
        if params is not request.params:
            request = replace(request, params=params)
        # nothing has changed yet: an interrupt while it is compiled ends this call alone, with several ranks too
        grammar = grammar or self.grammars.compiled(params)
        with self._change():
            self._add(request, stream, grammar)

    def _add(self, request: Request, stream: bool, grammar: Grammar | None) -> None:
        params = request.params
        seed = self._next_seed() if params.seed is None else params.seed
        sequence = Sequence(request, seed, self.max_model_len, self._start)
        for member in sequence.unit:
            member.forced = self._forced(member)
        # the host tells all stages whose blocks a beam goes on with
        sequence.reads_history |= params.beam_width > 1 and self._stages > 1
        sequence.arrived = time.monotonic()
        sequence.constraint = None if grammar is None else Constraint.begin(grammar)
        # what a search will return is not known before its end
        output = RequestOutput(request.request_id, request.prompt, list(request.prompt_token_ids))
        output.metrics.queued_ts = sequence.arrived
        state = _RequestState(request, output, unfinished=params.n, stream=stream and params.beam_width == 1)
        if self.tokenizer is not None:
            skip = params.skip_special_tokens
            state.continues = not self._start and self.tokenizer.continues(
                request.prompt_token_ids, skip_special_tokens=skip
            )
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None]
        self._requests[request.request_id] = state
        sequence.due = self._pacer.due(sequence, self.scheduler)
        self.scheduler.add(sequence)
        self._own(sequence)
        self.tally.prompts += len(request.prompt_token_ids)

    def _forced(self, sequence: Sequence) -> dict[int, tuple[int, ...]]:
        """The tokens that the model's outputs begin with, and end with at their maximum length, by their places."""
        model, forced = self.model_config, dict[int, tuple[int, ...]]()
        if model.forced_bos_token_id is not None:
            forced[0] = (model.forced_bos_token_id,)
        if model.forced_eos_token_ids and not sequence.params.ignore_eos:
            forced[sequence.max_length - sequence.prompt_len - 1] = model.forced_eos_token_ids
        return forced

    def _add_text(self, request: Request) -> None:
        """Queue a text of which a vector or scores are to be made."""
        name, pooler, params = f"request {request.request_id}", self.worker.pooler, request.pooling
        architecture = self.model_config.architecture
        if pooler is None:
            raise InvalidRequestError(f"{name}: {architecture} generates text; it gives no vectors and no scores")
        if params is None:
            raise InvalidRequestError(f"{name}: {architecture} generates no text; it does {', '.join(pooler.tasks)}")
        pooler.check(params)
        request = truncated(request, self.max_model_len)
        self._check_text(name, request)
        sequence = Sequence(request, 0)
        sequence.arrived = time.monotonic()
        sequence.num_states = pooler.num_states(request)
        sequence.position_rows = position_rows(self.model_config, request.prompt_token_ids, request.token_type_ids)
        with self._change():
            self._requests[request.request_id] = _TextState(request, sequence)
            self.scheduler.add(sequence)
            self._own(sequence)
            self.tally.prompts += sequence.prompt_len

    def _check_text(self, name: str, request: Request) -> None:
        ids, types, model = request.prompt_token_ids, request.token_type_ids, self.model_config
        if not ids:
            raise InvalidRequestError(f"{name}: the text has no tokens")
        if len(ids) > self.max_model_len:
            raise InvalidRequestError(
                f"{name}: the text has {len(ids)} tokens, more than the longest of {self.max_model_len} "
                "(max_model_len); shorten it, or let truncate_prompt_tokens do so"
            )
        self._check_vocabulary(name, "the text", ids)
        if types and len(types) != len(ids):
            raise InvalidRequestError(f"{name}: {len(types)} token_type_ids for {len(ids)} tokens")
        if types and model.token_types and not 0 <= min(types) <= max(types) < model.token_types:
            raise InvalidRequestError(f"{name}: token_type_ids must be below {model.token_types}, got {max(types)}")

    def _check_vocabulary(self, name: str, where: str, ids: Collection[int]) -> None:
        vocab = self.model_config.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < vocab:
            wrong = next(token for token in ids if not 0 <= token < vocab)
            raise InvalidRequestError(f"{name}: {where} has token id {wrong}; the vocabulary ends at {vocab - 1}")

    def _next_seed(self) -> int:
        self._unseeded += 1
        return mix64(mix64(self.config.seed) + self._unseeded)

    def _resolve(self, request: Request) -> SamplingParams:
        """The request's parameters, checked against the model, words turned into tokens."""
        params, prompt = request.params, request.prompt_token_ids
        name = f"request {request.request_id}"
        if not prompt:
            raise InvalidRequestError(f"{name}: the prompt has no tokens")
        if self._start:
            self._check_encoder_input(name, params, len(prompt))
        elif len(prompt) >= self.max_model_len:
            raise InvalidRequestError(
                f"{name}: the prompt has {len(prompt)} tokens; with at least one to come, "
                f"more than the longest sequence of {self.max_model_len} (max_model_len)"
            )
        named = {"the prompt": prompt, "stop_token_ids": params.stop_token_ids}
        named |= {"stop_words_ids": tuple(itertools.chain(*params.stop_words_ids))}
        named |= {"bad_words_ids": tuple(itertools.chain(*params.bad_words_ids))}
        named |= {"logit_bias": tuple(params.logit_bias), "allowed_token_ids": params.allowed_token_ids}
        for where, ids in named.items():
            self._check_vocabulary(name, where, ids)
        if self.tokenizer is None and (params.stop or params.bad_words):
            raise InvalidRequestError(f"{name}: stop strings and bad words need a tokenizer; give --tokenizer-path")
        if params.beam_width > 1:
            self._check_beams(name, params, len(prompt))
        if not params.bad_words:
            return params
        assert self._words_ids is not None, "refused above"
        runs = [run for word in params.bad_words for run in self._words_ids(word)]
        # what has tokens that the model lacks cannot be produced anyway
        runs = [run for run in runs if max(run) < self.model_config.vocab_size]
        return replace(params, bad_words=(), bad_words_ids=(*params.bad_words_ids, *runs))

    def _check_encoder_input(self, name: str, params: SamplingParams, length: int) -> None:
        """Whether an encoder can compute a prompt of so many tokens, which it does in one step."""
        whole = self.scheduler.config.max_num_batched_tokens or length
        option, most = min(("max_model_len", self.max_model_len), ("max_num_batched_tokens", whole), key=_second)
        if length > most:
            raise InvalidRequestError(
                f"{name}: the prompt has {length} tokens; the encoder takes {most} at the most ({option})"
            )
        if params.structured_outputs is not None and self.model_config.forced_bos_token_id is not None:
            raise InvalidRequestError(
                f"{name}: every output of this {self.model_config.architecture} begins with token "
                f"{self.model_config.forced_bos_token_id} (forced_bos_token_id), which no grammar knows"
            )
        if params.prompt_logprobs is not None:
            raise InvalidRequestError(
                f"{name}: prompt_logprobs are of models that continue their prompts; "
                f"{self.model_config.architecture} has an encoder for them"
            )

    def _check_beams(self, name: str, params: SamplingParams, prompt_len: int) -> None:
        """Whether all beams of a request can run together, which they must."""
        width, blocks, vocab = params.beam_width, self.scheduler.blocks, self.model_config.vocab_size
        most = self.scheduler.config.max_num_seqs
        if width > most:
            raise InvalidRequestError(
                f"{name}: beam_width is {width}; more than {most} sequences at once (max_num_seqs)"
            )
        needed = candidate_count(params, self.model_config.eos_token_ids)
        if needed > vocab:
            raise InvalidRequestError(
                f"{name}: beam_width is {width}; it chooses among {needed} tokens, but the vocabulary has {vocab}"
            )
        of_input = -(-prompt_len // blocks.block_size) if self._start else 0
        prompt_len = len(self._start) or prompt_len
        longest = params.max_length(prompt_len, self.max_model_len)
        shared = prompt_len // blocks.block_size
        needed = of_input + shared + width * (-(-longest // blocks.block_size) - shared)
        if needed > blocks.num_blocks:
            raise InvalidRequestError(
                f"{name}: {width} beams of {longest} tokens may need {needed} cache blocks, but there are "
                f"{blocks.num_blocks}; lower beam_width or max_tokens, or give the cache more memory (kv_cache_memory)"
            )

    def abort(self, request_id: str) -> RequestOutput | None:
        """Withdraw a request; its blocks are free before the next step. Returns what it had, if it was unfinished."""
        if request_id not in self._requests or self._closed_because is not None:
            return None
        with self._change():
            return self._abort(request_id)

    def reset_prefix_cache(self) -> None:
        """Let prompts to come find nothing of what the cache holds now."""
        with self._change():
            self.scheduler.blocks.forget_prefixes()

    def abort_all(self) -> None:
        """Withdraw all requests."""
        for request_id in list(self._requests):
            self.abort(request_id)

    def _abort(self, request_id: str) -> RequestOutput | None:
        state = self._requests.pop(request_id, None)
        if state is None:
            return None
        if isinstance(state, _RequestState):
            self._end_aborted(state)
        for key in state.keys:
            if key in self._owners:
                self._release(key)
        if not self.worker.defers:
            self._forget_flights_of_none()
        return state.shown() if isinstance(state, _RequestState) else None

    def _end_aborted(self, state: _RequestState) -> None:
        if state.search is not None:
            beam = self.scheduler.get(state.search.keys[0])
            assert beam is not None, "its beams are there until it ends"
            self._complete(state, beam, state.search.unfinished(), FinishReason.ABORT)
        for completion in state.completions.values():
            if completion.output.finish_reason is None:
                self._end(completion, FinishReason.ABORT)

    def step(self) -> list[Output]:
        """Compute one batch; the outputs of requests that it finished and of streaming ones that it brought further.

        An output that is not finished grows with further steps: whoever keeps one copies it.
        With overlapped steps they are those of the batch before.
        """
        with self._change(), self._closing_on_errors(), self.ranks.guard("computing a step"), torch.inference_mode():
            return self._step()

    @contextmanager
    def _closing_on_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._close_for(f"a step failed ({type(error).__name__}: {error})")
            raise

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Whatever changes the state of requests and blocks: an interrupt in the middle of it leaves none of them.

        A rank alone goes on with an empty state; other ranks would be left inside a step that never ends, so that
        with several the engine closes. EngineError where it is closed, or another thread is here.
        """
        self._check_usable()
        if self._changing is not None:
            self._recover()  # a second interrupt cut off the recovery from the first
        self._changing = threading.get_ident()
        try:
            yield
        except Exception:
            self._changing = None
            raise
        except BaseException:
            self._recover()
            raise
        self._changing = None

    def _check_usable(self) -> None:
        """EngineError where it is closed, or another thread is here."""
        if self._closed_because is not None:
            raise EngineError(f"the engine is closed: {self._closed_because}; create a new LLM")
        if self._changing not in (None, threading.get_ident()):
            raise EngineError("another thread is computing with this engine; one at a time may")

    def _recover(self) -> None:
        """After an interrupt: no request and no block in use, whatever was half done."""
        if self.ranks.world.size > 1:
            self._close_for("it was interrupted in the middle of a step, which its other ranks cannot leave")
        else:
            self._forget_all()
        self._changing = None

    def _close_for(self, reason: str) -> None:
        self._closed_because = reason
        self._failed = True
        self.ranks.report_failure(EngineError(reason))
        self._forget_all()

    def _forget_all(self) -> None:
        self._requests, self._owners = {}, {}
        self._flights.clear()
        self.worker.reset()
        before, self.scheduler = self.scheduler, self._new_scheduler()
        self.scheduler.go_on_counting(before)

    @property
    def closed_because(self) -> str | None:
        """Why nothing more is computed; None while the engine is open."""
        return self._closed_because

    def _step(self) -> list[Output]:
        touched: dict[str, _State] = {}
        while len(self._flights) >= self._stages and self._flights[0].blocks_next:
            self._collect(touched)
        limit = self._pacer.prompt_tokens(self.scheduler, time.monotonic())
        batch = self.scheduler.schedule(limit)
        if batch.sequences:
            self._launch(batch, limit, touched)
        elif self._flights:
            self._collect(touched)
        while len(self._flights) > (self._stages if self.worker.overlap else self._stages - 1):
            self._collect(touched)
        self._forget_flights_of_none()
        return [state.shown() for state in touched.values() if state.stream or state.unfinished == 0]

    def _launch(self, batch: Batch, limit: int | None, touched: dict[str, _State]) -> None:
        step, before = self._pacer.begin(batch, limit), self._flights[-1] if self._flights else None
        self.tally.computed += batch.num_tokens
        if self.estimator is not None:
            self.estimator.add(batch)
        launched = self.worker.launch(batch)
        for sequence in self.scheduler.advance(batch, chosen=not self.worker.defers):
            self._own(sequence)
        while self._flights and launched.reads_tokens:
            self._collect(touched)  # while the device computes what the choice is made from
        flight = _Flight(launched, batch, step, before)
        if not self.worker.defers:
            self._choose(flight)
        self._flights.append(flight)
        while self._flights[0] is not flight and any(sequence.pending > 1 for sequence in launched.sequences):
            self._collect(touched)

    def _choose(self, flight: _Flight) -> None:
        """Choose the next tokens of a launched step."""
        step = flight.step
        flight.choice = flight.launched.choose()
        if step is not None and self.worker.device.type == "cpu":
            self._pacer.observe(step, time.perf_counter() - step.began)
            flight.step = None
        if self._is_unmeasured:
            flight.step = None  # the device may still be busy with the step before, nobody knows for how long
        self._is_unmeasured = flight.choice is None and self.worker.overlap

    def _compute(self, flight: _Flight) -> None:
        """Compute this rank's stage of a step that other stages have begun with, and choose its tokens."""
        if flight.step is not None:
            flight.step = replace(flight.step, began=time.perf_counter())
        self._choose(flight)
        self.scheduler.note_chosen(flight.batch)
        for sequence in flight.launched.sequences:
            if sequence.key not in self._owners:
                self.worker.forget(sequence.key)

    def _collect(self, touched: dict[str, _State]) -> None:
        """Take the tokens of the step that is in flight for the longest, and note whose they are in `touched`.

        A sequence that ended after the step was launched is no longer owned, and its surplus token is nobody's.
        """
        flight = self._flights.popleft()
        if self.worker.defers:
            self._compute(flight)
        self.scheduler.land(flight.launched.sequences)
        with explained_out_of_memory():
            if isinstance(flight.choice, Pooled):
                self._take_pooled(flight.launched.sequences, flight.choice, touched)
                return
            self._take_prompt_logprobs(flight.launched.prompts)
            sampled = [] if flight.choice is None else flight.choice.collect(self._text_of)
        if flight.step is not None and (seconds := flight.seconds) is not None:
            self._pacer.observe(flight.step, seconds)
        flight.before = None
        steps: list[tuple[_RequestState, BeamSearch, BeamStep]] = []
        for sequence, token in zip(flight.launched.sequences, sampled, strict=True):
            state = self._owners.get(sequence.key)
            if not isinstance(state, _RequestState):
                continue
            touched[sequence.request_id] = state
            if state.search is None:
                self._take_token(state, sequence, token)
            elif token.error is not None:
                self._fail_search(state, state.search, sequence, token.error)
            else:
                self._count_token(state, sequence, is_first=not state.output.metrics.first_token_ts)
                if token.beams is not None:
                    steps.append((state, state.search, token.beams))
        for state, search, step in steps:
            self._go_on(state, search, step)

    def _take_pooled(self, sequences: list[Sequence], pooled: Pooled, touched: dict[str, _State]) -> None:
        """Finish the texts of a step; one that was withdrawn since is nobody's."""
        pooler = self.worker.pooler
        assert pooler is not None
        for sequence, (vector, rows) in zip(sequences, pooled.collect(), strict=True):
            state = self._owners.get(sequence.key)
            if not isinstance(state, _TextState):
                continue
            request = state.request
            assert request.pooling is not None
            found = pooler.output(request.pooling, vector, rows)
            ids = list(request.prompt_token_ids)
            state.output = PoolingRequestOutput(request.request_id, request.prompt, ids, found)
            touched[sequence.request_id] = state
            self._release(sequence.key)
            del self._requests[sequence.request_id]

    def _forget_flights_of_none(self) -> None:
        """Once no request is left, nobody will step again for what is in flight, and it has only surplus tokens."""
        if self._requests:
            return
        self._finish_stages()
        self._flights.clear()

    def _release(self, key: int) -> None:
        """Free what an ended sequence holds."""
        sequence = self.scheduler.get(key)
        self.scheduler.finish(key)
        self.worker.forget(key)
        given = None if sequence is None else sequence.encoder_input
        if given is not None and given.holders == 0:
            self.worker.forget(given.key)
        del self._owners[key]

    def _own(self, sequence: Sequence) -> None:
        state = self._requests[sequence.request_id]
        params = sequence.params
        for member in sequence.unit:
            self._owners[member.key] = state
        if isinstance(state, _TextState):
            return
        if sequence.beams is not None:
            keys = [member.key for member in sequence.beams.members]
            longest = sequence.max_length - sequence.prompt_len
            state.search = BeamSearch(params, self.model_config.eos_token_ids, longest, keys)
            return
        grows = params.detokenize and (state.stream or params.stop)
        text = None
        if self.tokenizer is not None and grows:
            text = TextState(self.tokenizer, params, continues=state.continues)
        output = CompletionOutput(index=sequence.index, text="", token_ids=[])
        if params.logprobs is not None:
            output.logprobs, output.cumulative_logprob = [], 0.0
        state.completions[sequence.index] = _Completion(output, text, sequence, state.continues)

    def _fail_search(self, state: _RequestState, search: BeamSearch, sequence: Sequence, error: str) -> None:
        best = search.unfinished() or [Hypothesis((), 0.0, 0.0, ended=False)] * sequence.params.n
        self._end_search(state, search, best, FinishReason.ERROR, error)

    def _go_on(self, state: _RequestState, search: BeamSearch, step: BeamStep) -> None:
        """Let a search go on or end; nothing where one of its beams has failed since."""
        if state.request.request_id not in self._requests:
            return
        search.go_on(step)
        if search.done:
            self._end_search(state, search, search.hypotheses, None)
        else:
            self.scheduler.move(search.keys[0], step.beams.beams, step.beams.tokens)

    def _end_search(
        self,
        state: _RequestState,
        search: BeamSearch,
        best: list[Hypothesis],
        reason: FinishReason | None,
        error: str | None = None,
    ) -> None:
        beam = self.scheduler.get(search.keys[0])
        assert beam is not None, "its beams are there until it ends"
        self._complete(state, beam, best, reason, error)
        state.unfinished = 0
        for key in search.keys:
            self._release(key)
        del self._requests[beam.request_id]

    def _complete(
        self,
        state: _RequestState,
        sequence: Sequence,
        best: list[Hypothesis],
        reason: FinishReason | None,
        error: str | None = None,
    ) -> None:
        """Make completions of the best beams. Without a reason, each has ended by its last token or its length."""
        for index, found in enumerate(best[: sequence.params.n]):
            tokens = list(found.token_ids)
            output = CompletionOutput(index, "", tokens, cumulative_logprob=found.logprob, stop_reason=error)
            completion = _Completion(output, None, sequence, state.continues)
            state.completions[index] = completion
            stopped = reason is None and found.ended and self._ends(completion, tokens[-1])
            self._end(completion, reason or (FinishReason.STOP if stopped else FinishReason.LENGTH))

    def _take_token(self, state: _RequestState, sequence: Sequence, sampled: Sampled) -> None:
        completion = state.completions[sequence.index]
        output, token = completion.output, sampled.token_id
        constraint = sequence.constraint
        if constraint is not None and constraint.error is not None:
            output.stop_reason = f"the grammar cannot be followed any further: {constraint.error}"
            self._finish(state, completion, FinishReason.ERROR)
            return
        if sampled.error is not None:
            output.stop_reason = sampled.error
            self._finish(state, completion, FinishReason.ERROR)
            return
        if sampled.top is not None and output.logprobs is not None:
            output.logprobs.append(sampled.top)
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + (sampled.logprob or 0.0)
        if self._extend(state, completion, token) or constraint is None or not self._skips_forced(sequence):
            return
        for forced in constraint.forced():
            if self._extend(state, completion, forced):
                return

    def _skips_forced(self, sequence: Sequence) -> bool:
        """Whether tokens that a grammar leaves no choice about are taken without a step that chooses them.

        The next step then computes all of them at once. With overlapped steps it is launched already; and who asks for
        log-probabilities needs the logits at each token.
        """
        return not self.worker.overlap and sequence.params.logprobs is None

    def _extend(self, state: _RequestState, completion: _Completion, token: int) -> bool:
        """Let a token be the next one of a completion; whether that ended it."""
        sequence = completion.sequence
        sequence.append(token)
        completion.output.token_ids.append(token)
        self._count_token(state, sequence, is_first=len(completion.output.token_ids) == 1)
        reason = self._finish_reason(completion, token)
        if reason is not None:
            self._finish(state, completion, reason)
        return reason is not None

    def _count_token(self, state: _RequestState, sequence: Sequence, *, is_first: bool) -> None:
        """Count a token that was chosen; `is_first`: of its completion."""
        self.tally.generated += 1
        if not is_first:
            return
        self.tally.first += 1
        output, metrics = state.output, state.output.metrics
        if not metrics.first_token_ts:
            metrics.scheduled_ts, metrics.first_token_ts = sequence.begun, time.monotonic()
            output.num_cached_tokens = sequence.num_cached

    def _finish(self, state: _RequestState, completion: _Completion, reason: FinishReason) -> None:
        sequence = completion.sequence
        self._end(completion, reason)
        state.unfinished -= 1
        self._release(sequence.key)
        if state.unfinished == 0:
            del self._requests[sequence.request_id]

    def _finish_reason(self, completion: _Completion, token: int) -> FinishReason | None:
        output, sequence = completion.output, completion.sequence
        params, count = sequence.params, len(completion.output.token_ids)
        may_stop = count >= params.min_tokens
        if may_stop and self._ends(completion, token):
            return FinishReason.STOP
        if completion.text is not None:
            found = completion.text.add(token, look_for_stop=may_stop)
            if found is not None:
                output.stop_reason = found
                return FinishReason.STOP
        if sequence.constraint is not None and sequence.constraint.accept(token):
            return FinishReason.STOP
        if len(sequence.token_ids) >= sequence.max_length:
            return FinishReason.LENGTH
        return None

    def _ends(self, completion: _Completion, token: int) -> bool:
        """Whether this token is, or completes, one that ends the completion."""
        output, params = completion.output, completion.sequence.params
        if token in params.stop_token_ids:
            output.stop_reason, completion.hidden_tokens = token, 1
            return True
        if token in self.model_config.eos_token_ids and not params.ignore_eos:
            completion.hidden_tokens = 1
            return True
        for word in params.stop_words_ids:
            if output.token_ids[-len(word) :] == list(word):
                output.stop_reason, completion.hidden_tokens = word[-1], len(word)
                return True
        return False

    def _end(self, completion: _Completion, reason: FinishReason) -> None:
        output = completion.output
        output.finish_reason = reason
        output.text = self._final_text(completion)

    def _final_text(self, completion: _Completion) -> str:
        output, text, params = completion.output, completion.text, completion.sequence.params
        if self.tokenizer is None or not params.detokenize:
            return ""
        if text is not None and isinstance(output.stop_reason, str) and output.finish_reason is FinishReason.STOP:
            return text.text
        hidden = 0 if params.include_stop_str_in_output else completion.hidden_tokens
        shown = output.token_ids[: len(output.token_ids) - hidden]
        skip = params.skip_special_tokens
        return self.tokenizer.decode(shown, skip_special_tokens=skip, continues=completion.continues)

    @property
    def _text_of(self) -> TextOf | None:
        return None if self.tokenizer is None else self._token_text

    def _token_text(self, token: int) -> str:
        """The text of a single token; the same few tokens are asked for again and again."""
        text = self._token_texts.get(token)
        if text is None:
            assert self.tokenizer is not None, "without a tokenizer there are no texts"
            text = self._token_texts[token] = self.tokenizer.decode([token], skip_special_tokens=False, continues=True)
        return text

    def _take_prompt_logprobs(self, prompts: PromptLogprobs) -> None:
        """Keep the entries of positions in order; those before a preemption come again and are kept already."""
        for sequence, position, top in prompts.collect(self._text_of):
            state = self._owners.get(sequence.key)
            kept = state.output.prompt_logprobs if isinstance(state, _RequestState) else None
            if kept is not None and len(kept) == position + 1:
                kept.append(top)

    def _finish_stages(self) -> None:
        """Compute this rank's stage of all steps that other stages have begun with, whose tokens nobody wants."""
        for flight in self._flights if self.worker.defers else ():
            flight.launched.compute()
            for sequence in flight.launched.sequences:
                self.worker.forget(sequence.key)

    def close(self) -> None:
        """Tell the other ranks to end and leave the group; a second call does nothing."""
        if self._left:
            return
        self._left = True
        self._closed_because = self._closed_because or "close() was called"
        self.grammars.close()
        if not self._failed:
            with suppress(RuntimeError):
                self._finish_stages()
            with suppress(HastenError), self.ranks.guard("closing"):
                self.worker.finish()
        self._flights.clear()
        self.ranks.expect_end()
        if self._failed or self.ranks.liveness.failure is not None:
            self.worker.give_up()
            return
        self.worker.release()
        with suppress(RuntimeError):  # a rank that is gone already needs no telling
            self.ranks.publish_end()
        self.ranks.leave()
