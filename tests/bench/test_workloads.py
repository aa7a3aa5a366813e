import random

import pytest

from hasten.bench import workloads
from hasten.core.errors import ConfigError


def test_lambada_lengths_are_those_that_peers_are_measured_with() -> None:
    rng = random.Random(0)
    lengths = [min(230, max(20, round(rng.gauss(87, 25)))) for _ in range(5153)]
    result = workloads.lambada()
    assert list(result.prompt_lengths) == lengths
    assert set(result.output_lengths) == {4}
    assert workloads.lambada(64).prompt_lengths == result.prompt_lengths[:64]


def test_tput_lengths_are_those_that_peers_are_measured_with() -> None:
    rng = random.Random(0)
    inputs = [rng.randint(100, 1024) for _ in range(1000)]
    outputs = [rng.randint(100, 1024) for _ in range(1000)]
    result = workloads.tput()
    assert list(result.prompt_lengths) == inputs
    assert list(result.output_lengths) == outputs
    assert result.max_len <= 2048


def test_mixed_is_small() -> None:
    result = workloads.mixed()
    assert len(result.prompt_lengths) == 64
    assert min(result.prompt_lengths + result.output_lengths) >= 16
    assert max(result.prompt_lengths + result.output_lengths) <= 256


def test_outputs_are_cut_to_the_longest_sequence() -> None:
    assert workloads.tput(1000, max_model_len=1200).max_len == 1200


@pytest.mark.parametrize("vocab_size", [2, 20, 21, 250_880])
def test_prompts_are_tokens_of_the_vocabulary(vocab_size: int) -> None:
    prompts = workloads.fixed(3, 50, 2).prompts(vocab_size, random.Random(1))
    assert [len(prompt) for prompt in prompts] == [50, 50, 50]
    assert all(0 <= token < vocab_size for prompt in prompts for token in prompt)
    assert prompts != workloads.fixed(3, 50, 2).prompts(vocab_size, random.Random(2))


@pytest.mark.parametrize("count", [0, -1])
def test_no_requests(count: int) -> None:
    with pytest.raises(ConfigError, match="number of requests"):
        workloads.lambada(count)


def test_no_batch() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        workloads.fixed(0)
