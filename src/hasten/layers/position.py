"""How attention learns of positions."""

import math

import torch
import torch.nn as nn
from torch import Tensor

from hasten.core.model_config import AttentionConfig, RopeConfig
from hasten.layers.linear import PackedModule
from hasten.parallel.groups import ALONE, TensorGroup


def alibi_slopes(num_heads: int, bias_max: float = 8.0) -> Tensor:
    """ALiBi's slope of each head, [heads] in fp32, for any number of heads.

    For a power of two p and a `bias_max` of 8 the slopes are 2^(-8/p), 2^(-16/p), ... Other counts take those of the
    power of two below and fill up with every other slope of the power of two above.
    Source: Press, Smith, Lewis, "Train Short, Test Long", 2022.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-bias_max * (i + 1) / below) for i in range(below)]
    slopes += [2.0 ** (-bias_max / 2 * (2 * i + 1) / below) for i in range(num_heads - below)]
    return torch.tensor(slopes, dtype=torch.float32)


def rope_frequencies(config: RopeConfig, longest: int) -> Tensor:
    """Radians per position of each pair of dimensions, [width / 2] in fp64, for sequences of up to `longest` tokens.

    Sources: Su et al., "RoFormer", 2021; Chen et al., "Extending Context Window of Large Language Models via Positional
    Interpolation", 2023 (linear); bloc97, "NTK-Aware Scaled RoPE", 2023 (dynamic); Peng et al., "YaRN", 2023; Llama
    Team, "The Llama 3 Herd of Models", 2024 (llama3); Ding et al., "LongRoPE", 2024.
    """
    theta, width = config.theta, config.width
    if config.kind == "dynamic" and width > 2:
        assert config.original_max_position is not None
        stretched = config.factor * max(longest, config.original_max_position) / config.original_max_position
        theta *= (stretched - (config.factor - 1)) ** (width / (width - 2))
    plain = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    if config.kind == "linear":
        return plain / config.factor
    if config.kind == "llama3":
        return _llama3(plain, config)
    if config.kind == "longrope":
        assert config.original_max_position is not None
        factors = config.long_factor if longest > config.original_max_position else config.short_factor
        return plain / torch.tensor(factors, dtype=torch.float64)
    if config.kind == "yarn":
        kept = _kept_by_yarn(config)
        return plain * kept + plain / config.factor * (1 - kept)
    return plain


def _llama3(plain: Tensor, config: RopeConfig) -> Tensor:
    """Fast pairs as they are, slow ones slowed down, and those between by interpolation."""
    assert config.original_max_position is not None
    low, high = config.low_freq_factor, config.high_freq_factor
    turns = config.original_max_position * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / config.factor + kept * plain


def _kept_by_yarn(config: RopeConfig) -> Tensor:
    """How much of each pair's own frequency is kept: 1 for those that turn often, 0 for those that hardly turn."""
    assert config.original_max_position is not None

    def pair(turns: float) -> float:
        """The pair that turns so often over the original length."""
        of_length = math.log(config.original_max_position / (turns * 2 * math.pi))  # type: ignore[operator]  # asserted
        return config.width * of_length / (2 * math.log(config.theta))

    first, last = pair(config.beta_fast), pair(config.beta_slow)
    if config.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.width - 1)
    # below 0 where not even the slowest pair counts, as for very short original lengths
    span = last - first or 1e-3
    ramp = (torch.arange(config.width // 2, dtype=torch.float64) - first) / span
    return 1 - ramp.clamp(0, 1)


def rope_table(config: RopeConfig, longest: int) -> Tensor:
    """Cosines and sines of every position below `longest`, [longest, width] in fp32, as `ops.HeadTransform` has them.

    They are worked out in fp64: in fp32 the angle of position 100,000 would be off by 0.004.
    """
    angles = torch.outer(torch.arange(longest, dtype=torch.float64), rope_frequencies(config, longest))
    return (torch.cat((angles.cos(), angles.sin()), dim=1) * config.attention_factor).float()


class RopeTables:
    """Tables of one device, each made once for all layers that need it."""

    def __init__(self, longest: int, device: torch.device) -> None:
        self._longest = longest
        self._device = device
        self._tables: dict[RopeConfig, Tensor] = {}

    def of(self, config: RopeConfig) -> Tensor:
        """`rope_table` on the device."""
        if config not in self._tables:
            self._tables[config] = rope_table(config, self._longest).to(self._device)
        return self._tables[config]


def relative_buckets(buckets: int, farthest: int, *, causal: bool = False) -> Tensor:
    """The bucket of each distance from a query to a key, from -`farthest` to `farthest`: int64 [2 * farthest + 1].

    Half of the buckets are for keys before the query or at it, half for those behind; where attention is `causal`, all
    are for those before. Of them half have a distance each; the next ones share more of them the longer they are.
    Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2020.
    """
    distances = torch.arange(-farthest, farthest + 1)
    side = buckets if causal else buckets // 2
    exact = side // 2
    lengths = distances.clamp(max=0).abs() if causal else distances.abs()
    # in fp32, as transformers has it: a bucket's border is where its logarithm is rounded to
    logs = torch.log(lengths.float().clamp_(min=1) / exact) / math.log(farthest / exact)
    far = (exact + (logs * (side - exact)).long()).clamp_(max=side - 1)
    near = torch.where(lengths < exact, lengths, far)
    return near if causal else near + (distances > 0) * side


class RelativeBias(PackedModule):
    """Learned biases of scores by the distance from query to key, for all layers of a stack."""

    bias_nr: Tensor
    """Of this rank's heads, for each distance from -r to r; those of longer ones are the first and the last."""

    def __init__(self, config: AttentionConfig, *, group: TensorGroup = ALONE) -> None:
        super().__init__()
        self.farthest, self.causal = config.relative_farthest, config.causal
        count = config.num_heads // group.size
        self.heads = slice(group.rank * count, (group.rank + 1) * count)
        self.weight = nn.Parameter(torch.empty(config.relative_buckets, config.num_heads), requires_grad=False)

    def pack(self) -> None:
        """Lay the biases out by distance."""
        buckets = relative_buckets(self.weight.shape[0], self.farthest, causal=self.causal).to(self.weight.device)
        self.bias_nr = self.weight[buckets, self.heads].t().float().contiguous()
        del self.weight
