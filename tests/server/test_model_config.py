from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError
from hasten.server.engine.queue import Queueing, QueueLimits
from hasten.server.models.config import completed, kind_of, parse_config, parse_config_json
from hasten.server.models.interfaces import DATATYPES, INTERFACES, Kind
from hasten.server.models.parameters import (
    check_parameters,
    checkpoint_folder,
    engine_options,
    engine_parameters,
    queue_limits,
)
from hasten.server.models.validation import Rules

ARTICLE = """
name: "fastertransformer"
backend: "fastertransformer"
default_model_filename: "bloom"
max_batch_size: 64
model_transaction_policy { decoupled: False }
input [
  { name: "input_ids" data_type: TYPE_UINT32 dims: [ -1 ] allow_ragged_batch: true },
  { name: "input_lengths" data_type: TYPE_UINT32 dims: [ 1 ] reshape: { shape: [ ] } },
  { name: "request_output_len" data_type: TYPE_UINT32 dims: [ 1 ] },
  { name: "runtime_top_k" data_type: TYPE_UINT32 dims: [ 1 ] reshape: { shape: [ ] } optional: true }
]
output [ { name: "output_ids" data_type: TYPE_UINT32 dims: [ -1, -1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
parameters { key: "tensor_para_size" value: { string_value: "2" } }
parameters { key: "pipeline_para_size" value: { string_value: "1" } }
parameters { key: "data_type" value: { string_value: "fp16" } }
parameters { key: "model_type" value: { string_value: "GPT" } }
parameters { key: "model_checkpoint_path" value: { string_value: "/mnt/model/2-gpu" } }
parameters { key: "int8_mode" value: { string_value: "0" } }
parameters { key: "enable_custom_all_reduce" value: { string_value: "1" } }
"""
TEXT = 'parameters { key: "kind" value { string_value: "text" } } '
ENSEMBLE = 'platform: "ensemble" ensemble_scheduling { } '


def config(text: str = "", name: str = "m") -> Any:
    return completed(parse_config(text, "config.pbtxt"), name)


def with_parameters(**parameters: str) -> Any:
    result = model_config_pb2.ModelConfig(name="m")
    for name, value in parameters.items():
        result.parameters[name].string_value = value
    return result


def test_the_configuration_of_the_article() -> None:
    result = config(ARTICLE, "fastertransformer")
    assert engine_options(result) == {"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "dtype": "fp16"}
    assert result.max_batch_size == 64
    assert [tensor.name for tensor in result.input][:4] == [
        "input_ids", "input_lengths", "request_output_len", "runtime_top_k",
    ]  # fmt: skip
    folder = checkpoint_folder(result, Path("/repo/fastertransformer"), Path("/repo/fastertransformer/1"))
    assert folder == Path("/mnt/model/2-gpu")


def test_what_is_left_out_is_completed_with_the_whole_interface() -> None:
    result = config()
    interface = INTERFACES[Kind.TOKEN]
    assert [tensor.name for tensor in result.input] == [rule.name for rule in interface.inputs]
    assert [tensor.name for tensor in result.output] == [rule.name for rule in interface.outputs]
    assert (result.name, result.backend, result.max_batch_size) == ("m", "hasten", 1024)
    assert result.version_policy.latest.num_versions == 1
    assert not result.model_transaction_policy.decoupled
    assert len(config(ARTICLE, "fastertransformer").input) == len(interface.inputs)


@pytest.mark.parametrize("model_type", ["GPT-J", "GPT-NeoX"])
def test_models_with_rotary_positions_have_the_tensors_of_their_own_backends(model_type: str) -> None:
    result = completed(with_parameters(model_type=model_type), "m")
    check_parameters(result, kind_of(result))
    assert {tensor.name for tensor in result.input} == {
        *("input_ids", "input_lengths", "request_output_len", "start_id", "end_id", "runtime_top_k", "runtime_top_p"),
        *("beam_search_diversity_rate", "temperature", "len_penalty", "repetition_penalty", "presence_penalty"),
        *("min_length", "random_seed", "is_return_log_probs", "beam_width", "bad_words_list", "stop_words_list"),
        *("prompt_learning_task_name_ids", "top_p_decay", "top_p_min", "top_p_reset_ids"),
        *("request_prompt_embedding", "request_prompt_lengths", "request_prompt_type"),
    }
    outputs = {tensor.name for tensor in result.output}
    assert outputs == {"output_ids", "sequence_length", "cum_log_probs", "output_log_probs"}
    for tensor in ("input { name: 'is_return_context_embeddings'", "output { name: 'response_input_lengths'"):
        given = parse_config(f"{tensor} data_type: TYPE_INT32 dims: [ -1 ] }}", "config.pbtxt")
        given.parameters["model_type"].string_value = model_type
        with pytest.raises(ConfigError, match="is not one of the model's"):
            completed(given, "m")


def test_an_encoder_decoder_has_the_tensors_of_t5s_backend() -> None:
    result = completed(with_parameters(model_type="T5"), "m")
    check_parameters(result, kind_of(result))
    names = [tensor.name for tensor in result.input]
    assert {"input_ids", "sequence_length", "max_output_len", "ia3_tasks", "runtime_top_k", "top_p_reset_ids"} < {
        *names
    }
    assert not {"input_lengths", "request_output_len", "is_return_context_embeddings", "request_prompt_type"} & {*names}
    outputs = {tensor.name: DATATYPES["INT32"] == tensor.data_type for tensor in result.output}
    expected = {"output_ids": True, "sequence_length": True, "cum_log_probs": False, "output_log_probs": False}
    assert outputs == expected


def test_what_triton_reports_of_a_configuration_is_one_again() -> None:
    given = config(ARTICLE, "fastertransformer")
    again = completed(parse_config_json(json_format.MessageToJson(given, preserving_proto_field_name=True)), given.name)
    assert again == given


def test_without_completion_the_tensors_must_be_there() -> None:
    given = parse_config(ARTICLE, "x")
    assert len(completed(given, "fastertransformer", auto_complete=False).input) == 4
    del given.input[0]
    with pytest.raises(ConfigError, match=r"inputs \['input_ids'\] and outputs must be listed"):
        completed(given, "fastertransformer", auto_complete=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name: "m"\nnope: 3', r'config.pbtxt:2:1 : .*no field named "nope"'),
        ('max_batch_size: "x"', r"config.pbtxt:1:17 .*integer"),
        ("input [ { data_type: TYPE_FOO } ]", "no value named TYPE_FOO"),
        ('name: "other"', "unexpected directory name 'm' for model 'other', directory name must equal model name"),
        ('backend: "python"', "backend 'python' is not supported; there are fastertransformer and hasten"),
        ('platform: "tensorrt_plan"', "platform 'tensorrt_plan' is not supported"),
        ('backend: "fastertransformer" parameters { key: "kind" value { string_value: "text" } }', "'kind' 'text'"),
        ("dynamic_batching { preferred_batch_size: [ 4 ] }", "dynamic_batching.preferred_batch_size is not supported"),
        ("dynamic_batching { max_queue_delay_microseconds: 1 }", "max_queue_delay_microseconds is not supported"),
        ("dynamic_batching { preserve_ordering: true }", "preserve_ordering is not supported"),
        ("dynamic_batching { priority_queue_policy { key: 1 value {} } }", "priority_queue_policy is not supported"),
        ("dynamic_batching { default_queue_policy { timeout_action: DELAY } }", "timeout_action must be REJECT"),
        ("dynamic_batching { priority_levels: 2 }", r"default_priority_level must be from 1 to priority_levels \(2\)"),
        ("dynamic_batching { default_priority_level: 2 }", "needs priority_levels"),
        ("sequence_batching { }", "sequence_batching is not supported: every request stands for itself"),
        ('model_warmup { name: "w" }', "model_warmup is not supported: an engine warms up by itself"),
        ("optimization { eager_batching: true }", "optimization.eager_batching is not supported"),
        ("optimization { cuda { graphs: true } }", "optimization.cuda is not supported"),
        ("response_cache { enable: true }", "response_cache is not supported"),
        ('model_repository_agents { agents { name: "a" } }', "model_repository_agents is not supported"),
        ('batch_input { kind: BATCH_ELEMENT_COUNT }', "batch_input is not supported"),
        ('runtime: "x"', "runtime is not supported"),
        (TEXT + "instance_group [ { count: 2 } ]", "instance_group count 2 belongs to the model that has the engines"),
        ("instance_group [ { count: -1 } ]", "instance_group count must be at least 1, got -1"),
        ("instance_group [ { }, { } ]", "several instance_groups are not supported"),
        ("instance_group [ { kind: KIND_GPU gpus: [ 0 ] } ]", "instance_group gpus is not supported"),
        (TEXT + 'instance_group [ { kind: KIND_GPU } ]', "GPU belongs"),
        (TEXT + 'default_model_filename: "x"', "belongs to the model"),
        ('platform: "ensemble" backend: "python" ensemble_scheduling { }', "backend is not supported: its steps are"),
        ('platform: "ensemble" instance_group [ { } ] ensemble_scheduling { }', "instance_group is not supported"),
        ('platform: "ensemble" default_model_filename: "x" ensemble_scheduling { }', "default_model_filename is not"),
        ('platform: "ensemble" ensemble_scheduling { max_inflight_requests: 2 }', "max_inflight_requests is not"),
        (ENSEMBLE + 'input [ { name: "x" data_type: TYPE_FP32 dims: 1 reshape { } } ]',
         "'x' of an ensemble cannot be reshaped"),
        ("max_batch_size: -1", "max_batch_size must not be negative"),
        ("ensemble_scheduling { } backend: \"hasten\"", "ensemble_scheduling belongs to"),
        ('platform: "ensemble"', "ensemble_scheduling belongs to"),
        ('input [ { name: "x" data_type: TYPE_FP32 dims: [ 1 ] } ]', "input 'x' is not one of the model's: input_ids"),
        ('input [ { name: "input_ids" data_type: TYPE_INT32 dims: [ -1 ] } ]', "data type INT32, but the model's is"),
        ('input [ { name: "input_ids" data_type: TYPE_UINT32 dims: [ -1, -1 ] } ]', r"has dims \[-1, -1\], but"),
        ('input [ { name: "input_lengths" data_type: TYPE_UINT32 dims: [ 2 ] } ]', r"has dims \[2\], but the model's"),
        ('input [ { name: "input_ids" data_type: TYPE_UINT32 dims: [ 0 ] } ]', "each must be -1 or positive"),
        ('input [ { name: "input_ids" data_type: TYPE_UINT32 dims: [ -1 ] optional: true } ]', "cannot be optional"),
        ('input [ { name: "input_ids" data_type: TYPE_UINT32 dims: [ -1 ] format: FORMAT_NHWC } ]', "format is not"),
        ('input [ { name: "input_ids" data_type: TYPE_UINT32 dims: [ -1 ] reshape { shape: [ 1 ] } } ]', "reshaped"),
        ('input [ { name: "input_ids" data_type: 77 dims: [ -1 ] } ]', "needs a name and a data_type"),
        ('output [ { name: "output_ids" data_type: TYPE_UINT32 dims: [ -1, -1 ] label_filename: "l" } ]', "label_file"),
        (2 * 'input [ { name: "input_ids" data_type: TYPE_UINT32 dims: [ -1 ] } ]', "is listed twice"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_an_error_that_names_it(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(text)


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"nope": 1}', '{"max_batch_size": "x"}', "[" * 100_000])
def test_json_that_is_no_configuration(text: str) -> None:
    with pytest.raises(ConfigError, match="the load parameter 'config'"):
        parse_config_json(text)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"pipeline_para_size": "two"}, "'pipeline_para_size' must be a whole number, got 'two'"),
        ({"pipeline_para_size": "2", "pipeline_parallel_size": "2"}, "says the same as another one"),
        ({"int8_mode": "2"}, "'int8_mode' is '2', but must be 0 or 1: 2 is SmoothQuant, whose int8 files are not read"),
        ({"int8_mode": "1", "quantization": "int8"}, "'quantization' says the same as another one"),
        ({"model_type": "Swin"}, "'model_type' is 'Swin', but must be GPT or GPT-J or GPT-NeoX or T5"),
        ({"enable_custom_all_reduce": "2"}, "must be 0 or 1"),
        ({"tensor_para_size": "two"}, "'tensor_para_size' must be a whole number, got 'two'"),
        ({"gpu_memory_utilization": "x"}, "must be a number, got 'x'"),
        ({"enforce_eager": "yes"}, "must be true or false, got 'yes'"),
        ({"data_type": "int8"}, "data type 'int8' is not known"),
        ({"is_half": "1"}, "'is_half' is not known; there are: model_checkpoint_path"),
        ({"tensor_para_size": "2", "tensor_parallel_size": "2"}, "says the same as another one"),
        ({"kind": "text", "max_model_len": "1"}, "'max_model_len' is not known; there are: kind, token_model"),
    ],
)
def test_a_wrong_parameter_is_named(parameters: dict[str, str], message: str) -> None:
    result = completed(with_parameters(**parameters), "m")
    with pytest.raises(ConfigError, match=f"model 'm': .*{message}|{message}"):
        check_parameters(result, kind_of(result))


def test_every_option_of_the_engine_is_a_parameter_and_back() -> None:
    engine = EngineConfig.create(
        "/m", tokenizer="/t", tensor_parallel_size=4, pipeline_parallel_size=2, pipeline_layers="3,1",
        dtype="bf16", device="cuda:1", verify_checksums=False, seed=7,
        block_size=32, kv_cache_memory=1 << 30, gpu_memory_utilization=0.5, enable_prefix_caching=False, max_num_seqs=9,
        max_num_batched_tokens=99, max_model_len=512, overlap_steps=True, enforce_eager=True, load_format="dummy",
        quantization="int8",
    )  # fmt: skip
    result = completed(with_parameters(**engine_parameters(engine)), "m")
    folder = checkpoint_folder(result, Path(), Path("1"))
    assert EngineConfig.create(str(folder), **engine_options(result)) == engine
    plain = EngineConfig.create("/m")
    assert set(engine_parameters(plain)) == {
        *("tensor_para_size", "pipeline_para_size", "model_type", "model_checkpoint_path", "int8_mode"),
        "enable_custom_all_reduce",
    }


def test_an_instance_on_a_gpu_has_its_engine_there() -> None:
    assert "device" not in engine_options(config("instance_group [ { kind: KIND_CPU } ]"))  # it places itself
    group = "instance_group [ { kind: KIND_GPU } ] "
    assert engine_options(config(group))["device"] == "cuda"
    device = 'parameters {{ key: "device" value {{ string_value: "{}" }} }}'
    assert engine_options(config(group + device.format("cuda:1")))["device"] == "cuda:1"
    with pytest.raises(ConfigError, match="'device' is 'cpu', but its instance_group is KIND_GPU"):
        engine_options(config(group + device.format("cpu")))


def test_instances_are_engines_of_the_model() -> None:
    for text, count in (("", 1), ("instance_group [ { } ]", 1), ("instance_group [ { count: 3 } ]", 3)):
        assert [group.count for group in config(text).instance_group] == [count]


def test_where_the_weights_lie(tmp_path: Path) -> None:
    def at(text: str) -> Path:
        return checkpoint_folder(config(text), tmp_path, tmp_path / "1").relative_to(tmp_path)

    assert at("") == Path("1")
    assert at('default_model_filename: "bloom"') == Path("1/bloom")
    relative = 'parameters { key: "model_checkpoint_path" value { string_value: "../weights" } }'
    assert at(relative) == Path("../weights")
    two = 'parameters { key: "tensor_para_size" value { string_value: "2" } }'
    assert at(two) == Path("1")
    (tmp_path / "1" / "2-gpu").mkdir(parents=True)
    assert at(two) == Path("1/2-gpu")


def test_queue_limits() -> None:
    policy = "max_queue_size: 5 default_timeout_microseconds: 1500000"
    result = queue_limits(config(f"dynamic_batching {{ default_queue_policy {{ {policy} }} }}"), QueueLimits())
    assert (result.max_queue_size, result.default_timeout) == (5, 1.5)
    nothing = queue_limits(config(), QueueLimits())
    assert (nothing.max_queue_size, nothing.default_timeout) == (0, None)


@pytest.mark.parametrize(
    ("batching", "asked", "priority", "timeout"),
    [
        ("", {"priority": 7, "timeout": 1000}, 7, 0.001),
        ("", {}, 0, None),
        ("", {"timeout": -1}, 0, None),
        ("priority_levels: 2 default_priority_level: 2", {"priority": 1}, 1, None),
        ("priority_levels: 2 default_priority_level: 2", {}, 2, None),
        ("priority_levels: 2 default_priority_level: 2", {"priority": 9}, 2, None),
        ("default_queue_policy { allow_timeout_override: true }", {"timeout": 1000}, 0, 0.001),
        ("default_queue_policy { default_timeout_microseconds: 500 }", {"timeout": 100}, 0, None),
        (
            "default_queue_policy { default_timeout_microseconds: 500 allow_timeout_override: true }",
            {"timeout": 1000},
            0,
            0.0005,
        ),
    ],
)
def test_priority_and_timeout_as_triton_has_them(
    batching: str, asked: dict[str, int], priority: int, timeout: float | None
) -> None:
    rules = Rules(config(f"dynamic_batching {{ {batching} }}" if batching else ""))
    assert rules._queueing(asked) == Queueing(priority, timeout)


def test_a_text_model_is_decoupled_unless_it_says_otherwise() -> None:
    text = 'parameters { key: "kind" value { string_value: "text" } }'
    assert config(text).model_transaction_policy.decoupled
    assert not config(text + "model_transaction_policy { decoupled: false }").model_transaction_policy.decoupled
    with pytest.raises(ConfigError, match="max_batch_size must be 0 for a model of kind text"):
        config(text + "max_batch_size: 4")
    with pytest.raises(ConfigError, match="gives one response"):
        config(text.replace("text", "preprocessing") + "model_transaction_policy { decoupled: true }")


def test_a_configuration_survives_being_written() -> None:
    result = config(ARTICLE, "fastertransformer")
    assert completed(parse_config(text_format.MessageToString(result), "x"), "fastertransformer") == result
