"""What the encoder of an encoder-decoder reads for a request. Never imports torch."""


class EncoderInput:
    """The encoder's input of a request, and the cache blocks of what it leaves for cross-attention.

    All sequences of the request read these blocks, which are written once. They are there for as long as one of the
    sequences holds them; after all have been preempted, the encoder computes them again.
    """

    __slots__ = ("block_table", "holders", "is_computed", "key", "prefix", "root", "table_version", "token_ids")

    def __init__(self, token_ids: tuple[int, ...], root: int = 0) -> None:
        self.token_ids = token_ids
        self.root = root
        """The prefix cache's number for no tokens; 0 without a salt."""
        self.key = -1
        """Number that all ranks know its block table by; the scheduler gives it."""
        self.block_table: list[int] = []
        self.table_version = 0
        """As `Sequence.table_version`."""
        self.holders = 0
        """Sequences that hold its blocks."""
        self.is_computed = False
        """Whether a step writes its blocks, or has done so."""
        self.prefix = 0
        """The prefix cache's number for it, before any token of the decoder; 0: it has none yet."""
