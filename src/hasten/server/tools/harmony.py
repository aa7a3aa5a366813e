"""Answers in channels, as gpt-oss writes them: `analysis` is reasoning, `commentary` has calls, `final` answers."""

import re
from collections.abc import Callable, Mapping

from hasten.server.tools.reader import MAX_SPACE, AnswerReader, Reading, ReasoningPiece, TextPiece
from hasten.server.tools.rules import Marks

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, RETURN, CALL = "<|end|>", "<|return|>", "<|call|>"
_ENDS = (END, RETURN, CALL, START, CHANNEL)
"""Marks that end a message; the last two for models that forget the first."""
_ALL = (START, CHANNEL, CONSTRAIN, MESSAGE, END, RETURN, CALL)
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_HEADERS = ("<|", "to=", "assistant")
"""With one of these a message's header begins."""
_NAMESPACE = "functions."


class HarmonyReader(AnswerReader):
    """Reads one answer, whose first message has its role in the prompt already.

    Messages to functions are calls where `with_calls`, else what the model writes for itself. An answer without
    channels is text.
    """

    def __init__(self, *, with_calls: bool, max_calls: int | None = None) -> None:
        super().__init__(max_calls)
        self._with_calls = with_calls
        self._begun = {TextPiece: False, ReasoningPiece: False}
        """Whether a message of this kind had text, which the next one begins a line after."""

    def _read(self) -> Reading[None]:
        """One message, up to its end."""
        begin, header = self._position, (yield from self._header())
        recipient = _RECIPIENT.search(header)
        is_call = recipient is not None and self._with_calls
        is_reasoning = not is_call and (recipient is not None or "analysis" in header)
        if recipient is not None and is_call:
            self._begin_call(recipient[1].removeprefix(_NAMESPACE))
        if is_reasoning:
            self.reasoned.append((begin, None))
        put = self._put_arguments if is_call else self._putter(ReasoningPiece if is_reasoning else TextPiece)
        mark = yield from self._until(put, *_ENDS)
        if is_call:
            self._end_call()
        if is_reasoning and mark:
            self.reasoned[-1] = (begin, self._position + (0 if mark in (START, CHANNEL) else len(mark)))
        is_next = mark == CHANNEL and self._position > begin  # that of the next message, unless this one has no header
        self._at += 0 if is_next else len(mark)

    def _header(self) -> Reading[str]:
        """What stands before a message: its role, channel and recipient."""
        while True:
            text = self._text[self._at : self._at + MAX_SPACE + len(MESSAGE)]
            rest = text.lstrip()
            if not any(rest.startswith(begin) or begin.startswith(rest) for begin in _HEADERS):
                return "final"
            if MESSAGE in text:
                header = text.partition(MESSAGE)[0]
                self._at += len(header) + len(MESSAGE)
                return header
            if self._last and CHANNEL[:2] in rest:  # a header that was cut short
                self._at = len(self._text)
            if self._last or len(text) > MAX_SPACE:
                return "final"
            yield

    def _putter(self, kind: type[TextPiece] | type[ReasoningPiece]) -> Callable[[str], None]:
        """Gives the text of one message."""
        separator = "\n" if self._begun[kind] else ""

        def put(text: str) -> None:
            nonlocal separator
            self._pieces.append(kind(separator + text))
            self._begun[kind], separator = True, ""

        return put


class HarmonyGrammar:
    """Rules of answers in channels, in llguidance's Lark syntax."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._channel, self._message = marks.rule(CHANNEL), marks.rule(MESSAGE)
        self._has_tokens = all(each in marks.tokens for each in (CHANNEL, MESSAGE, END))
        self.text = f"answer: {marks.text_without(*_ALL)}" if self._has_tokens else "answer: /(?s:.*)/"
        """The rule of a final message that is any text."""

    def answer(self, rules: str) -> str:
        """Reasoning, if any, and a final message by the rule `answer` of some rules."""
        return "\n".join([f"start: hidden* {self._final}", rules, *self._hidden()])

    def calls(self, arguments: Mapping[str, str], answer: str | None = None) -> str:
        """Reasoning, if any, and a call of a function, each by its name with the rule of its arguments.

        `answer`: the rules of a final message that may come in place of a call.
        """
        names = " | ".join(f"call{number}" for number in range(len(arguments)))
        final = "" if answer is None else f" | {self._final}"
        rules = [f"start: hidden* (call{final})", f"call: {names}", *([answer] if answer else ())]
        for number, (name, rule) in enumerate(arguments.items()):
            to = f'"commentary to={_NAMESPACE}{name} " {self._marks.rule(CONSTRAIN)} "json"'
            rules.append(f"call{number}: {self._channel} {to} {self._message} arguments{number}")
            rules.append(f"arguments{number}: {rule}")
        channels = '("analysis" | "commentary")' if answer == self.text else '"analysis"'
        return "\n".join([*rules, *self._hidden(channels)])

    @property
    def _final(self) -> str:
        return f'{self._channel} "final" {self._message} answer'

    def _hidden(self, channels: str = '"analysis"') -> list[str]:
        """The rules of a message before the last: of those in `commentary` the answer's text has what they say."""
        begin, end = f"{self._channel} {channels} {self._message}", f'{self._marks.rule(START)} "assistant"'
        closing = self._marks.rule(END)
        if self._has_tokens:
            return [f"hidden: {begin} {self._marks.text_without(*_ALL)} {closing} {end}"]
        return [f"hidden: {begin} hidden_text {end}", f"hidden_text[lazy]: /(?s:.*)/ {closing}"]
