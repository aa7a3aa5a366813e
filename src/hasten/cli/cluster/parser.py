"""Parsers of `hasten cluster`: commands that end in a user's command line, and Arena's commands that hasten lacks."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from hasten.cli.options import Parser
from hasten.core.errors import UnsupportedError


class VerbParser(Parser):
    """A parser of one verb, which may end in a command whose words are not looked at."""

    words_before_command: int | None = None
    """So many words of the verb's own stand before the command; None: it has no command."""
    refusal: str | None = None
    """Why the verb is not offered, whatever its options."""
    fill: Callable[["VerbParser"], None] | None = None
    """Adds the options and verbs, once they are asked for: all verbs together would slow every command."""

    def filled(self) -> "VerbParser":
        """This parser, with all its options."""
        fill, self.fill = self.fill, None
        if fill is not None:
            fill(self)
        return self

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, but `command` is what follows `--`, or begins with the first word that is not the verb's."""
        if self.refusal is not None:
            raise UnsupportedError(self.refusal)
        self.filled()
        if self.words_before_command is None:
            return super().parse_known_args(args, namespace)
        own, command = self._split(list(args), self.words_before_command)
        found, rest = super().parse_known_args(own, namespace)
        found.command = command
        return found, rest

    def _split(self, args: list[str], words: int) -> tuple[list[str], list[str]]:
        index = 0
        while index < len(args):
            word = args[index]
            if word == "--":
                return args[:index], args[index + 1 :]
            if word.startswith("-") and word != "-":
                index += 2 if self._takes_next(word) else 1
                continue
            if not words:
                self._check_quoted(args[index:])
                return args[:index], args[index:]
            words -= 1
            index += 1
        return args, []

    def _action(self, word: str) -> argparse.Action | None:
        known = self._option_string_actions
        short = None if word.startswith("--") else known.get(word[:2])
        return known.get(word.partition("=")[0]) or short

    def _takes_next(self, word: str) -> bool:
        action = self._action(word)
        if action is None:
            self.error(f"unrecognized arguments: {word}")
        return action.nargs != 0 and word in action.option_strings

    def _check_quoted(self, command: Sequence[str]) -> None:
        """A command in quotes is the last word: an option behind it was meant for the verb, and would be lost."""
        for word in command[1:]:
            if " " in command[0] and word.startswith("-") and self._action(word) is not None:
                self.error(
                    f"{word} stands behind the command {command[0]!r}: give options before it, "
                    "or write -- before a command of several words"
                )


VerbParsers: TypeAlias = "argparse._SubParsersAction[VerbParser]"


def refuse(verbs: VerbParsers, names: Sequence[str], why: str) -> None:
    """Add verbs that Arena has and hasten has not: they are known, and say so."""
    verbs.add_parser(names[0], aliases=names[1:], add_help=False).refusal = f"{why} (not done: {', '.join(names)})"
