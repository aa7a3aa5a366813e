"""Requests in flight on rank 0: their sequences, and the outputs that chosen tokens become."""

import time

from hasten.core.types import CompletionOutput, FinishReason, LogprobList, PoolingParams, PoolingRequestOutput
from hasten.engine.beam import BeamSearch, BeamStep, Hypothesis
from hasten.engine.pooling import Pooled
from hasten.engine.request_state import Completion, PoolingState, RequestState, State
from hasten.engine.sampler import PromptLogprobs, Sampled
from hasten.engine.scheduler import Scheduler
from hasten.engine.sequence import Sequence
from hasten.engine.stats import StepTally
from hasten.engine.stopping import StopRules
from hasten.engine.text import TextState, Tokenizer
from hasten.engine.text_scheduler import TextSequence
from hasten.engine.worker import Worker


class RequestTracker:
    """The requests that the engine has, and their outputs so far.

    What ends a request frees the blocks and other state of its sequences, in the scheduler and in the worker.
    """

    def __init__(self, worker: Worker, scheduler: Scheduler, tokenizer: Tokenizer | None, tally: StepTally) -> None:
        self.states: dict[str, State] = {}
        """By request id."""
        self.owners: dict[int, State] = {}
        """Sequence key -> its request."""
        self.stopping = StopRules(worker.model_config.eos_token_ids, tokenizer)
        self._worker, self._scheduler, self._tokenizer, self._tally = worker, scheduler, tokenizer, tally

    def reset(self, scheduler: Scheduler) -> None:
        """Forget all requests; sequences to come are those of another scheduler."""
        self.states, self.owners, self._scheduler = {}, {}, scheduler

    def add(self, state: State, sequence: Sequence) -> None:
        """Track a request with its first sequence."""
        self.states[sequence.request_id] = state
        self.own(sequence)

    def add_text(self, state: PoolingState) -> None:
        """Track a text."""
        self.states[state.request.request_id] = self.owners[state.sequence.key] = state

    def abort(self, request_id: str) -> State | None:
        """End a request and free what it holds; None where it has ended already."""
        state = self.states.pop(request_id, None)
        if state is None:
            return None
        if isinstance(state, RequestState):
            self._end_aborted(state)
        for key in state.keys:
            if key in self.owners:
                self.release(key)
        return state

    def take(self, sequences: list[Sequence], sampled: list[Sampled], touched: dict[str, State]) -> None:
        """Take the next token of each sequence, and note whose they are in `touched`.

        A sequence that ended after the step was launched is no longer owned, and its surplus token is nobody's.
        """
        steps: list[tuple[RequestState, BeamSearch, BeamStep]] = []
        for sequence, token in zip(sequences, sampled, strict=True):
            state = self.owners.get(sequence.key)
            if not isinstance(state, RequestState):
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

    def own(self, sequence: Sequence) -> None:
        """Track a sequence of a request that is tracked: its first, or one forked from that."""
        state = self.states[sequence.request_id]
        assert isinstance(state, RequestState)
        params = sequence.params
        for member in sequence.unit:
            self.owners[member.key] = state
        if sequence.beams is not None:
            keys = [member.key for member in sequence.beams.members]
            longest = sequence.max_length - sequence.prompt_len
            state.search = BeamSearch(params, self._worker.model_config.eos_token_ids, longest, keys)
            return
        grows = params.detokenize and (state.stream or params.stop)
        text = None
        if self._tokenizer is not None and grows:
            text = TextState(self._tokenizer, params, continues=state.continues)
        output = CompletionOutput(index=sequence.index, text="", token_ids=[])
        if params.logprobs is not None:
            output.logprobs = LogprobList(self.stopping.text_of)
        state.completions[sequence.index] = Completion(output, text, sequence, state.continues)

    def release(self, key: int) -> None:
        """Free what an ended sequence holds."""
        sequence = self._scheduler.get(key)
        self._scheduler.finish(key)
        self._worker.forget(key)
        given = None if sequence is None else sequence.encoder_input
        if given is not None and given.holders == 0:
            self._worker.forget(given.key)
        del self.owners[key]

    def _end_aborted(self, state: RequestState) -> None:
        if state.search is not None:
            beam = self._scheduler.get(state.search.keys[0])
            assert beam is not None, "its beams are there until it ends"
            self._complete(state, beam, state.search.unfinished(), FinishReason.ABORT)
        for completion in state.completions.values():
            if completion.output.finish_reason is None:
                self.stopping.end(completion, FinishReason.ABORT)

    def take_pooled(self, sequences: list[Sequence], pooled: Pooled, touched: dict[str, State]) -> None:
        """Finish the texts of a step; one that was withdrawn since is nobody's."""
        pooler = self._worker.pooler
        assert pooler is not None
        states: dict[int, PoolingState] = {}
        params: dict[int, PoolingParams] = {}
        for index, sequence in enumerate(sequences):
            state = self.owners.pop(sequence.key, None)
            if isinstance(state, PoolingState) and sequence.pooling is not None:
                states[index], params[index] = state, sequence.pooling
                self._scheduler.finish(sequence.key)
        for index, found in pooler.outputs(params, pooled).items():
            state, request, text = states[index], states[index].request, sequences[index]
            assert isinstance(text, TextSequence)
            state.output = PoolingRequestOutput(request.request_id, request.prompt, text.ids, found)
            touched[request.request_id] = state
            del self.states[request.request_id]

    def take_prompt_logprobs(self, prompts: PromptLogprobs) -> None:
        """Keep the entries of positions in order; those before a preemption come again and are kept already."""
        for sequence, position, rows in prompts.collect():
            state = self.owners.get(sequence.key)
            kept = state.output.prompt_logprobs if isinstance(state, RequestState) else None
            if isinstance(kept, LogprobList) and len(kept) > position:
                kept.extend(rows[len(kept) - 1 - position :])

    def _take_token(self, state: RequestState, sequence: Sequence, sampled: Sampled) -> None:
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
        if sampled.top is not None and isinstance(output.logprobs, LogprobList):
            output.logprobs.append(sampled.top)
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
        return not self._worker.overlap and sequence.params.logprobs is None

    def _extend(self, state: RequestState, completion: Completion, token: int) -> bool:
        """Let a token be the next one of a completion; whether that ended it."""
        sequence = completion.sequence
        sequence.append(token)
        completion.output.token_ids.append(token)
        self._count_token(state, sequence, is_first=len(completion.output.token_ids) == 1)
        reason = self.stopping.finish_reason(completion, token)
        if reason is not None:
            self._finish(state, completion, reason)
        return reason is not None

    def _count_token(self, state: RequestState, sequence: Sequence, *, is_first: bool) -> None:
        """Count a token that was chosen; `is_first`: of its completion."""
        self._tally.generated += 1
        if not is_first:
            return
        self._tally.first += 1
        output, metrics = state.output, state.output.metrics
        if not metrics.first_token_ts:
            metrics.scheduled_ts, metrics.first_token_ts = sequence.begun, time.monotonic()
            output.num_cached_tokens = sequence.num_cached

    def _finish(self, state: RequestState, completion: Completion, reason: FinishReason) -> None:
        sequence = completion.sequence
        self.stopping.end(completion, reason)
        state.unfinished -= 1
        self.release(sequence.key)
        if state.unfinished == 0:
            del self.states[sequence.request_id]

    def _fail_search(self, state: RequestState, search: BeamSearch, sequence: Sequence, error: str) -> None:
        best = search.unfinished() or [Hypothesis((), (), 0.0, ended=False)] * sequence.params.n
        self._end_search(state, search, best, FinishReason.ERROR, error)

    def _go_on(self, state: RequestState, search: BeamSearch, step: BeamStep) -> None:
        """Let a search go on or end; nothing where one of its beams has failed since."""
        if state.request.request_id not in self.states:
            return
        search.go_on(step)
        if search.done:
            self._end_search(state, search, search.hypotheses, None)
        else:
            self._scheduler.move(search.keys[0], step.beams.beams, step.beams.tokens)

    def _end_search(
        self,
        state: RequestState,
        search: BeamSearch,
        best: list[Hypothesis],
        reason: FinishReason | None,
        error: str | None = None,
    ) -> None:
        beam = self._scheduler.get(search.keys[0])
        assert beam is not None, "its beams are there until it ends"
        self._complete(state, beam, best, reason, error)
        state.unfinished = 0
        for key in search.keys:
            self.release(key)
        del self.states[beam.request_id]

    def _complete(
        self,
        state: RequestState,
        sequence: Sequence,
        best: list[Hypothesis],
        reason: FinishReason | None,
        error: str | None = None,
    ) -> None:
        """Make completions of the best beams. Without a reason, each has ended by its last token or its length."""
        for index, found in enumerate(best[: sequence.params.n]):
            tokens = list(found.token_ids)
            output = CompletionOutput(index, "", tokens, cumulative_logprob=found.logprob, stop_reason=error)
            output.token_logprobs = found.token_logprobs
            completion = Completion(output, None, sequence, state.continues)
            state.completions[index] = completion
            stopped = reason is None and found.ended and self.stopping.ends(completion, tokens[-1])
            self.stopping.end(completion, reason or (FinishReason.STOP if stopped else FinishReason.LENGTH))
