"""Texts are what a Triton 2.51.0 answers for a model with these tensors, but where a test says otherwise. Inputs are
looked at and named in their order; in Triton's, that of a hash table, mostly the last one comes first.
"""

from typing import Any

import numpy as np
import pytest
from tests.server.service_fixtures import tensor

from hasten.server.engine.queue import Queueing
from hasten.server.models.config import completed, parse_config
from hasten.server.models.validation import Rules
from hasten.server.protocol.tensors import NUMPY
from hasten.server.types import ErrorKind, InferRequest, RequestedOutput, ServiceError, Tensor

TOKENS = """
backend: "fastertransformer" max_batch_size: 64
input [
  { name: "input_ids" data_type: TYPE_UINT32 dims: [ -1 ] },
  { name: "input_lengths" data_type: TYPE_UINT32 dims: [ 1 ] },
  { name: "request_output_len" data_type: TYPE_UINT32 dims: [ -1 ] },
  { name: "stop_words_list" data_type: TYPE_INT32 dims: [ 2, -1 ] optional: true }
]
output [ { name: "output_ids" data_type: TYPE_UINT32 dims: [ -1, -1 ] } ]
"""
TEXT = """
backend: "hasten" parameters { key: "kind" value { string_value: "text" } }
input [ { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] } ]
"""
NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try setting "
    "max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)
UNKNOWN = "[request id: <id_unknown>] "
IDS, LENGTHS, ASKED = (("input_ids", "UINT32", (1, 3)), ("input_lengths", "UINT32", (1, 1)), ("request_output_len", "UINT32", (1, 1)))  # fmt: skip  # noqa: E501
Given = tuple[str, str, tuple[int, ...]]


def rules(text: str, name: str = "tokens") -> Rules:
    return Rules(completed(parse_config(text, "x"), name, auto_complete=False))


def made(name: str, datatype: str, shape: tuple[int, ...]) -> Tensor:
    fits = tuple(max(size, 0) for size in shape)
    data = np.zeros(fits, NUMPY.get(datatype, np.dtype("<f4")))
    if datatype == "BYTES":
        data[...] = b"x"
    return Tensor(name, datatype, shape, data)


def refusal(inputs: list[Given], model: str = TOKENS, **request: Any) -> str:
    with pytest.raises(ServiceError) as caught:
        rules(model).work(InferRequest("tokens", [made(*given) for given in inputs], **request))
    assert caught.value.kind is ErrorKind.INVALID
    return str(caught.value)


COUNT = "expected number of inputs between 3 and 4 but got"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            [IDS, LENGTHS],
            f"{UNKNOWN}{COUNT} 2 inputs for model 'tokens'. Got input(s) ['input_ids','input_lengths'], but missing "
            "required input(s) ['request_output_len']. Please provide all required input(s).",
        ),
        (
            [],
            f"{UNKNOWN}{COUNT} 0 inputs for model 'tokens'. Got input(s) [], but missing required input(s) "
            "['input_ids','input_lengths','request_output_len']. Please provide all required input(s).",
        ),
        (
            [IDS, LENGTHS, ASKED, ("x", "UINT32", (1, 1)), ("y", "UINT32", (1, 1))],
            f"{UNKNOWN}{COUNT} 5 inputs for model 'tokens'. Got input(s) ['input_ids','input_lengths',"
            "'request_output_len','x','y'], but missing required input(s) []. Please provide all required input(s).",
        ),
        ([IDS, LENGTHS, ("x", "UINT32", (1, 1))], "unexpected inference input 'x' for model 'tokens'"),
        ([IDS, IDS, LENGTHS, ASKED], f"{UNKNOWN}input 'input_ids' already exists in request"),
        (
            [("input_ids", "INT32", (1, 3)), LENGTHS, ASKED],
            f"{UNKNOWN}inference input 'input_ids' data-type is 'INT32', but model 'tokens' expects 'UINT32'",
        ),
        (
            [("input_ids", "FLOAT", (1, 3)), LENGTHS, ASKED],
            f"{UNKNOWN}inference input 'input_ids' data-type is '<invalid>', but model 'tokens' expects 'UINT32'",
        ),
        (
            [("input_ids", "UINT32", (1, 2, 4)), LENGTHS, ASKED],
            f"{UNKNOWN}unexpected shape for input 'input_ids' for model 'tokens'. Expected [-1,-1], got [1,2,4]. "
            f"{NOTE}",
        ),
        (
            [("input_ids", "UINT32", (1, -1)), LENGTHS, ASKED],
            f"{UNKNOWN}All input dimensions should be specified for input 'input_ids' for model 'tokens', got [1,-1]",
        ),
        (
            [("input_ids", "UINT32", (1, -2)), LENGTHS, ASKED],
            f"{UNKNOWN}unexpected shape for input 'input_ids' for model 'tokens'. Expected [-1,-1], got [1,-2]. {NOTE}",
        ),
        (
            [IDS, ("input_lengths", "UINT32", (1,)), ASKED],
            f"{UNKNOWN}unexpected shape for input 'input_lengths' for model 'tokens'. Expected [-1,1], got [1]. {NOTE}",
        ),
        (
            [IDS, LENGTHS, ASKED, ("stop_words_list", "INT32", (1, 3, 1))],
            f"{UNKNOWN}unexpected shape for input 'stop_words_list' for model 'tokens'. Expected [-1,2,-1], got "
            f"[1,3,1]. {NOTE}",
        ),
        (
            [IDS, LENGTHS, ASKED, ("stop_words_list", "INT32", (2, 2, 1))],
            f"{UNKNOWN}input 'stop_words_list' batch size does not match other inputs for 'tokens'",
        ),
        (
            [("input_ids", "UINT32", (3,)), LENGTHS, ASKED],
            f"{UNKNOWN}input 'input_lengths' batch size does not match other inputs for 'tokens'",
        ),
        (
            [("input_ids", "UINT32", ()), LENGTHS, ASKED],
            f"{UNKNOWN}input 'input_ids' has no shape but model requires batch dimension for 'tokens'",
        ),
        (
            [(name, datatype, (65, *shape[1:])) for name, datatype, shape in (IDS, LENGTHS, ASKED)],
            f"{UNKNOWN}inference request batch-size must be <= 64 for 'tokens'",
        ),
        (
            [(name, datatype, (0, *shape[1:])) for name, datatype, shape in (IDS, LENGTHS, ASKED)],
            f"{UNKNOWN}input byte size mismatch for input 'input_ids' for model 'tokens'. Expected 12, got 0",
        ),
    ],
)
def test_what_triton_says_of_inputs_that_do_not_fit(inputs: list[Given], message: str) -> None:
    assert refusal(inputs) == message


def test_required_inputs_are_missed_also_where_the_number_is_right() -> None:
    """Triton passes these on, and the model fails."""
    stop = ("stop_words_list", "INT32", (1, 2, 1))
    assert refusal([IDS, LENGTHS, stop]) == (
        f"{UNKNOWN}{COUNT} 3 inputs for model 'tokens'. Got input(s) ['input_ids','input_lengths','stop_words_list'], "
        "but missing required input(s) ['request_output_len']. Please provide all required input(s)."
    )


def test_a_model_without_optional_inputs_has_one_number() -> None:
    assert refusal([], TEXT) == (
        f"{UNKNOWN}expected 1 inputs but got 0 inputs for model 'tokens'. Got input(s) [], but missing required "
        "input(s) ['text_input']. Please provide all required input(s)."
    )


def test_a_model_without_batches() -> None:
    expected = f"{UNKNOWN}unexpected shape for input 'text_input' for model 'tokens'. Expected [1], got"
    assert refusal([("text_input", "BYTES", (2,))], TEXT) == f"{expected} [2]. "
    assert refusal([("text_input", "BYTES", (2, 1))], TEXT) == f"{expected} [2,1]. "
    work = rules(TEXT).work(InferRequest("tokens", [made("text_input", "BYTES", (1,))]))
    assert (work.batch_size, work.inputs["text_input"].shape) == (0, (1,))
    work = rules(TEXT).work(InferRequest("tokens", [made("text_input", "BYTES", (1, 1))]))
    assert (work.batch_size, work.inputs["text_input"].shape) == (1, (1,))


def test_the_requests_id_is_named() -> None:
    assert refusal([], id="q7").startswith("[request id: q7] expected number")


def test_outputs() -> None:
    unknown = "unexpected inference output 'x' for model 'tokens'"
    assert refusal([IDS, LENGTHS, ASKED], outputs=[RequestedOutput("x")]) == unknown
    work = rules(TOKENS).work(InferRequest("tokens", [made(*given) for given in (IDS, LENGTHS, ASKED)]))
    assert work.outputs == {"output_ids"}
    assert work.batch_size == 1


def test_data_that_are_not_what_they_are_said_to_be() -> None:
    """A transport would not let these through."""
    short = Tensor("input_ids", "UINT32", (1, 4), np.zeros(2, np.uint32))
    others = [made(*LENGTHS), made(*ASKED)]
    for wrong, message in (
        (short, f"{UNKNOWN}input byte size mismatch for input 'input_ids' for model 'tokens'. Expected 16, got 8"),
        (
            Tensor("input_ids", "UINT32", (1, 2), np.zeros((1, 2), np.int64)),
            "has data of int64, but is said to be UINT32",
        ),
    ):
        with pytest.raises(ServiceError) as caught:
            rules(TOKENS).work(InferRequest("tokens", [wrong, *others]))
        assert message in str(caught.value)
    text = Tensor("text_input", "BYTES", (1,), np.array(["a str"], object))
    with pytest.raises(ServiceError, match="has elements that are not bytes"):
        rules(TEXT).work(InferRequest("tokens", [text]))


RESERVED = (
    "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys starting with "
    "'triton_' are allowed: triton_enable_empty_final_response"
)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"priority": -1}, "invalid value for 'priority', expected value >= 0."),
        ({"priority": "x"}, "invalid value type for 'priority' parameter, expected int64_param or uint64_param."),
        ({"priority": True}, "invalid value type for 'priority' parameter, expected int64_param or uint64_param."),
        ({"timeout": "x"}, "invalid value type for 'timeout' parameter, expected int64_param."),
        ({"sequence_start": 3}, "invalid value type for 'sequence_start' parameter, expected bool_param."),
        (
            {"triton_enable_empty_final_response": 3},
            "invalid value type for 'triton_enable_empty_final_response' parameter, expected bool_param.",
        ),
        ({"triton_x": 1}, RESERVED),
        ({"triton_final_response": True}, RESERVED),
    ],
)
def test_parameters_of_the_protocol(parameters: dict[str, Any], message: str) -> None:
    assert refusal([IDS, LENGTHS, ASKED], parameters=parameters) == message


def test_parameters_of_the_model_are_passed_on() -> None:
    given: dict[str, Any] = {"a": 1, "headers": "h", "sequence_id": "s", "sequence_end": True, "priority": 2}
    given["timeout"] = 0
    request = InferRequest(
        "m", [tensor("text_input", "BYTES", ["x"])], parameters={**given, "binary_data_output": True}
    )
    work = rules(TEXT).work(request)
    assert (work.parameters, work.queueing) == ({"a": 1}, Queueing(2))
