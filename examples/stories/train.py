"""Train the demo model: a small BLOOM that reads the stories and knows their last words.

Writes a Hugging Face folder (fp16 safetensors, config, byte-level BPE tokenizer), loads it back in
fp32 and fails if it gets too few of the test stories' last words.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that torch's users know
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from batches import END_ID, LAST_WORD, PAD_ID, PADDING, Batch, encode, training_batches
from generate import StoryError, read_stories, stories
from lexicon import LEXICON

HERE: Final = Path(__file__).resolve().parent
SPECIAL_TOKENS: Final = ("<unk>", "<s>", "</s>", "<pad>")
START_ID: Final = 1
TOKENIZER_STORIES: Final = 2000
# Without this help the templates' words take every merge and the answers stay in single letters.
TOKENIZER_LEXICON_REPEATS: Final = 100
MAX_FOLDER_BYTES: Final = 8_000_000
EVAL_STORIES: Final = 512
EVAL_BATCH: Final = 128


@dataclass(frozen=True)
class Schedule:
    """Learning rate over the run's progress: a linear warm-up, then a cosine down to a tenth of 1%."""

    peak: float
    warmup: float

    def rate(self, progress: float) -> float:
        """The rate at `progress` in [0, 1]."""
        if progress < self.warmup:
            return self.peak * max(progress / self.warmup, 1e-3)
        fraction = (progress - self.warmup) / (1.0 - self.warmup)
        return self.peak * max(0.5 * (1.0 + math.cos(math.pi * min(fraction, 1.0))), 1e-3)


def train_tokenizer(vocab_size: int, seed: int) -> Tokenizer:
    """A byte-level BPE with BLOOM's special tokens, trained on training stories."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = list(islice(stories(f"{seed}/tokenizer"), TOKENIZER_STORIES))
    words = [f" {word}" for kind in LEXICON.values() for word in kind]
    tokenizer.train_from_iterator(texts + words * TOKENIZER_LEXICON_REPEATS, trainer)
    return tokenizer


def build_model(vocab_size: int, heads: int) -> BloomForCausalLM:
    """A BLOOM of 3.4 million parameters: 4 layers, 256 wide."""
    config = BloomConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        n_layer=4,
        n_head=heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=START_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    return BloomForCausalLM(config)


def _tensors(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.from_numpy(batch.ids).to(device, non_blocking=True).long()
    return ids, torch.from_numpy(batch.roles).to(device, non_blocking=True)


def story_loss(model: BloomForCausalLM, batch: Batch, last_word_weight: float) -> torch.Tensor:
    """Mean cross-entropy a token, the last word's tokens counted `last_word_weight` times."""
    ids, roles = _tensors(batch, model.device)
    # Padding stands on the right, so the causal mask alone hides it from every real token.
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    targets, roles = ids[:, 1:], roles[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    weights = (roles != PADDING).float() + (last_word_weight - 1.0) * (roles == LAST_WORD).float()
    return (losses * weights.flatten()).sum() / weights.sum()


@torch.inference_mode()
def last_word_accuracy(model: BloomForCausalLM, tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """The share of stories whose last word's tokens are all the likeliest ones."""
    right = 0
    for start in range(0, len(texts), EVAL_BATCH):
        batch = encode(tokenizer, texts[start : start + EVAL_BATCH])
        ids, roles = _tensors(batch, model.device)
        guesses = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        ignored = roles[:, 1:] != LAST_WORD
        right += int(((guesses == ids[:, 1:]) | ignored).all(-1).sum())
    return right / len(texts)


def _optimizer(model: BloomForCausalLM) -> torch.optim.AdamW:
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=model.device.type == "cuda")


def fit(
    model: BloomForCausalLM,
    tokenizer: Tokenizer,
    batches: Iterator[Batch],
    probe: list[str],
    args: argparse.Namespace,
) -> None:
    """Train until `--steps` or `--time-budget` is reached; the schedule ends with whichever is first."""
    schedule = Schedule(args.learning_rate, warmup=0.04)
    optimizer = _optimizer(model)
    model.train()
    # The first batch is awaited before the clock starts, since the workers take a while to come up.
    batches = chain([next(batches)], batches)
    started = logged = time.monotonic()
    tokens = 0
    for step in range(1, args.steps + 1):
        batch = next(batches)
        elapsed = time.monotonic() - started
        progress = max((step - 1) / args.steps, elapsed / args.time_budget)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(progress)
        loss = story_loss(model, batch, args.last_word_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += int((batch.roles != PADDING).sum())
        stopping = step == args.steps or progress >= 1.0
        if step % args.log_every == 0 or stopping:
            line = f"step {step} loss {loss.item():.4f}"
            now = time.monotonic()
            line += f" {tokens / (now - logged):,.0f} tokens/s {now - started:.0f} s"
            if step % args.eval_every == 0 or stopping:
                model.eval()
                line += f" last words {last_word_accuracy(model, tokenizer, probe):.1%}"
                model.train()
            print(line, flush=True)
            logged, tokens = time.monotonic(), 0
        if stopping:
            break


@torch.no_grad()
def spread_norms(model: BloomForCausalLM, seed: int) -> None:
    """Give each layer norm a scale of its own and take it back in the weights behind: the same function, other weights.

    Training leaves all norms nearly flat, so that a model with two of them swapped would hardly be worse. The scales
    are powers of two, which round nothing; only the epsilon of the norm behind the embedding weighs less.
    """
    generator = torch.Generator().manual_seed(seed)
    bloom = model.transformer
    for block in bloom.h:
        behind = {
            block.input_layernorm: block.self_attention.query_key_value,
            block.post_attention_layernorm: block.mlp.dense_h_to_4h,
        }
        for norm, linear in behind.items():
            scale = 2.0 ** torch.randint(-2, 3, norm.weight.shape, generator=generator).to(norm.weight)
            norm.weight *= scale
            norm.bias *= scale
            linear.weight /= scale
    bloom.word_embeddings.weight *= 16.0
    bloom.ln_f.weight /= 16.0
    bloom.ln_f.bias /= 16.0


def save(model: BloomForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the Hugging Face folder, the weights in fp16."""
    model.to(torch.float16).save_pretrained(folder)
    unk, start, end, pad = SPECIAL_TOKENS
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        bos_token=start,
        eos_token=end,
        pad_token=pad,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    # The name that every release of transformers reads, whichever release writes it here.
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "BloomTokenizerFast"
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _report_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    roles = encode(tokenizer, texts).roles
    last_word = (roles == LAST_WORD).sum() / len(texts)
    story = (roles != PADDING).sum() / len(texts)
    print(f"vocabulary {tokenizer.get_vocab_size()}, {story:.1f} tokens a story, {last_word:.2f} tokens a last word")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train the demo model on generated stories.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--test", type=Path, default=HERE / "test.jsonl", help="the test stories")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch-size", type=int, default=256, help="stories a step")
    parser.add_argument("--time-budget", type=float, default=300.0, help="seconds of training")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--last-word-weight", type=float, default=4.0)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=4, help="attention heads, a divisor of 256 and a multiple of 4")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--workers",
        type=int,
        default=max(1, min(12, (os.cpu_count() or 2) - 2)),
        help="processes that write stories",
    )
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--min-accuracy", type=float, default=0.60)
    return parser


def _check(args: argparse.Namespace) -> None:
    for name in ("steps", "batch_size", "workers", "log_every", "eval_every", "time_budget"):
        if getattr(args, name) <= 0:
            raise StoryError(f"--{name.replace('_', '-')} must be above 0")
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + len(SPECIAL_TOKENS)
    if args.vocab_size < smallest:
        raise StoryError(f"--vocab-size must be at least {smallest}, got {args.vocab_size}")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise StoryError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def run(args: argparse.Namespace) -> float:
    """Train, save and measure; the accuracy on the test stories."""
    _check(args)
    test_texts = read_stories(args.test)
    device = _device(args.device)
    # TF32 rather than bf16: ALiBi's biases grow with the position, where bf16 has too few digits.
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)

    tokenizer = train_tokenizer(args.vocab_size, args.seed)
    _report_tokens(tokenizer, test_texts)
    model = build_model(tokenizer.get_vocab_size(), args.heads).to(device)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters on {device}")
    probe = list(islice(stories(f"{args.seed}/probe", exclude=test_texts), EVAL_STORIES))
    batches = training_batches(
        tokenizer.to_str(),
        [*test_texts, *probe],
        size=args.batch_size,
        seed=args.seed,
        workers=args.workers,
    )
    with closing(batches):
        fit(model, tokenizer, batches, probe, args)

    args.output.mkdir(parents=True, exist_ok=True)
    spread_norms(model, args.seed)
    save(model, tokenizer, args.output)
    size = sum(path.stat().st_size for path in args.output.iterdir() if path.is_file())
    print(f"{args.output}: {size:,} bytes")
    if size > MAX_FOLDER_BYTES:
        raise StoryError(f"{args.output} holds {size:,} bytes, more than {MAX_FOLDER_BYTES:,}")
    torch.set_float32_matmul_precision("highest")
    saved = BloomForCausalLM.from_pretrained(args.output, dtype=torch.float32).to(device).eval()
    return last_word_accuracy(saved, tokenizer, test_texts)


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when good enough, 1 when not, 2 with one line for bad input."""
    args = _parser().parse_args(argv)
    try:
        accuracy = run(args)
    except StoryError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    print(f"test accuracy {accuracy:.2%} (fp32)")
    if accuracy < args.min_accuracy:
        print(
            f"train.py: error: accuracy {accuracy:.2%} is below --min-accuracy "
            f"{args.min_accuracy:.2%}; train for more steps",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
