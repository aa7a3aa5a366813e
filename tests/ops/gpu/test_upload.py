"""Tensors of the host on a GPU: small and large ones, of mapped files, in any order of memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hasten import ops
from hasten.ops.transfer import to_device

PIECE = ops.Upload._PIECE


def test_on_a_cpu_tensors_stay_what_they_are() -> None:
    tensor = torch.zeros(PIECE, dtype=torch.uint8)
    assert ops.Upload(torch.device("cpu"))(tensor) is tensor


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn])
def test_a_gpu_gets_every_byte(tmp_path: Path, dtype: torch.dtype) -> None:
    upload, file = ops.Upload(torch.device("cuda", 0)), tmp_path / "weights"
    sizes = [16, PIECE - 16, PIECE, PIECE + 16, 7 * PIECE + 4096, PIECE]
    for number, nbytes in enumerate(sizes):
        file.with_suffix(f".{number}").write_bytes(torch.randint(256, (nbytes,), dtype=torch.uint8).numpy().tobytes())
    mapped = [
        torch.from_file(str(file.with_suffix(f".{number}")), size=nbytes, dtype=torch.uint8).view(dtype).view(2, -1)
        for number, nbytes in enumerate(sizes)
    ]
    copies = [upload(tensor) for tensor in mapped]
    for tensor, copy in zip(mapped, copies, strict=True):
        assert (copy.shape, copy.dtype, copy.is_cuda) == (tensor.shape, tensor.dtype, True)
        assert torch.equal(copy.cpu().view(torch.uint8), tensor.view(torch.uint8))
    turned = mapped[4].view(torch.uint8).view(2, -1).t()
    assert torch.equal(upload(turned).cpu(), turned)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64, torch.bool], ids=str)
@pytest.mark.parametrize(
    "values",
    [[], [3, 1, 2], [(1, 2), (3, 4)], np.array([[0, 1], [1, 0]]), np.arange(6.0)[::2], np.array([], dtype=np.int32)],
    ids=["none", "a list", "pairs", "an array", "every other", "an empty array"],
)
def test_host_values_of_any_form(values: Any, dtype: torch.dtype, device: torch.device) -> None:
    found = to_device(values, dtype, device)
    assert (found.dtype, found.device.type) == (dtype, device.type)
    assert found.tolist() == np.asarray(values).astype(torch.empty(0, dtype=dtype).numpy().dtype).tolist()
