"""Responses over gRPC: put together of serialized parts, they are what protobuf itself makes."""

from typing import Any

import numpy as np
import pytest
from tests.server.service_fixtures import tensor
from tritonclient.grpc import service_pb2 as pb

from hasten.server.protocol.proto import field, infer_response, stream_response
from hasten.server.protocol.tensors import to_bytes
from hasten.server.types import InferResponse

RESPONSES = {
    "text": InferResponse("text", "1", "q1", outputs=[tensor("text_output", "BYTES", ["ab\u00e9"])]),
    "nothing": InferResponse("m", "12"),
    "several": InferResponse(
        *("m\u00fc", "3", "x" * 200),
        outputs=[tensor("A", "FP32", [[1.5, 2.5]]), tensor("B", "UINT32", [[[7] * 300] * 60])],
    ),
    "scalar": InferResponse("m", "1", outputs=[tensor("S", "INT64", 5)]),
}


def expected(response: InferResponse, final: bool | None, elsewhere: set[str]) -> Any:
    message = pb.ModelInferResponse(model_name=response.model, model_version=response.version, id=response.id)
    if final is not None:
        message.parameters["triton_final_response"].bool_param = final
    for output in response.outputs:
        message.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
        message.raw_output_contents.append(b"" if output.name in elsewhere else to_bytes(output))
    return message


@pytest.mark.parametrize("final", [None, False, True])
@pytest.mark.parametrize("name", RESPONSES)
def test_a_response_is_protobufs_own(name: str, final: bool | None) -> None:
    response = RESPONSES[name]
    for elsewhere in (set(), {output.name for output in response.outputs[:1]}):
        raw = infer_response(response, elsewhere, final=final)
        message = expected(response, final, elsewhere)
        assert pb.ModelInferResponse.FromString(raw) == message
        streamed = pb.ModelStreamInferResponse.FromString(stream_response(raw))
        assert streamed == pb.ModelStreamInferResponse(infer_response=message)


def test_the_next_response_of_a_stream_has_nothing_of_the_last() -> None:
    for text, final in (("a", False), ("bc", False), ("", True)):
        response = InferResponse("m", "1", "id", outputs=[tensor("text_output", "BYTES", [text])], final=final)
        message = pb.ModelInferResponse.FromString(infer_response(response, set(), final=final))
        assert message == expected(response, final, set())
        assert np.frombuffer(message.raw_output_contents[0][:4], np.uint32).tolist() == [len(text)]


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 2_097_152])
def test_fields_of_any_size(size: int) -> None:
    value = b"a" * size
    assert pb.ModelInferResponse.FromString(field(6, value)) == pb.ModelInferResponse(raw_output_contents=[value])
