"""Small random encoders with a tokenizer, saved by transformers, and what transformers makes of texts with them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tests.conftest import WORDS, stories
from torch import Tensor

TEXTS = [*stories(12, seed=3), "the", "a café", "of"]
"""Of 1 to about 100 tokens besides those that begin and end each."""
_LIKE_ROBERTA = ("Roberta", "XLMRoberta", "MPNet")
_SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 320,
}
_DISTILBERT = {"dim": 48, "n_layers": 3, "n_heads": 4, "hidden_dim": 80, "max_position_embeddings": 320}


def _save_tokenizer(folder: Path, family: str) -> int:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789.,'é"))
    pieces = [word.lower() for word in WORDS if len(word) < 7] + letters + [f"##{letter}" for letter in letters]
    roberta = family in _LIKE_ROBERTA
    mask = "<mask>" if roberta else "[MASK]"
    special = ["<s>", "<pad>", "</s>", "<unk>"] if roberta else ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys([*special, *pieces, mask]))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>" if roberta else "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if roberta:
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token=mask, **names).save_pretrained(folder)
    return len(vocab)


def save_encoder(folder: Path, family: str, head: str = "Model", **config: Any) -> Path:
    """A model of `family` with this head, as transformers' classes are called."""
    import transformers

    sizes = _DISTILBERT if family == "DistilBert" else _SIZES
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2} if family in _LIKE_ROBERTA else {"pad_token_id": 0}
    options = {**sizes, **ids, "initializer_range": 0.2, "vocab_size": _save_tokenizer(folder, family), **config}
    result = getattr(transformers, f"{family}Config")(**options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}{head}")(result)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases too: a swapped one is invisible where all are alike
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def save_pooling(folder: Path, modules: Sequence[tuple[str, str, dict[str, Any]]], /, **files: Any) -> None:
    """What sentence-transformers writes: modules, each a class, a folder and its config, and files by their names."""
    entries = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for number, (kind, path, raw) in enumerate(modules, start=1):
        kind_path = f"sentence_transformers.models.{kind}"
        entries.append({"idx": number, "name": str(number), "path": path, "type": kind_path})
        (folder / path).mkdir(exist_ok=True)
        if raw:
            (folder / path / "config.json").write_text(json.dumps(raw))
    (folder / "modules.json").write_text(json.dumps(entries))
    for name, raw in files.items():
        (folder / f"{name}.json").write_text(json.dumps(raw))


def theirs(folder: Path, head: str = "Model") -> Any:
    """Transformers' model in fp32."""
    import transformers

    return getattr(transformers, f"Auto{head}").from_pretrained(folder, dtype=torch.float32).eval()


def their_output(model: Any, ids: Sequence[int], type_ids: Sequence[int] = ()) -> Tensor:
    """Hidden states [t, h] or logits of one text alone: no padding."""
    types = {"token_type_ids": torch.tensor([list(type_ids)])} if type_ids else {}
    with torch.inference_mode():
        found = model(input_ids=torch.tensor([list(ids)]), **types)
    output: Tensor = (found.logits if "logits" in found else found.last_hidden_state)[0]
    return output
