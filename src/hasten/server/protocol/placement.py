"""What a client wants done with an output: sent as it is, classified, or written to shared memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hasten.server.protocol.classification import classify
from hasten.server.protocol.shared_memory import REGION, SharedMemory, Slice
from hasten.server.protocol.tensors import to_bytes
from hasten.server.types import InferResponse, RequestedOutput, Tensor, invalid


@dataclass(frozen=True)
class Placement:
    """What is to be done with one output."""

    classes: int = 0
    """Send this many classes instead; 0: the tensor."""
    slice: Slice | None = None
    """Write it there instead of sending it."""


def placements(outputs: Sequence[RequestedOutput], memory: SharedMemory) -> dict[str, Placement]:
    """What is to be done with which output, for those that are not sent as they are; INVALID where it is unclear."""
    found: dict[str, Placement] = {}
    for output in outputs:
        if not output.parameters:
            continue
        classes = output.parameters.get("classification", 0)
        if type(classes) is not int:
            raise invalid("invalid value type for 'classification' parameter, expected int64_param")
        if classes < 0 or (classes == 0 and "classification" in output.parameters):
            raise invalid("invalid value for 'classification' parameter, expected >= 0")
        if classes and REGION in output.parameters:
            raise invalid("output can't set both 'shared_memory_region' and 'classification'")
        where = memory.slice_of(output.name, output.parameters)
        if where is not None or classes:
            found[output.name] = Placement(classes, where)
    return found


def deliver(response: InferResponse, wanted: Mapping[str, Placement], *, batched: bool) -> set[str]:
    """Do with a response's outputs what is wanted; the names of those that are in shared memory now."""
    if not wanted:
        return set()
    return {output.name for output in response.outputs if _deliver(response, output, wanted, batched=batched)}


def _deliver(response: InferResponse, output: Tensor, wanted: Mapping[str, Placement], *, batched: bool) -> bool:
    what = wanted.get(output.name)
    if what is None:
        return False
    if what.slice is not None:
        what.slice.write(output.name, to_bytes(output))
        return True
    at = next(at for at, each in enumerate(response.outputs) if each is output)
    response.outputs[at] = classify(output, what.classes, batched=batched)
    return False
