"""Arguments of vLLM that hasten lacks: accepted for values that choose nothing here, else refused with a reason."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hasten.core.errors import InvalidRequestError

Accepted = Mapping[str, tuple[tuple[object, ...] | None, str]]
"""By name: the values that ask for what hasten does anyway (None: any value), and why others are refused."""
_Method = TypeVar("_Method", bound=Callable[..., Any])


def refusal(accepted: Accepted, name: str, value: object) -> str | None:
    """Why one of these arguments is refused with a value; None where it is accepted."""
    values, reason = accepted[name]
    if values is None:
        return None
    plain = isinstance(value, int | str | list | tuple | dict | None)  # others may not say whether they are equal
    return None if plain and value in values else reason


def with_accepted_names(accepted: Accepted) -> Callable[[_Method], _Method]:
    """Let a method take arguments that it does not have; InvalidRequestError for those that are refused."""

    def decorate(method: _Method) -> _Method:
        @functools.wraps(method)
        def checked(*args: Any, **options: Any) -> Any:
            for name in accepted.keys() & options.keys():
                if (reason := refusal(accepted, name, options.pop(name))) is not None:
                    raise InvalidRequestError(f"{name} is not supported: {reason}")
            return method(*args, **options)

        return checked  # type: ignore[return-value]  # it has the method's own arguments, too

    return decorate


_TASK = "what a model gives follows from its checkpoint; leave it out"
WITHOUT_EFFECT: Accepted = {
    "enable_chunked_prefill": ((True, None), "long prompts are computed in chunks; see max_num_batched_tokens"),
    "disable_log_stats": (None, ""),
    "disable_custom_all_reduce": (None, ""),
    "trust_remote_code": (None, ""),
    "swap_space": (None, ""),
    "max_seq_len_to_capture": (None, ""),
    "cpu_offload_gb": ((0,), "all weights stay on the device"),
    "data_parallel_size": ((1,), "this is one engine; hasten serve --data-parallel-size runs several"),
    "enable_lora": ((False, None), "adapters are not supported; merge them into the checkpoint"),
    "skip_tokenizer_init": ((False,), "a folder without a tokenizer does without one"),
    "enable_auto_tool_choice": (None, ""),
    "tokenizer_mode": (("auto", "fast"), "the tokenizer is the checkpoint's tokenizer.json"),
    "scheduling_policy": (("fcfs",), "requests begin as they come; itl_target and LLM.generate may change that"),
    "speculative_config": ((None,), "there is no speculative decoding"),
    "max_logprobs": (None, ""),
    "limit_mm_per_prompt": (None, ""),
    "task": (("auto", None), _TASK),
    "runner": (("auto", None), _TASK),
    "convert": (("auto", "none", None), _TASK),
    "generation_config": (
        ("vllm", None),
        "SamplingParams have defaults of their own; LLM.get_default_sampling_params has the checkpoint's",
    ),
    "override_generation_config": (({}, None), "give SamplingParams"),
    "hf_overrides": (({}, None), "change the checkpoint's config.json"),
    "rope_scaling": (({}, None), "change the checkpoint's config.json"),
    "rope_theta": ((None,), "change the checkpoint's config.json"),
    "logits_processors": (([], (), None), "use logit_bias, allowed_token_ids, bad_words or structured_outputs"),
    "compilation_config": (
        ({}, None),
        "what a device needs compiled or captured is; enforce_eager does without graphs",
    ),
    "structured_outputs_config": (
        ({"backend": "auto"}, {"backend": "guidance"}, {}, None),
        "grammars are llguidance's; max_grammar_seconds and max_grammar_memory bound them",
    ),
    "num_gpu_blocks_override": ((None,), "give kv_cache_memory"),
    "distributed_executor_backend": (
        ("mp", "uni", None),
        "ranks are processes that LLM starts, or torchrun or mpirun",
    ),
}
"""Of engines."""

_NOTHING = (None,)
_OF_PROMPTS: Accepted = {
    "lora_request": (_NOTHING, "merge the adapter into the checkpoint"),
    "tokenization_kwargs": ((None, {}), "give the token ids of texts that are tokenized otherwise"),
}
OF_TEXTS: Accepted = {
    **_OF_PROMPTS,
    "prompt_token_ids": (_NOTHING, "give token ids as prompts, a list for each"),
}
"""Of methods that take prompts."""
OF_SCORE: Accepted = {
    **_OF_PROMPTS,
    "chat_template": (_NOTHING, "the tokenizer says how two texts become one"),
    "pooling_params": (_NOTHING, "truncate_prompt_tokens is an argument of its own"),
}
"""Of `score`."""
OF_GENERATE: Accepted = {
    **OF_TEXTS,
    "priority": ((None, 0), "requests begin as they come, or with the greatest max_tokens"),
    "trace_headers": (_NOTHING, "a server takes them as headers of its requests"),
    "data_parallel_rank": (_NOTHING, "this is one engine"),
}
"""Of `generate`."""
OF_CHAT: Accepted = {
    **_OF_PROMPTS,
    "chat_template_content_format": ((None, "auto", "string"), "templates get the content of a message as one text"),
    "mm_processor_kwargs": ((None, {}), "models read text alone"),
}
"""Of `chat`."""
