"""One rank's model and cache: from a step's numbers to hidden states, logits and tokens.

Shapes: t tokens of the flat batch, r rows that need logits, v vocabulary, h hidden.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from hasten import ops
from hasten.engine.deferred import Deferred, Piece
from hasten.engine.graphs import CudaCapture, Size, Sizes, StepGraphs, StepOutput
from hasten.engine.inputs import BlockTables, Inputs, Tokens
from hasten.engine.recorded import RecordedSteps
from hasten.engine.sampler import draw_every_way
from hasten.engine.step_message import StepMessage
from hasten.layers.attention import Attention
from hasten.layers.embedding import Head
from hasten.layers.position import RopeTables
from hasten.models.base import CausalLM, Transformer
from hasten.models.encoder_decoder import EncoderDecoder
from hasten.models.kinds import distinct_layers
from hasten.ops.plan import Planner


class Runner:
    """Runs steps through one rank's model."""

    def __init__(
        self,
        model: Transformer,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int,
        max_sequences: int,
        *,
        deterministic: bool = False,
        hidden_size: int = 0,
        max_tokens: int = 0,
        keeps_cache: bool = True,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        """`hidden_size` and `max_tokens` of a step: needed in pipeline stages behind the first.

        `cache_dtype`: a type of 8 bits; None for `dtype`.
        `keeps_cache`: whether later steps read the keys and values of a step; else all layers write to one cache.
        """
        self._keeps_cache = keeps_cache
        self.cache_dtype = cache_dtype or dtype
        self.deterministic = deterministic
        self.model = model
        self.stage = model.stage
        self.dtype = dtype
        self.device = device
        self.block_size = block_size
        self.max_sequences = max_sequences
        tokens = 0 if self.stage.is_first else max_tokens
        self._hidden_dtype = ops.hidden_dtype(dtype, device.type)
        self._incoming = torch.zeros(tokens, hidden_size, dtype=self._hidden_dtype, device=device)
        """Hidden states that the stage before gave for the tokens of this step."""
        by_cache = model.attentions_by_cache()
        self._attentions = by_cache if keeps_cache else [[each for attentions in by_cache for each in attentions]]
        """Layers of attention, those together that write to the same cache."""
        names = {id(module): name for name, module in model.named_modules()}
        self.attention_names = [names[id(first)] for first, *_ in self._attentions]
        """Of the first of those layers."""
        self._caches = ops.BlockCaches.of(())
        self._kept = torch.zeros(2, self.stage.size * max_sequences, dtype=torch.int32, device=device)
        self.chosen = self._kept[0]
        """Tokens of the last steps, of as many as there are pipeline stages, each in the order of its rows."""
        self._parents = self._kept[1]
        """Where a token is a beam's, the number of the beam that it continues."""
        self._graphs: StepGraphs | RecordedSteps | None = None
        self.deferred = Deferred()
        """What the start leaves for when there is time."""
        self._captures: dict[Size, int] = {}
        """The pieces of that by which graphs come to be."""
        self._output: StepOutput | None = None
        """Of the last step, if a graph or a recording made it."""

    @cached_property
    def head(self) -> Head:
        """The language model head."""
        assert isinstance(self.model, CausalLM), "nothing is generated without one"
        return self.model.head

    @property
    def block_bytes(self) -> int:
        """Bytes of one cache block over all caches of this rank."""
        width = sum(2 * first.num_kv_heads * first.head_size for first, *_ in self._attentions)
        return width * self.block_size * self.cache_dtype.itemsize

    @property
    def placeholder_ranges(self) -> list[Tensor]:
        """Some ranges of each cache, for steps whose results nobody reads."""
        return [torch.ones(2, first.num_kv_heads) for first, *_ in self._attentions]

    def allocate_cache(
        self, num_blocks: int, max_blocks: int, ropes: RopeTables, ranges: Sequence[Tensor] | None = None
    ) -> None:
        """Allocate the cache, as zeros, and give every layer its part.

        One sequence may hold `max_blocks`. `ropes` are on the same device. With `ranges` of each layer of attention,
        [2, m], the cache is in 8 bits, else in the type that the model computes in.
        """
        dtype = self.dtype if ranges is None else self.cache_dtype
        has_encoder = isinstance(self.model, EncoderDecoder)
        tables = BlockTables((2 if has_encoder else 1) * self.max_sequences, max_blocks)
        first = self._attentions[0][0]
        assert isinstance(first, Attention)
        longest = max_blocks * self.block_size
        run = ops.fixed_run(self.device, longest) if self.deterministic else None
        planner = Planner.of(self.device, first.num_heads, first.num_kv_heads, run=run, max_kv_len=longest)
        causal = first.config.causal
        self._inputs = Inputs(
            tables,
            self.block_size,
            planner,
            self.device,
            run,
            causal=causal,
            has_encoder=has_encoder,
            consecutive=not self._keeps_cache and planner is not None,
        )
        caches: list[Tensor] = []
        for number, attentions in enumerate(self._attentions):
            width = attentions[0].num_kv_heads * attentions[0].head_size
            caches += self._zeros((2, num_blocks, self.block_size, width), dtype)
            scales = None if ranges is None else ops.CacheScales.of(ranges[number].to(self.device), dtype)
            assert scales is None or len(attentions) == 1, "layers that share a cache would need ranges of their own"
            for attention in attentions:
                heads = (attention.num_kv_heads, attention.head_size)
                keys, values = (cache.unflatten(-1, heads) for cache in caches[-2:])
                attention.bind_cache(keys, values, ropes, scales)
        self._caches = ops.BlockCaches.of(caches)

    def release_cache(self) -> None:
        """Let the cache go."""
        self._caches = ops.BlockCaches.of(())
        for attention in chain.from_iterable(self._attentions):
            del attention.key_cache, attention.value_cache

    @torch.inference_mode()
    def measured_ranges(self, steps: Sequence[StepMessage], ropes: RopeTables) -> list[Tensor]:
        """Greatest keys and values of the tokens of some steps, [2, m] on the host for each layer of attention.

        The steps have a cache of their own, and there must be no other. Each is of one sequence, whose blocks it names.
        """
        tables = [blocks for step in steps for _, _, blocks in step.edits]
        self.allocate_cache(1 + max(map(max, tables)), max(map(len, tables)), ropes)
        for step in steps:
            self.forward(step)
        caches = [(first.key_cache, first.value_cache) for first, *_ in self._attentions]
        ranges = [torch.stack([cache.abs().amax((0, 1, 3)) for cache in pair]).float().cpu() for pair in caches]
        self.release_cache()
        return ranges

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=self.device)
        # numpy asks the system for zero pages, which cost nothing until they are used; torch would write every one.
        return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)

    @torch.inference_mode()
    def compile_kernels(self, steps: Iterable[tuple[int, int]], sizes: Sizes, processes: int) -> None:
        """Compile the kernels of steps of these numbers of tokens and sequences on a GPU, several at a time.

        And those of graphs of `sizes`. On every rank, each in a process without kernels; `processes` of them are on
        this host.
        """
        with distinct_layers(self.model), ops.compiled_together(processes):
            for num_tokens, sequences in steps:
                tokens = self._inputs.warmup_tokens(max(num_tokens, sequences), sequences)
                logits = self._dry_run(tokens).local_logits
                whole = None if logits is None else self.head.gather(logits)
                if whole is not None:
                    draw_every_way(whole)
            for size in (*sizes.decode, *sizes.mixed):
                self._dry_run(self._inputs.sent(size.of_padding(self._inputs)))

    def _dry_run(self, tokens: Tokens) -> StepOutput:
        ops.resolve_ids(tokens.ids, self.chosen)
        return self._predict(self._hidden(tokens.ids, tokens))

    @torch.inference_mode()
    def warm_up(self, num_tokens: int, sequences: Iterable[int]) -> int:
        """Run steps of this number of tokens on a GPU, without effect on the cache: the peak of bytes that they need.

        There is a step for each number of `sequences`.
        """
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for count in sequences:
            tokens = self._inputs.warmup_tokens(max(num_tokens, count), count)
            self._decode(tokens)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    @torch.inference_mode()
    def load_kernels(self, num_tokens: int, sequences: Iterable[int]) -> None:
        """Run steps of this number of tokens through one layer of each kind: their kernels are compiled and loaded.

        There is a step for each number of `sequences`.
        """
        with distinct_layers(self.model):
            for count in sequences:
                self._decode(self._inputs.warmup_tokens(max(num_tokens, count), count))

    def defer_products(self, most_tokens: int) -> None:
        """Leave for later every number of rows of a step that a GPU's library is given.

        It loads its programs when it computes the first of them, and those of a fixed order are compared then.
        """
        if not isinstance(self.model, CausalLM):
            return  # its layers cannot be distinguished, and all of them would take too long
        for tokens in reversed(ops.library_rows(most_tokens)):
            load = partial(self.load_kernels, tokens, [min(tokens, self.max_sequences)])
            self.deferred.add(Piece(f"the library's products of {tokens} rows", load))

    def graph_sizes(self, most_mixed_tokens: int) -> Sizes:
        """Of steps of single tokens, and of steps with prompts of at most `most_mixed_tokens`."""
        most_mixed_tokens = 0 if isinstance(self.model, EncoderDecoder) else most_mixed_tokens
        return Sizes.up_to(self.max_sequences, most_mixed_tokens)

    @torch.inference_mode()
    def capture_graphs(self, sizes: Sizes) -> None:
        """Capture steps of the first of these sizes, to be replayed; the others are left for later."""
        graphs = StepGraphs(
            self._decode,
            self._mixed,
            self._inputs,
            self.max_sequences,
            sizes,
            CudaCapture(self.device),
            one_of_each=partial(distinct_layers, self.model),
            is_last=self.stage.is_last,
        )
        graphs.capture(sizes.first)
        self._graphs = graphs
        for size in sizes.later:
            piece = Piece(f"the CUDA graph of steps {size}", partial(graphs.capture, [size]))
            self._captures[size] = self.deferred.add(piece)

    def lacking(self, message: StepMessage) -> int | None:
        """The piece of deferred work that makes the graph for a step; None where the step has all that it can have."""
        if not self._captures or not isinstance(self._graphs, StepGraphs):
            return None
        size = self._graphs.lacking(message)
        number = None if size is None else self._captures[size]
        return number if number is not None and number in self.deferred else None

    def record_steps(self) -> None:
        """Record steps of single tokens on a CPU as they come, to be replayed."""
        vocabulary = self.head.vocab_size if self.stage.is_last and self._keeps_cache else 0
        self._graphs = RecordedSteps(
            lambda tokens: self._predict(self._hidden(tokens.ids, tokens)), self._inputs, vocabulary
        )

    @property
    def any_threads(self) -> bool:
        """Whether steps have the same bits on any number of threads.

        Kernels for a CPU have; what torch computes for prompts of models with sinks or capped scores, or for an
        encoder, was not compared.
        """
        if not isinstance(self._graphs, RecordedSteps) or not self._graphs.has_recorded:
            return False
        attentions = list(chain(*self._attentions))
        own = [each for each in attentions if isinstance(each, Attention)]
        return len(own) == len(attentions) and all(each.sinks is None and each.config.softcap is None for each in own)

    def release_graphs(self) -> None:
        """Let the graphs go: NCCL does not leave a group that one of them still has work of."""
        self._graphs = self._output = None
        self.deferred.clear()

    def tokens(self, message: StepMessage) -> Tokens:
        """A step on the device, for who runs a part of the model alone."""
        return self._inputs.tokens(message)

    def _mixed(self, tokens: Tokens) -> StepOutput:
        ids = ops.resolve_ids(tokens.ids, self.chosen) if self.stage.is_first else tokens.ids
        return StepOutput(self._hidden(ids, tokens))

    def _hidden(self, ids_t: Tensor, tokens: Tokens) -> Tensor:
        if tokens.encoder is not None:
            assert isinstance(self.model, EncoderDecoder)
            self.model.encode(tokens.encoder.ids, tokens.encoder.positions, tokens.encoder.meta)
        read = ids_t if self.stage.is_first else self._incoming[: len(ids_t)]
        hidden: Tensor = self.model(read, tokens.positions, tokens.meta)
        # a sum that a stage ends with is in fp32, and what is sent must be what the next stage makes room for
        return hidden if self.stage.is_last else hidden.to(self._hidden_dtype)

    def _decode(self, tokens: Tokens) -> StepOutput:
        return self._predict(self._mixed(tokens).hidden)

    def _predict(self, hidden: Tensor) -> StepOutput:
        if not self.stage.is_last or not self._keeps_cache:
            return StepOutput(hidden)
        logits = self.head.local_logits(hidden)
        return StepOutput(hidden, logits, self.head.greedy(logits))

    def forward(self, message: StepMessage) -> Tensor:
        """Hidden states of each sequence's last `needed` tokens, in order; all tokens leave their keys and values.

        In pipeline stages before the last they are of all tokens, and go to the next stage.
        """
        for copies in message.copy_rounds():
            sources_n, targets_n = ops.to_device(list(zip(*copies, strict=True)), torch.int64, self.device)
            ops.copy_blocks(self._caches, sources_n, targets_n)
        link = self.stage.link
        if link is not None and not self.stage.is_first:
            link.receive(self._incoming[: message.num_tokens])
        if link is not None and self.stage.is_first and (latest := self._latest_pending(message)) is not None:
            link.await_tokens(latest)
        hidden = self._computed(message)
        if link is not None and not self.stage.is_last:
            link.send(hidden)
        return hidden

    def _computed(self, message: StepMessage) -> Tensor:
        self._output = None if self._graphs is None else self._graphs.replay(message, self._move_beams)
        if self._output is not None:
            return self._output.hidden
        tokens = self._inputs.tokens(message)
        self._move_beams(message, tokens.meta.block_tables)
        return self._mixed(tokens).hidden if tokens.any_pending else self._hidden(tokens.ids, tokens)

    def _move_beams(self, message: StepMessage, tables_sn: Tensor) -> None:
        """Let the beams of a step have what the beams that they continue have in the cache."""
        if not message.moves:
            return
        size, starts = self.block_size, message.starts
        moves = ((*move, starts[move[0]] // size, starts[move[0]] % size) for move in message.moves)
        ops.move_beams(self._caches, tables_sn, ops.BeamMoves.of(moves, self.device), self._parents)

    def _latest_pending(self, message: StepMessage) -> int | None:
        """Number of the latest step of whose chosen tokens this one reads any that only devices know."""
        slots = {(-1 - token) // self.max_sequences for token in message.ids if token < 0}
        before = message.number - 1
        return max((before - (before - slot) % self.stage.size for slot in slots), default=None)

    def _chosen_by(self, message: StepMessage) -> slice:
        """Where the tokens that a step chooses are kept."""
        first = message.number % self.stage.size * self.max_sequences
        return slice(first, first + message.num_chosen)

    def logits(self, hidden_th: Tensor, rows: list[int]) -> Tensor | None:
        """Logits [r, v] of these rows of the hidden states, on rank 0; None on the others, which must call it too."""
        return self.head.gather(self._local_logits(hidden_th, rows))

    def greedy(self, hidden_th: Tensor, rows: list[int]) -> Tensor:
        """The most probable tokens, int32 [r], of these rows, on every rank; -1 where the logits are not finite."""
        output = self._replayed(hidden_th, rows)
        if output is not None and output.tokens is not None:
            return output.tokens
        return self.head.greedy(self._local_logits(hidden_th, rows))

    def _local_logits(self, hidden_th: Tensor, rows: list[int]) -> Tensor:
        output = self._replayed(hidden_th, rows)
        if output is not None and output.local_logits is not None:
            return output.local_logits
        return self.head.local_logits(self._of_rows(hidden_th, rows))

    def _of_rows(self, hidden_th: Tensor, rows: list[int]) -> Tensor:
        """These rows, in ascending order, of the hidden states."""
        if rows and rows[-1] - rows[0] == len(rows) - 1:
            return hidden_th[rows[0] : rows[0] + len(rows)]
        return hidden_th[ops.to_device(rows, torch.int64, self.device)]

    def _replayed(self, hidden_th: Tensor, rows: list[int]) -> StepOutput | None:
        """What a graph left of these hidden states, if all rows are wanted."""
        output = self._output
        return output if output is not None and output.hidden is hidden_th and len(rows) == len(hidden_th) else None

    def remember(self, message: StepMessage, chosen: Tensor) -> None:
        """Keep the tokens that a step chose, here and in the first stage: later steps read what the host lacks.

        `chosen` has a row of them, and with searches a row of the beams that they continue.
        """
        self._kept[: len(chosen), self._chosen_by(message)].copy_(chosen)
        if self.stage.link is not None:
            self.stage.link.return_tokens(chosen[0])

    def expect(self, message: StepMessage) -> None:
        """In the first of several stages, let the tokens that a step chooses come from the last one."""
        if self.stage.link is not None and self.stage.is_first:
            self.stage.link.expect_tokens(self.chosen[self._chosen_by(message)], message.number)
