"""Layers that are alike, of small random models."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hasten import LLM
from hasten.models.base import CausalLM
from hasten.models.kinds import distinct_layers


@pytest.mark.parametrize(
    ("family", "config", "kept"),
    [
        ("Bloom", {}, ["0", "2"]),  # the last layer computes the needed rows alone
        ("Gemma2", {"num_hidden_layers": 5}, ["0", "1", "4"]),  # windows take turns
    ],
)
def test_a_layer_of_each_kind_is_left(
    family: str, config: dict[str, int], kept: list[str], make_model: Callable[..., Path]
) -> None:
    with LLM(make_model(family, **config), device="cpu") as llm:
        model = llm.engine.worker.runner.model
        assert isinstance(model, CausalLM)
        layers = model.layers
        with distinct_layers(model):
            assert list(model.layers) == kept
            assert all(model.layers[name] is layers[name] for name in kept)
        assert model.layers is layers
        assert len(list(model.layers)) == config.get("num_hidden_layers", 3)
