"""The model `hasten` for lm-evaluation-harness. Needs that package (`pip install lm-eval`), which no extra brings.

    python -m hasten.bench.lm_eval run --model hasten --model_args pretrained=MODEL --tasks TASK

is its own command with this model besides. `model_args` are `pretrained`, `max_length`, `max_gen_toks`,
`add_bos_token`, `prefix_token_id`, and all options of `LLM`. The engine forms its own batches, so `--batch_size`
chooses nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from hasten.core.types import RequestOutput, SamplingParams
from hasten.engine.llm import LLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SCORED = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
"""Log-probabilities of a prompt's tokens, and which of them were the most probable."""


@register_model("hasten")
class HastenLM(TemplateLM):  # type: ignore[misc]  # untyped
    """A model as lm-evaluation-harness asks for it: log-likelihoods of texts, and completions."""

    def __init__(
        self,
        pretrained: str,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        device: str | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        **options: Any,
    ) -> None:
        super().__init__()
        options |= {} if max_length is None else {"max_model_len": int(max_length)}
        if device is not None and (not device.startswith("cuda") or torch.cuda.is_available()):
            options["device"] = device  # its command asks for cuda where nobody asks for anything
        self.llm = LLM(pretrained, **options)
        self.tokenizer: PreTrainedTokenizerBase = self.llm.get_tokenizer()
        self.max_gen_toks = int(max_gen_toks)
        self._add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id

    @property
    def max_length(self) -> int:
        """Tokens of the longest text that is scored: one token must fit behind it."""
        return self.llm.engine.max_model_len - 1

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text begins behind that has no context."""
        if self._prefix_token_id is not None:
            return int(self._prefix_token_id)
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """By which answers are cached."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        """Token ids of a text; without a second token of the beginning where the text has one."""
        special = self._add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            special = False
        given = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer.encode(string, **given))

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as one text."""
        return str(
            self.tokenizer.apply_chat_template(
                list(chat_history),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **others: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what greedy choice gives; long contexts are cut."""
        texts = [[*context, *continuation][-self.max_length :] for _, context, continuation in requests]
        outputs = self.llm.generate(texts, _SCORED, use_tqdm=not disable_tqdm)
        answers = [
            _scored(output, min(len(continuation), len(text) - 1))
            for output, text, (_, _, continuation) in zip(outputs, texts, requests, strict=True)
        ]
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that lie side by side."""
        windows = [
            (number, (None, context, tokens))
            for number, request in enumerate(requests)
            for context, tokens in _windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length - 1)
        ]
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens([window for _, window in windows], disable_tqdm)
        for (number, _), (logprob, _) in zip(windows, answers, strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions, each up to the first of its stop strings; InvalidRequestError for unknown settings."""
        prompts, params = [], []
        for context, options in (request.args for request in requests):
            each = _sampling(options, self.max_gen_toks)
            most = min(each.max_tokens or 1, self.max_length)
            params.append(replace(each, max_tokens=most))
            prompts.append(self.tok_encode(context)[-max(1, self.max_length + 1 - most) :])
        outputs = self.llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        texts = [output.outputs[0].text for output in outputs]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts


def _windows(tokens: list[int], prefix: int, most: int) -> Iterator[tuple[list[int], list[int]]]:
    """A text as contexts with up to `most` tokens to score behind each; a window is filled with what stands before."""
    if tokens:
        yield [prefix], tokens[:most]
    for begin in range(most, len(tokens), most):
        end = min(begin + most, len(tokens))
        yield tokens[end - most - 1 : begin], tokens[begin:end]


def _sampling(options: Mapping[str, Any], most: int) -> SamplingParams:
    """Settings of a task: greedy unless they say `do_sample`."""
    given = dict(options)
    until, do_sample = given.pop("until", None), given.pop("do_sample", False)
    for name in ("max_completion_tokens", "max_tokens", "max_new_tokens", "max_gen_toks"):
        most = int(given.pop(name, most))
    if not do_sample:
        given["temperature"] = 0
    return SamplingParams(max_tokens=most, stop=until or (), **given)


def _scored(output: RequestOutput, count: int) -> tuple[float, bool]:
    """Log-likelihood of a prompt's last `count` tokens, and whether each was the most probable."""
    assert output.prompt_logprobs is not None, "it was asked for"
    tokens = output.prompt_token_ids[len(output.prompt_token_ids) - count :]
    entries = output.prompt_logprobs[len(output.prompt_logprobs) - count :]
    found = [entry[token] for token, entry in zip(tokens, entries, strict=True) if entry is not None]
    return sum(each.logprob for each in found), all(each.rank == 1 for each in found)


if __name__ == "__main__":
    cli_evaluate()
