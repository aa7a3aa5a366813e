"""One completion on its way through the scheduler."""

from collections.abc import Mapping
from hashlib import blake2b
from itertools import takewhile

from hasten.core.types import Request, SamplingParams
from hasten.engine.constraint import Constraint
from hasten.engine.encoder_input import EncoderInput

_ROOT_BITS = 128
"""More than numbers of prefixes ever have."""


def _root_of(salt: str) -> int:
    """The prefix cache's number for no tokens behind a salt; 0 without one."""
    if not salt:
        return 0
    return 1 << _ROOT_BITS | int.from_bytes(blake2b(salt.encode(), digest_size=_ROOT_BITS // 8).digest())


class Beams:
    """The sequences of one beam search, by number. All of them run or none does, and all choose tokens together.

    Scattered, before the prompt is computed and after a preemption, they have no blocks. The first one, the leader,
    then computes what all have in common, and the others go on from its blocks.
    """

    def __init__(self, leader: "Sequence") -> None:
        self.leader = leader
        self.members = [leader, *(leader.fork(index) for index in range(1, leader.params.beam_width))]
        self.scatter()

    def scatter(self) -> None:
        """Note that none has blocks any more, and which tokens they have."""
        self.scattered = True
        columns = zip(*(member.token_ids for member in self.members), strict=True)
        common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        leader = self.leader
        has_output = len(leader.token_ids) > leader.prompt_len
        self.trunk = min(common, len(leader.token_ids) - 1) if has_output else common
        """Tokens that all have in common, without the last one: all choose what comes after that, together."""
        for member in self.members:
            member.parent = None


class Sequence:
    """A prompt and the tokens chosen so far, with what the cache holds of them.

    `num_computed` tokens have their keys and values in the cache blocks of `block_table`. A step catches up with the
    rest: the whole prompt at first, one token while decoding, all of both again after a preemption.

    A token counts as soon as it is chosen on the device. Until it is known here it is `pending`: `length` has it,
    `token_ids` not yet.
    """

    __slots__ = (
        "arrived",
        "beams",
        "begun",
        "block_table",
        "constraint",
        "due",
        "encoder_input",
        "forced",
        "group_size",
        "holds_input",
        "in_flight",
        "index",
        "is_plain",
        "is_waiting",
        "key",
        "last_step",
        "masks",
        "max_length",
        "num_cached",
        "num_computed",
        "num_registered",
        "num_released",
        "num_states",
        "params",
        "parent",
        "pending",
        "pending_row",
        "pooling",
        "prefix",
        "prompt_len",
        "reads_history",
        "request_id",
        "root",
        "seed",
        "table_version",
        "token_ids",
        "wants_prompt_logprobs",
    )

    def __init__(
        self, request: Request, seed: int, max_model_len: int | None = None, start: tuple[int, ...] = ()
    ) -> None:
        """`start`: what a decoder begins with whose encoder reads the request's prompt."""
        self.request_id = request.request_id
        self.params: SamplingParams = request.params
        self.index = 0
        self.key = -1
        """Number that all ranks know it by; the scheduler gives it."""
        self.is_waiting = False
        """Whether it is in the scheduler's queue; of beams, the leader alone is."""
        self.seed = seed
        self.is_plain = self.params.is_plain
        """Whether the most probable token is all that is asked for."""
        beam_width = self.params.beam_width
        self.reads_history = beam_width > 1 and any(len(run) > 2 for run in self.params.bad_words_ids)
        """Whether the host must know the tokens so far before the next step can be launched: of beams, what ends with a
        run of banned tokens is known only with the beams that they continue."""
        self.group_size = request.params.n if beam_width == 1 else 1
        """Completions still to be forked from it once its prompt is computed, itself included."""
        self.root = _root_of(request.cache_salt)
        """The prefix cache's number for no tokens."""
        self.encoder_input = EncoderInput(request.prompt_token_ids, self.root) if start else None
        """What cross-attention reads, in an encoder-decoder; all sequences of a request have it in common."""
        self.holds_input = False
        """Whether it is one of the holders of that."""
        self.token_ids = list(start or request.prompt_token_ids)
        self.prompt_len = len(self.token_ids)
        self.pooling = request.pooling
        """What to make of its hidden states: it is then computed whole, in one step, and has no next token."""
        self.masks = request.masks
        """Places of the tokens whose words are asked for, all of them among those that need hidden states."""
        self.forced: Mapping[int, tuple[int, ...]] = {}
        """By the number of output tokens before: tokens of which the most probable comes next, whatever others have."""
        self.max_length = self.prompt_len if self.pooling else self.params.max_length(self.prompt_len, max_model_len)
        self.num_states = 1
        """Of its last tokens, how many need hidden states once it is computed."""
        self.pending = 0
        """Tokens that the device has chosen and that are not known here: between two steps, 1 at most."""
        self.pending_row = 0
        """Where the devices keep its pending token."""
        self.in_flight = 0
        """Steps under way that choose a token of it, which is pending or not chosen yet; with several stages alone."""
        self.last_step = -1
        """Number of the last of them."""
        self.arrived = 0.0
        """When rank 0 got it, in seconds; other ranks do not know."""
        self.begun = 0.0
        """When the first step that computes it was scheduled, on the same clock; 0 before that."""
        self.num_cached = 0
        """Tokens of its prompt that were in the prefix cache then."""
        self.due = 0
        """Prompts are computed in this order, and in that of their arrival where it is the same."""
        self.num_computed = 0
        self.block_table: list[int] = []
        self.table_version = 0
        """Changes whenever blocks already in the table do, so that copies of it know that they are stale."""
        self.prefix = self.root
        self.num_registered = 0
        """Full blocks that the prefix cache knows, and its number for the tokens in them."""
        self.num_released = 0
        """First blocks of the table that it holds no longer, since no layer sees their tokens."""
        self.wants_prompt_logprobs = request.params.prompt_logprobs is not None
        self.constraint: Constraint | None = None
        """How far its output has come in the grammar that it keeps to; only rank 0 knows."""
        self.beams: Beams | None = None
        """The beams that it is one of."""
        self.parent: int | None = None
        """Number of the beam that it continues since its last choice, if its blocks are still to follow that."""
        if beam_width > 1:
            self.beams = Beams(self)
            for member in self.beams.members:
                member.beams = self.beams

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether the logits of the prompt's tokens are asked for and not computed yet."""
        return self.wants_prompt_logprobs and self.num_computed < self.prompt_len

    @property
    def length(self) -> int:
        """Tokens of the prompt and those chosen so far, known here or not."""
        return len(self.token_ids) + self.pending

    @property
    def forced_next(self) -> tuple[int, ...]:
        """The only tokens that may come next; empty: any may."""
        return self.forced.get(self.output_len, ()) if self.forced else ()

    @property
    def uncomputed_input(self) -> int:
        """Tokens that the encoder has to compute before it can run."""
        given = self.encoder_input
        return 0 if given is None or given.is_computed else len(given.token_ids)

    @property
    def unit(self) -> "list[Sequence]":
        """The sequences that come and go with it, itself included."""
        return [self] if self.beams is None else self.beams.members

    @property
    def successors(self) -> "list[Sequence]":
        """The sequences that get a token when one is chosen after it: all beams when a search begins, else itself."""
        beams = self.beams
        return beams.members if beams is not None and self.length == self.prompt_len else [self]

    @property
    def uncomputed(self) -> int:
        """Tokens that the next steps may compute.

        Of scattered beams those that all have in common, by the leader; none of the others.
        """
        beams = self.beams
        if beams is None or not beams.scattered:
            return self.length - self.num_computed
        return beams.trunk - self.num_computed if self is beams.leader else 0

    @property
    def is_prefilling(self) -> bool:
        """Whether several tokens are left to compute: of its prompt, those that a grammar forced, or, after a
        preemption, all that it had.
        """
        if len(self.token_ids) + self.pending - self.num_computed < 2:
            return False
        beams = self.beams
        return beams is None or (beams.scattered and beams.leader is self)

    @property
    def is_complete(self) -> bool:
        """Whether it has all the tokens that it may have: there is nothing left to compute."""
        return len(self.token_ids) + self.pending >= self.max_length

    @property
    def output_len(self) -> int:
        """Tokens chosen so far, known here or not."""
        return self.length - self.prompt_len

    def append(self, token: int) -> None:
        """Take note of a token: of the one that was pending for the longest, or of one that no step has to choose."""
        self.token_ids.append(token)
        self.pending = max(0, self.pending - 1)

    def fork(self, index: int) -> "Sequence":
        """A sibling with the same prompt and a seed of its own; the scheduler shares the blocks."""
        fork = object.__new__(Sequence)
        for name in self.__slots__:
            setattr(fork, name, getattr(self, name))
        fork.index, fork.group_size = index, 1
        fork.seed = (self.seed + index * 0x632BE59BD9B4E019) % 2**64
        fork.token_ids = self.token_ids[: self.prompt_len]
        fork.pending = fork.in_flight = 0
        fork.block_table = []
        fork.table_version = 0
        fork.holds_input = False
        if self.constraint is not None:
            fork.constraint = self.constraint.fork()
        return fork
