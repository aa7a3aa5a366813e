"""What `held_tiles.py` uses of Gluon, for one program at a time in numpy. Copies are done at once, layouts left out.

Triton's interpreter does not run Gluon. What threads hold, and whether conversions cost nothing, is for the compiler.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]


class Block(np.ndarray[Any, Any]):
    """A tensor of a program."""

    def to(self, dtype: Any) -> "Block":
        return self.astype(dtype).view(Block)


def block(numbers: Any) -> Block:
    return np.asarray(numbers).view(Block)


class Pointers:
    """Addresses of elements of an array."""

    def __init__(self, memory: Numbers, at: Any = 0) -> None:
        self.memory, self.at = memory, np.asarray(at, dtype=np.int64)

    def __add__(self, offset: Any) -> "Pointers":
        return Pointers(self.memory, self.at + np.asarray(offset))

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.memory.dtype)


class Shared:
    """Shared memory."""

    def __init__(self, memory: Numbers) -> None:
        self.memory = memory

    def index(self, at: int) -> "Shared":
        return Shared(self.memory[at])

    def slice(self, start: int, count: int) -> "Shared":
        return Shared(self.memory[start : start + count])

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.memory.transpose(order))

    def load(self, _: Any) -> Block:
        return block(self.memory.copy())


def _expand_dims(x: Any, axis: int) -> Any:
    return Pointers(x.memory, np.expand_dims(x.at, axis)) if isinstance(x, Pointers) else block(np.expand_dims(x, axis))


def _store(pointers: Pointers, numbers: Numbers) -> None:
    at, numbers = np.broadcast_arrays(pointers.at, numbers)
    pointers.memory[at] = numbers


def _copy(shared: Shared, pointers: Pointers) -> None:
    shared.memory[...] = pointers.memory[pointers.at]


def _dot4(a: Numbers, b: Numbers, total: Numbers) -> Block:
    """The instruction: products of signed bytes of words, and a sum of 32 bits."""
    shape = np.broadcast_shapes(a.shape, b.shape)
    first, second = (np.ascontiguousarray(np.broadcast_to(x, shape)).view(np.int8).astype(np.int32) for x in (a, b))
    return block(total + (first * second).reshape(*shape, 4).sum(-1, dtype=np.int32))


def _high_nibbles(words: Numbers) -> Block:
    return block((np.asarray(words) & np.int32(-0x0F0F0F10)) ^ np.int32(-0x7F7F7F80))


def in_numpy(program: int) -> dict[str, Any]:
    """What stands for names of `held_tiles.py` within a program."""
    gl = SimpleNamespace(
        constexpr=int,
        int32=np.int32,
        int64=np.int64,
        float32=np.float32,
        BlockedLayout=lambda *_: None,
        SliceLayout=lambda *_: None,
        SwizzledSharedLayout=lambda *_, order: None,
        program_id=lambda _: program,
        static_range=range,
        allocate_shared_memory=lambda dtype, shape, _: Shared(np.zeros(shape, dtype)),
        arange=lambda start, end, layout: block(np.arange(start, end)),
        zeros=lambda shape, dtype, _: block(np.zeros(shape, dtype)),
        zeros_like=lambda x: block(np.zeros_like(x)),
        expand_dims=_expand_dims,
        reshape=lambda x, shape: block(np.reshape(x, shape)),
        split=lambda x: (block(x[..., 0]), block(x[..., 1])),
        convert_layout=lambda x, _, assert_trivial: x,
        sum=lambda x, axis: block(np.sum(x, axis, dtype=x.dtype)),
        load=lambda pointers: block(pointers.memory[pointers.at]),
        store=_store,
    )
    copies = SimpleNamespace(
        async_copy_global_to_shared=_copy, commit_group=lambda: None, wait_group=lambda outstanding: None
    )
    return {"gl": gl, "async_copy": copies, "_dot4": _dot4, "_high_nibbles": _high_nibbles}
