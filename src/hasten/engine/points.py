"""Uniform random numbers for sampling, which depend only on a request's seed and a token's position."""

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

Seeds = NDArray[np.uint64]


def mix64(value: int) -> int:
    """64 bits, each of which depends on all bits of `value`. Source: Steele, Lea, Flood, SplitMix64, 2014."""
    state = (value + _GOLDEN) & _MASK
    state = ((state ^ (state >> 30)) * _FIRST) & _MASK
    state = ((state ^ (state >> 27)) * _SECOND) & _MASK
    return state ^ (state >> 31)


def seeds_of(seeds: list[int]) -> Seeds:
    """Seeds modulo 2^64, as `uniforms` reads them."""
    return np.array([seed & _MASK for seed in seeds], dtype=np.uint64)


def uniforms(seeds_r: Seeds, positions_r: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each seed and position: the upper 53 bits of `mix64(seed + position * golden)`.

    Positions [..., r] have points for each of their rows.
    """
    golden, first, second = map(np.uint64, (_GOLDEN, _FIRST, _SECOND))
    state = seeds_r + positions_r.astype(np.uint64) * golden + golden
    state = (state ^ (state >> np.uint64(30))) * first
    state = (state ^ (state >> np.uint64(27))) * second
    points: NDArray[np.float64] = ((state ^ (state >> np.uint64(31))) >> np.uint64(11)).astype(np.float64)
    points *= 2.0**-53
    return points
