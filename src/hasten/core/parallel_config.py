"""How an engine is divided over ranks, and which models can be."""

from collections.abc import Iterator
from dataclasses import dataclass

from hasten.core.errors import ConfigError
from hasten.core.model_config import ModelConfig
from hasten.core.option_fields import check_fields, option, require


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many ranks share the model."""

    tensor_parallel_size: int = option(
        1, "number of ranks that share every layer (tensor parallel)", short="-tp", flag="--tensor-para-size"
    )
    pipeline_parallel_size: int = option(
        1,
        "number of pipeline stages that the layers are divided into, each of tensor-para-size ranks",
        short="-pp",
        flag="--pipeline-para-size",
    )
    pipeline_layers: str | None = option(
        None, "number of layers in each pipeline stage, such as 10,11,11 (default: as equal as possible)"
    )
    expert_parallel: bool = option(
        False,
        "give each rank whole experts of a mixture, instead of a part of every expert",
        aliases=("enable_expert_parallel",),
    )
    nnodes: int | None = option(
        None,
        "number of hosts, each of which runs this command for equally many ranks (default: from the environment)",
    )
    node_rank: int | None = option(None, "number of this host, from 0; host 0 answers")
    master_addr: str | None = option(None, "name or address of host 0")
    master_port: int | None = option(None, "port of host 0 where the ranks meet (default: 29500)")

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            self.tensor_parallel_size >= 1, f"tensor_parallel_size must be at least 1, got {self.tensor_parallel_size}"
        )
        stages = self.pipeline_parallel_size
        require(stages >= 1, f"pipeline_parallel_size must be at least 1, got {stages}")
        require(self.nnodes is None or self.nnodes >= 1, f"nnodes must be at least 1, got {self.nnodes}")
        port = self.master_port
        require(port is None or 1 <= port <= 65535, f"master_port must be from 1 to 65535, got {port}")
        counts = self.dealt_layers
        require(
            not counts or len(counts) == stages,
            f"pipeline_layers {self.pipeline_layers} is for {len(counts)} stages, pipeline_parallel_size is {stages}",
        )

    @property
    def ranks(self) -> int:
        """Ranks of one engine."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def dealt_layers(self) -> tuple[int, ...]:
        """The layers of each pipeline stage, where they are given."""
        if self.pipeline_layers is None:
            return ()
        counts = self.pipeline_layers.split(",")
        require(
            all(count.strip().isdecimal() and int(count) > 0 for count in counts),
            f"pipeline_layers must be positive numbers separated by commas, as 10,11,11; got {self.pipeline_layers!r}",
        )
        return tuple(map(int, counts))

    def validate(self, model: ModelConfig) -> None:
        """Raise ConfigError unless `model` can be split over these ranks."""
        require(
            not self.expert_parallel or model.experts is not None,
            f"expert_parallel: {model.architecture} has no experts; leave the option out",
        )
        require(
            self.pipeline_parallel_size == 1 or model.task == "generate",
            f"pipeline_parallel_size: {model.architecture} generates no text, and has no stages; leave the option out",
        )
        require(
            self.pipeline_parallel_size == 1 or model.encoder is None,
            f"pipeline_parallel_size: {model.architecture} has an encoder, and no stages; leave the option out",
        )
        layers, counts = model.num_layers, self.dealt_layers
        require(
            self.pipeline_parallel_size <= layers,
            f"pipeline_parallel_size {self.pipeline_parallel_size} is more than the {layers} layers of the model",
        )
        require(
            not counts or sum(counts) == layers,
            f"pipeline_layers {self.pipeline_layers} deals {sum(counts)} layers, but the model has {layers}",
        )
        size = self.tensor_parallel_size
        if unfit := self._unfit(size, model):
            sizes = range(1, model.attention.num_heads + 1)
            fitting = (str(size) for size in sizes if self._unfit(size, model) is None)
            raise ConfigError(
                f"tensor parallel size {size} does not divide {unfit}; choose a size that does: {', '.join(fitting)}"
            )

    def _unfit(self, size: int, model: ModelConfig) -> str | None:
        """What of a model cannot be split over `size` ranks, None if all can."""
        heads, kv_heads = model.attention.num_heads, model.attention.num_kv_heads
        # with more ranks than key/value heads, as many ranks hold each
        fits = {
            ("attention heads", heads): heads % size,
            ("key/value heads", kv_heads): min(kv_heads % size, size % kv_heads),
        }
        fits |= {(name, count): count % size for name, count in self._divided(model)}
        return next((f"{name} ({count})" for (name, count), rest in fits.items() if rest), None)

    def _divided(self, model: ModelConfig) -> Iterator[tuple[str, int]]:
        """Counts, with their names, that the ranks must divide evenly."""
        if model.has_mlp:
            yield "the MLP's inner size", model.intermediate_size
        if model.encoder is not None:
            yield "the encoder's attention heads", model.encoder.attention.num_heads
            yield "the inner size of the encoder's MLP", model.encoder.intermediate_size
        if model.experts is None:
            return
        if self.expert_parallel:
            yield "the experts", model.experts.num_experts
        else:
            yield "the experts' inner size", model.experts.inner_size
        if model.experts.shared_size is not None:
            yield "the shared expert's inner size", model.experts.shared_size
