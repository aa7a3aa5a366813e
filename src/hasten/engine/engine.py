"""The engine as rank 0 runs it: requests in, steps, outputs back. Every other rank follows (`worker.py`).

A step is launched, and its tokens are collected when the device has chosen them: with overlapped steps only after the
next one is launched, so that the device has that to do while Python looks at the tokens.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch

from hasten import ops
from hasten.core.config import EngineConfig
from hasten.core.errors import EngineError, HastenError, InvalidRequestError
from hasten.core.types import FinishReason, LogprobList, Request, RequestOutput, SamplingParams
from hasten.engine.batch import Batch
from hasten.engine.block_manager import BlockManager
from hasten.engine.constraint import Constraint
from hasten.engine.grammar import Grammar, GrammarCompiler
from hasten.engine.grammar_trial import GrammarLimits
from hasten.engine.launched_step import InFlightStep
from hasten.engine.memory import explained_out_of_memory
from hasten.engine.pacing import Pacer
from hasten.engine.planning.step_work import EstimatedWork, WorkEstimator
from hasten.engine.points import mix64
from hasten.engine.pooling import Pooled
from hasten.engine.rank_options import LEAST_STEP_TOKENS
from hasten.engine.request_checks import RequestChecks, RequestLimits
from hasten.engine.request_state import Output, PoolingState, RequestState, State
from hasten.engine.request_tracker import RequestTracker
from hasten.engine.scheduler import Scheduler
from hasten.engine.sequence import Sequence
from hasten.engine.stats import EngineStats, StepTally
from hasten.engine.text import Tokenizer
from hasten.engine.text_scheduler import TextScheduler, TextSequence
from hasten.engine.worker import Worker
from hasten.models.encoder import position_rows
from hasten.parallel.launch import Ranks


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
        folder = self.config.tokenizer or self.worker.tokenizer_folder
        self.tokenizer = None if folder is None else Tokenizer.deferred(folder)
        self.grammars = GrammarCompiler(
            self.tokenizer,
            self.model_config.vocab_size,
            self.model_config.eos_token_ids,
            GrammarLimits(config.scheduler.max_grammar_seconds, config.scheduler.max_grammar_memory),
        )
        self._pacer = self._new_pacer()
        self._is_unmeasured = False
        """Whether the last step launched chooses no tokens, whose arrival would show when it ends."""
        self._stages = self.worker.stage.size
        self._flights: deque[InFlightStep] = deque()
        """In the order in which they were launched."""
        self._checks = self._new_checks()
        self._unseeded = 0
        self.tally = StepTally()
        self.requests = RequestTracker(self.worker, self.scheduler, self.tokenizer, self.tally)
        self._before_requests = EngineStats()
        """What counters had come to before the first request."""
        self.estimator: WorkEstimator | None = None
        """Adds up what its steps take, where anybody wants to know."""
        self._closed_because: str | None = None
        """Why nothing more is computed."""
        self._failed = self._left = False
        self._changing: int | None = None
        """The thread that is changing the engine's state, for as long as that takes."""

    def _new_scheduler(self) -> Scheduler:
        cache, worker = self.config.cache, self.worker
        keeps = cache.enable_prefix_caching and worker.pooler is None
        window = worker.model_config.widest_window
        blocks = BlockManager(worker.num_blocks, worker.block_size, enable_prefix_caching=keeps, window=window)
        kind = Scheduler if worker.pooler is None else TextScheduler
        least = LEAST_STEP_TOKENS[worker.device.type]
        return kind(worker.scheduler_config, blocks, worker.stage.size, least)

    def _new_pacer(self) -> Pacer:
        scheduler = self.scheduler.config
        assert scheduler.max_num_batched_tokens is not None, "the worker resolves the default"
        # a sequence is in every step, or in one of as many as there are stages
        target = 0.0
        if self.worker.pooler is None:
            target = (scheduler.itl_target or 0.0) / 1000 / self.worker.stage.size
        return Pacer(target, scheduler.max_num_batched_tokens)

    def _new_checks(self) -> RequestChecks:
        scheduler, blocks = self.scheduler.config, self.scheduler.blocks
        assert scheduler.max_num_batched_tokens is not None, "the worker resolves the default"
        limits = RequestLimits(
            max_model_len=self.max_model_len,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            num_blocks=blocks.num_blocks,
            block_size=blocks.block_size,
        )
        return RequestChecks(self.model_config, limits, self.tokenizer, self.worker.pooler)

    @property
    def has_unfinished(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.requests.states)

    @property
    def has_deferred(self) -> bool:
        """Whether the start left anything for later that is still to be done."""
        is_read = self.tokenizer is None or self.tokenizer.is_loaded
        return not is_read or self.worker.runner.deferred.next is not None

    @property
    def waiting(self) -> set[str]:
        """Ids of the requests that have not begun, or were preempted."""
        return {sequence.request_id for sequence in self.scheduler.waiting if sequence.index == 0}

    @property
    def stats(self) -> EngineStats:
        """What goes on between two steps, and counters since the start."""
        return self._all_stats().since(self._before_requests)

    def _all_stats(self) -> EngineStats:
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        waiting = len(self.waiting)
        work = EstimatedWork() if self.estimator is None else self.estimator.total
        return EngineStats(
            running=len(self.requests.states) - waiting,
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
        if request.request_id in self.requests.states:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use")
        if request.pooling is not None or self.worker.pooler is not None:
            self.add_texts([request])
            return
        params = self._checks.sampling_params(request)
        if params is not request.params:
            request = replace(request, params=params)
        # nothing has changed yet: an interrupt while it is compiled ends this call alone, with several ranks too
        grammar = grammar or self.grammars.compiled(params)
        with self._change():
            self._add(request, stream, grammar)

    def begin_longest_first(self) -> None:
        """Let queued requests begin in the order of their `max_tokens`, the greatest first.

        For a caller who takes all outputs together: the last of them comes sooner.
        """
        with self._change():
            self.scheduler.begin_longest_first()

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
        state = RequestState(request, output, unfinished=params.n, stream=stream and params.beam_width == 1)
        if self.tokenizer is not None and params.detokenize:
            skip = params.skip_special_tokens
            state.continues = not self._start and self.tokenizer.continues(
                request.prompt_token_ids, skip_special_tokens=skip
            )
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = LogprobList(self.requests.stopping.text_of, [None])
        sequence.due = self._pacer.due(sequence, self.scheduler)
        self.scheduler.add(sequence)
        self.requests.add(state, sequence)
        self.tally.prompts += len(request.prompt_token_ids)

    def _forced(self, sequence: Sequence) -> dict[int, tuple[int, ...]]:
        """The tokens that the model's outputs begin with, and end with at their maximum length, by their places."""
        model, forced = self.model_config, dict[int, tuple[int, ...]]()
        if model.forced_bos_token_id is not None:
            forced[0] = (model.forced_bos_token_id,)
        if model.forced_eos_token_ids and not sequence.params.ignore_eos:
            forced[sequence.max_length - sequence.prompt_len - 1] = model.forced_eos_token_ids
        return forced

    @property
    def has_room_for_texts(self) -> bool:
        """Whether the texts that wait do not fill the next step."""
        assert isinstance(self.scheduler, TextScheduler)
        return self.scheduler.has_room

    def add_texts(self, requests: Iterable[Request]) -> None:
        """Queue texts of which vectors or scores are to be made; InvalidRequestError, and none is, where one cannot be.

        Their ids are not in use.
        """
        self._check_usable()
        texts = [self._text(request) for request in requests]
        with self._change():
            for text in texts:
                self.scheduler.add(text)
                self.requests.add_text(PoolingState(text.request, text))
                self.tally.prompts += text.prompt_len

    def _text(self, request: Request) -> TextSequence:
        request, ids = self._checks.pooled(request)
        pooler = self.worker.pooler
        assert pooler is not None, "what it cannot do was refused"
        rows = position_rows(self.model_config, request.prompt_token_ids, request.token_type_ids)
        return TextSequence(request, ids, pooler.num_states(request), rows)

    def _next_seed(self) -> int:
        self._unseeded += 1
        return mix64(mix64(self.config.seed) + self._unseeded)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Withdraw a request; its blocks are free before the next step. Returns what it had, if it was unfinished."""
        if request_id not in self.requests.states or self._closed_because is not None:
            return None
        with self._change():
            return self._abort(request_id)

    def reset_prefix_cache(self) -> None:
        """Let prompts to come find nothing of what the cache holds now."""
        with self._change():
            self.scheduler.blocks.forget_prefixes()

    def abort_all(self) -> None:
        """Withdraw all requests."""
        for request_id in list(self.requests.states):
            self.abort(request_id)

    def _abort(self, request_id: str) -> RequestOutput | None:
        state = self.requests.abort(request_id)
        if state is None:
            return None
        if not self.worker.defers:
            self._forget_flights_of_none()
        return state.shown() if isinstance(state, RequestState) else None

    def step(self) -> list[Output]:
        """Compute one batch; the outputs of requests that it finished and of streaming ones that it brought further.

        An output that is not finished grows with further steps: whoever keeps one copies it.
        With overlapped steps they are those of the batch before.
        """
        return [state.shown() for state in self.advance()]

    def advance(self) -> list[State]:
        """Compute one batch, as `step` does, and return the requests: their `shown()` has what there is when called.

        Tokens become text there, so that whoever shows several of them at once decodes them at once.
        """
        with (
            self._change(),
            self._closing_on_errors("a step"),
            self.ranks.guard("computing a step"),
            torch.inference_mode(),
        ):
            return self._step()

    def check(self) -> None:
        """Compute two tokens before the first request; EngineError where their logits are no numbers. Counts nowhere.

        For models that generate text.
        """
        if self.worker.pooler is not None:
            return
        params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, detokenize=False, seed=0)
        self.add(Request(request_id="check", prompt_token_ids=(0,), params=params))
        outputs: list[Output] = []
        while self.has_unfinished:
            outputs += self.step()
        self._pacer = self._new_pacer()
        self._before_requests = self._all_stats()
        for output in outputs:
            completion = output.outputs[0] if isinstance(output, RequestOutput) else None
            if completion is not None and completion.finish_reason is FinishReason.ERROR:
                raise EngineError(f"{self.config.model}: its first token cannot be computed: {completion.stop_reason}")

    def prepare_next(self) -> bool:
        """Do a piece of what the start left for later; False where none is left.

        For when there is nothing to compute: a request that comes meanwhile waits for as long as a few steps take.
        """
        doing = "preparing steps"
        with self._change(), self._closing_on_errors(doing), self.ranks.guard(doing):
            if self.tokenizer is not None and not self.tokenizer.is_loaded:
                self.tokenizer.load()
                return True
            return self.worker.prepare_next()

    def prepare(self) -> None:
        """Do all that the start left for later: no request waits for any of it afterwards."""
        while self.prepare_next():
            pass

    @contextmanager
    def _closing_on_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._close_for(f"{what} failed ({type(error).__name__}: {error})")
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
        self._flights.clear()
        self.worker.reset()
        before, self.scheduler = self.scheduler, self._new_scheduler()
        self.requests.reset(self.scheduler)
        self.scheduler.go_on_counting(before)

    @property
    def closed_because(self) -> str | None:
        """Why nothing more is computed; None while the engine is open."""
        return self._closed_because

    def _step(self) -> list[State]:
        touched: dict[str, State] = {}
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
        return [state for state in touched.values() if state.stream or state.unfinished == 0]

    def _launch(self, batch: Batch, limit: int | None, touched: dict[str, State]) -> None:
        step, before = self._pacer.begin(batch, limit), self._flights[-1] if self._flights else None
        self.tally.computed += batch.num_tokens
        if self.estimator is not None:
            self.estimator.add(batch)
        launched = self.worker.launch(batch)
        for sequence in self.scheduler.advance(batch, chosen=not self.worker.defers):
            self.requests.own(sequence)
        while self._flights and launched.reads_tokens:
            self._collect(touched)  # while the device computes what the choice is made from
        flight = InFlightStep(launched, batch, step, before)
        if not self.worker.defers:
            self._choose(flight)
        self._flights.append(flight)
        while self._flights[0] is not flight and any(sequence.pending > 1 for sequence in launched.sequences):
            self._collect(touched)

    def _choose(self, flight: InFlightStep) -> None:
        """Choose the next tokens of a launched step."""
        step = flight.step
        flight.choice = flight.launched.choose()
        if step is not None and self.worker.device.type == "cpu":
            self._pacer.observe(step, time.perf_counter() - step.began)
            flight.step = None
        if self._is_unmeasured:
            flight.step = None  # the device may still be busy with the step before, nobody knows for how long
        self._is_unmeasured = flight.choice is None and self.worker.overlap

    def _compute(self, flight: InFlightStep) -> None:
        """Compute this rank's stage of a step that other stages have begun with, and choose its tokens."""
        if flight.step is not None:
            flight.step = replace(flight.step, began=time.perf_counter())
        self._choose(flight)
        self.scheduler.note_chosen(flight.batch)
        for sequence in flight.launched.sequences:
            if sequence.key not in self.requests.owners:
                self.worker.forget(sequence.key)

    def _collect(self, touched: dict[str, State]) -> None:
        """Take the tokens of the step that is in flight for the longest, and note whose they are in `touched`."""
        flight = self._flights.popleft()
        if self.worker.defers:
            self._compute(flight)
        self.scheduler.land(flight.launched.sequences)
        with explained_out_of_memory():
            if isinstance(flight.choice, Pooled):
                self.requests.take_pooled(flight.launched.sequences, flight.choice, touched)
                return
            self.requests.take_prompt_logprobs(flight.launched.prompts)
            sampled = [] if flight.choice is None else flight.choice.collect()
        if flight.step is not None and (seconds := flight.seconds) is not None:
            self._pacer.observe(flight.step, seconds)
        flight.before = None
        self.requests.take(flight.launched.sequences, sampled, touched)

    def _forget_flights_of_none(self) -> None:
        """Once no request is left, nobody will step again for what is in flight, and it has only surplus tokens."""
        if self.requests.states:
            return
        self._finish_stages()
        self._flights.clear()

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
