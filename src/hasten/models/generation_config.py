"""Hugging Face's generation_config.json, whose settings old checkpoints have in config.json.

hasten applies the end tokens, and the first and last tokens of encoder-decoders' outputs; all else is a request's own.
A warning names other settings that change what transformers generates.
"""

from collections.abc import Mapping
from typing import Any

_ANY = object()
"""Stands for every value: a setting that a request of hasten always brings itself, or that changes no token."""
_ONLY_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")

TOKENS_OF_OUTPUTS = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
"""Settings of encoder-decoders that are applied to each request."""
SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "do_sample": (False,),
    "temperature": (1,),
    "top_k": (0, 50),
    "top_p": (1,),
    "min_p": (0,),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "penalty_alpha": (0,),
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "dola_layers": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_decoder_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": ([], {}),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "token_healing": (False,),
    "watermarking_config": (),
    "renormalize_logits": (False,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "max_time": (),
    "stop_strings": ([],),
    "max_length": (_ANY,),
    "max_new_tokens": (_ANY,),
    "num_return_sequences": (_ANY,),
    "remove_invalid_values": (_ANY,),
}
"""Settings that change what transformers generates, each with the values that change nothing."""

_HARMLESS = frozenset(
    """
    _commit_hash _from_model_config transformers_version bos_token_id eos_token_id pad_token_id decoder_start_token_id
    use_cache cache_implementation cache_config max_cache_len return_legacy_cache use_mtp low_memory
    output_attentions output_hidden_states output_scores output_logits return_dict_in_generate
    is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit assistant_lookbehind target_lookbehind
    assistant_ensemble_weight speculation_type compile_config disable_compile continuous_batching_config
    prefill_chunk_size
    """.split()
)
"""Keys that change nothing that is generated, and those that name tokens, which are read elsewhere."""


def unknown(raw: Mapping[str, Any]) -> list[str]:
    """Keys of a generation_config.json of which hasten does not know what they change, sorted."""
    return sorted(
        name for name, value in raw.items() if value is not None and name not in SETTINGS and name not in _HARMLESS
    )


def not_applied(raw: Mapping[str, Any], *, has_encoder: bool = False) -> list[str]:
    """Names of the settings that would act in transformers and do not in hasten; `has_encoder`: in such a model."""
    inert: tuple[str, ...] = () if raw.get("do_sample") else _ONLY_SAMPLING
    inert += TOKENS_OF_OUTPUTS if has_encoder else ()
    return [
        name
        for name, neutral in SETTINGS.items()
        if raw.get(name) is not None and name not in inert and raw[name] not in neutral and _ANY not in neutral
    ]
