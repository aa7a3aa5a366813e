"""Small real models for all tests: random ones with a tokenizer, saved by transformers."""

import contextlib
import os
import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

# A stall of the machine is no fault of an example, and examples are the same in every run.
with contextlib.suppress(ModuleNotFoundError):  # where only what runs on a GPU is installed
    from hypothesis import HealthCheck, settings

    settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("steady")

# Before torch is loaded, here and in the processes that tests start: several of them share few cores, where threads
# that spin while they wait take the time of those that compute.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

# Small models are as fast on one thread as on two, which wait for each other where other workers have the cores.
torch.set_num_threads(1)

# Before anything imports triton: without a GPU its kernels run on its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell ignores interrupts in what it starts in the background, and all that is started there would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

MakeBloom = Callable[..., Path]
MakeModel = Callable[..., Path]

WORDS = (
    "the a of to and in was he she it on with as at his her had said that for Anna Ben Clara David river garden house "
    "letter lamp bread window morning evening storm harbour violin keys coat dog cat market bridge looked walked found "
    "opened closed wanted carried remembered promised under behind before after until quietly slowly again never café"
).split()

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")


def stories(count: int, seed: int) -> list[str]:
    """Nonsense sentences of 8 to 40 words, the same for the same seed."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(8, 40))) for _ in range(count)]


def save_tokenizer(folder: Path) -> int:
    """A small tokenizer of bytes and their pairs; the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories(200, seed=1), trainer)
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


_GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128}
_FALCON = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
_SIZES: dict[str, dict[str, Any]] = {
    "Bloom": {"hidden_size": 64, "n_layer": 3, "n_head": 8, "seq_length": 512},
    "Falcon": _FALCON,
    "GPT2": _GPT2,
    "GPTBigCode": _GPT2,
    "GPTJ": _GPT2 | {"rotary_dim": 8},
    "GPTNeoX": _FALCON | {"intermediate_size": 80},
    "GPTNeo": {
        "hidden_size": 48,
        "num_layers": 3,
        "num_heads": 4,
        "max_position_embeddings": 128,
        "attention_types": [[["global", "local"], 1], [["local"], 1]],
        "window_size": 7,
    },
    "Mpt": {"d_model": 48, "n_layers": 3, "n_heads": 4, "max_seq_len": 128},
    "OPT": {
        "hidden_size": 48,
        "ffn_dim": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 48,
    },
    "other": {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    },
}
"""Of random models, by family; a family without an entry has LLaMA's keys."""


def _save_model(folder: Path, family: str, seed: int, **config: Any) -> None:
    import transformers

    sizes = _SIZES.get(family, _SIZES["other"])
    spread = 0.1 if family == "Bloom" else 0.2
    options: dict[str, Any] = sizes | {
        "vocab_size": save_tokenizer(folder),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        # wide enough that logits differ clearly and greedy decoding does not run into ties
        "init_std" if family == "OPT" else "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    settings = getattr(transformers, name)(**(options | config))
    kind = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, family + kind)(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * spread)
    model.save_pretrained(folder)


TESTS = Path(__file__).parent
SAME_ON_EVERY_PYTHON = frozenset(
    {"bench", "checkpoint", "examples", "layers", "models", "ops", "quantization", "security", "soak"}
)
"""Folders whose tests look at numbers, formats and whole programs: they have the mark `any_python`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs more GPUs than there are. Files with slow tests come first: at the end they would run alone."""
    for item in items:
        if item.path.relative_to(TESTS).parts[0] in SAME_ON_EVERY_PYTHON:
            item.add_marker("any_python")
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for mark, least in (("gpu", 1), ("multi_gpu", 2)):
        if gpus < least:
            for item in items:
                if item.get_closest_marker(mark) is not None:
                    item.add_marker(pytest.mark.skip(reason=f"needs {least} GPU{'s' * (least > 1)}; {gpus} are here"))


@pytest.fixture
def forked_ranks() -> Iterator[None]:
    """Ranks that an engine starts are copies of one process, which takes a tenth of the time of new ones."""
    from tests import forked

    with forked.forked_ranks():
        yield


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Make a folder with a random model of a family, such as `Llama`, and its tokenizer.

    Equal arguments give the same folder, so do not write to it. `seed` chooses the weights, all other arguments go to
    the family's configuration.
    """
    made: dict[str, Path] = {}

    def make(family: str, seed: int = 0, **config: Any) -> Path:
        key = repr((family, seed, sorted(config.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(family.lower())
            _save_model(folder, family, seed, **config)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_bloom(make_model: MakeModel) -> MakeBloom:
    """`make_model` for BLOOM."""
    return partial(make_model, "Bloom")


@pytest.fixture(scope="session")
def tiny_bloom(make_bloom: MakeBloom) -> Path:
    """8 heads, 3 layers, 64 wide, tied head, fp32."""
    return make_bloom()


@pytest.fixture(scope="session")
def tiny_bloom_12_heads(make_bloom: MakeBloom) -> Path:
    """A number of heads that is not a power of two: ALiBi's slopes come from another rule."""
    return make_bloom(n_head=12, hidden_size=96)


@pytest.fixture(scope="session")
def tiny_bloom_untied(make_bloom: MakeBloom) -> Path:
    """With a language model head of its own."""
    return make_bloom(tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tiny_bloom_post_norm(make_bloom: MakeBloom) -> Path:
    """The residual is taken after the layer norm."""
    return make_bloom(apply_residual_connection_post_layernorm=True)


@pytest.fixture(scope="session")
def tiny_bloom_odd_vocab(make_bloom: MakeBloom) -> Path:
    """A vocabulary that is not a multiple of 8, and larger than the tokenizer's."""
    return make_bloom(vocab_size=509)
