"""Small random encoder-decoders as transformers saves them, and what its `generate` answers."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

_SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "d_model": 64,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_T5: dict[str, Any] = {
    **_SIZES,
    # heads that are not as wide together as the model, and stacks of different depths
    "d_kv": 8,
    "num_heads": 6,
    "d_ff": 96,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "initializer_factor": 1.5,
}
_BART: dict[str, Any] = {
    "vocab_size": 200,
    "d_model": 48,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 80,
    "max_position_embeddings": 420,
    "decoder_start_token_id": 2,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": 2,
    "init_std": 0.2,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", _T5),
    "flan-t5": ("T5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": (
        "MT5",
        {
            **_T5,
            "tie_word_embeddings": False,
            "relative_attention_num_buckets": 16,
            "relative_attention_max_distance": 40,
        },
    ),
    "umt5": ("UMT5", _T5),
    "bart": ("Bart", _BART),
    "mbart": ("MBart", {**_BART, "scale_embedding": True, "activation_function": "relu"}),
}
"""Families, as transformers' classes are called, and their configurations."""


def save_encoder_decoder(folder: Path, kind: str, **config: Any) -> Path:
    """A model of a kind, with random weights and, for those with one of their own, another head than the embedding."""
    import transformers

    family, options = KINDS[kind]
    torch.manual_seed(0)
    settings = getattr(transformers, f"{family}Config")(**options | config)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    if options.get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.2)
        model.config.tie_word_embeddings = False
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
        model.generation_config.forced_bos_token_id = 7
    model.save_pretrained(folder)
    return folder


@cache
def theirs(folder: Path) -> Any:
    """Transformers' model in fp32."""
    from transformers import AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()


def their_tokens(folder: Path, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[list[int]]]:
    """What `generate` answers to each prompt alone, all sequences that it returns, behind their first token."""
    found = []
    for prompt in prompts:
        with torch.inference_mode():
            output = theirs(folder).generate(torch.tensor([prompt]), do_sample=False, **options)
        found.append([without_padding(folder, row[1:]) for row in output.tolist()])
    return found


def without_padding(folder: Path, tokens: list[int]) -> list[int]:
    """The tokens but those at the end that may fill up a row of transformers'."""
    while tokens and tokens[-1] == theirs(folder).config.pad_token_id:
        tokens = tokens[:-1]
    return tokens


def their_logprobs(folder: Path, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """Log-probabilities [t, v] of each token of an output."""
    decoder = torch.tensor([[theirs(folder).config.decoder_start_token_id, *tokens[:-1]]])
    with torch.inference_mode():
        logits = theirs(folder)(input_ids=torch.tensor([list(prompt)]), decoder_input_ids=decoder).logits
    found: torch.Tensor = logits[0].float().log_softmax(-1)
    return found
