"""Ops on a CPU, with the signatures of `reference`; docstrings stand at `hasten.ops.dispatch`."""

from hasten.ops.cpu import attention, bf16, edits, experts, fixed, heads, norms, products, sampling

__all__ = ["attention", "bf16", "edits", "experts", "fixed", "heads", "norms", "products", "sampling"]
