"""Weights of 4 and 8 bits a value widened in registers, by bits and not by conversions."""

import triton
import triton.language as tl

_FP16_0 = tl.constexpr(
    "{.reg .b32 t; lop3.b32 $0, $1, 0x000f000f, 0x64006400, 0xea; mov.b32 t, 0x64086408; sub.f16x2 $0, $0, t;}"
)
_FP16_1 = tl.constexpr(
    "{.reg .b32 t, u; lop3.b32 $0, $1, 0x00f000f0, 0x64006400, 0xea; "
    "mov.b32 t, 0x2c002c00; mov.b32 u, 0xd480d480; fma.rn.f16x2 $0, $0, t, u;}"
)
_FP16_2 = tl.constexpr(
    "{.reg .b32 t; shr.b32 $0, $1, 8; lop3.b32 $0, $0, 0x000f000f, 0x64006400, 0xea; "
    "mov.b32 t, 0x64086408; sub.f16x2 $0, $0, t;}"
)
_FP16_3 = tl.constexpr(
    "{.reg .b32 t, u; shr.b32 $0, $1, 8; lop3.b32 $0, $0, 0x00f000f0, 0x64006400, 0xea; "
    "mov.b32 t, 0x2c002c00; mov.b32 u, 0xd480d480; fma.rn.f16x2 $0, $0, t, u;}"
)
"""1024 + v, whose low ten bits count in ones, less 1032; or 1024 + 16 v divided by 16, less 72: exact in fp16."""
_BF16_0 = tl.constexpr(
    "{.reg .b32 t, u; lop3.b32 $0, $1, 0x000f000f, 0x43004300, 0xea; "
    "mov.b32 t, 0x3f803f80; mov.b32 u, 0xc308c308; fma.rn.bf16x2 $0, $0, t, u;}"
)
_BF16_1 = tl.constexpr(
    "{.reg .b32 t, u; shr.b32 $0, $1, 4; lop3.b32 $0, $0, 0x000f000f, 0x43004300, 0xea; "
    "mov.b32 t, 0x3f803f80; mov.b32 u, 0xc308c308; fma.rn.bf16x2 $0, $0, t, u;}"
)
_BF16_2 = tl.constexpr(
    "{.reg .b32 t, u; shr.b32 $0, $1, 8; lop3.b32 $0, $0, 0x000f000f, 0x43004300, 0xea; "
    "mov.b32 t, 0x3f803f80; mov.b32 u, 0xc308c308; fma.rn.bf16x2 $0, $0, t, u;}"
)
_BF16_3 = tl.constexpr(
    "{.reg .b32 t, u; shr.b32 $0, $1, 12; lop3.b32 $0, $0, 0x000f000f, 0x43004300, 0xea; "
    "mov.b32 t, 0x3f803f80; mov.b32 u, 0xc308c308; fma.rn.bf16x2 $0, $0, t, u;}"
)
"""128 + v less 136: exact in bf16."""


@triton.jit
def quarter(words, NIBBLE: tl.constexpr, dtype: tl.constexpr, PDL: tl.constexpr):
    """The values at one of the four places of words, less 8; on newer devices of two words at once."""
    if not PDL:
        value = less((words >> (4 * NIBBLE)) & 15, 8, dtype)
    elif dtype == tl.float16:
        if NIBBLE == 0:
            value = tl.inline_asm_elementwise(_FP16_0, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
        elif NIBBLE == 1:
            value = tl.inline_asm_elementwise(_FP16_1, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
        elif NIBBLE == 2:
            value = tl.inline_asm_elementwise(_FP16_2, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
        else:
            value = tl.inline_asm_elementwise(_FP16_3, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        if NIBBLE == 0:
            value = tl.inline_asm_elementwise(_BF16_0, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
        elif NIBBLE == 1:
            value = tl.inline_asm_elementwise(_BF16_1, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
        elif NIBBLE == 2:
            value = tl.inline_asm_elementwise(_BF16_2, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            value = tl.inline_asm_elementwise(_BF16_3, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
    return value


@triton.jit
def less(values, middle: tl.constexpr, dtype: tl.constexpr):
    """Values of a byte less the middle: exact in fp16 and bf16."""
    if dtype == tl.float16:
        return (values.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + middle)
    return (values.to(tl.int16) - middle).to(dtype)


@triton.jit
def of_group(scales, zeros, at, MIDDLE: tl.constexpr, HAS_ZEROS: tl.constexpr):
    """Scales and zero points less the middle of one group; without any, these are not read."""
    scale_n = tl.load(scales + at).to(tl.float32)
    if HAS_ZEROS:
        return scale_n, tl.load(zeros + at).to(tl.float32) - MIDDLE
    return scale_n, scale_n


@triton.jit
def scaled(w_nk, scale_n, zero_n, HAS_ZEROS: tl.constexpr):
    """Values of one group as the weights that they stand for."""
    if HAS_ZEROS:
        w_nk -= zero_n.to(w_nk.dtype)[:, None]
    return w_nk * scale_n.to(w_nk.dtype)[:, None]
