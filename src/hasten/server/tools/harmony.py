"""Answers in channels, as gpt-oss writes them: `analysis` is reasoning, `commentary` has calls, `final` answers."""

import re
from collections.abc import Mapping, Sequence
from functools import partial

from hasten.engine.text import AddedToken
from hasten.server.tools.reader import MAX_SPACE, ReasoningPiece, Span, StepReader, TextPiece, begun_mark
from hasten.server.tools.rules import mark_rule

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, RETURN, CALL = "<|end|>", "<|return|>", "<|call|>"
_ENDS = (END, RETURN, CALL, START, CHANNEL)
"""Marks that end a message; the last two for models that forget the first."""
_ALL = (START, CHANNEL, CONSTRAIN, MESSAGE, END, RETURN, CALL)
_END = re.compile("|".join(map(re.escape, _ENDS)))
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_HEADERS = ("<|", "to=", "assistant")
"""With one of these a message's header begins."""
_NAMESPACE = "functions."


class HarmonyReader(StepReader):
    """Reads one answer, whose first message has its role in the prompt already.

    Messages to functions are calls where `with_calls`, else what the model writes for itself. An answer without
    channels is text.
    """

    def __init__(self, *, with_calls: bool, max_calls: int | None = None) -> None:
        super().__init__(self._header, max_calls)
        self._with_calls = with_calls
        self._is_reasoning = False
        self._is_call = False
        self._reasoned = False
        """Whether a message of reasoning was given, which the next one begins a line after."""
        self._said = False
        """The same of text."""
        self._separator = ""
        self._begin = 0
        """Where the message stands in the text, with its header."""
        self._spans: list[Span] = []

    @property
    def reasoned(self) -> Sequence[Span]:
        """See AnswerReader."""
        return [*self._spans, (self._begin, None)] if self._is_reasoning else self._spans

    def _header(self, text: str, at: int, last: bool) -> int:
        """What stands before a message: its role, channel and recipient."""
        rest = text[at : at + MAX_SPACE + len(MESSAGE)].lstrip()
        is_header = any(rest.startswith(begin) or begin.startswith(rest) for begin in _HEADERS)
        found = text.find(MESSAGE, at, at + MAX_SPACE + len(MESSAGE))
        if is_header and found >= 0:
            self._begin = self._fed - len(text) + at
            self._begin_body(text[at:found])
            return found + len(MESSAGE)
        if is_header and not last and len(text) - at <= MAX_SPACE:
            return at
        if is_header and last and CHANNEL[:2] in rest:
            return len(text)  # a header that was cut short
        self._begin_body("final")
        return at

    def _begin_body(self, header: str) -> None:
        self._step = self._body
        recipient = _RECIPIENT.search(header)
        self._is_call = recipient is not None and self._with_calls
        is_hidden = "analysis" in header or recipient is not None
        self._is_reasoning = is_hidden and not self._is_call
        begun = self._reasoned if self._is_reasoning else self._said
        self._separator = "\n" if begun else ""
        if self._is_call:
            assert recipient is not None, "it is a call"
            self._begin_call(recipient[1].removeprefix(_NAMESPACE))

    def _body(self, text: str, at: int, last: bool) -> int:
        """A message's text, up to its end."""
        found = _END.search(text, at)
        if found is not None:
            self._put(text[at : found.start()])
            if self._is_call:
                if not self._has_arguments:
                    self._put_arguments("{}")
                self._is_call, self._after_call = False, True
            if self._is_reasoning:
                end = found.start() if found[0] in (START, CHANNEL) else found.end()
                self._spans.append((self._begin, self._fed - len(text) + end))
                self._is_reasoning = False
            self._step = self._header
            return found.start() if found[0] == CHANNEL else found.end()
        end = len(text) if last else len(text) - max(begun_mark(text, at, mark) for mark in _ENDS)
        self._put(text[at:end])
        return end

    def _finish(self) -> None:
        if self._is_call and not self._has_arguments:
            self._put_arguments("{}")

    def _put(self, text: str) -> None:
        if not text:
            return
        if self._is_call:
            self._put_arguments(text)
            return
        text, self._separator = self._separator + text, ""
        if self._is_reasoning:
            self._reasoned = True
            self._pieces.append(ReasoningPiece(text))
        else:
            self._said = True
            self._pieces.append(TextPiece(text))


class HarmonyGrammar:
    """Rules of answers in channels, in llguidance's Lark syntax; `tokens` are the tokenizer's added ones."""

    def __init__(self, tokens: Mapping[str, AddedToken], end_tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._end_tokens = end_tokens
        self._mark = partial(mark_rule, tokens=tokens)

    def answer(self, rules: str) -> str:
        """Reasoning, if any, and a final message by the rule `answer` of some rules."""
        return "\n".join([f"start: hidden* {self._final('answer')}", rules, *self._hidden()])

    def calls(self, calls: Sequence[tuple[str, str]], arguments: Sequence[str], answer: str | None = None) -> str:
        """Reasoning, if any, and a call: names, and the rules of their arguments, which `arguments` are.

        `answer`: the rules of a final message that may come in place of a call.
        """
        names = " | ".join(f"call{number}" for number in range(len(calls)))
        final = "" if answer is None else f" | {self._final('answer')}"
        channels = '("analysis" | "commentary")' if answer == self.text else '"analysis"'
        rules = [f"start: hidden* (call{final})", f"call: {names}", *arguments, *([answer] if answer else ())]
        for number, (name, rule) in enumerate(calls):
            to = f'"commentary to={_NAMESPACE}{name} "'
            head = f'{self._mark(CHANNEL)} {to} {self._mark(CONSTRAIN)} "json" {self._mark(MESSAGE)}'
            rules.append(f"call{number}: {head} {rule}")
        return "\n".join([*rules, *self._hidden(channels)])

    @property
    def text(self) -> str:
        """The rule of a final message that is any text."""
        return f"answer: {self._any}" if self._has_tokens else "answer: /(?s:.*)/"

    def _final(self, body: str) -> str:
        return f'{self._mark(CHANNEL)} "final" {self._mark(MESSAGE)} {body}'

    def _hidden(self, channels: str = '"analysis"') -> list[str]:
        """The rules of a message before the last: of those in `commentary` the answer's text has what they say."""
        begin = f"{self._mark(CHANNEL)} {channels} {self._mark(MESSAGE)}"
        end = f'{self._mark(START)} "assistant"'
        if self._has_tokens:
            return [f"hidden: {begin} {self._any} {self._mark(END)} {end}"]
        return [f"hidden: {begin} hidden_text {end}", f"hidden_text[lazy]: /(?s:.*)/ {self._mark(END)}"]

    @property
    def _has_tokens(self) -> bool:
        return all(mark in self._tokens for mark in (CHANNEL, MESSAGE, END))

    @property
    def _any(self) -> str:
        """Any text without marks."""
        marks = {self._tokens[mark].number for mark in _ALL if mark in self._tokens}
        return f"<[^{','.join(map(str, sorted(marks | set(self._end_tokens))))}]>*"
