"""The pooling tasks of a model, against which requests are checked. Imports no torch, so that servers can use it."""

from dataclasses import dataclass

from hasten.core.errors import InvalidRequestError
from hasten.core.model_config import TextConfig
from hasten.core.types import PoolingParams, PoolingTask


@dataclass(frozen=True, kw_only=True)
class PoolingInfo:
    """What a model that makes vectors or scores of texts can do."""

    architecture: str
    tasks: tuple[PoolingTask, ...]
    """What it does; the first is its own."""
    width: int
    """Length of a vector, or number of labels."""
    labels: tuple[str, ...]
    """Names of the classes, in the order of scores; none where it does not classify."""
    dimensions: tuple[int, ...] | None
    """Lengths that vectors may be cut to, none of them: to any; None: they may not be cut."""
    texts: TextConfig

    def check(self, params: PoolingParams) -> None:
        """InvalidRequestError where the model cannot do what is asked for."""
        if params.task not in self.tasks:
            if params.task == "score" and self.labels:
                raise InvalidRequestError(f"score needs a model with one label; {self.architecture} has others")
            raise InvalidRequestError(
                f"{self.architecture} is not a model to {params.task}; it does {', '.join(self.tasks)}"
            )
        if params.dimensions is not None:
            self._check_dimensions(params.dimensions)

    def _check_dimensions(self, count: int) -> None:
        if count > self.width:
            raise InvalidRequestError(f"dimensions is {count}; the model's vectors have {self.width}")
        if count == self.width:
            return
        if self.dimensions is None:
            raise InvalidRequestError(
                f"dimensions is {count}, but the model's config.json does not say that its vectors may be cut; if it "
                'was trained so (Matryoshka), add "is_matryoshka": true there'
            )
        if self.dimensions and count not in self.dimensions:
            raise InvalidRequestError(
                f"dimensions is {count}; the model's vectors may be cut to {', '.join(map(str, self.dimensions))}"
            )
