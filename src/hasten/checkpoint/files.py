"""Files of checkpoints, read as JSON and as tensors. CheckpointError names the file, what is wrong and what to do."""

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hasten.core.errors import CheckpointError
from hasten.core.text import from_json
from hasten.ops import TORCH_DTYPES

_FLOATS = frozenset({torch.float64, *TORCH_DTYPES.values()})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError names the file and what is wrong."""
    raw = _json(path)
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is not a JSON object; copy it again")
    return raw


def read_json_list(path: Path) -> list[Any]:
    """A JSON list from a file; CheckpointError names the file and what is wrong."""
    raw = _json(path)
    if not isinstance(raw, list):
        raise CheckpointError(f"{path} is not a JSON list; copy it again")
    return raw


def _json(path: Path) -> Any:
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}: is it the folder of a model?") from None
    except NotADirectoryError:
        raise CheckpointError(f"{path.parent} is a file; give the folder of a checkpoint") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); copy it again") from error


class TensorFile(Protocol):
    """An open file of named tensors."""

    def keys(self) -> Iterable[str]:
        """Names of the tensors."""
        ...

    def get_tensor(self, name: str) -> Tensor:
        """One tensor, which may be mapped."""
        ...


class Pickle:
    """A `.bin` file of torch, mapped where its format allows it."""

    def __init__(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} is damaged, or holds more than tensors, which hasten does not execute: save it as safetensors"
            ) from error
        # torch's readers raise whatever the damage leads to
        except Exception as error:
            what = f"{path} cannot be read as a torch file ({_first_line(error)})"
            raise CheckpointError(f"{what}; copy it again") from error
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointError(f"{path} does not hold a plain set of named tensors; save the model's state_dict()")
        self._state: dict[str, Tensor] = state

    def keys(self) -> Iterable[str]:
        """Names of the tensors."""
        return self._state.keys()

    def get_tensor(self, name: str) -> Tensor:
        """One tensor, without a gradient."""
        return self._state[name].detach()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def open_safetensors(path: Path) -> Any:
    """A safetensors file whose header is read."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; copy it again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({_first_line(error)}); copy it again") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a small `model.safetensors` or `pytorch_model.bin`; CheckpointError where neither is whole."""
    path = folder / "model.safetensors"
    if path.is_file():
        with open_safetensors(path) as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - it is no dict
    path = folder / "pytorch_model.bin"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no model.safetensors and no pytorch_model.bin; copy it again")
    pickled = Pickle(path)
    return {name: pickled.get_tensor(name) for name in pickled.keys()}  # noqa: SIM118


def read_index(path: Path) -> dict[str, Path]:
    """Which file holds each tensor, by an index of Hugging Face's form; all the files are there."""
    weights = read_json(path).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"{path} has no weight_map; copy it again")
    files = sorted(set(weights.values()))
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{path} names {name!r}, which is no file of its folder")
        if not (path.parent / name).is_file():
            tensor = min(tensor for tensor, file in weights.items() if file == name)
            raise CheckpointError(
                f"{path.parent / name} is missing, but {path.name} finds {tensor!r} in it; copy it again"
            )
    return {name: path.parent / file for name, file in weights.items()}


def check_names(where: Path, expected: Iterable[str], found: Iterable[str]) -> None:
    """CheckpointError names the first tensor that is missing, or that nobody expects."""
    expected, found = set(expected), set(found)
    for names, what, advice in (
        (expected - found, "lacks", "the checkpoint is incomplete, or its config.json is of another model"),
        (found - expected, "holds unknown", "it belongs to another model, or to a version that hasten does not know"),
    ):
        if names:
            first, more = min(names), f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{where} {what} tensor {first!r}{more}; {advice}")


def check_tensor(where: Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor; CheckpointError where its shape or its type is another."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{where}: tensor {name!r} has shape {tuple(tensor.shape)}, the configuration asks for {shape}"
        )
    if tensor.dtype not in _FLOATS:
        raise CheckpointError(f"{where}: tensor {name!r} has type {tensor.dtype}; hasten reads fp32, fp16 and bf16")
    return tensor
