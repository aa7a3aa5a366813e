"""PoolingParams of a request over Triton's protocol, from the request's own parameters."""

from typing import Any

from hasten.core.types import PoolingParams, PoolingTask
from hasten.server.models.work import Work

_OF_VECTORS = ("dimensions", "normalize", "truncate_prompt_tokens")
_OF_SCORES = ("activation", "truncate_prompt_tokens")


def pooling_params(work: Work, task: PoolingTask, **values: Any) -> PoolingParams:
    """What to make of each text; ServiceError and InvalidRequestError name a parameter that is wrong or not known.

    `values` are those that came otherwise.
    """
    known = work.known_parameters(_OF_VECTORS if "embed" in task else _OF_SCORES)
    return PoolingParams(task=task, **{**known, **values})
