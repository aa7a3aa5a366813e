"""One row's product with a weight of 4 bits that waits in shared memory when the row comes.

A program asks for all of its weights before it waits for its inputs, and holds them in shared memory, which has more
room than registers. Each warp has several output features, so that what a thread reads of the row serves them all and
sums cross fewer threads. Values are multiplied as `byte_dots.py` does.

Shapes: N output features, W words of eight nibbles a feature; a row [2 digits, 2 halves, W].
"""

from dataclasses import dataclass

from triton import knobs
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from hasten.ops.gpu.activations import activated
from hasten.ops.gpu.endings import store_projected
from hasten.ops.gpu.launch import start_next, wait_for_inputs
from hasten.ops.rounding import BASE

_BASE = gl.constexpr(BASE)
_DP4A = gl.constexpr("dp4a.s32.s32 $0, $1, $2, $3;")
_LESS_MIDDLES = gl.constexpr("lop3.b32 $0, $1, 0xf0f0f0f0, 0x80808080, 0x6a;")
"""The high nibble of each byte less its middle, sixteenfold."""
_OF_A_WARP = 4
"""Output features."""
_ROWS = gl.constexpr(_OF_A_WARP)
_MOST_WORDS = 8192
"""Of a program, 32 kB: a multiprocessor has room for six, and their last ones end at about once."""


@gluon.jit
def _words(x):
    """[n, w] as four tensors [n, w / 4] of what a thread has next to each other."""
    even, odd = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 4, 2, 2]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return first, second, third, fourth


@gluon.jit
def _dot4(a, b, total):
    return gl.inline_asm_elementwise(_DP4A, "=r,r,r,r", [a, b, total], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _high_nibbles(words):
    return gl.inline_asm_elementwise(_LESS_MIDDLES, "=r,r", [words], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _add(words, x, total, chunk: gl.constexpr, layout: gl.constexpr):
    """`total` [n, w / 4] and the products of the signed bytes of four words each with those of a row at `x`."""
    line = gl.expand_dims(gl.load(x + gl.arange(0, chunk, layout=gl.SliceLayout(0, layout))), 0)
    row = _words(line + gl.zeros([total.shape[0], chunk], gl.int32, layout))
    total = _dot4(words[0], row[0], total)
    total = _dot4(words[1], row[1], total)
    total = _dot4(words[2], row[2], total)
    return _dot4(words[3], row[3], total)


@gluon.jit
def held_tile(
    x,
    units,
    weight,
    scales,
    bias,
    out,
    keys,
    values,
    slots,
    inverses,
    N,
    WORDS: gl.constexpr,
    GROUP: gl.constexpr,
    BY_ROWS: gl.constexpr,
    BY_COLUMNS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    CLIP: gl.constexpr,
    Q: gl.constexpr,
    KV: gl.constexpr,
    D: gl.constexpr,
    PDL: gl.constexpr,
):
    """A program multiplies the row with 4 * BY_ROWS rows of the weight; BY_ROWS by BY_COLUMNS warps share the words.

    GROUP words, a multiple of 16, have a scale, and each 16 a unit of the row.
    """
    start_next(PDL)
    features: gl.constexpr = _ROWS * BY_ROWS
    chunk: gl.constexpr = 128 * BY_COLUMNS
    chunks: gl.constexpr = WORDS // chunk
    groups: gl.constexpr = chunk // 16
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    by_vectors: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [BY_ROWS, BY_COLUMNS], [1, 0])
    of_scales: gl.constexpr = gl.BlockedLayout([1, 4], [32 // BY_ROWS, BY_ROWS], [BY_ROWS * BY_COLUMNS, 1], [1, 0])
    by_words: gl.constexpr = gl.BlockedLayout([4, 4], [1, 32], [BY_ROWS, BY_COLUMNS], [0, 1])
    by_units: gl.constexpr = gl.BlockedLayout([4, 1, 1], [1, 8, 4], [BY_ROWS, BY_COLUMNS, 1], [0, 2, 1])
    by_groups: gl.constexpr = gl.SliceLayout(2, by_units)
    held = gl.allocate_shared_memory(gl.int32, [chunks, features, chunk], plain)
    held_scales = gl.allocate_shared_memory(gl.float32, [chunks * groups, features], plain)
    first = gl.program_id(0) * features
    row = (first + gl.arange(0, features, layout=gl.SliceLayout(1, by_vectors))).to(gl.int64)
    word = gl.arange(0, chunk, layout=gl.SliceLayout(0, by_vectors))
    start = weight + gl.expand_dims(row, 1) * WORDS + gl.expand_dims(word, 0)
    for number in gl.static_range(chunks):
        async_copy.async_copy_global_to_shared(held.index(number), start + number * chunk)
    group = gl.arange(0, chunks * groups, layout=gl.SliceLayout(1, of_scales)) * 16 // GROUP
    feature = first + gl.arange(0, features, layout=gl.SliceLayout(0, of_scales))
    of_groups = scales + gl.expand_dims(group, 1) * N + gl.expand_dims(feature, 0)
    async_copy.async_copy_global_to_shared(held_scales, of_groups)
    async_copy.commit_group()
    n = first + gl.arange(0, features, layout=gl.SliceLayout(1, by_groups))
    if HAS_BIAS:
        bias_n = gl.load(bias + n).to(gl.float32)
    wait_for_inputs(PDL)
    async_copy.wait_group(0)
    total = gl.zeros([features, groups, 4], gl.float32, by_units)
    for number in gl.static_range(chunks):
        at = x + number * chunk
        words = held.index(number).load(by_words)
        even, odd = _words(_high_nibbles(words << 4)), _words(_high_nibbles(words))
        sums = _add(even, at, gl.zeros_like(even[0]), chunk, by_words)
        sums = _add(odd, at + WORDS, sums, chunk, by_words) * _BASE
        sums = _add(even, at + 2 * WORDS, sums, chunk, by_words)
        sums = _add(odd, at + 3 * WORDS, sums, chunk, by_words)
        sums = gl.convert_layout(gl.reshape(sums, [features, groups, 4]), by_units, assert_trivial=True)
        unit = gl.load(units + number * groups + gl.arange(0, groups, layout=gl.SliceLayout(0, by_groups)))
        scale = held_scales.slice(number * groups, groups).permute((1, 0)).load(by_groups)
        total += sums.to(gl.float32) * gl.expand_dims(scale * gl.expand_dims(unit, 0), 2)
    value = gl.sum(gl.sum(total, 2), 1) * (1 / 16)
    if HAS_BIAS:
        value += bias_n
    if ACTIVATION is not None:
        value = activated(value, ACTIVATION)
    if CLIP is not None:
        value = gl.where(value > CLIP, CLIP, gl.where(value < -CLIP, -CLIP, value))  # NaN stays NaN
    value = value.to(out.dtype.element_ty)
    if KV:
        slot = gl.load(slots).to(gl.int64)
        store_projected(value, n * 0, slot, n, n < N, out, keys, values, inverses, Q, KV, D)
    else:
        gl.store(out + n, value)


@dataclass(frozen=True)
class Form:
    """How `held_tile` is cut: warps by output features, and by words."""

    by_rows: int
    by_columns: int

    @property
    def features(self) -> int:
        """Output features of a program."""
        return _OF_A_WARP * self.by_rows


def form_of(features: int, words: int, group: int) -> Form | None:
    """The cut for a weight whose groups have so many words; None where it does not fill programs of four warps."""
    if knobs.runtime.interpret or group % 16:
        return None
    forms = (Form(4 // columns, columns) for columns in (1, 2, 4) if words % (128 * columns) == 0)
    form = next((form for form in forms if form.features * words <= _MOST_WORDS), None)
    return None if form is None or features % form.features else form
