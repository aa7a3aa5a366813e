"""FasterTransformer's folders, written with numpy from the documented layouts alone, from what transformers saved."""

import json
from collections.abc import Callable, Mapping
from configparser import ConfigParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]
Files = dict[str, bytes]
TYPES: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16}


class _Folder:
    """A folder in memory. Arrays come in the stored layout, (in, out)."""

    def __init__(self, folder: Path, ranks: int, dtype: str, prefix: str = "model.") -> None:
        from safetensors.torch import load_file

        state = load_file(folder / "model.safetensors")
        self.raw: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.state = {name: tensor.float().numpy() for name, tensor in state.items()}
        self.ranks, self.dtype, self.prefix = ranks, dtype, prefix
        self.files: Files = {}

    def get(self, name: str) -> Array:
        """A tensor of the checkpoint in the type of the files."""
        return np.asarray(self.state[name].astype(TYPES[self.dtype]))

    def whole(self, name: str, array: Array) -> None:
        self.files[f"{self.prefix}{name}.bin"] = array.astype(TYPES[self.dtype]).tobytes()

    def split(self, name: str, array: Array, axis: int) -> None:
        for rank, part in enumerate(np.split(array, self.ranks, axis=axis)):
            self.files[f"{self.prefix}{name}.{rank}.bin"] = part.astype(TYPES[self.dtype]).tobytes()

    def norm(self, name: str, hf: str) -> None:
        for kind in ("weight", "bias"):
            self.whole(f"{name}.{kind}", self.get(f"{hf}.{kind}"))

    def ini(self, section: str, **values: object) -> None:
        lines = [f"[{section}]", *(f"{key}={value}" for key, value in values.items())]
        self.files["config.ini"] = ("\n".join(lines) + "\n\n").encode()

    def parsed(self, **sections: Mapping[str, object]) -> None:
        """As configparser writes sections of its own accord."""
        parser, text = ConfigParser(interpolation=None), StringIO()
        parser.read_dict(
            {name: {key: str(value) for key, value in values.items()} for name, values in sections.items()}
        )
        parser.write(text)
        self.files["config.ini"] = text.getvalue().encode()


def gpt2(folder: Path, ranks: int, dtype: str) -> Files:
    """Linears of the checkpoint are (in, out) already; Q, K and V are blocks of the output."""
    out = _Folder(folder, ranks, dtype)
    raw, hidden = out.raw, out.raw["n_embd"]
    out.whole("wte", out.get("transformer.wte.weight"))
    out.whole("wpe", out.get("transformer.wpe.weight"))
    out.norm("final_layernorm", "transformer.ln_f")
    for layer in range(raw["n_layer"]):
        ft, hf = f"layers.{layer}", f"transformer.h.{layer}"
        out.norm(f"{ft}.input_layernorm", f"{hf}.ln_1")
        out.norm(f"{ft}.post_attention_layernorm", f"{hf}.ln_2")
        out.split(
            f"{ft}.attention.query_key_value.weight", out.get(f"{hf}.attn.c_attn.weight").reshape(hidden, 3, -1), -1
        )
        out.split(f"{ft}.attention.query_key_value.bias", out.get(f"{hf}.attn.c_attn.bias").reshape(3, -1), -1)
        out.split(f"{ft}.attention.dense.weight", out.get(f"{hf}.attn.c_proj.weight"), 0)
        out.whole(f"{ft}.attention.dense.bias", out.get(f"{hf}.attn.c_proj.bias"))
        out.split(f"{ft}.mlp.dense_h_to_4h.weight", out.get(f"{hf}.mlp.c_fc.weight"), -1)
        out.split(f"{ft}.mlp.dense_h_to_4h.bias", out.get(f"{hf}.mlp.c_fc.bias"), -1)
        out.split(f"{ft}.mlp.dense_4h_to_h.weight", out.get(f"{hf}.mlp.c_proj.weight"), 0)
        out.whole(f"{ft}.mlp.dense_4h_to_h.bias", out.get(f"{hf}.mlp.c_proj.bias"))
    out.ini(
        "gpt",
        model_name=folder,
        head_num=raw["n_head"],
        size_per_head=hidden // raw["n_head"],
        inter_size=4 * hidden,
        max_pos_seq_len=raw["n_positions"],
        num_layer=raw["n_layer"],
        vocab_size=raw["vocab_size"],
        start_id=raw["bos_token_id"],
        end_id=raw["eos_token_id"],
        weight_data_type=dtype,
        tensor_para_size=ranks,
    )
    return out.files


def gpt_neox(folder: Path, ranks: int, dtype: str) -> Files:
    """Rows of the fused projection are (heads, 3, head size). With parallel residuals each rank adds the biases of what
    it has summed, so they are divided; their sum is what the runtime reads.
    """
    out = _Folder(folder, ranks, dtype)
    raw, hidden, heads = out.raw, out.raw["hidden_size"], out.raw["num_attention_heads"]
    rope = raw.get("rope_parameters") or {"partial_rotary_factor": raw.get("rotary_pct", 0.25)}
    parallel = raw["use_parallel_residual"]
    parts = ranks if parallel else 1
    out.whole("wte", out.get("gpt_neox.embed_in.weight"))
    out.whole("lm_head.weight", out.get("embed_out.weight"))
    out.norm("final_layernorm", "gpt_neox.final_layer_norm")
    for layer in range(raw["num_hidden_layers"]):
        ft, hf = f"layers.{layer}", f"gpt_neox.layers.{layer}"
        out.norm(f"{ft}.input_layernorm", f"{hf}.input_layernorm")
        out.norm(f"{ft}.post_attention_layernorm", f"{hf}.post_attention_layernorm")
        qkv, bias = (out.get(f"{hf}.attention.query_key_value.{kind}") for kind in ("weight", "bias"))
        qkv = qkv.T.reshape(hidden, heads, 3, -1).transpose(0, 2, 1, 3).reshape(hidden, 3, -1)
        out.split(f"{ft}.attention.query_key_value.weight", qkv, -1)
        bias = bias.reshape(heads, 3, -1).transpose(1, 0, 2).reshape(3, -1)
        out.split(f"{ft}.attention.query_key_value.bias", bias, -1)
        out.split(f"{ft}.attention.dense.weight", out.get(f"{hf}.attention.dense.weight").T, 0)
        out.split(f"{ft}.mlp.dense_h_to_4h.weight", out.get(f"{hf}.mlp.dense_h_to_4h.weight").T, -1)
        out.split(f"{ft}.mlp.dense_h_to_4h.bias", out.get(f"{hf}.mlp.dense_h_to_4h.bias"), -1)
        out.split(f"{ft}.mlp.dense_4h_to_h.weight", out.get(f"{hf}.mlp.dense_4h_to_h.weight").T, 0)
        attention, mlp = (out.get(f"{hf}.{name}.bias") / parts for name in ("attention.dense", "mlp.dense_4h_to_h"))
        out.whole(f"{ft}.attention.dense.bias", attention)
        out.whole(f"{ft}.mlp.dense_4h_to_h.bias", mlp)
        if parallel:
            out.whole(f"{ft}.mlp.attention.bias.sum", attention + mlp)
    out.ini(
        "gptneox",
        model_name=folder,
        head_num=heads,
        size_per_head=hidden // heads,
        inter_size=raw["intermediate_size"],
        num_layer=raw["num_hidden_layers"],
        rotary_embedding=int(hidden // heads * rope["partial_rotary_factor"]),
        vocab_size=raw["vocab_size"],
        start_id=raw["bos_token_id"],
        end_id=raw["eos_token_id"],
        use_gptj_residual=int(parallel),
        weight_data_type=dtype,
    )
    return out.files


def gptj(folder: Path, ranks: int, dtype: str) -> Files:
    """No biases of attention, one norm per layer, a head with a bias."""
    out = _Folder(folder, ranks, dtype)
    raw, hidden = out.raw, out.raw["n_embd"]
    out.whole("wte", out.get("transformer.wte.weight"))
    out.norm("final_layernorm", "transformer.ln_f")
    out.norm("lm_head", "lm_head")
    for layer in range(raw["n_layer"]):
        ft, hf = f"layers.{layer}", f"transformer.h.{layer}"
        out.norm(f"{ft}.input_layernorm", f"{hf}.ln_1")
        qkv = np.stack([out.get(f"{hf}.attn.{name}_proj.weight") for name in "qkv"]).transpose(2, 0, 1)
        out.split(f"{ft}.attention.query_key_value.weight", qkv, -1)
        out.split(f"{ft}.attention.dense.weight", out.get(f"{hf}.attn.out_proj.weight").T, 0)
        out.split(f"{ft}.mlp.dense_h_to_4h.weight", out.get(f"{hf}.mlp.fc_in.weight").T, -1)
        out.split(f"{ft}.mlp.dense_h_to_4h.bias", out.get(f"{hf}.mlp.fc_in.bias"), -1)
        out.split(f"{ft}.mlp.dense_4h_to_h.weight", out.get(f"{hf}.mlp.fc_out.weight").T, 0)
        out.whole(f"{ft}.mlp.dense_4h_to_h.bias", out.get(f"{hf}.mlp.fc_out.bias"))
    out.ini(
        "gptj",
        model_name=raw.get("_name_or_path") or "gptj",
        head_num=raw["n_head"],
        size_per_head=hidden // raw["n_head"],
        inter_size=4 * hidden,
        num_layer=raw["n_layer"],
        rotary_embedding=raw["rotary_dim"],
        vocab_size=raw["vocab_size"],
        start_id=raw["bos_token_id"],
        end_id=raw["eos_token_id"],
        weight_data_type=dtype,
    )
    return out.files


def opt(folder: Path, ranks: int, dtype: str) -> Files:
    """The two first rows of the positions are left out; the head is always there, and both it and the embedding have
    the projections of narrow embeddings multiplied in.
    """
    out = _Folder(folder, ranks, dtype)
    raw, base = out.raw, "model.decoder"
    wte = out.state[f"{base}.embed_tokens.weight"]
    head = out.state.get("lm_head.weight", wte)
    if f"{base}.project_in.weight" in out.state:
        project_in, project_out = (torch.from_numpy(out.state[f"{base}.project_{way}.weight"]) for way in ("in", "out"))
        wte, head = (torch.from_numpy(wte) @ project_in.T).numpy(), (torch.from_numpy(head) @ project_out).numpy()
    out.whole("wte", wte)
    out.whole("lm_head.weight", head)
    out.whole("wpe", out.get(f"{base}.embed_positions.weight")[2:])
    final = f"{base}.final_layer_norm.bias" in out.state
    if final:
        out.norm("final_layernorm", f"{base}.final_layer_norm")
    for layer in range(raw["num_hidden_layers"]):
        ft, hf = f"layers.{layer}", f"{base}.layers.{layer}"
        out.norm(f"{ft}.input_layernorm", f"{hf}.self_attn_layer_norm")
        out.norm(f"{ft}.post_attention_layernorm", f"{hf}.final_layer_norm")
        weights = [out.get(f"{hf}.self_attn.{name}_proj.weight").T for name in "qkv"]
        out.split(f"{ft}.attention.query_key_value.weight", np.stack(weights, axis=1), -1)
        biases = [out.get(f"{hf}.self_attn.{name}_proj.bias") for name in "qkv"]
        out.split(f"{ft}.attention.query_key_value.bias", np.stack(biases), -1)
        out.split(f"{ft}.attention.dense.weight", out.get(f"{hf}.self_attn.out_proj.weight").T, 0)
        out.whole(f"{ft}.attention.dense.bias", out.get(f"{hf}.self_attn.out_proj.bias"))
        out.split(f"{ft}.mlp.dense_h_to_4h.weight", out.get(f"{hf}.fc1.weight").T, -1)
        out.split(f"{ft}.mlp.dense_h_to_4h.bias", out.get(f"{hf}.fc1.bias"), -1)
        out.split(f"{ft}.mlp.dense_4h_to_h.weight", out.get(f"{hf}.fc2.weight").T, 0)
        out.whole(f"{ft}.mlp.dense_4h_to_h.bias", out.get(f"{hf}.fc2.bias"))
    out.ini(
        "gpt",
        model_name=folder,
        head_num=raw["num_attention_heads"],
        size_per_head=raw["hidden_size"] // raw["num_attention_heads"],
        inter_size=raw["ffn_dim"],
        max_pos_seq_len=raw["max_position_embeddings"],
        num_layer=raw["num_hidden_layers"],
        layernorm_eps="1e-5",
        layernorm_type="pre_layernorm" if raw["do_layer_norm_before"] else "post_layernorm",
        activation_type="Relu",
        has_post_decoder_layernorm=int(final),
        vocab_size=raw["vocab_size"],
        start_id=raw["bos_token_id"],
        end_id=raw["eos_token_id"],
        weight_data_type=dtype,
        int8=False,
    )
    return out.files


def t5(folder: Path, ranks: int, dtype: str) -> Files:
    """Names are transformers', without anything before them. The embedding is there twice, once transposed; that of
    biases by distance is transposed and divided by heads; the decoder's own attention alone is fused.
    """
    out = _Folder(folder, ranks, dtype, prefix="")
    raw = out.raw
    shared = out.get("shared.weight")
    out.whole("shared.weight", shared.T)
    out.whole("shared.weight_T", shared)
    out.whole("lm_head.weight", out.state.get("lm_head.weight", shared))
    layers = {"encoder": raw["num_layers"], "decoder": raw["num_decoder_layers"]}
    for stack, count in layers.items():
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        out.split(bias, out.get(bias).T, 0)
        out.whole(f"{stack}.final_layer_norm.weight", out.get(f"{stack}.final_layer_norm.weight"))
        for layer in range(count):
            block = f"{stack}.block.{layer}.layer"
            own, last = f"{block}.0.SelfAttention", 2 if stack == "decoder" else 1
            for part in range(last + 1):
                out.whole(f"{block}.{part}.layer_norm.weight", out.get(f"{block}.{part}.layer_norm.weight"))
            qkv = [out.get(f"{own}.{name}.weight").T for name in "qkv"]
            if stack == "decoder":
                out.split(f"{own}.qkv.weight", np.stack(qkv, axis=1), -1)
                for name in "qkv":
                    out.split(
                        f"{block}.1.EncDecAttention.{name}.weight",
                        out.get(f"{block}.1.EncDecAttention.{name}.weight").T,
                        -1,
                    )
                out.split(f"{block}.1.EncDecAttention.o.weight", out.get(f"{block}.1.EncDecAttention.o.weight").T, 0)
            else:
                for name, array in zip("qkv", qkv, strict=True):
                    out.split(f"{own}.{name}.weight", array, -1)
            out.split(f"{own}.o.weight", out.get(f"{own}.o.weight").T, 0)
            mlp = f"{block}.{last}.DenseReluDense"
            halves = {"wi": "wi"} if f"{mlp}.wi.weight" in out.state else {"wi_0": "wi", "wi_1": "wi2"}
            for theirs, name in halves.items():
                out.split(f"{mlp}.{name}.weight", out.get(f"{mlp}.{theirs}.weight").T, -1)
            out.split(f"{mlp}.wo.weight", out.get(f"{mlp}.wo.weight").T, 0)
    gated = raw["feed_forward_proj"].startswith("gated")
    scaled = raw["model_type"] == "t5" and raw.get("scale_decoder_outputs", raw["tie_word_embeddings"])
    stacks = {
        stack: {
            "vocab_size": raw["vocab_size"],
            "d_model": raw["d_model"],
            "d_kv": raw["d_kv"],
            "d_ff": raw["d_ff"],
            "num_layers": count,
            "num_decoder_layers": raw["num_decoder_layers"],
            "num_heads": raw["num_heads"],
            "relative_attention_max_distance": 128,
            "layer_norm_epsilon": raw["layer_norm_epsilon"],
            "feed_forward_proj": raw["feed_forward_proj"],
            "is_decoder": stack == "decoder",
            "is_encoder_decoder": False,
            "tie_word_embeddings": scaled,
            "decoder_start_token_id": raw["decoder_start_token_id"],
            "pad_token_id": raw["pad_token_id"],
            "eos_token_id": raw["eos_token_id"],
            "model_type": raw["model_type"],
            "_name_or_path": folder,
            "weight_data_type": dtype,
            "relative_attention_num_buckets_or_max_pos_seq_len": raw["relative_attention_num_buckets"],
        }
        for stack, count in layers.items()
    }
    structure = {"t5_with_bias": "false", "use_gated_activation": "1" if gated else "false"}
    out.parsed(**stacks, structure={**structure, "position_embedding_type": "relative"})
    return out.files


def bert(folder: Path, ranks: int, dtype: str) -> Files:
    """The layers alone, under transformers' names: the runtime takes hidden states."""
    out = _Folder(folder, ranks, dtype)
    raw = out.raw
    base = "bert." if any(name.startswith("bert.") for name in out.state) else ""
    for layer in range(raw["num_hidden_layers"]):
        ft = f"encoder.layer.{layer}"
        hf = f"{base}{ft}"
        for name in (*(f"attention.self.{part}" for part in ("query", "key", "value")), "intermediate.dense"):
            out.split(f"{ft}.{name}.weight", out.get(f"{hf}.{name}.weight").T, -1)
            out.split(f"{ft}.{name}.bias", out.get(f"{hf}.{name}.bias"), -1)
        for name in ("attention.output", "output"):
            out.split(f"{ft}.{name}.dense.weight", out.get(f"{hf}.{name}.dense.weight").T, 0)
            out.whole(f"{ft}.{name}.dense.bias", out.get(f"{hf}.{name}.dense.bias"))
            out.norm(f"{ft}.{name}.LayerNorm", f"{hf}.{name}.LayerNorm")
    out.parsed(
        bert={
            "model_name": "bert",
            "position_embedding_type": "absolute",
            "hidden_size": raw["hidden_size"],
            "num_layer": raw["num_hidden_layers"],
            "head_num": raw["num_attention_heads"],
            "size_per_head": raw["hidden_size"] // raw["num_attention_heads"],
            "activation_type": raw["hidden_act"],
            "inter_size": raw["intermediate_size"],
            "max_position_embeddings": raw["max_position_embeddings"],
            "layer_norm_eps": raw["layer_norm_eps"],
            "weight_data_type": dtype,
            "tensor_para_size": ranks,
        }
    )
    return out.files


WRITERS: dict[str, Callable[[Path, int, str], Files]] = {
    "GPT2": gpt2,
    "GPTNeoX": gpt_neox,
    "GPTJ": gptj,
    "OPT": opt,
    "T5": t5,
    "MT5": t5,
    "Bert": bert,
}
"""By what transformers calls the families."""
