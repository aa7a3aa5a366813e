"""What `hasten embed`, `classify` and `fill-mask` have in common: texts as JSON lines in, JSON lines out."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.cli.options import Parser, add_engine_options, add_fields, given, path
from hasten.core.errors import ConfigError
from hasten.core.files import reading
from hasten.core.text import from_command_line, from_json, require_utf8, utf8_lines
from hasten.core.types import PoolingParams

ENGINE_SKIP = frozenset({"seed"})
"""Nothing is drawn."""


@dataclass(frozen=True)
class Entry:
    """A text, and what came with it."""

    text: str
    fields: Mapping[str, Any]
    """Of its JSON object, which the output has too."""


def add_text_options(parser: Parser, *, skip: frozenset[str] = frozenset()) -> None:
    """Add the options for texts, for what is made of them, and for the engine; `skip`: fields of PoolingParams."""
    parser.add_argument("model", type=path, metavar="MODEL", help="folder of the checkpoint, or its Hugging Face id")
    parser.text_option = "--text"
    parser.add_argument("--text", action="append", default=[], help="a text; may be given more than once")
    parser.add_argument(
        "--input",
        type=path,
        metavar="FILE",
        help='file of JSON lines, each a text or an object with "text"; - reads standard input',
    )
    add_fields(parser, PoolingParams, "text options", skip=skip)
    add_engine_options(parser, skip=ENGINE_SKIP)


def pooling_params(args: argparse.Namespace, **fields: Any) -> PoolingParams:
    """PoolingParams from the options of `add_text_options`, with these fields."""
    return PoolingParams(**{**given(args, PoolingParams), **fields})


def read_texts(args: argparse.Namespace) -> list[Entry]:
    """The texts of the command line and of its input; ConfigError names the line that is wrong."""
    texts = [from_command_line(text) for text in args.text]
    for text in texts:
        require_utf8("--text", text)
    entries = [Entry(text, {"text": text}) for text in texts]
    if args.input is not None:
        with reading(f"texts from {args.input}"):
            lines = utf8_lines(_standard_input() if args.input == "-" else Path(args.input).read_bytes())
        entries += _entries(args.input, lines)
    if not entries:
        raise ConfigError("there is no text; give --text or --input")
    return entries


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise ConfigError("cannot read texts from -: standard input is closed")
    return sys.stdin.buffer.read()


def _entries(name: str, lines: Iterable[str]) -> Iterable[Entry]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            value = from_json(line)
        except ValueError as error:
            raise ConfigError(
                f'{where} is not JSON ({error}); give a text in quotes, or an object with "text"'
            ) from None
        fields = {"text": value} if isinstance(value, str) else value
        if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
            raise ConfigError(f'{where} is neither a text nor an object with "text": {line.strip():.80}')
        require_utf8(where, fields["text"])
        yield Entry(fields["text"], fields)


def print_lines(entries: Sequence[Entry], found: Iterable[Mapping[str, Any]]) -> None:
    """Print a JSON object for each text: what came with it, and what was found."""
    for entry, fields in zip(entries, found, strict=True):
        print(json.dumps({**entry.fields, **fields}))
