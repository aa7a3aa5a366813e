"""Command-line options made from the fields of configuration dataclasses, and back.

A field is offered if its metadata (`core.option_fields.option`) has a help text. Name, type, default and choices come
from the field itself; its own name and its aliases are names of the option too. Options that the user does not give are
left out of what is read back, so that defaults are stated only once, in the dataclass.
"""

import argparse
import dataclasses
import difflib
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import MISSING, Field, dataclass
from pathlib import Path
from typing import Any

from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError
from hasten.core.files import expand_home, reading
from hasten.core.option_fields import parse_size
from hasten.core.types import SamplingParams

HOST_OPTIONS = frozenset({"nnodes", "node_rank", "master_addr", "master_port"})
"""Options of an engine that are those of one process, not of a model."""

NOTHING: Mapping[str, Any] = types.MappingProxyType({})
_OF_CHATS = frozenset({"tool_call_parser", "reasoning_parser"})
"""Options that only say how answers of chats are read."""

Value = typing.TypeVar("Value")


class _Formatter(argparse.HelpFormatter):
    """Help texts in which an option's names stand once, with one placeholder for its value."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = list(action.option_strings)
        if isinstance(action, argparse.BooleanOptionalAction):
            names = [name.replace("--", "--[no-]", 1) for name in names if not name.startswith("--no-")]
        value = "" if action.nargs == 0 else " " + self._format_args(action, self._metavar_of(action))
        return ", ".join(names) + value

    def _metavar_of(self, action: argparse.Action) -> str:
        return self._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose options are spelt out, and whose errors are one line that names the nearest option."""

    text_option: str | None = None
    """The option of texts that users may expect to give without one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": _Formatter, **options})

    def error(self, message: str) -> typing.NoReturn:
        """Raise ConfigError instead of printing the usage."""
        raise ConfigError(f"{message} (see `{self.prog} --help`)")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """An option of a file, where `fromfile_prefix_chars` allows any; nothing for an empty line or a comment."""
        line = arg_line.strip()
        return [line] if line and not line.startswith("#") else []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; what is left over is an error of the command that it was given to.

        The namespace's `parser` is the parser of that command.
        """
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}{self._meant(rest)}")
        if "parser" not in found:
            found.parser = self
        return found, rest

    def _meant(self, rest: Sequence[str]) -> str:
        """What a user may have meant by arguments that are left over, to stand behind an error."""
        option = next((word for word in rest if word.startswith("-")), None)
        if option is not None or self.text_option is None:
            return _nearest((option or rest[0]).partition("=")[0], self._option_string_actions)
        text = shlex.quote(" ".join(rest))
        return f"; give a text behind {self.text_option}: {self.prog} MODEL {self.text_option} {text}"

    def _get_option_tuples(self, option_string: str) -> Any:
        """What a word that is no option may begin with: an option of one letter, and no beginning of a longer one."""
        return [found for found in super()._get_option_tuples(option_string) if found[1] == option_string[:2]]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            raise argparse.ArgumentError(
                action, f"{error.message}{_nearest(str(value), action.choices or ())}"
            ) from None

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help or the version; argparse itself is silent where that fails."""
        (file or sys.stderr).write(message)
        (file or sys.stderr).flush()

    def named_by_options(self, message: str) -> str:
        """A message in which the fields that this command has options for stand under the options' names."""
        flags = {action.dest: _shown_flag(action) for action in self._actions if action.option_strings}
        pattern = r"(?<![\w./'\"-])(%s)(?:=(?:\"([^\"]*)\")?|(?![\w/'\"=-]|\.\w))"
        about = re.compile(r"\w+(?= must | cannot be | holds | '.*' is not known)").match(message)
        names = "|".join(sorted(map(re.escape, flags), key=len, reverse=True))

        def option_of(found: "re.Match[str]") -> str:
            name, value = found[1], found[2]
            if "=" not in found[0] and "_" not in name and (about is None or found.span() != about.span()):
                return found[0]  # a word of the sentence, not the name of a field
            return flags[name] if value is None else f"{flags[name]} {value}"

        return re.sub(pattern % names, option_of, message)


def _shown_flag(action: argparse.Action) -> str:
    """The name of an option that stands first among its long ones."""
    return next((name for name in action.option_strings if name.startswith("--")), action.option_strings[0])


def _nearest(word: str, known: Iterable[str]) -> str:
    """A question for the known word that comes nearest, to stand behind an error; empty where none is near."""
    # dashes would make any two options alike, and so would a single letter
    bare = {name.lstrip("-"): name for name in known if len(name) > 2}
    word = word.lstrip("-")
    found = difflib.get_close_matches(word, bare, n=1) if len(word) > 1 else []
    return f"; did you mean {bare[found[0]]}?" if found else ""


def positive(text: str) -> int:
    """The `type` of an option that counts something."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def typed(read: Callable[[str], Value]) -> Callable[[str], Value]:
    """The `type` of an option that a function reads which raises ConfigError."""

    def read_option(text: str) -> Value:
        try:
            return read(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read_option


@typed
def path(text: str) -> str:
    """The `type` of an option that is a file or a folder: a `~` that no shell has expanded is the home directory.

    An empty one is an error: it would be the current folder, and comes from a variable that is not set.
    """
    if not text:
        raise ConfigError("the path is empty; is the variable that it comes from set?")
    return str(expand_home(Path(text), "set HOME, or write the path in full")) if text.startswith("~") else text


@typed
def _content(text: str) -> str:
    """The `type` of an option that is a text, or `@` and the name of the file that has it."""
    if not text.startswith("@"):
        return text
    with reading(name := path(text[1:])):
        return Path(name).read_text(encoding="utf-8")


@typed
def _run(text: str) -> list[int]:
    """The `type` of an option that is a run of token ids."""
    try:
        return [int(token) for token in text.split(",")]
    except ValueError:
        raise ConfigError(f"{text!r} is not a run of token ids; separate them by commas, such as 5,17") from None


@typed
def _bias(text: str) -> tuple[int, float]:
    """The `type` of an option that is a token id with a number."""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise ConfigError(f"{text!r} is not TOKEN=BIAS, such as 5=-2.5") from None


class _AddEntry(argparse.Action):
    """Collects what is given for an option, pairs, in a dictionary."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), **dict([values])})


_KINDS: dict[str, Callable[[str], Any]] = {"size": typed(parse_size), "path": path, "content": _content}


@dataclass(frozen=True)
class _Shape:
    """What the type of a field asks of its option."""

    type: Callable[[str], Any]
    action: "str | Callable[..., argparse.Action]" = "store"

    @property
    def many(self) -> bool:
        """Whether it may be given more than once."""
        return self.action != "store"


def _shape(hint: Any) -> _Shape:
    """`int | None` is an int; `Sequence[str] | str` is a str that may be given more than once; words are a str."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        shapes = [_shape(part) for part in typing.get_args(hint) if part is not type(None)]
        return max(shapes, key=lambda shape: shape.many)
    if typing.get_origin(hint) is Sequence:
        item = typing.get_args(hint)[0]
        return _Shape(_run if typing.get_origin(item) is Sequence else item, "append")
    if typing.get_origin(hint) is Mapping:
        return _Shape(_bias, _AddEntry)
    if typing.get_origin(hint) is typing.Literal:
        return _Shape(type(typing.get_args(hint)[0]))
    return _Shape(hint)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _help(text: str, default: Any) -> str:
    if default in (None, MISSING, (), "") or default is False or "(default" in text:
        return text
    return f"{text} (default: {'yes' if default is True else default})"


def _add_field(group: argparse._ArgumentGroup, field: Field[Any], hint: Any, default: Any) -> None:
    shape = _shape(field.metadata.get("type", hint))
    if "kind" in field.metadata:
        shape = dataclasses.replace(shape, type=_KINDS[field.metadata["kind"]])
    long = field.metadata.get("flag", _flag(field.name))
    names = [field.metadata["short"], long] if "short" in field.metadata else [long]
    names += [_flag(name) for name in (field.name, *field.metadata.get("aliases", ())) if _flag(name) != long]
    options: dict[str, Any] = {
        "dest": field.name,
        "default": argparse.SUPPRESS,
        "help": _help(field.metadata["help"], default).replace("%", "%%"),
    }
    if shape.type is bool:
        options["action"] = "store_true" if default is False else argparse.BooleanOptionalAction
    else:
        options |= {"type": shape.type, "action": shape.action, "metavar": long.rpartition("-")[2].upper()}
        if "choices" in field.metadata:
            options.update(choices=field.metadata["choices"], metavar=None)
    group.add_argument(*names, **options)


def add_fields(
    parser: argparse.ArgumentParser,
    kind: type[Any],
    title: str,
    *,
    defaults: Mapping[str, Any] = NOTHING,
    skip: Set[str] = frozenset(),
) -> None:
    """Add an option for each field of the dataclass `kind`, and of the dataclasses in it, under one title.

    `defaults` are those that a command uses instead of the fields': they change the help alone, the command puts them
    in itself.
    """
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in skip:
            continue
        if dataclasses.is_dataclass(hints[field.name]):
            add_fields(parser, hints[field.name], f"{field.name} options", defaults=defaults, skip=skip)
            continue
        if field.metadata.get("help"):
            _add_field(group, field, hints[field.name], defaults.get(field.name, field.default))


def field_names(kind: type[Any]) -> set[str]:
    """Names of the fields of a dataclass and of the dataclasses in it."""
    hints = typing.get_type_hints(kind)
    names: set[str] = set()
    for field in dataclasses.fields(kind):
        names |= field_names(hints[field.name]) if dataclasses.is_dataclass(hints[field.name]) else {field.name}
    return names


def given(args: argparse.Namespace, kind: type[Any], skip: Set[str] = frozenset()) -> dict[str, Any]:
    """What the user gave for the fields of `kind`, by field name."""
    names = field_names(kind) - skip
    return {name: value for name, value in vars(args).items() if name in names}


def add_engine_options(
    parser: argparse.ArgumentParser,
    *,
    defaults: Mapping[str, Any] = NOTHING,
    skip: Set[str] = frozenset(),
    chats: bool = False,
) -> None:
    """Add the options of EngineConfig, those of chats' answers only where a command may serve chats."""
    left_out = skip if chats else skip | _OF_CHATS
    add_fields(parser, EngineConfig, "engine options", defaults=defaults, skip=left_out)


def engine_options(
    args: argparse.Namespace, *, defaults: Mapping[str, Any] = NOTHING, skip: Set[str] = frozenset()
) -> dict[str, Any]:
    """Keyword arguments for `LLM` or `EngineConfig.create` from the options of `add_engine_options`."""
    return {**defaults, **given(args, EngineConfig, skip | {"model"})}


def option_words(options: Mapping[str, Any]) -> list[str]:
    """Options of an engine, by the names of their fields, as words of a command line that have their values with them.

    Options whose value is None are left out.
    """
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if value is not None:
            words.append(f"--{flag}" if value is True else f"--no-{flag}" if value is False else f"--{flag}={value}")
    return words


def add_sampling_options(
    parser: argparse.ArgumentParser, *, defaults: Mapping[str, Any] = NOTHING, skip: Set[str] = frozenset()
) -> None:
    """Add the options of SamplingParams."""
    add_fields(parser, SamplingParams, "sampling options", defaults=defaults, skip=skip)


def sampling_params(
    args: argparse.Namespace, *, defaults: Mapping[str, Any] = NOTHING, skip: Set[str] = frozenset()
) -> SamplingParams:
    """SamplingParams from the options of `add_sampling_options`."""
    return SamplingParams(**{**defaults, **given(args, SamplingParams, skip)})
