"""The tensors that each kind of model takes and gives. Names, types and shapes are FasterTransformer's, vLLM's and
TensorRT-LLM's; shapes are without the batch axis.
"""

from dataclasses import dataclass, replace
from enum import Enum

from tritonclient.grpc import model_config_pb2

from hasten.core.types import PoolingTask

DATATYPES = {name.removeprefix("TYPE_"): number for name, number in model_config_pb2.DataType.items()}
DATATYPES["BYTES"] = DATATYPES.pop("STRING")
"""Number in the configuration of each data type, by the name that the protocol gives it."""
_NAMES = {number: name for name, number in DATATYPES.items()}


def datatype_name(number: int) -> str:
    """A configuration's data type as the protocol calls it: TYPE_STRING is BYTES."""
    return _NAMES[number]


class Kind(Enum):
    """What a model does."""

    TOKEN = "token"
    """Token ids to token ids: an engine of its own, behind FasterTransformer's tensors."""
    TEXT = "text"
    """Text to text, with the engine of a token model, behind vLLM's and TensorRT-LLM's tensors."""
    EMBEDDING = "embedding"
    """Texts to vectors, with the engine of a token model."""
    CLASSIFICATION = "classification"
    """Texts, or pairs of texts, to scores by label, with the engine of a token model."""
    TOKEN_CLASSIFICATION = "token-classification"
    """Texts to scores of each of their tokens by label, with the engine of a token model."""
    PREPROCESSING = "preprocessing"
    POSTPROCESSING = "postprocessing"
    ENSEMBLE = "ensemble"


POOLING_KINDS: dict[Kind, PoolingTask] = {
    Kind.EMBEDDING: "embed",
    Kind.CLASSIFICATION: "classify",
    Kind.TOKEN_CLASSIFICATION: "token_classify",
}
"""Kinds of text models that generate none, and what they make of texts."""
TEXT_KINDS = (Kind.TEXT, *POOLING_KINDS)
"""Kinds of models that take texts for a token model's engine."""


@dataclass(frozen=True)
class TensorRule:
    """One tensor of an interface."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    optional: bool = False
    scalar: bool = False
    """Whether FasterTransformer's configuration drops the axis: `reshape { shape: [] }`."""

    def as_input(self) -> model_config_pb2.ModelInput:
        """As a configuration has it."""
        tensor = model_config_pb2.ModelInput(
            name=self.name, data_type=DATATYPES[self.datatype], dims=self.dims, optional=self.optional
        )
        if self.scalar:
            tensor.reshape.SetInParent()
        return tensor

    def as_output(self) -> model_config_pb2.ModelOutput:
        """As a configuration has it."""
        return model_config_pb2.ModelOutput(name=self.name, data_type=DATATYPES[self.datatype], dims=self.dims)


@dataclass(frozen=True)
class Interface:
    """All tensors of one kind of model."""

    inputs: tuple[TensorRule, ...]
    outputs: tuple[TensorRule, ...]
    max_batch_size: int
    """What a configuration without one gets; 0: no batch axis, and none can be had."""


def _options(datatype: str, names: str, *, scalar: bool) -> tuple[TensorRule, ...]:
    return tuple(TensorRule(name, datatype, (1,), optional=True, scalar=scalar) for name in names.split())


_WORDS = (2, -1)
_TOKEN = Interface(
    inputs=(
        TensorRule("input_ids", "UINT32", (-1,)),
        TensorRule("input_lengths", "UINT32", (1,), scalar=True),
        TensorRule("request_output_len", "UINT32", (-1,)),
        *_options("UINT32", "runtime_top_k", scalar=True),
        *_options("FP32", "runtime_top_p beam_search_diversity_rate temperature len_penalty", scalar=True),
        *_options("FP32", "repetition_penalty presence_penalty", scalar=True),
        *_options("UINT32", "min_length", scalar=True),
        *_options("UINT64", "random_seed", scalar=True),
        *_options("BOOL", "is_return_log_probs is_return_context_embeddings", scalar=True),
        *_options("UINT32", "beam_width start_id end_id", scalar=True),
        TensorRule("stop_words_list", "INT32", _WORDS, optional=True),
        TensorRule("bad_words_list", "INT32", _WORDS, optional=True),
        *_options("UINT32", "prompt_learning_task_name_ids", scalar=True),
        TensorRule("request_prompt_embedding", "FP16", (-1, -1), optional=True),
        *_options("UINT32", "request_prompt_lengths request_prompt_type", scalar=True),
        *_options("FP32", "top_p_decay top_p_min", scalar=True),
        *_options("UINT32", "top_p_reset_ids", scalar=True),
    ),
    outputs=(
        TensorRule("output_ids", "UINT32", (-1, -1)),
        TensorRule("sequence_length", "UINT32", (-1,)),
        TensorRule("response_input_lengths", "INT32", (-1,)),
        TensorRule("cum_log_probs", "FP32", (-1,)),
        TensorRule("output_log_probs", "FP32", (-1, -1)),
        TensorRule("context_embeddings", "FP32", (-1, -1)),
    ),
    max_batch_size=1024,
)
_NOT_ROTARY = frozenset({"is_return_context_embeddings", "context_embeddings", "response_input_lengths"})
"""What FasterTransformer's backends of GPT-J and GPT-NeoX lack."""
_ROTARY_TOKEN = Interface(
    inputs=tuple(rule for rule in _TOKEN.inputs if rule.name not in _NOT_ROTARY),
    outputs=tuple(rule for rule in _TOKEN.outputs if rule.name not in _NOT_ROTARY),
    max_batch_size=_TOKEN.max_batch_size,
)
_T5_NAMES = {"input_lengths": "sequence_length", "request_output_len": "max_output_len"}
"""What FasterTransformer's backend of T5 calls inputs, by their names in GPT's."""
_NOT_T5 = _NOT_ROTARY | {"request_output_len", "input_lengths", "request_prompt_type"}
_T5_TOKEN = Interface(
    inputs=(
        *(
            replace(rule, name=_T5_NAMES.get(rule.name, rule.name), dims=(1,), scalar=True)
            for rule in _TOKEN.inputs
            if rule.name in _T5_NAMES
        ),
        *(rule for rule in _TOKEN.inputs if rule.name not in _NOT_T5),
        *_options("INT32", "ia3_tasks", scalar=True),
    ),
    outputs=tuple(
        replace(rule, datatype="INT32" if rule.datatype == "UINT32" else rule.datatype)
        for rule in _TOKEN.outputs
        if rule.name not in _NOT_T5
    ),
    max_batch_size=_TOKEN.max_batch_size,
)
_ENCODER_INPUTS = (
    TensorRule("input_ids", "UINT32", (-1,)),
    TensorRule("sequence_lengths", "INT32", (1,), scalar=True),
    TensorRule("token_type_ids", "UINT32", (-1,), optional=True),
)


def _encoder(*outputs: TensorRule) -> Interface:
    return Interface(inputs=_ENCODER_INPUTS, outputs=outputs, max_batch_size=1024)


DEFAULT_MODEL_TYPE = "GPT"
ENCODER_DECODER_TYPE = "T5"
"""Parameter `model_type` of models whose encoder reads the prompt: outputs have generated tokens alone."""
INPUT_NAMES: dict[str, dict[str, str]] = {ENCODER_DECODER_TYPE: _T5_NAMES}
"""What inputs are called where not as in GPT's backend, by `model_type`."""
ENCODER_TYPES: dict[PoolingTask, str] = {
    "embed": "bert",
    "classify": "classifier",
    "token_classify": "token-classifier",
}
"""Parameter `model_type` of models that generate no text, by their own task."""
MODEL_TYPES = {
    DEFAULT_MODEL_TYPE: _TOKEN,
    "GPT-J": _ROTARY_TOKEN,
    "GPT-NeoX": _ROTARY_TOKEN,
    ENCODER_DECODER_TYPE: _T5_TOKEN,
    "bert": _encoder(
        TensorRule("output_hidden_state", "FP32", (-1, -1)), TensorRule("output_embedding", "FP32", (-1,))
    ),
    "classifier": _encoder(TensorRule("output_scores", "FP32", (-1,))),
    "token-classifier": _encoder(TensorRule("output_scores", "FP32", (-1, -1))),
}
"""Tensors of a token model by parameter `model_type`: FasterTransformer's backends, and those of classifiers."""
_PREPROCESSING = Interface(
    inputs=(
        TensorRule("QUERY", "BYTES", (-1,)),
        TensorRule("BAD_WORDS_DICT", "BYTES", (-1,), optional=True),
        TensorRule("STOP_WORDS_DICT", "BYTES", (-1,), optional=True),
        TensorRule("REQUEST_OUTPUT_LEN", "UINT32", (-1,)),
    ),
    outputs=(
        TensorRule("INPUT_ID", "UINT32", (-1,)),
        TensorRule("REQUEST_INPUT_LEN", "UINT32", (1,)),
        TensorRule("BAD_WORDS_IDS", "INT32", _WORDS),
        TensorRule("STOP_WORDS_IDS", "INT32", _WORDS),
        TensorRule("REQUEST_OUTPUT_LEN", "UINT32", (-1,)),
    ),
    max_batch_size=1024,
)
_POSTPROCESSING = Interface(
    inputs=(
        TensorRule("TOKENS_BATCH", "UINT32", (-1, -1)),
        TensorRule("RESPONSE_INPUT_LENGTHS", "INT32", (-1,), optional=True),
        TensorRule("SEQUENCE_LENGTH", "UINT32", (-1,), optional=True),
    ),
    outputs=(TensorRule("OUTPUT", "BYTES", (-1,)),),
    max_batch_size=1024,
)
VLLM_INPUTS = (
    *_options("BYTES", "sampling_parameters", scalar=False),
    *_options("BOOL", "return_finish_reason return_cumulative_logprob return_logprobs", scalar=False),
    *_options("BOOL", "return_num_input_tokens return_num_output_tokens", scalar=False),
)
"""What only vLLM's backend has."""
TENSORRT_LLM_INPUTS = (
    *_options("INT32", "max_tokens", scalar=False),
    TensorRule("bad_words", "BYTES", (-1,), optional=True),
    TensorRule("stop_words", "BYTES", (-1,), optional=True),
    *_options("INT32", "end_id pad_id top_k min_length beam_width early_stopping num_return_sequences", scalar=False),
    *_options("FP32", "top_p temperature length_penalty repetition_penalty", scalar=False),
    *_options("FP32", "presence_penalty frequency_penalty beam_search_diversity_rate", scalar=False),
    *_options("BYTES", "guided_decoding_guide_type guided_decoding_guide", scalar=False),
    *_options("UINT64", "random_seed seed", scalar=False),
    *_options("BOOL", "return_log_probs", scalar=False),
)
"""What only TensorRT-LLM has."""
_TEXT = Interface(
    inputs=(
        TensorRule("text_input", "BYTES", (1,)),
        *_options("BOOL", "stream exclude_input_in_output", scalar=False),
        *VLLM_INPUTS,
        *TENSORRT_LLM_INPUTS,
    ),
    outputs=(
        TensorRule("text_output", "BYTES", (-1,)),
        TensorRule("finish_reason", "BYTES", (-1,)),
        TensorRule("cumulative_logprob", "FP32", (-1,)),
        TensorRule("logprobs", "BYTES", (-1,)),
        TensorRule("num_input_tokens", "UINT32", (1,)),
        TensorRule("num_output_tokens", "UINT32", (-1,)),
        TensorRule("cum_log_probs", "FP32", (-1,)),
        TensorRule("output_log_probs", "FP32", (-1, -1)),
    ),
    max_batch_size=0,
)
_COUNTS = _options("BOOL", "return_num_input_tokens return_num_output_tokens", scalar=False)
_COUNTED = (TensorRule("num_input_tokens", "UINT32", (-1,)), TensorRule("num_output_tokens", "UINT32", (-1,)))
_EMBEDDING = Interface(
    inputs=(
        TensorRule("text_input", "BYTES", (-1,), optional=True),
        *_options("BYTES", "embedding_request", scalar=False),
        *_COUNTS,
    ),
    outputs=(TensorRule("text_output", "BYTES", (-1,)), TensorRule("embedding", "FP32", (-1, -1)), *_COUNTED),
    max_batch_size=0,
)


def _classification(*dims: int) -> Interface:
    pair = TensorRule("text_pair", "BYTES", (-1,), optional=True)
    return Interface(
        inputs=(TensorRule("text_input", "BYTES", (-1,)), pair, *_COUNTS),
        outputs=(TensorRule("text_output", "BYTES", (-1,)), TensorRule("scores", "FP32", dims), *_COUNTED),
        max_batch_size=0,
    )


INTERFACES = {
    Kind.TOKEN: _TOKEN,
    Kind.TEXT: _TEXT,
    Kind.EMBEDDING: _EMBEDDING,
    Kind.CLASSIFICATION: _classification(-1, -1),
    Kind.TOKEN_CLASSIFICATION: _classification(-1, -1, -1),
    Kind.PREPROCESSING: _PREPROCESSING,
    Kind.POSTPROCESSING: _POSTPROCESSING,
}
"""An ensemble has none of its own: its configuration says what it takes and gives. A token model has the tensors of its
`model_type`, here the default's."""
