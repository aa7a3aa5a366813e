"""Architectures by their Hugging Face name; a model's module is imported when it is first needed."""

import re
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hasten.core.errors import ConfigError, UnsupportedError
from hasten.core.model_config import Task

if TYPE_CHECKING:
    from hasten.models.base import Transformer

MODELS: dict[str, str] = {
    "BartForConditionalGeneration": "hasten.models.bart:BartForConditionalGeneration",
    "BertForMaskedLM": "hasten.models.bert:BertModel",
    "BertForPreTraining": "hasten.models.bert:BertModel",
    "BertForSequenceClassification": "hasten.models.bert:BertModel",
    "BertForTokenClassification": "hasten.models.bert:BertModel",
    "BertModel": "hasten.models.bert:BertModel",
    "BloomForCausalLM": "hasten.models.bloom:BloomForCausalLM",
    "BloomModel": "hasten.models.bloom:BloomForCausalLM",
    "Cohere2ForCausalLM": "hasten.models.cohere:Cohere2ForCausalLM",
    "Cohere2Model": "hasten.models.cohere:Cohere2ForCausalLM",
    "CohereForCausalLM": "hasten.models.cohere:CohereForCausalLM",
    "CohereModel": "hasten.models.cohere:CohereForCausalLM",
    "DistilBertForMaskedLM": "hasten.models.distilbert:DistilBertModel",
    "DistilBertForSequenceClassification": "hasten.models.distilbert:DistilBertModel",
    "DistilBertForTokenClassification": "hasten.models.distilbert:DistilBertModel",
    "DistilBertModel": "hasten.models.distilbert:DistilBertModel",
    "FalconForCausalLM": "hasten.models.falcon:FalconForCausalLM",
    "FalconModel": "hasten.models.falcon:FalconForCausalLM",
    "GPT2LMHeadModel": "hasten.models.gpt2:GPT2LMHeadModel",
    "GPT2Model": "hasten.models.gpt2:GPT2LMHeadModel",
    "GPTBigCodeForCausalLM": "hasten.models.gpt_bigcode:GPTBigCodeForCausalLM",
    "GPTBigCodeModel": "hasten.models.gpt_bigcode:GPTBigCodeForCausalLM",
    "GPTJForCausalLM": "hasten.models.gptj:GPTJForCausalLM",
    "GPTJModel": "hasten.models.gptj:GPTJForCausalLM",
    "GPTNeoForCausalLM": "hasten.models.gpt_neo:GPTNeoForCausalLM",
    "GPTNeoModel": "hasten.models.gpt_neo:GPTNeoForCausalLM",
    "GPTNeoXForCausalLM": "hasten.models.gpt_neox:GPTNeoXForCausalLM",
    "GPTNeoXModel": "hasten.models.gpt_neox:GPTNeoXForCausalLM",
    "Gemma2ForCausalLM": "hasten.models.gemma:Gemma2ForCausalLM",
    "Gemma2Model": "hasten.models.gemma:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": "hasten.models.gemma:Gemma3ForCausalLM",
    "Gemma3TextModel": "hasten.models.gemma:Gemma3ForCausalLM",
    "GemmaForCausalLM": "hasten.models.gemma:GemmaForCausalLM",
    "GemmaModel": "hasten.models.gemma:GemmaForCausalLM",
    "GptOssForCausalLM": "hasten.models.gpt_oss:GptOssForCausalLM",
    "GptOssModel": "hasten.models.gpt_oss:GptOssForCausalLM",
    "LlamaForCausalLM": "hasten.models.llama:LlamaForCausalLM",
    "LlamaModel": "hasten.models.llama:LlamaForCausalLM",
    "MBartForConditionalGeneration": "hasten.models.bart:MBartForConditionalGeneration",
    "MPNetForMaskedLM": "hasten.models.mpnet:MPNetModel",
    "MPNetForSequenceClassification": "hasten.models.mpnet:MPNetModel",
    "MPNetForTokenClassification": "hasten.models.mpnet:MPNetModel",
    "MPNetModel": "hasten.models.mpnet:MPNetModel",
    "MPTForCausalLM": "hasten.models.mpt:MptForCausalLM",
    "MT5ForConditionalGeneration": "hasten.models.t5:MT5ForConditionalGeneration",
    "MistralForCausalLM": "hasten.models.mistral:MistralForCausalLM",
    "MistralModel": "hasten.models.mistral:MistralForCausalLM",
    "MixtralForCausalLM": "hasten.models.mixtral:MixtralForCausalLM",
    "MixtralModel": "hasten.models.mixtral:MixtralForCausalLM",
    "ModernBertForMaskedLM": "hasten.models.modernbert:ModernBertModel",
    "ModernBertForSequenceClassification": "hasten.models.modernbert:ModernBertModel",
    "ModernBertForTokenClassification": "hasten.models.modernbert:ModernBertModel",
    "ModernBertModel": "hasten.models.modernbert:ModernBertModel",
    "MptForCausalLM": "hasten.models.mpt:MptForCausalLM",
    "MptModel": "hasten.models.mpt:MptForCausalLM",
    "OPTForCausalLM": "hasten.models.opt:OPTForCausalLM",
    "OPTModel": "hasten.models.opt:OPTForCausalLM",
    "Olmo2ForCausalLM": "hasten.models.olmo2:Olmo2ForCausalLM",
    "Olmo2Model": "hasten.models.olmo2:Olmo2ForCausalLM",
    "Olmo3ForCausalLM": "hasten.models.olmo3:Olmo3ForCausalLM",
    "Olmo3Model": "hasten.models.olmo3:Olmo3ForCausalLM",
    "Phi3ForCausalLM": "hasten.models.phi3:Phi3ForCausalLM",
    "Phi3Model": "hasten.models.phi3:Phi3ForCausalLM",
    "PhiForCausalLM": "hasten.models.phi:PhiForCausalLM",
    "PhiModel": "hasten.models.phi:PhiForCausalLM",
    "Qwen2ForCausalLM": "hasten.models.qwen2:Qwen2ForCausalLM",
    "Qwen2Model": "hasten.models.qwen2:Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM": "hasten.models.qwen2_moe:Qwen2MoeForCausalLM",
    "Qwen2MoeModel": "hasten.models.qwen2_moe:Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM": "hasten.models.qwen3:Qwen3ForCausalLM",
    "Qwen3Model": "hasten.models.qwen3:Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM": "hasten.models.qwen3_moe:Qwen3MoeForCausalLM",
    "Qwen3MoeModel": "hasten.models.qwen3_moe:Qwen3MoeForCausalLM",
    "RWForCausalLM": "hasten.models.falcon:FalconForCausalLM",
    "RWModel": "hasten.models.falcon:FalconForCausalLM",
    "RobertaForMaskedLM": "hasten.models.roberta:RobertaModel",
    "RobertaForSequenceClassification": "hasten.models.roberta:RobertaModel",
    "RobertaForTokenClassification": "hasten.models.roberta:RobertaModel",
    "RobertaModel": "hasten.models.roberta:RobertaModel",
    "SeedOssForCausalLM": "hasten.models.seed_oss:SeedOssForCausalLM",
    "SeedOssModel": "hasten.models.seed_oss:SeedOssForCausalLM",
    "SmolLM3ForCausalLM": "hasten.models.smollm3:SmolLM3ForCausalLM",
    "SmolLM3Model": "hasten.models.smollm3:SmolLM3ForCausalLM",
    "StableLmForCausalLM": "hasten.models.stablelm:StableLmForCausalLM",
    "StableLmModel": "hasten.models.stablelm:StableLmForCausalLM",
    "Starcoder2ForCausalLM": "hasten.models.starcoder2:Starcoder2ForCausalLM",
    "Starcoder2Model": "hasten.models.starcoder2:Starcoder2ForCausalLM",
    "T5ForConditionalGeneration": "hasten.models.t5:T5ForConditionalGeneration",
    "T5WithLMHeadModel": "hasten.models.t5:T5ForConditionalGeneration",
    "UMT5ForConditionalGeneration": "hasten.models.t5:UMT5ForConditionalGeneration",
    "XLMRobertaForMaskedLM": "hasten.models.roberta:RobertaModel",
    "XLMRobertaForSequenceClassification": "hasten.models.roberta:RobertaModel",
    "XLMRobertaForTokenClassification": "hasten.models.roberta:RobertaModel",
    "XLMRobertaModel": "hasten.models.roberta:RobertaModel",
}


_MODEL_TYPES: dict[str, str] = {
    "RefinedWeb": "FalconForCausalLM",
    "RefinedWebModel": "FalconForCausalLM",
    "bart": "BartForConditionalGeneration",
    "bert": "BertModel",
    "bloom": "BloomForCausalLM",
    "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "distilbert": "DistilBertModel",
    "falcon": "FalconForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_bigcode": "GPTBigCodeForCausalLM",
    "gpt_neo": "GPTNeoForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "gptj": "GPTJForCausalLM",
    "llama": "LlamaForCausalLM",
    "mbart": "MBartForConditionalGeneration",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "modernbert": "ModernBertModel",
    "mpnet": "MPNetModel",
    "mpt": "MptForCausalLM",
    "mt5": "MT5ForConditionalGeneration",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "opt": "OPTForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "roberta": "RobertaModel",
    "seed_oss": "SeedOssForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration",
    "xlm-roberta": "XLMRobertaModel",
}
"""Architectures by `model_type`, for a config.json that names no architecture."""


def architecture_of(raw: Mapping[str, Any]) -> str:
    """The architecture that a config.json names, or its `model_type` stands for.

    ConfigError where it names none, UnsupportedError where hasten has no such model.
    """
    named, model_type = raw.get("architectures"), raw.get("model_type")
    if named:
        if not isinstance(named, list):
            raise ConfigError(f"architectures {named!r} is not a list of names")
        return _known("architecture", str(named[0]), MODELS)
    if not model_type:
        raise ConfigError(
            'has neither "architectures" nor "model_type", which say what the model is: take config.json from where '
            "the model was published, or add them (docs/models.md has the names)"
        )
    return _MODEL_TYPES[_known("model type", str(model_type), _MODEL_TYPES)]


_ENCODERS = frozenset({"bert", "distilbert", "modernbert", "mpnet", "roberta"})
"""Modules of models that generate no text."""
_ENCODER_DECODERS = frozenset({"bart", "t5"})
"""Modules of models whose encoder reads the prompt."""


def has_encoder(architecture: str) -> bool:
    """Whether the models of an architecture are encoder-decoders."""
    return _module(architecture) in _ENCODER_DECODERS


def task_of(architecture: str) -> Task:
    """What the models of an architecture give, unless other files of the checkpoint say otherwise."""
    if architecture.endswith("ForTokenClassification"):
        return "token_classify"
    if architecture.endswith("ForSequenceClassification"):
        return "classify"
    return "embed" if _module(architecture) in _ENCODERS else "generate"


def _module(architecture: str) -> str:
    return MODELS[architecture].partition(":")[0].rpartition(".")[2]


_OTHER_BUILDS: tuple[tuple[str, str], ...] = (
    (r"deepseek_?v?[23]|minicpm3|kimi", "a model with latent attention"),
    (r"mamba|rwkv|falcon_?h1|jamba|zamba|bamba|hybrid|qwen3_?next|nemotron_?h|lfm2", "a model with recurrent layers"),
    (r"moe|mixtral|dbrx|grok|olmoe|arctic|llama4(_text|forcausal)", "a mixture of experts of another build"),
    (r"t5|bart|pegasus|marian|m2m|whisper|led(for|$)", "an encoder-decoder"),
    (r"bert|electra|mpnet|roberta|xlm|nomic|gte|jina", "an encoder of another build, or with another head"),
    (r"sequenceclassification|tokenclassification", "a classifier of another build"),
    (r"conditionalgeneration|llava|vl(for|model|$|_)|vision|idefics|mllama|paligemma", "a model of images and text"),
)
"""What architectures are that are built otherwise than any that hasten has, by a part of their name in lower case."""


def _known(what: str, name: str, table: Mapping[str, str]) -> str:
    if name not in table:
        found = (build for pattern, build in _OTHER_BUILDS if re.search(pattern, name.lower()))
        build = next((f" ({build})" for build in found), "")
        raise UnsupportedError(
            f"{what} {name!r}{build} is not supported; supported are {', '.join(sorted(table, key=str.lower))} "
            "(docs/adding-a-model.md says how to add another)"
        )
    return name


def model_class(architecture: str) -> "type[Transformer]":
    """The class for an architecture of Hugging Face; UnsupportedError where hasten has none."""
    _known("architecture", architecture, MODELS)
    module, name = MODELS[architecture].split(":")
    found: type[Transformer] = getattr(import_module(module), name)
    return found
