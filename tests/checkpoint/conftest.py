"""Checkpoints in every form that users bring, and what FasterTransformer would make of them."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

State = dict[str, Tensor]
Bytes = dict[str, bytes]


def _float_state(folder: Path) -> tuple[State, int]:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return dict(model.named_parameters()), int(model.config.n_head)


def _in_out(array: NDArray[np.generic]) -> NDArray[np.generic]:
    return np.ascontiguousarray(array.T)


def _grouped_qkv(array: NDArray[np.generic], heads: int) -> NDArray[np.generic]:
    """Last axis from (heads, 3, head size) to (3, heads x head size)."""
    rest = array.shape[:-1]
    parts = array.reshape(*rest, heads, 3, -1)
    return np.moveaxis(parts, -2, -3).reshape(*rest, 3, -1)


def _file(name: str, array: NDArray[np.generic], heads: int) -> tuple[str, NDArray[np.generic], int | None]:
    """FasterTransformer's name, array and axis to split (None: not split), from its documented table."""
    name = name.replace("h.", "layers.", 1) if name.startswith("h.") else name
    if name == "word_embeddings.weight":
        return "wte", array, None
    if name.startswith(("word_embeddings_layernorm", "ln_f")):
        new = {"word_embeddings_layernorm": "pre_decoder_layernorm", "ln_f": "final_layernorm"}
        head, kind = name.split(".")
        return f"{new[head]}.{kind}", array, None
    name = name.replace("self_attention", "attention")
    if name.endswith("query_key_value.weight"):
        return name, _grouped_qkv(_in_out(array), heads), -1
    if name.endswith("query_key_value.bias"):
        return name, _grouped_qkv(array, heads), -1
    if name.endswith("dense_h_to_4h.weight"):
        return name, _in_out(array), -1
    if name.endswith("dense_h_to_4h.bias"):
        return name, array, -1
    if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
        return name, _in_out(array), 0
    return name, array, None


@pytest.fixture(scope="session")
def ft_files() -> Callable[[Path, int, str], Bytes]:
    """Every .bin file that FasterTransformer's converter writes, made with numpy from what transformers loads."""

    def make(folder: Path, ranks: int, dtype: str) -> Bytes:
        state, heads = _float_state(folder)
        files: Bytes = {}
        for name, parameter in state.items():
            array = parameter.detach().numpy().astype({"fp32": np.float32, "fp16": np.float16}[dtype])
            ft_name, whole, axis = _file(name, array, heads)
            if axis is None:
                files[f"model.{ft_name}.bin"] = whole.tobytes()
                continue
            for rank, shard in enumerate(np.split(whole, ranks, axis=axis)):
                files[f"model.{ft_name}.{rank}.bin"] = shard.tobytes()
        return files

    return make


@pytest.fixture(scope="session")
def whole_tensors() -> Callable[[Path], State]:
    """What the model's parameters should be, under hasten's names, from what transformers loads."""
    from hasten.models.bloom import BloomForCausalLM as Ours

    def make(folder: Path) -> State:
        from transformers import BloomForCausalLM

        model = BloomForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tied, heads = torch.equal(model.lm_head.weight, model.transformer.word_embeddings.weight), model.config.n_head
        state = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
        config = replace(Ours.config_from_hf(model.config.to_dict()), tie_word_embeddings=tied)
        found: State = {}
        for spec in Ours.weight_map(config).specs:
            (source,) = spec.sources
            tensor = state[source.name]
            if "query_key_value" in source.name:
                rest = tensor.shape[1:]
                tensor = tensor.reshape(heads, 3, -1, *rest).transpose(0, 1).reshape(-1, *rest)
            found[spec.name] = tensor.contiguous()
        return found

    return make


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a checkpoint that a test may damage."""
    numbers = itertools.count()

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copies" / str(next(numbers))))

    return copy


def _state_of(folder: Path) -> State:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture
def as_bin(copy_of: Callable[[Path], Path]) -> Callable[..., Path]:
    """The same checkpoint as one or several files of torch.save."""

    def make(folder: Path, shards: int = 1, legacy: bool = False, **more: Tensor) -> Path:
        state = _state_of(folder) | more
        result = copy_of(folder)
        (result / "model.safetensors").unlink()
        zipped = not legacy
        if shards == 1:
            torch.save(state, result / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
            return result
        names = [f"pytorch_model-{index + 1:05d}-of-{shards:05d}.bin" for index in range(shards)]
        where = {name: names[index % shards] for index, name in enumerate(state)}
        for file in names:
            part = {name: tensor.clone() for name, tensor in state.items() if where[name] == file}
            torch.save(part, result / file, _use_new_zipfile_serialization=zipped)
        index_file = {"metadata": {}, "weight_map": where}
        (result / "pytorch_model.bin.index.json").write_text(json.dumps(index_file), encoding="utf-8")
        return result

    return make


@pytest.fixture
def as_shards(copy_of: Callable[[Path], Path]) -> Callable[..., Path]:
    """The same checkpoint as several safetensors files with an index."""

    def make(folder: Path, shard_bytes: int = 100_000) -> Path:
        from transformers import BloomForCausalLM

        result = copy_of(folder)
        (result / "model.safetensors").unlink()
        BloomForCausalLM.from_pretrained(folder).save_pretrained(result, max_shard_size=shard_bytes)
        assert len(list(result.glob("model-*.safetensors"))) > 2
        return result

    return make


@pytest.fixture
def resaved(copy_of: Callable[[Path], Path]) -> Callable[..., Path]:
    """The same checkpoint with its tensors changed by a function."""

    def make(folder: Path, change: Callable[[State], None]) -> Path:
        from safetensors.torch import save_file

        state = _state_of(folder)
        result = copy_of(folder)
        change(state)
        save_file(state, result / "model.safetensors", metadata={"format": "pt"})
        return result

    return make


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """Change keys of a folder's config.json; None removes one."""

    def edit(folder: Path, name: str = "config.json", **changes: object) -> None:
        path = folder / name
        raw = json.loads(path.read_text(encoding="utf-8")) | changes
        path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}), encoding="utf-8")

    return edit
