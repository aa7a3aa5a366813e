"""What the service and its transports pass each other: tensors, requests, responses, and what can be wrong.

Names are those of Triton's protocol. Transports translate these to protobuf, JSON or binary bodies and back, and map an
error's kind to their own status codes.
"""

from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import HastenError
from hasten.core.text import shortened

Parameter = bool | int | float | str
"""A parameter's value, as the protocol has them."""


LONGEST_MESSAGE = 4000
"""Characters of an error's message: some of them name what the client sent."""


@dataclass(frozen=True)
class Codes:
    """What an error is called by each transport."""

    http: int
    """Status of Triton's routes, and of OpenAI's unless `openai` differs."""
    grpc: str
    """Name of gRPC's status."""
    backend: str
    """Name of the code in Triton's Python backend."""
    openai: int = 0
    """Status of OpenAI's routes, and those with its form of errors, where it is another."""


class ErrorKind(Enum):
    """Kinds of errors, each with its codes: Triton's kinds, and two of this server's."""

    INVALID = Codes(400, "INVALID_ARGUMENT", "INVALID_ARG")
    NOT_FOUND = Codes(404, "NOT_FOUND", "NOT_FOUND")
    ALREADY_EXISTS = Codes(400, "ALREADY_EXISTS", "ALREADY_EXISTS")
    UNAVAILABLE = Codes(503, "UNAVAILABLE", "UNAVAILABLE")
    OVERLOADED = Codes(503, "UNAVAILABLE", "UNAVAILABLE", openai=429)
    """The queue is full, or the request waited in it for too long."""
    EXHAUSTED = Codes(503, "RESOURCE_EXHAUSTED", "UNAVAILABLE")
    """What is in flight leaves no room for the request."""
    UNSUPPORTED = Codes(501, "UNIMPLEMENTED", "UNSUPPORTED")
    CANCELLED = Codes(499, "CANCELLED", "CANCELLED")
    """The client left: nobody reads the status, but the log has it, and the counts of calls."""
    INTERNAL = Codes(500, "INTERNAL", "INTERNAL")

    @property
    def is_temporary(self) -> bool:
        """Whether the same request may be taken later."""
        return self in (ErrorKind.UNAVAILABLE, ErrorKind.OVERLOADED, ErrorKind.EXHAUSTED)


class ServiceError(HastenError):
    """A request that the service refuses or could not finish; its message is for the client."""

    def __init__(self, kind: ErrorKind, message: str, retry_after: float | None = None) -> None:
        super().__init__(shortened(message, LONGEST_MESSAGE))
        self.kind = kind
        self.retry_after = retry_after
        """Estimated seconds after which the server can take the request, where that is known."""


def invalid(message: str) -> ServiceError:
    """The error of a request that is wrong in itself."""
    return ServiceError(ErrorKind.INVALID, message)


@dataclass
class Tensor:
    """A named tensor. `data` has the shape `shape`; BYTES are an object array of `bytes`."""

    name: str
    datatype: str
    """BOOL, UINT8 to UINT64, INT8 to INT64, FP16, FP32, FP64 or BYTES."""
    shape: tuple[int, ...]
    data: NDArray[np.generic]

    @classmethod
    def of(cls, name: str, datatype: str, data: NDArray[np.generic]) -> "Tensor":
        """A tensor of the shape that its data have."""
        return Tensor(name, datatype, data.shape, data)


class Texts(Tensor):
    """A tensor of BYTES that holds its elements in a list, end to end; an array is made of them where one is wanted.

    A stream of text has one for each token, and most are only sent.
    """

    def __init__(self, name: str, shape: tuple[int, ...], elements: list[bytes]) -> None:
        self.name, self.datatype, self.shape, self.elements = name, "BYTES", shape, elements

    @cached_property
    def data(self) -> NDArray[np.generic]:  # type: ignore[override]  # computed, and kept as the attribute that it is
        """As in any tensor."""
        array = np.empty(len(self.elements), dtype=object)
        array[:] = self.elements
        return array.reshape(self.shape)


@dataclass
class RequestedOutput:
    """An output that the client asks for, with its parameters (classification and the like)."""

    name: str
    parameters: dict[str, Parameter] = field(default_factory=dict)


@dataclass
class InferRequest:
    """One inference request."""

    model: str
    inputs: list[Tensor]
    version: str = ""
    """Empty: the newest that is ready."""
    id: str = ""
    parameters: dict[str, Parameter] = field(default_factory=dict)
    outputs: list[RequestedOutput] = field(default_factory=list)
    """Empty: all."""


@dataclass
class InferResponse:
    """One response; a decoupled model may give several, or none but the final flag."""

    model: str
    version: str
    id: str = ""
    outputs: list[Tensor] = field(default_factory=list)
    final: bool = True
    """Whether it is the last of its request (`triton_final_response`)."""
