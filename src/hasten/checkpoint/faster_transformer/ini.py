"""config.ini of a folder: its sections, with values read as what they must be."""

import configparser
from collections.abc import Mapping
from pathlib import Path

from hasten.core.dtypes import Quantization
from hasten.core.errors import CheckpointError, UnsupportedError
from hasten.core.text import from_json

CONFIG_INI = "config.ini"
INT8_MODES: Mapping[str, Quantization | None] = {"0": None, "1": "int8"}
"""FasterTransformer's int8_mode, and the scheme that it stands for."""
NO_SMOOTHQUANT = (
    "2 is SmoothQuant, whose int8 files are not read; 1 quantizes full-precision files while they load, "
    "and so does --quantization w8a8, with activations in int8 as well"
)
_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})
"""What FasterTransformer's runtime takes for true and for false, in lower case."""


def ini_text(sections: Mapping[str, Mapping[str, object]], *, spaced: bool = False) -> str:
    """Text of a config.ini, byte for byte as Python's configparser writes it, `spaced` or not."""
    equals = " = " if spaced else "="
    written = (
        f"[{section}]\n" + "".join(f"{name}{equals}{value}\n" for name, value in values.items()) + "\n"
        for section, values in sections.items()
    )
    return "".join(written)


def read_sections(path: Path) -> "dict[str, Section]":
    """All sections of a config.ini; CheckpointError where it is none."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8"), source=str(path))
    except (configparser.Error, ValueError, OSError) as error:
        raise unreadable(path, str(error)) from error
    sections: dict[str, Section] = {}
    sections |= {name: Section(path, name, dict(parser[name]), sections) for name in parser.sections()}
    return sections


def unreadable(path: Path, problem: str) -> CheckpointError:
    """An error that says what is wrong with a config.ini."""
    return CheckpointError(f"{path} cannot be read as FasterTransformer's config.ini: {problem}")


class Section:
    """The keys of one section, which remembers those that were read. CheckpointError names a wrong one."""

    def __init__(self, path: Path, name: str, values: Mapping[str, str], sections: "Mapping[str, Section]") -> None:
        """`sections`: all those of the file."""
        self.path = path
        self.name = name
        self._values = values
        self._sections = sections
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def sibling(self, name: str) -> "Section":
        """Another section of the file."""
        if name not in self._sections:
            raise CheckpointError(f"{self.path} lacks [{name}]; convert the checkpoint again")
        return self._sections[name]

    def text(self, key: str, default: str | None = None) -> str:
        """A value as it is written."""
        self._read.add(key)
        value = self._values.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path} lacks {key!r} in [{self.name}]; convert the checkpoint again")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number."""
        value = self.text(key, None if default is None else str(default))
        try:
            return int(value)
        except ValueError:
            raise self._wrong(key, value, "a whole number") from None

    def number(self, key: str, default: float) -> float:
        """A number."""
        value = self.text(key, str(default))
        try:
            return float(value)
        except ValueError:
            raise self._wrong(key, value, "a number") from None

    def flag(self, key: str, default: bool) -> bool:
        """A value that is true or false."""
        value = self.text(key, str(default))
        if value.lower() not in _TRUE | _FALSE:
            raise self._wrong(key, value, "true or false")
        return value.lower() in _TRUE

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        """One of several values, the first of which is the default; UnsupportedError for another."""
        value = self.text(key, choices[0])
        if value not in choices:
            raise UnsupportedError(f"{self.path}: {key} {value!r} is not one of {', '.join(choices)}")
        return value

    def ids(self, key: str, default: int) -> tuple[int, ...]:
        """Token ids: one, a list or `None`."""
        value = self.text(key, str(default))
        try:
            found = () if value == "None" else from_json(value)
            return tuple(int(each) for each in found) if isinstance(found, list | tuple) else (int(found),)
        except (ValueError, TypeError):
            raise self._wrong(key, value, "a token id or a list of them") from None

    def unread(self) -> list[str]:
        """Keys that nobody read, sorted."""
        return sorted(set(self._values) - self._read)

    def _wrong(self, key: str, value: str, wanted: str) -> CheckpointError:
        return unreadable(self.path, f"{key} in [{self.name}] is {value!r}, not {wanted}")
