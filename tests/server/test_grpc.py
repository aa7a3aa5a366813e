import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as aioclient
from tests.server.adding_service import EXTENSIONS, OWN_ERROR
from tests.server.transport_fixtures import LIMIT, Transports, workers
from tests.waiting import LIMIT_S, attempts, eventually
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

from hasten.server.protocol import grpc as protocol_grpc
from hasten.server.protocol import grpc_stream
from hasten.server.protocol.grpc_stream import _Room

# Expected answers are those that Triton 2.51.0 gave to the same requests.

Code = grpc.StatusCode
NO_ID = "[request id: <id_unknown>] "
INPUT0, INPUT1 = ("INPUT0", "FP32", [1, 2]), ("INPUT1", "FP32", [1, 2])
RAW0, RAW1 = np.array([1, 2.5], np.float32).tobytes(), np.array([10, 0.5], np.float32).tobytes()
SUM, DIFFERENCE = (np.array(values, np.float32).tobytes() for values in ([11, 3], [-9, 2]))


@pytest.fixture(scope="module")
def stub(transports: Transports) -> Iterator[Any]:
    with grpc.insecure_channel(transports.grpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def request(
    model: str = "add",
    inputs: Any = (INPUT0, INPUT1),
    raw: Any = (RAW0, RAW1),
    outputs: Any = (),
    parameters: Mapping[str, Any] | None = None,
    **fields: str,
) -> Any:
    """`inputs`: name, type, shape, and optionally typed contents and parameters."""
    result = pb.ModelInferRequest(model_name=model, raw_input_contents=raw, **fields)
    for name, datatype, shape, *more in inputs:
        tensor = result.inputs.add(name=name, datatype=datatype, shape=shape)
        for field, values in (more[0] if more else {}).items():
            getattr(tensor.contents, field).extend(values)
    for name, own in outputs:
        set_parameters(result.outputs.add(name=name).parameters, own)
    set_parameters(result.parameters, parameters or {})
    return result


def set_parameters(target: Any, values: Mapping[str, Any]) -> None:
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    for key, value in values.items():
        setattr(target[key], kinds[type(value)], value)


def count(wanted: int, name: str = "d", delay: float = 0, **parameters: Any) -> Any:
    inputs: list[Any] = [("IN", "INT32", [1], {"int_contents": [wanted]})]
    if delay:
        inputs.append(("DELAY", "FP32", [1], {"fp32_contents": [delay]}))
    return request("decoupled", inputs, (), id=name, parameters=parameters)


def refusal(call: Callable[..., Any], message: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as error:
        call(message, timeout=LIMIT_S)
    return error.value.code(), error.value.details()


def test_all_calls_of_the_service_are_served(stub: Any) -> None:
    calls = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    assert len(calls) == 20
    assert list(stub.ModelStreamInfer(iter(()))) == []
    for name in set(calls) - {"ModelStreamInfer"}:
        code = status(getattr(stub, name), getattr(pb, f"{name}Request")())
        assert (code is Code.UNIMPLEMENTED) == (name == "CudaSharedMemoryRegister")


def status(call: Callable[..., Any], message: Any) -> grpc.StatusCode:
    try:
        call(message, timeout=LIMIT_S)
    except grpc.RpcError as error:
        return error.code()
    return Code.OK


def test_metadata_is_told(stub: Any) -> None:
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    assert stub.ServerReady(pb.ServerReadyRequest()).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name="add")).ready
    assert not stub.ModelReady(pb.ModelReadyRequest(name="nope")).ready
    assert list(stub.ServerMetadata(pb.ServerMetadataRequest()).extensions) == EXTENSIONS.split()
    found = stub.ModelMetadata(pb.ModelMetadataRequest(name="add"))
    assert (found.name, list(found.versions), found.platform) == ("add", ["1"], "python")
    assert [(output.name, output.datatype, list(output.shape)) for output in found.outputs] == [
        ("OUTPUT0", "FP32", [-1, -1]),
        ("OUTPUT1", "FP32", [-1, -1]),
    ]
    assert stub.ModelConfig(pb.ModelConfigRequest(name="add")).config.max_batch_size == 64
    stats = stub.ModelStatistics(pb.ModelStatisticsRequest(name="add")).model_stats
    assert [(output.name, output.version) for output in stats] == [("add", "1")]


@pytest.mark.parametrize(
    ("call", "fields", "code", "details"),
    [
        ("ModelMetadata", {"name": "nope"}, Code.NOT_FOUND, "Request for unknown model: 'nope' is not found"),
        ("ModelMetadata", {}, Code.NOT_FOUND, "Request for unknown model: '' is not found"),
        ("ModelMetadata", {"name": "add", "version": "9"}, Code.NOT_FOUND, "model: 'add' version 9 is not found"),
        (
            "ModelReady",
            {"name": "add", "version": "x"},
            Code.INVALID_ARGUMENT,
            "failed to get model version from specified version string 'x' (details: stol), version should be an "
            "integral value > 0",
        ),
        ("ModelConfig", {"name": "nope"}, Code.NOT_FOUND, "Request for unknown model: 'nope' is not found"),
        ("ModelStatistics", {"name": "nope"}, Code.INVALID_ARGUMENT, "requested model 'nope' is not available"),
        ("RepositoryModelLoad", {"model_name": "nope"}, Code.INTERNAL, "failed to load 'nope', failed to poll from"),
        *(
            (call, {"repository_name": "r"}, Code.UNIMPLEMENTED, "'repository_name' specification is not supported")
            for call in ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload")
        ),
        ("SystemSharedMemoryStatus", {"name": "r"}, Code.NOT_FOUND, "Unable to find system shared memory region: 'r'"),
        ("CudaSharedMemoryStatus", {"name": "r"}, Code.NOT_FOUND, "Unable to find cuda shared memory region: 'r'"),
        ("CudaSharedMemoryRegister", {"name": "r"}, Code.UNIMPLEMENTED, "CUDA shared memory is not supported"),
        ("TraceSetting", {"model_name": "nope"}, Code.INVALID_ARGUMENT, "Request for unknown model : nope"),
    ],
)
def test_what_cannot_be_done_says_why(stub: Any, call: str, fields: Any, code: grpc.StatusCode, details: str) -> None:
    found = refusal(getattr(stub, call), getattr(pb, f"{call}Request")(**fields))
    assert found[0] is code
    assert details in found[1]


def test_an_inference(stub: Any) -> None:
    answer = stub.ModelInfer(request(id="r1"))
    assert (answer.model_name, answer.model_version, answer.id) == ("add", "1", "r1")
    assert [(item.name, item.datatype, list(item.shape)) for item in answer.outputs] == [
        ("OUTPUT0", "FP32", [1, 2]),
        ("OUTPUT1", "FP32", [1, 2]),
    ]
    assert list(answer.raw_output_contents) == [SUM, DIFFERENCE]
    assert not answer.parameters
    item = stub.ModelInfer(request(outputs=[("OUTPUT1", {"own": 1})], parameters={"x": 1.5, "y": "s", "priority": 2}))
    assert [tensor.name for tensor in item.outputs] == ["OUTPUT1"]
    assert list(item.raw_output_contents) == [DIFFERENCE]


@pytest.mark.parametrize(
    ("datatype", "field", "values", "raw"),
    [
        ("BOOL", "bool_contents", [True, False], b"\1\0"),
        ("UINT8", "uint_contents", [1, 255], b"\1\xff"),
        ("INT8", "int_contents", [-128, 5], b"\x80\5"),
        ("UINT16", "uint_contents", [5, 65535], b"\5\0\xff\xff"),
        ("INT16", "int_contents", [-5, 5], b"\xfb\xff\5\0"),
        ("INT32", "int_contents", [-5, 5], b"\xfb\xff\xff\xff\5\0\0\0"),
        ("UINT32", "uint_contents", [5, 2**32 - 1], b"\5\0\0\0\xff\xff\xff\xff"),
        ("INT64", "int64_contents", [-5, 5], b"\xfb" + b"\xff" * 7 + b"\5" + bytes(7)),
        ("UINT64", "uint64_contents", [5, 2**64 - 1], b"\5" + bytes(7) + b"\xff" * 8),
        ("FP32", "fp32_contents", [1, 2.5], RAW0),
        ("FP64", "fp64_contents", [0.1, 2], b"\x9a\x99\x99\x99\x99\x99\xb9?" + bytes(7) + b"@"),
        ("BYTES", "bytes_contents", [b"a", b"\xff\0"], b"\1\0\0\0a\2\0\0\0\xff\0"),
    ],
)
def test_typed_contents_and_raw_ones_are_the_same(
    stub: Any, datatype: str, field: str, values: list[Any], raw: bytes
) -> None:
    model = f"id_{datatype.lower().replace('bytes', 'string')}"
    typed = stub.ModelInfer(request(model, [("IN", datatype, [2], {field: values})], ()))
    assert list(typed.raw_output_contents) == [raw]
    assert stub.ModelInfer(request(model, [("IN", datatype, [2])], [raw])) == typed


FLOATS = {"fp32_contents": [1, 2]}


@pytest.mark.parametrize(
    ("message", "details"),
    [
        (
            request(inputs=[(*INPUT0, FLOATS), (*INPUT1, {"fp32_contents": [1]})], raw=()),
            f"{NO_ID}input byte size mismatch for input 'INPUT1' for model 'add'. Expected 8, got 4",
        ),
        (
            request(inputs=[(*INPUT0, {"int_contents": [1, 2]}), (*INPUT1, FLOATS)], raw=()),
            "unexpected explicit tensor data for input tensor 'INPUT0' for model 'add' of type 'INT32', expected "
            "datatype 'FP32'",
        ),
        (
            request(inputs=[(*INPUT0, FLOATS), INPUT1], raw=[RAW1]),
            "contents field must not be specified when using raw_input_contents for 'INPUT0' for model 'add'",
        ),
        (request(raw=[RAW0]), "unable to find data for input tensor 'INPUT1' for model 'add' in request."),
        (request(raw=()), "unable to find data for input tensor 'INPUT0' for model 'add' in request."),
        (
            request(raw=[RAW0, RAW1[:4]]),
            f"{NO_ID}input byte size mismatch for input 'INPUT1' for model 'add'. Expected 8, got 4",
        ),
        (
            request(inputs=[("INPUT0", "FOO", [1, 2]), INPUT1]),
            f"{NO_ID}inference input 'INPUT0' data-type is '<invalid>', but model 'add' expects 'FP32'",
        ),
        (request(inputs=[("INPUT0", "FP32", [1, -2]), INPUT1]), "invalid shape [1,-2] for input 'INPUT0'"),
        (request(inputs=[("INPUT0", "FP32", [2**62, 4]), INPUT1]), "invalid shape [4611686018427387904,4]"),
        (request(inputs=[("", "FP32", [1, 2]), INPUT1]), "unexpected inference input '' for model 'add'"),
        (
            request("id_uint8", [("IN", "UINT8", [1], {"uint_contents": [256]})], ()),
            "a value of input 'IN' for model 'id_uint8' does not fit UINT8",
        ),
        (
            request("id_fp16", [("IN", "FP16", [2], FLOATS)], ()),
            "unexpected explicit tensor data for input tensor 'IN' for model 'id_fp16' of type 'FP32', expected "
            "datatype 'FP16'",
        ),
        (
            request("id_string", [("IN", "BYTES", [2])], [b"\1\0\0\0a"]),
            f"{NO_ID}expected 2 string elements for inference input 'IN' for model 'id_string', got 1",
        ),
        (request(outputs=[("OUTPUT0", {})] * 2), "output 'OUTPUT0' already exists in request"),
        (request(outputs=[("X", {})]), "unexpected inference output 'X' for model 'add'"),
        (
            request(parameters={"priority": "a"}),
            "invalid value type for 'priority' parameter, expected int64_param or uint64_param.",
        ),
        (request(parameters={"priority": -1}), "invalid value for 'priority', expected value >= 0."),
        (request(parameters={"timeout": True}), "invalid value type for 'timeout' parameter, expected int64_param."),
        (
            request(parameters={"sequence_start": 1}),
            "invalid value type for 'sequence_start' parameter, expected bool_param.",
        ),
        (
            request(parameters={"triton_x": 1}),
            "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys starting "
            "with 'triton_' are allowed: triton_enable_empty_final_response",
        ),
        (
            request(outputs=[("OUTPUT0", {"classification": "x"})]),
            "invalid value type for 'classification' parameter, expected int64_param",
        ),
        (
            request(outputs=[("OUTPUT0", {"classification": 0})]),
            "invalid value for 'classification' parameter, expected >= 0",
        ),
        (
            request(outputs=[("OUTPUT0", {"shared_memory_region": "r", "shared_memory_byte_size": 8})]),
            "Unable to find shared memory region: 'r'",
        ),
    ],
)
def test_wrong_inferences_are_refused(stub: Any, message: Any, details: str) -> None:
    code, found = refusal(stub.ModelInfer, message)
    assert details in found
    assert code is (Code.NOT_FOUND if "Unable to find" in details else Code.INVALID_ARGUMENT)


def test_a_parameter_without_a_value_is_refused(stub: Any) -> None:
    message = request()
    message.parameters["zz"].SetInParent()
    assert refusal(stub.ModelInfer, message)[1] == (
        "invalid value type for 'zz' parameter, expected int64_param, bool_param, or string_param."
    )


def test_errors_have_the_codes_of_their_kinds(stub: Any) -> None:
    negative = np.array([-1, 0], np.float32).tobytes()
    assert refusal(stub.ModelInfer, request(raw=[negative, RAW1])) == (Code.INTERNAL, OWN_ERROR)
    defect = np.array([-3, 0], np.float32).tobytes()
    assert refusal(stub.ModelInfer, request(raw=[defect, RAW1]))[0] is Code.INTERNAL
    assert refusal(stub.ModelInfer, request("nope"))[0] is Code.NOT_FOUND
    assert refusal(stub.ModelInfer, count(1)) == (
        Code.UNIMPLEMENTED,
        "ModelInfer RPC doesn't support models with decoupled transaction policy",
    )
    assert refusal(stub.ModelInfer, request(raw=[bytes(LIMIT + 1), RAW1]))[0] is Code.RESOURCE_EXHAUSTED


def test_classification(stub: Any) -> None:
    answer = stub.ModelInfer(request(outputs=[("OUTPUT0", {"classification": 1}), ("OUTPUT1", {"classification": 3})]))
    assert [(output.datatype, list(output.shape)) for output in answer.outputs] == [
        ("BYTES", [1, 1]),
        ("BYTES", [1, 2]),
    ]
    assert answer.raw_output_contents[0] == b"\x0b\0\0\x0011.000000:0"
    assert answer.raw_output_contents[1] == b"\x0a\0\0\x002.000000:1\x0b\0\0\0-9.000000:0"


def test_a_stream_of_a_decoupled_model(stub: Any) -> None:
    found = [item.infer_response for item in stub.ModelStreamInfer(iter([count(2)]))]
    assert [list(item.raw_output_contents) for item in found] == [[b"\0\0\0\0"], [b"\1\0\0\0"]]
    assert all((item.model_name, item.model_version, item.id) == ("decoupled", "1", "d") for item in found)
    assert [item.parameters["triton_final_response"].bool_param for item in found] == [False, False]
    assert list(stub.ModelStreamInfer(iter([count(0)]))) == []


@pytest.mark.parametrize("wanted", [0, 2])
def test_an_empty_final_response_comes_where_it_is_asked_for(stub: Any, wanted: int) -> None:
    message = count(wanted, triton_enable_empty_final_response=True)
    *before, last = [item.infer_response for item in stub.ModelStreamInfer(iter([message]))]
    assert len(before) == wanted
    assert (last.id, len(last.outputs), last.parameters["triton_final_response"].bool_param) == ("d", 0, True)


def test_errors_are_in_the_stream_which_stays_open(stub: Any) -> None:
    lacking = request(inputs=[INPUT0], raw=[RAW0], id="bad")
    messages = [request(id="u1"), lacking, request("nope", id="n"), count(-2, "c"), request(id="u2")]
    found = list(stub.ModelStreamInfer(iter(messages)))
    by_id = {item.infer_response.id: item for item in found}
    assert by_id["u1"].infer_response.parameters["triton_final_response"].bool_param
    assert not by_id["u1"].error_message
    assert by_id["bad"].error_message.startswith("[request id: bad] expected 2 inputs but got 1 inputs")
    assert by_id["n"].error_message == "Request for unknown model: 'nope' is not found"
    assert by_id["c"].error_message == OWN_ERROR
    assert list(by_id["u2"].infer_response.raw_output_contents) == [SUM, DIFFERENCE]


GARBAGE = b"\xff\xff\xff"
NO_MESSAGE = "the request is not a message of type 'inference.ModelInferRequest'"


def test_bytes_that_are_no_message_are_the_clients_fault(transports: Transports) -> None:
    with grpc.insecure_channel(transports.grpc) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        assert refusal(infer, GARBAGE) == (Code.INVALID_ARGUMENT, NO_MESSAGE)
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        messages = (request(id="a").SerializeToString(), GARBAGE, request(id="b").SerializeToString())
        found = [pb.ModelStreamInferResponse.FromString(raw) for raw in stream(iter(messages), timeout=LIMIT_S)]
    assert [(item.infer_response.id, item.error_message) for item in found] == [("a", ""), ("", NO_MESSAGE), ("b", "")]


def test_a_models_error_can_be_the_status_of_its_stream(stub: Any) -> None:
    """Where the client wants it so; what comes before it is answered, and a refused request ends nothing."""

    def stream(wanted: str, *messages: Any) -> Any:
        call = stub.ModelStreamInfer(iter(messages), timeout=LIMIT_S, metadata=(("triton_grpc_error", wanted),))
        number = 0
        with suppress(grpc.RpcError):
            for _ in call:
                number += 1
        return number, call.code(), call.details()

    assert stream("true", count(-2)) == (1, Code.INTERNAL, OWN_ERROR)
    assert stream("false", count(-2)) == (2, Code.OK, "")
    assert stream("true", request("nothing"), count(1), request()) == (3, Code.OK, "")


def test_an_error_is_followed_by_the_final_response_where_it_is_asked_for(stub: Any) -> None:
    message = count(-2, triton_enable_empty_final_response=True)
    first, error, last = stub.ModelStreamInfer(iter([message]))
    assert len(first.infer_response.outputs) == 1
    assert error.error_message == OWN_ERROR
    assert not error.infer_response.parameters["triton_final_response"].bool_param
    assert last.infer_response.parameters["triton_final_response"].bool_param
    assert not last.error_message
    # what was refused never began
    refused = request("decoupled", [], (), id="r", parameters={"triton_enable_empty_final_response": True})
    assert len(list(stub.ModelStreamInfer(iter([refused])))) == 1


def test_requests_of_a_stream_are_computed_side_by_side(transports: Transports, stub: Any) -> None:
    transports.service.most_at_once = 0
    found = [
        item.infer_response.id for item in stub.ModelStreamInfer(iter([count(3, str(at), 0.1) for at in range(8)]))
    ]
    assert sorted(found) == sorted(3 * [str(at) for at in range(8)])
    assert transports.service.most_at_once > 1


def test_models_that_answer_once_answer_in_the_order_of_their_requests(transports: Transports, stub: Any) -> None:
    slow = np.array([-2, 0], np.float32).tobytes()
    transports.service.delay, before = 0.2, transports.service.delay
    try:
        messages = [request(id="slow", raw=[slow, RAW1]), request("nope", id="no"), request(id="fast")]
        assert [item.infer_response.id for item in stub.ModelStreamInfer(iter(messages))] == ["slow", "no", "fast"]
    finally:
        transports.service.delay = before


SLOW = request(raw=[np.array([-2, 0], np.float32).tobytes(), RAW1])


@pytest.mark.parametrize("how", ["cancel", "deadline", "disconnect"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_withdraws_its_requests(transports: Transports, how: str, streamed: bool) -> None:
    service, several = transports.service, 3 if streamed else 1
    for number in attempts("requests that have begun before their deadline"):
        begun, withdrawn = service.begun, service.withdrawn
        channel = grpc.insecure_channel(transports.grpc, options=[("grpc.use_local_subchannel_pool", 1)])
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        timeout = 2 << number if how == "deadline" else None
        more: queue.Queue[Any] = queue.Queue()
        for item in (SLOW, count(1000, "a", 1000), count(1000, "b", 1000)):
            more.put(item)
        if streamed:
            call = stub.ModelStreamInfer(iter(more.get, None), timeout=timeout)
        else:
            call = stub.ModelInfer.future(SLOW, timeout=timeout)
        eventually(lambda begun=begun, call=call: service.begun == begun + several or call.done())  # type: ignore[misc]
        if how == "cancel":
            call.cancel()
        elif how == "disconnect":
            channel.close()
        eventually(lambda: service.begun == service.ended)
        more.put(None)
        channel.close()
        if service.withdrawn == withdrawn + several:
            break


def test_a_client_that_does_not_read_holds_up_nobody(transports: Transports, stub: Any) -> None:
    withdrawn = transports.service.withdrawn
    with grpc.insecure_channel(transports.grpc, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([count(1_000_000)]))
        next(call)
        for _ in range(5):
            assert stub.ModelInfer(request(), timeout=LIMIT_S).model_name == "add"
        call.cancel()
    eventually(lambda: transports.service.withdrawn == withdrawn + 1)


def test_a_stream_takes_no_more_requests_than_there_is_room_for(transports: Transports) -> None:
    async def run() -> int:
        async with grpc.aio.insecure_channel(transports.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

            async def messages() -> AsyncIterator[Any]:
                for at in range(1500):
                    yield request(id=str(at))

            return sum([1 async for _ in stub.ModelStreamInfer(messages())])

    assert asyncio.run(run()) == 1500


def test_a_stream_takes_no_more_bytes_than_there_is_room_for() -> None:
    async def run() -> None:
        room, entered = _Room(max_bytes=100), asyncio.Event()

        async def enter(size: int) -> None:
            await room.enter(size)
            entered.set()

        await room.enter(1000)  # one alone may have any size
        waiting = asyncio.create_task(enter(60))
        await asyncio.sleep(0)
        assert not entered.is_set()
        room.leave(1000)
        await waiting
        await room.enter(40)
        entered.clear()
        waiting = asyncio.create_task(enter(41))
        room.leave(40)
        await asyncio.sleep(0)
        assert not entered.is_set()
        room.leave(60)
        await waiting

    asyncio.run(run())


def test_large_requests_of_a_stream_are_read_in_their_order(stub: Any) -> None:
    large = np.ones((1, 50_000), np.float32).tobytes()
    inputs = [(name, "FP32", [1, 50_000]) for name in ("INPUT0", "INPUT1")]
    small, wrong = request(id="small"), request(id="wrong", inputs=inputs, raw=[large, large[:-4]])
    messages = [request(id="large", inputs=inputs, raw=[large, large]), small, wrong, small]
    answers = list(stub.ModelStreamInfer(iter(messages)))
    assert [answer.infer_response.id for answer in answers] == ["large", "small", "wrong", "small"]
    assert [bool(answer.error_message) for answer in answers] == [False, False, True, False]


@pytest.mark.parametrize("streamed", [False, True])
def test_large_answers_are_written_beside_the_loop(stub: Any, streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    used = workers(monkeypatch, grpc_stream if streamed else protocol_grpc, "infer_response")
    texts = [b"a" * 100] * 1000
    for count in (1000, 1):
        message = pb.ModelInferRequest(model_name="id_string")
        message.inputs.add(name="IN", datatype="BYTES", shape=[count]).contents.bytes_contents.extend(texts[:count])
        if streamed:
            (answer,) = (each.infer_response for each in stub.ModelStreamInfer(iter([message])))
        else:
            answer = stub.ModelInfer(message)
        assert len(answer.raw_output_contents[0]) == 104 * count
    large, small = used
    assert large.startswith("by-size")
    assert not small.startswith("by-size")


def test_large_files_of_a_model_are_read_beside_the_loop(
    transports: Transports, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = workers(monkeypatch, protocol_grpc, "parsed")
    message = pb.RepositoryModelLoadRequest(model_name="add")
    message.parameters["file:1/a"].bytes_param = bytes(100_000)
    stub.RepositoryModelLoad(message)
    assert transports.service.loads.pop() == ("add", None, {"1/a": bytes(100_000)})
    assert used[0].startswith("by-size")


def test_the_repository_is_controlled(transports: Transports, stub: Any) -> None:
    def states() -> dict[str, tuple[str, str]]:
        models = stub.RepositoryIndex(pb.RepositoryIndexRequest()).models
        return {item.name: (item.state, item.reason) for item in models}

    assert states()["text"] == ("READY", "")
    unload = pb.RepositoryModelUnloadRequest(model_name="text")
    unload.parameters["unload_dependents"].bool_param = True
    stub.RepositoryModelUnload(unload)
    assert states()["text"] == ("UNAVAILABLE", "unloaded")
    load = pb.RepositoryModelLoadRequest(model_name="text")
    load.parameters["config"].string_param = "{}"
    load.parameters["file:1/model.bin"].bytes_param = b"hello"
    stub.RepositoryModelLoad(load)
    assert transports.service.loads[-1] == ("text", "{}", {"1/model.bin": b"hello"})
    assert states()["text"] == ("READY", "")


@pytest.mark.parametrize(
    ("call", "key", "field", "details"),
    [
        ("Load", "foo", "string_param", "unrecognized load parameter 'foo'."),
        ("Load", "config", "int64_param", "invalid value type for load parameter 'config', expected string_param."),
        ("Load", "file:1/a", "string_param", "invalid value type for load parameter 'file:1/a', expected bytes_param."),
        ("Unload", "foo", "string_param", "unrecognized unload parameter 'foo'."),
        (
            "Unload",
            "unload_dependents",
            "int64_param",
            "invalid value type for 'unload_dependents' parameter",
        ),
    ],
)
def test_wrong_repository_parameters_are_refused(stub: Any, call: str, key: str, field: str, details: str) -> None:
    message = getattr(pb, f"RepositoryModel{call}Request")(model_name="text")
    setattr(message.parameters[key], field, "x" if field == "string_param" else 1)
    code, found = refusal(getattr(stub, f"RepositoryModel{call}"), message)
    assert code is Code.INVALID_ARGUMENT
    assert details in found


def test_settings(stub: Any) -> None:
    message = pb.TraceSettingRequest()
    message.settings["trace_rate"].value.append("5")
    assert stub.TraceSetting(message).settings["trace_rate"].value == ["5"]
    message.settings["trace_rate"].value.append("6")
    assert refusal(stub.TraceSetting, message) == (Code.INVALID_ARGUMENT, "expect only 1 value for 'trace_rate'")
    del message.settings["trace_rate"].value[:]
    assert stub.TraceSetting(message).settings["trace_rate"].value == ["1000"]
    log = pb.LogSettingsRequest()
    log.settings["log_verbose_level"].uint32_param = 1
    assert stub.LogSettings(log).settings["log_verbose_level"].uint32_param == 1
    log.settings["log_verbose_level"].uint32_param = 0
    found = stub.LogSettings(log).settings
    assert found["log_info"].bool_param
    assert found["log_format"].string_param == "default"
    log.settings["log_file"].string_param = "x"
    assert refusal(stub.LogSettings, log)[0] is Code.UNIMPLEMENTED


def test_health_is_told_as_probes_ask_for_it(transports: Transports) -> None:
    with grpc.insecure_channel(transports.grpc) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert check(b"") == b"\x08\x01"
        transports.service.ready = False
        try:
            assert check(b"") == b"\x08\x02"
        finally:
            transports.service.ready = True


def tensors(kit: Any, first: float = 1) -> list[Any]:
    inputs = [kit.InferInput(name, [1, 2], "FP32") for name in ("INPUT0", "INPUT1")]
    inputs[0].set_data_from_numpy(np.array([[first, 2.5]], np.float32))
    inputs[1].set_data_from_numpy(np.array([[10, 0.5]], np.float32))
    return inputs


@pytest.fixture(scope="module")
def triton(transports: Transports) -> Iterator[grpcclient.InferenceServerClient]:
    with grpcclient.InferenceServerClient(transports.grpc) as client:
        yield client


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritons_client_infers(triton: grpcclient.InferenceServerClient, compression: str | None) -> None:
    outputs = [grpcclient.InferRequestedOutput("OUTPUT0"), grpcclient.InferRequestedOutput("OUTPUT1", class_count=1)]
    result = triton.infer(
        "add",
        tensors(grpcclient),
        outputs=outputs,
        request_id="7",
        priority=1,
        timeout=1000,
        parameters={"own": "x"},
        compression_algorithm=compression,
    )
    assert result.as_numpy("OUTPUT0").tolist() == [[11, 3]]
    assert result.as_numpy("OUTPUT1").tolist() == [[b"2.000000:1"]]
    assert result.get_response().id == "7"
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'nope' is not found") as error:
        triton.infer("nope", tensors(grpcclient))
    assert error.value.status() == "StatusCode.NOT_FOUND"


def test_tritons_client_streams(triton: grpcclient.InferenceServerClient) -> None:
    came: queue.Queue[tuple[Any, Any]] = queue.Queue()
    triton.start_stream(callback=lambda result, error: came.put((result, error)))
    tensor = grpcclient.InferInput("IN", [1], "INT32")
    tensor.set_data_from_numpy(np.array([3], np.int32))
    triton.async_stream_infer("decoupled", [tensor], enable_empty_final_response=True)
    found = [came.get(timeout=LIMIT_S) for _ in range(4)]
    assert [result.as_numpy("OUT").tolist() for result, _ in found[:3]] == [[0], [1], [2]]
    assert found[3][0].get_response().parameters["triton_final_response"].bool_param
    triton.async_stream_infer("nope", [tensor])
    assert "unknown model" in str(came.get(timeout=LIMIT_S)[1])
    triton.async_stream_infer("add", tensors(grpcclient))
    assert came.get(timeout=LIMIT_S)[0].as_numpy("OUTPUT0").tolist() == [[11, 3]]
    triton.stop_stream()


def test_tritons_client_cancels(transports: Transports, triton: grpcclient.InferenceServerClient) -> None:
    begun, withdrawn = transports.service.begun, transports.service.withdrawn
    ended: queue.Queue[Any] = queue.Queue()
    call = triton.async_infer("add", tensors(grpcclient, -2), callback=lambda result, error: ended.put(error))
    eventually(lambda: transports.service.begun == begun + 1)
    call.cancel()
    assert "CANCELLED" in str(ended.get(timeout=LIMIT_S))
    eventually(lambda: transports.service.withdrawn == withdrawn + 1)


def test_tritons_client_manages(triton: grpcclient.InferenceServerClient) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.get_model_config("add", as_json=True)["config"]["max_batch_size"] == 64
    assert triton.get_inference_statistics("add").model_stats[0].name == "add"
    assert {model.state for model in triton.get_model_repository_index().models} == {"READY"}
    triton.unload_model("text")
    triton.load_model("text", config="{}")
    assert triton.get_trace_settings("add").settings["trace_level"].value == ["OFF"]
    assert triton.update_log_settings({"log_info": True}).settings["log_info"].bool_param


def test_tritons_client_for_asyncio(transports: Transports) -> None:
    async def run() -> None:
        async with aioclient.InferenceServerClient(transports.grpc) as client:
            results = await asyncio.gather(*(client.infer("add", tensors(aioclient, at)) for at in range(20)))
            assert [result.as_numpy("OUTPUT0").tolist()[0][0] for result in results] == [10 + at for at in range(20)]
            tensor = aioclient.InferInput("IN", [1], "INT32")
            tensor.set_data_from_numpy(np.array([2], np.int32))

            async def messages() -> AsyncIterator[Any]:
                yield {"model_name": "decoupled", "inputs": [tensor]}

            found = [result.as_numpy("OUT").tolist() async for result, _ in client.stream_infer(messages())]
            assert found == [[0], [1]]

    asyncio.run(run())
