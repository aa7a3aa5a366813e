"""A partial sum as the kernels that read it take it: their arguments for its terms, and what they are compiled for."""

from typing import Any

from torch import Tensor

from hasten.ops.partial_sum import PartialSum, count_parts


def terms_of(sum_: PartialSum, none: Tensor) -> tuple[Any, ...]:
    """Parts and their stride, bias, those of a second product, residual and its rows; `none` stands for absent ones."""

    def given(tensor: Tensor | None) -> Tensor:
        return none if tensor is None else tensor

    return (
        sum_.parts,
        _stride(sum_.parts),
        given(sum_.bias),
        given(sum_.added),
        _stride(given(sum_.added)),
        given(sum_.added_bias),
        given(sum_.residual),
        given(sum_.residual_indices),
    )


def constants_of(sum_: PartialSum) -> dict[str, int]:
    """Which terms there are, and how many parts each product has."""
    return {
        "PARTS": sum_.num_parts,
        "ADDED": 0 if sum_.added is None else count_parts(sum_.added),
        "HAS_BIAS": sum_.bias is not None,
        "HAS_ADDED_BIAS": sum_.added_bias is not None,
        "HAS_RESIDUAL": sum_.residual is not None,
        "HAS_ROWS": sum_.residual_indices is not None,
    }


def _stride(parts: Tensor) -> int:
    """From one part to the next; 0 where there is one."""
    return parts.stride(0) if count_parts(parts) > 1 else 0
