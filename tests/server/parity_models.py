"""Models for a real Triton: those of `AddingService`, and models with the tensors of hasten's own that give zeros."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from google.protobuf import text_format
from tests.server.tritonserver import Interpreter, installed
from tritonclient.grpc import model_config_pb2

from hasten.core.config import EngineConfig
from hasten.server.create import model_configs, write_repository

NUMPY = "numpy==1.26.4"
"""The stub of the wheel misreads the arrays of numpy 2."""
NUMPY_PYTHONS = ("3.12", "3.11")
"""Which have a wheel of that numpy."""
OWN_MODELS = ("fastertransformer", "preprocessing", "postprocessing", "ensemble", "demo-model")
SAME_TYPES = ("uint64", "fp16")

_ADD = """
import time
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        return [self.one(request) for request in requests]

    def one(self, request):
        one, other = (pb.get_input_tensor_by_name(request, name).as_numpy() for name in ("INPUT0", "INPUT1"))
        first = one.flat[0] if one.size else 0
        if first == -1:
            return pb.InferenceResponse([], error=pb.TritonError("this is the model's own error"))
        return pb.InferenceResponse([pb.Tensor("OUTPUT0", one + other), pb.Tensor("OUTPUT1", one - other)])
"""
_TEXT = """
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        return [self.one(request) for request in requests]

    def one(self, request):
        texts = pb.get_input_tensor_by_name(request, "text_input").as_numpy().reshape(-1)
        most = pb.get_input_tensor_by_name(request, "max_tokens")
        said = np.array([b"you said: " + text for text in texts], dtype=object)
        length = np.array([-1], np.int32) if most is None else most.as_numpy()
        parameters = np.array([request.parameters().encode()], dtype=object)
        made = {"text_output": said, "length": length, "parameters": parameters}
        return pb.InferenceResponse([pb.Tensor(*item) for item in made.items()])
"""
_COUNT = """
import threading
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            wanted = int(pb.get_input_tensor_by_name(request, "IN").as_numpy()[0])
            threading.Thread(target=self.answer, args=(request.get_response_sender(), wanted)).start()

    def answer(self, sender, wanted):
        for number in range(wanted if wanted >= 0 else -wanted - 1):
            sender.send(pb.InferenceResponse([pb.Tensor("OUT", np.array([number], np.int32))]))
        if wanted < 0:
            sender.send(pb.InferenceResponse(error=pb.TritonError("this is the model's own error")))
        sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
_SAME = """
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        given = [pb.get_input_tensor_by_name(request, "IN").as_numpy() for request in requests]
        return [pb.InferenceResponse([pb.Tensor("OUT", array)]) for array in given]
"""
_ZEROS = """
import json
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def initialize(self, args):
        self.config = json.loads(args["model_config"])
        self.decoupled = self.config.get("model_transaction_policy", {}).get("decoupled", False)

    def execute(self, requests):
        if not self.decoupled:
            return [pb.InferenceResponse(self.outputs(request)) for request in requests]
        for request in requests:
            sender = request.get_response_sender()
            sender.send(pb.InferenceResponse(self.outputs(request)))
            sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def outputs(self, request):
        batch = [request.inputs()[0].as_numpy().shape[0]] if self.config["max_batch_size"] else []
        made = []
        for spec in self.config["output"]:
            if spec["name"] in request.requested_output_names():
                shape = batch + [max(1, size) for size in spec["dims"]]
                kind = pb.triton_string_to_numpy(spec["data_type"])
                data = np.full(shape, b"", dtype=object) if kind == np.object_ else np.zeros(shape, kind)
                made.append(pb.Tensor(spec["name"], data))
        return made
"""
_CODE = {"add": _ADD, "text": _TEXT, "decoupled": _COUNT}


def write_triton_models(folder: Path, configs: Iterable[model_config_pb2.ModelConfig], numpy: Path) -> None:
    """Write the models of `AddingService`, or others whose outputs are zeros, for the Python backend."""
    for given in configs:
        config = model_config_pb2.ModelConfig()
        config.CopyFrom(given)
        for field in ("optimization", "instance_group", "default_model_filename"):
            config.ClearField(field)
        version = folder / config.name / "1"
        version.mkdir(parents=True)
        if not config.HasField("ensemble_scheduling"):
            config.backend = "python"
            config.instance_group.add(count=1, kind=model_config_pb2.ModelInstanceGroup.KIND_CPU)
            code = _SAME if config.name.startswith("id_") else _CODE.get(config.name, _ZEROS)
            (version / "model.py").write_text(f"import sys\n\nsys.path.insert(0, {str(numpy)!r})\n{code}")
        (folder / config.name / "config.pbtxt").write_text(text_format.MessageToString(config))


def write_own_models(folder: Path, engine: EngineConfig) -> list[model_config_pb2.ModelConfig]:
    """What `hasten repository create` writes; returns the configurations."""
    configs = model_configs(engine)
    write_repository(configs, folder, engine)
    return configs


def older_numpy(cache: pytest.Cache, python: Interpreter) -> Path:
    """A folder with an older numpy, for the Python backend. Skips the test where it cannot be had."""
    return installed(cache, NUMPY, f"{NUMPY}-python{python.version}", "--python-version", python.version)
