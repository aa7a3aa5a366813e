"""When a completion ends, and the text that it then has."""

from collections.abc import Callable

from hasten.core.types import FinishReason
from hasten.engine.request_state import Completion
from hasten.engine.text import Tokenizer


class StopRules:
    """The ends of completions of one model: its end tokens, what requests stop at, and their maximum length."""

    def __init__(self, eos_token_ids: tuple[int, ...], tokenizer: Tokenizer | None) -> None:
        self._eos_token_ids, self._tokenizer = eos_token_ids, tokenizer
        self._token_texts = None if tokenizer is None else _TokenTexts(tokenizer)

    def finish_reason(self, completion: Completion, token: int) -> FinishReason | None:
        """Why a completion ends with the token that was just appended to it; None where it goes on."""
        output, sequence = completion.output, completion.sequence
        params, count = sequence.params, len(completion.output.token_ids)
        may_stop = count >= params.min_tokens
        if may_stop and self.ends(completion, token):
            return FinishReason.STOP
        if completion.text is not None:
            found = completion.text.add(token, look_for_stop=may_stop)
            if found is not None:
                output.stop_reason = found
                return FinishReason.STOP
        if sequence.constraint is not None and sequence.constraint.accept(token):
            return FinishReason.STOP
        if len(sequence.token_ids) >= sequence.max_length:
            return FinishReason.LENGTH
        return None

    def ends(self, completion: Completion, token: int) -> bool:
        """Whether this token is, or completes, one that ends the completion."""
        output, params = completion.output, completion.sequence.params
        if token in params.stop_token_ids:
            output.stop_reason, completion.hidden_tokens = token, 1
            return True
        if token in self._eos_token_ids and not params.ignore_eos:
            completion.hidden_tokens = 1
            return True
        for word in params.stop_words_ids:
            if output.token_ids[-len(word) :] == list(word):
                output.stop_reason, completion.hidden_tokens = word[-1], len(word)
                return True
        return False

    def end(self, completion: Completion, reason: FinishReason) -> None:
        """Finish a completion: its reason, and its text without what ended it."""
        output = completion.output
        output.finish_reason = reason
        output.text = self._final_text(completion)

    def _final_text(self, completion: Completion) -> str:
        output, text, params = completion.output, completion.text, completion.sequence.params
        if self._tokenizer is None or not params.detokenize:
            return ""
        if text is not None and isinstance(output.stop_reason, str) and output.finish_reason is FinishReason.STOP:
            return text.text
        hidden = 0 if params.include_stop_str_in_output else completion.hidden_tokens
        shown = output.token_ids[: len(output.token_ids) - hidden]
        skip = params.skip_special_tokens
        return self._tokenizer.decode(shown, skip_special_tokens=skip, continues=completion.continues)

    @property
    def text_of(self) -> Callable[[int], str] | None:
        """The text of single tokens; None without a tokenizer."""
        return None if self._token_texts is None else self._token_texts.__getitem__


class _TokenTexts(dict[int, str]):
    """The texts of single tokens, of which the same few are needed again and again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        text = self[token] = self._tokenizer.decode([token], skip_special_tokens=False, continues=True)
        return text
