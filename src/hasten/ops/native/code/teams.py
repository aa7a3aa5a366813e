"""The kernels of a launch one after the other: on a thread of several, and on one alone. See `native/launch.py`."""

from numba import types

from hasten.ops.native.code import simd
from hasten.ops.native.code.functions import team


@team
def _team(data):
    """Run all kernels of a launch on one of its threads, each after all threads are done with the one before."""
    thread = types.int64(simd.call_number(simd.load_i64(data)))
    threads = types.int64(simd.call_number(simd.load_i64(data + 8)))
    barrier, count = simd.load_i64(data + 16), simd.load_i64(data + 24)
    at = data + 48
    for number in range(count):
        if number > 0:
            simd.wait(barrier)
        simd.call(simd.load_i64(at), simd.load_i64(at + 8), thread, threads)
        at += 16


@team
def _alone(data):
    """Run all kernels of a launch on this thread."""
    at = data + 48
    for _ in range(simd.load_i64(data + 24)):
        simd.call(simd.load_i64(at), simd.load_i64(at + 8), 0, 1)
        at += 16
