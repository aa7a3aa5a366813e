"""A GPT-NeoX and a T5 in FasterTransformer's folders, served from configurations of its backends, as stock clients meet
them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tests.conftest import MakeModel
from tests.encoder_decoders import save_encoder_decoder, their_logprobs, their_tokens
from tests.server.serve_process import serve_process
from tritonclient.utils import InferenceServerException

from hasten.checkpoint.convert import Conversion, convert
from hasten.core.config import EngineConfig
from hasten.server.create import model_configs, write_repository

pytestmark = pytest.mark.any_python

CONFIG = """
name: "theirs"
backend: "fastertransformer"
max_batch_size: 8
input [
  {{ name: "input_ids" data_type: TYPE_UINT32 dims: [ -1 ] }},
  {{ name: "start_id" data_type: TYPE_UINT32 dims: [ 1 ] reshape: {{ shape: [ ] }} optional: true }},
  {{ name: "end_id" data_type: TYPE_UINT32 dims: [ 1 ] reshape: {{ shape: [ ] }} optional: true }},
  {{ name: "input_lengths" data_type: TYPE_UINT32 dims: [ 1 ] reshape: {{ shape: [ ] }} }},
  {{ name: "request_output_len" data_type: TYPE_UINT32 dims: [ -1 ] }}
]
output [
  {{ name: "output_ids" data_type: TYPE_UINT32 dims: [ -1, -1 ] }},
  {{ name: "sequence_length" data_type: TYPE_UINT32 dims: [ -1 ] }},
  {{ name: "cum_log_probs" data_type: TYPE_FP32 dims: [ -1 ] }},
  {{ name: "output_log_probs" data_type: TYPE_FP32 dims: [ -1, -1 ] }}
]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
parameters {{ key: "tensor_para_size" value: {{ string_value: "1" }} }}
parameters {{ key: "pipeline_para_size" value: {{ string_value: "1" }} }}
parameters {{ key: "data_type" value: {{ string_value: "fp32" }} }}
parameters {{ key: "model_type" value: {{ string_value: "GPT-NeoX" }} }}
parameters {{ key: "model_checkpoint_path" value: {{ string_value: "{}" }} }}
parameters {{ key: "enable_custom_all_reduce" value: {{ string_value: "0" }} }}
"""
T5_CONFIG = """
name: "t5"
backend: "fastertransformer"
default_model_filename: "t5"
max_batch_size: 1024
input [
  {{ name: "input_ids" data_type: TYPE_UINT32 dims: [ -1 ] }},
  {{ name: "sequence_length" data_type: TYPE_UINT32 dims: [ 1 ] reshape: {{ shape: [ ] }} }},
  {{ name: "max_output_len" data_type: TYPE_UINT32 dims: [ 1 ] reshape: {{ shape: [ ] }} }},
  {{ name: "is_return_log_probs" data_type: TYPE_BOOL dims: [ 1 ] reshape: {{ shape: [ ] }} optional: true }},
  {{ name: "beam_width" data_type: TYPE_UINT32 dims: [ 1 ] reshape: {{ shape: [ ] }} optional: true }},
  {{ name: "start_id" data_type: TYPE_UINT32 dims: [ 1 ] reshape: {{ shape: [ ] }} optional: true }},
  {{ name: "ia3_tasks" data_type: TYPE_INT32 dims: [ 1 ] reshape: {{ shape: [ ] }} optional: true }}
]
output [
  {{ name: "output_ids" data_type: TYPE_INT32 dims: [ -1, -1 ] }},
  {{ name: "sequence_length" data_type: TYPE_INT32 dims: [ -1 ] }},
  {{ name: "cum_log_probs" data_type: TYPE_FP32 dims: [ -1 ] }},
  {{ name: "output_log_probs" data_type: TYPE_FP32 dims: [ -1, -1 ] }}
]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
parameters {{ key: "tensor_para_size" value: {{ string_value: "1" }} }}
parameters {{ key: "pipeline_para_size" value: {{ string_value: "1" }} }}
parameters {{ key: "data_type" value: {{ string_value: "fp32" }} }}
parameters {{ key: "model_type" value: {{ string_value: "T5" }} }}
parameters {{ key: "model_checkpoint_path" value: {{ string_value: "{}" }} }}
"""
PROMPT = [5, 6, 7, 9]
LENGTH = 8


@dataclass(frozen=True)
class Served:
    """A server with two token models over one checkpoint: `theirs`, and `ours` with the ensemble around it."""

    source: Path
    t5: Path
    grpc: grpcclient.InferenceServerClient
    http: httpclient.InferenceServerClient


@pytest.fixture(scope="module")
def served(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    index = tmp_path_factory.mktemp("backends")
    source = make_model("GPTNeoX", hidden_size=64)
    convert(Conversion(str(source), str(index / "out"), ranks=2))
    repository, folder = index / "repository", index / "out" / "2-gpu"
    (repository / "theirs" / "1").mkdir(parents=True)
    (repository / "theirs" / "config.pbtxt").write_text(CONFIG.format(folder), encoding="utf-8")
    t5 = save_encoder_decoder(index / "flan-t5", "flan-t5")
    convert(Conversion(str(t5), str(index / "t5"), ranks=2))
    (repository / "t5" / "1").mkdir(parents=True)
    (repository / "t5" / "config.pbtxt").write_text(T5_CONFIG.format(index / "t5" / "2-gpu"), encoding="utf-8")
    engine = EngineConfig.create(str(folder), device="cpu", kv_cache_memory=1 << 22)
    write_repository(model_configs(engine, token_name="ours", text_name="text"), repository, engine)
    with (
        serve_process(index / "log", "--model-repository", str(repository)) as indices,
        grpcclient.InferenceServerClient(indices["GRPCInferenceService"]) as grpc,
        httpclient.InferenceServerClient(indices["HTTPService"]) as http,
    ):
        yield Served(source, t5, grpc, http)


def inputs(module: Any, **more: list[list[Any]]) -> list[Any]:
    values = {"input_ids": [PROMPT], "input_lengths": [[len(PROMPT)]], "request_output_len": [[LENGTH]], **more}
    return tensors(module, **values)


def tensors(module: Any, **values: list[list[Any]]) -> list[Any]:
    types: dict[str, tuple[str, Any]] = {
        "is_return_log_probs": ("BOOL", np.bool_),
        "is_return_context_embeddings": ("BOOL", np.bool_),
    }
    types |= {"ia3_tasks": ("INT32", np.int32), "len_penalty": ("FP32", np.float32)}
    output = []
    for name, rows in values.items():
        datatype, dtype = types.get(name, ("UINT32", np.uint32))
        tensor = module.InferInput(name, [len(rows), len(rows[0])], datatype)
        tensor.set_data_from_numpy(np.array(rows, dtype))
        output.append(tensor)
    return output


@pytest.fixture(scope="module")
def right_tokens(served: Served) -> list[int]:
    """Prompt and completion by transformers."""
    import torch
    from transformers import GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM.from_pretrained(served.source)
    prompt = torch.tensor([PROMPT])
    outputs = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=LENGTH, do_sample=False)
    tokens: list[int] = outputs[0].tolist()
    return tokens


@pytest.mark.parametrize("model", ["theirs", "ours"])
def test_the_tensors_are_those_of_gpt_neox(served: Served, model: str) -> None:
    found = served.http.get_model_metadata(model)
    assert {tensor["name"] for tensor in found["outputs"]} == {
        *("output_ids", "sequence_length", "cum_log_probs", "output_log_probs"),
    }
    assert "is_return_context_embeddings" not in {tensor["name"] for tensor in found["inputs"]}
    assert served.grpc.get_model_config(model).config.parameters["model_type"].string_value == "GPT-NeoX"


@pytest.mark.parametrize("model", ["theirs", "ours"])
def test_tokens_are_those_of_transformers(served: Served, right_tokens: list[int], model: str) -> None:
    for client, module in ((served.grpc, grpcclient), (served.http, httpclient)):
        result = client.infer(model, inputs(module, is_return_log_probs=[[True]]))
        length = len(right_tokens)
        assert result.as_numpy("sequence_length").tolist() == [[length]]
        assert result.as_numpy("output_ids")[0, 0, :length].tolist() == right_tokens
        assert result.as_numpy("output_log_probs").shape == (1, 1, length - len(PROMPT))
        for name in ("response_input_lengths", "context_embeddings"):
            assert result.as_numpy(name) is None


def test_what_only_gpt_has_is_refused(served: Served) -> None:
    with pytest.raises(InferenceServerException, match="unexpected inference input 'is_return_context_embeddings'"):
        served.grpc.infer("theirs", inputs(grpcclient, is_return_context_embeddings=[[False]]))
    wanted = [grpcclient.InferRequestedOutput("response_input_lengths")]
    with pytest.raises(InferenceServerException, match="unexpected inference output 'response_input_lengths'"):
        served.grpc.infer("theirs", inputs(grpcclient), outputs=wanted)


def test_the_ensemble_does_without_it(served: Served) -> None:
    texts, length = (httpclient.InferInput(f"INPUT_{at}", [1, 1], kind) for at, kind in enumerate(("BYTES", "UINT32")))
    texts.set_data_from_numpy(np.array([["Once upon a time"]], dtype=object))
    length.set_data_from_numpy(np.array([[LENGTH]], np.uint32))
    result = served.http.infer("ensemble", [texts, length])
    assert result.as_numpy("OUTPUT_0")[0, 0].decode().startswith("Once upon a time")


def t5_inputs(module: Any, rows: list[list[int]], length: int, **more: list[list[Any]]) -> list[Any]:
    longest = max(map(len, rows))
    values = {"input_ids": [[*row, *[0] * (longest - len(row))] for row in rows]}
    lengths = {"sequence_length": [[len(row)] for row in rows], "max_output_len": [[length]] * len(rows)}
    return tensors(module, **values, **lengths, **more)


def test_a_t5_has_the_tensors_of_its_backend(served: Served) -> None:
    """Outputs have generated tokens alone, signed; a batch has texts of several lengths."""
    rows = [[5, 6, 7, 9], [(7 * at + 3) % 190 + 5 for at in range(30)]]
    plain = their_tokens(served.t5, rows, min_new_tokens=LENGTH, max_new_tokens=LENGTH)
    beams = their_tokens(
        served.t5, rows, min_new_tokens=LENGTH, max_new_tokens=LENGTH, num_beams=2, num_return_sequences=2
    )
    least = {"min_length": [[LENGTH]] * 2}
    for client, module in ((served.grpc, grpcclient), (served.http, httpclient)):
        found = client.infer("t5", t5_inputs(module, rows, LENGTH, is_return_log_probs=[[True]] * 2, **least))
        assert found.as_numpy("output_ids").dtype == found.as_numpy("sequence_length").dtype == np.int32
        assert found.as_numpy("output_ids").tolist() == plain
        assert found.as_numpy("sequence_length").tolist() == [[LENGTH]] * 2
        sums = found.as_numpy("output_log_probs").sum(2)
        np.testing.assert_allclose(found.as_numpy("cum_log_probs"), sums, rtol=1e-4)
    wide = served.grpc.infer(
        "t5",
        t5_inputs(
            grpcclient,
            rows,
            LENGTH,
            beam_width=[[2]] * 2,
            len_penalty=[[1.0]] * 2,
            is_return_log_probs=[[True]] * 2,
            **least,
        ),
    )
    assert wide.as_numpy("output_ids").tolist() == beams
    each = wide.as_numpy("output_log_probs")
    np.testing.assert_allclose(each.sum(2), wide.as_numpy("cum_log_probs"), rtol=1e-4)
    for row, ours, tokens in zip(rows, each, beams, strict=True):
        for found_t, beam in zip(ours, tokens, strict=True):
            theirs_tv = their_logprobs(served.t5, row, beam)
            np.testing.assert_allclose(found_t, theirs_tv[range(LENGTH), beam], atol=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"start_id": [[4]]}, "'start_id' is 4, which is not supported: outputs of the model begin with token 0"),
        ({"ia3_tasks": [[1]]}, "'ia3_tasks' is 1, which is not supported: the model has no adapters"),
        ({"sequence_length": [[9]]}, "input 'sequence_length' is 9, but 'input_ids' has 4 tokens"),
        ({"max_output_len": [[0]]}, "item 0 of the batch: max_output_len must be"),
        ({"sequence_length": [[0]]}, "input 'sequence_length' is 0, and the encoder needs a token"),
        ({"request_output_len": [[1]]}, "unexpected inference input 'request_output_len'"),
    ],
)
def test_what_a_t5_does_not_take(served: Served, more: dict[str, Any], message: str) -> None:
    given = {"input_ids": [PROMPT], "sequence_length": [[4]], "max_output_len": [[LENGTH]]} | more
    with pytest.raises(InferenceServerException, match=message):
        served.grpc.infer("t5", tensors(grpcclient, **given))
