"""The model that runs inside a real Triton: a transport in front of the service, as gRPC and HTTP are.

Triton's Python backend imports it in a process of its own, through the model.py that `create_triton_repository` writes.
`execute` hands requests to an event loop and returns; each is answered by its response sender, which the backend
allows for models with one response too. Thus requests join the running batch as they come. Were `execute` to return
responses, as a coroutine or not, the backend would not call it again before.
"""

import asyncio
import ctypes
import json
import os
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tritonclient.grpc import model_config_pb2

from hasten.server.create import ENVIRONMENT
from hasten.server.models.config import parse_config_json
from hasten.server.models.parameters import CHECKPOINT, TOKENIZER, checkpoint_folder
from hasten.server.protocol.tensors import NUMPY
from hasten.server.repository import MemoryRepository
from hasten.server.service import ControlMode, Service
from hasten.server.types import ErrorKind, InferRequest, RequestedOutput, ServiceError, Tensor

_LOOK_S, _LOOK_EACH_S = 0.05, 0.002
"""Time between looks at whether clients have left, and with many requests so much for each: one takes 0.08 ms."""
_LOOK_PARENT_S = 1.0
_LONGEST_END_S = 3600.0
"""How long requests may go on once the model is unloaded."""
_DATATYPES = {dtype: name for name, dtype in NUMPY.items() if name != "BF16"}
_T = TypeVar("_T")


class TritonPythonModel:
    """What the backend calls: `initialize` and `finalize` once, `execute` for requests that have come."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the model; the error that keeps it from that becomes Triton's reason."""
        self._backend = import_module("triton_python_backend_utils")  # there is one in the backend's process alone
        threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._running: dict[Any, asyncio.Task[None]] = {}
        """Requests that have not had their last response, by their senders."""
        self._name = args["model_name"]
        config = model_config(args["model_config"], Path(args["model_repository"]), args["model_version"])
        self._service = self._submit(_load(config)).result()
        self._watching = self._submit(self._watch())

    def execute(self, requests: Sequence[Any]) -> None:
        """Begin with requests."""
        for request in requests:
            infer = infer_request(request, self._name)
            self._loop.call_soon_threadsafe(self._begin, infer, request.get_response_sender())

    def finalize(self) -> None:
        """End the engine. Triton calls it when all requests have had their responses."""
        self._watching.cancel()
        self._submit(self._service.close(_LONGEST_END_S)).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _submit(self, work: Coroutine[Any, Any, _T]) -> "Future[_T]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _begin(self, request: InferRequest, sender: Any) -> None:
        task = self._running[sender] = self._loop.create_task(self._answer(request, sender))
        task.add_done_callback(lambda _: self._end(sender))

    async def _answer(self, request: InferRequest, sender: Any) -> None:
        """Send all responses of a request."""
        try:
            async with aclosing(self._service.stream(request)) as responses:
                async for response in responses:
                    self._send(sender, [self._tensor(output) for output in response.outputs], final=response.final)
        except ServiceError as error:
            self._fail(sender, error)

    def _end(self, sender: Any) -> None:
        if sender in self._running:
            self._fail(sender, ServiceError(ErrorKind.CANCELLED, "the client waits for the response no more"))

    async def _watch(self) -> None:
        """Withdraw requests whose clients have left: the backend knows of them, but must be asked."""
        while True:
            await asyncio.sleep(max(_LOOK_S, _LOOK_EACH_S * len(self._running)))
            for sender, task in self._running.items():
                if not task.cancelling() and sender.is_cancelled():
                    task.cancel()

    def _send(self, sender: Any, tensors: Sequence[Any], *, final: bool, error: Any = None) -> None:
        if final:
            self._running.pop(sender, None)  # asked anything after its last response, a sender crashes the server
        flags = self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        sender.send(self._backend.InferenceResponse(tensors, error), flags=flags)

    def _fail(self, sender: Any, error: ServiceError) -> None:
        kinds = self._backend.TritonError
        self._send(sender, [], final=True, error=kinds(str(error), getattr(kinds, error.kind.value.backend)))

    def _tensor(self, tensor: Tensor) -> Any:
        """The backend's form of a tensor: by DLPack, since it misreads the arrays of numpy 2."""
        array = np.require(tensor.data, requirements=["C_CONTIGUOUS", "WRITEABLE"])
        return self._backend.Tensor.from_dlpack(tensor.name, _handed_over(array.__dlpack__()))


def model_config(text: str, folder: Path, version: str) -> model_config_pb2.ModelConfig:
    """Triton's configuration of the model as hasten's: without what is the Python backend's, or filled in by Triton.

    Paths in it are relative to the model's folder.
    """
    config = parse_config_json(text)
    config.backend = "hasten"
    config.ClearField("default_model_filename")
    config.parameters.pop(ENVIRONMENT, None)
    if config.HasField("dynamic_batching"):
        config.dynamic_batching.ClearField("preferred_batch_size")
    config.parameters[CHECKPOINT].string_value = str(checkpoint_folder(config, folder, folder / version))
    if TOKENIZER in config.parameters:
        config.parameters[TOKENIZER].string_value = str(folder / config.parameters[TOKENIZER].string_value)
    return config


def infer_request(request: Any, model: str) -> InferRequest:
    """A request of the backend as the server's own transports make it."""
    parameters = json.loads(request.parameters())
    if request.timeout():
        parameters["timeout"] = request.timeout()
    return InferRequest(
        model=model,
        inputs=[_input(tensor) for tensor in request.inputs()],
        id=request.request_id(),
        parameters=parameters,
        outputs=[RequestedOutput(name) for name in request.requested_output_names()],
    )


def _input(tensor: Any) -> Tensor:
    """A copy of an input. What the configuration reshapes to [batch] has its own axis again, as the client gave it."""
    data = np.array(np.from_dlpack(tensor))
    if data.ndim == 1:
        data = data[:, None]
    return Tensor.of(tensor.name(), _DATATYPES[data.dtype], data)


async def _load(config: model_config_pb2.ModelConfig) -> Service:
    service = Service(MemoryRepository([config]), mode=ControlMode.EXPLICIT)
    await service.start()
    await service.load(config.name)
    return service


def _leave_with(parent: int) -> None:
    """End this process once its parent has, and thus the engine's: a server that was killed leaves it behind."""
    while os.getppid() == parent:
        time.sleep(_LOOK_PARENT_S)
    os._exit(1)


_api = ctypes.pythonapi
_api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]
_api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_api.PyCapsule_New.restype = ctypes.py_object
_FRESH, _USED = b"dltensor", b"used_dltensor"
"""DLPack's names for capsules whose tensor nobody has taken yet and somebody has; capsules refer to them for ever."""


def _handed_over(capsule: object) -> object:
    """The tensor of a DLPack capsule in another one, without a destructor.

    The backend takes a capsule's tensor, but then gives the capsule a name that makes numpy's destructor complain.
    """
    pointer = _api.PyCapsule_GetPointer(capsule, _FRESH)
    _api.PyCapsule_SetName(capsule, _USED)
    return _api.PyCapsule_New(pointer, _FRESH, None)
