"""Where models are described: folders NAME/config.pbtxt with NAME/VERSION, or descriptions made in memory."""

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from tritonclient.grpc import model_config_pb2

from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError
from hasten.server.models.config import completed, kind_of, parse_config, parse_config_json
from hasten.server.models.interfaces import Kind
from hasten.server.models.parameters import CHECKPOINT, TOKENIZER, check_parameters, checkpoint_folder, engine_options

CONFIG = "config.pbtxt"
_LONGEST_NAME = 255
"""Bytes of a folder's name: systems refuse to look for longer ones."""


@dataclass(frozen=True)
class Description:
    """A model as its repository has it."""

    name: str
    config: model_config_pb2.ModelConfig
    """Complete."""
    folder: Path
    versions: tuple[int, ...]
    """Those that are to serve, by the version policy."""
    keep: object = field(default=None, compare=False)
    """What must live as long as it does: a temporary folder."""

    @cached_property
    def kind(self) -> Kind:
        """What the model does."""
        return kind_of(self.config)

    def engine_config(self, version: int) -> EngineConfig:
        """Of a token model's version; ConfigError names a wrong parameter."""
        checkpoint = checkpoint_folder(self.config, self.folder, self.folder / str(version))
        options = engine_options(self.config)
        if "tokenizer" in options:
            options["tokenizer"] = str(self.folder / options["tokenizer"])
        return EngineConfig.create(str(checkpoint), **options)


def is_model_name(name: str) -> bool:
    """Whether it can be the name of a model: of one folder, and not of one elsewhere."""
    short = len(name.encode(errors="replace")) <= _LONGEST_NAME
    return short and name not in ("", ".", "..") and not any(char in "/\\\0" for char in name)


class FolderRepository:
    """One or several folders of models."""

    def __init__(self, folders: Sequence[str | Path], *, auto_complete: bool = True) -> None:
        self._folders = [Path(folder) for folder in folders]
        self._auto_complete = auto_complete
        for folder in self._folders:
            if not folder.is_dir():
                raise ConfigError(f"model repository {folder} is not a folder")

    def names(self) -> list[str]:
        """Folders in the repository; hidden ones are none of it."""
        found = {path.name for root in self._folders for path in root.iterdir() if path.is_dir()}
        return sorted(name for name in found if not name.startswith("."))

    def _folder(self, name: str) -> Path | None:
        if not is_model_name(name):
            return None
        found = [root / name for root in self._folders if (root / name).is_dir()]
        if len(found) > 1:
            raise ConfigError(f"model '{name}' is in {found[0].parent} and in {found[1].parent}; remove one of them")
        return found[0] if found else None

    def describe(self, name: str) -> Description | None:
        """One model as it is now, by its config.pbtxt, or without one by what its version folders hold.

        None where there is none. ConfigError says what is wrong with it.
        """
        folder = self._folder(name)
        if folder is None:
            return None
        return _description(name, folder, _read_config(folder), self._auto_complete)

    def override(self, name: str, config_json: str | None, files: Mapping[str, bytes]) -> Description | None:
        """The same with another configuration, and with other files in place of its folder.

        With files, the model's folder has those alone, and the configuration must come with them.
        """
        if not is_model_name(name):
            return None
        folder = self._folder(name)
        if folder is None and not files:
            return None
        if config_json is None:
            if files:
                raise ConfigError("Load parameter 'config' must be specified for model file override")
            return self.describe(name)
        config = parse_config_json(config_json)
        given = _read_config(folder) if folder is not None and not files else None
        self._check_paths(config, given)
        if files:
            sent = _SentFiles(files)
            return _description(name, sent.folder, config, self._auto_complete, keep=sent)
        assert folder is not None
        return _description(name, folder, config, self._auto_complete)

    def _check_paths(self, config: model_config_pb2.ModelConfig, given: model_config_pb2.ModelConfig | None) -> None:
        """A configuration that came over the network names no folder that the repository does not name itself."""
        if config.default_model_filename and not _is_inside(config.default_model_filename):
            raise ConfigError(
                f"default_model_filename is {config.default_model_filename!r}, which is not in the version's folder; a "
                "configuration that is sent cannot lead elsewhere"
            )
        for parameter in (CHECKPOINT, TOKENIZER):
            if parameter not in config.parameters:
                continue
            path = config.parameters[parameter].string_value
            known = given is not None and parameter in given.parameters and given.parameters[parameter].string_value
            inside = any(Path(path).resolve().is_relative_to(root.resolve()) for root in self._folders)
            if path != known and not (inside and Path(path).is_absolute()):
                raise ConfigError(
                    f"parameter '{parameter}' is {path!r}, which is neither in the model repository nor what the "
                    f"model's {CONFIG} says; a configuration that is sent cannot lead elsewhere"
                )

    def stamp(self, name: str) -> int | None:
        """Time of the last change in the model's folder, in ns; 0 where there is not one such folder, None where it
        cannot be told now.
        """
        try:
            folder = self._folder(name)
            paths = [] if folder is None else [folder, *folder.rglob("*")]
            return max((path.stat().st_mtime_ns for path in paths), default=0)
        except ConfigError:
            return 0
        except OSError:  # it changes while it is looked at
            return None


class MemoryRepository:
    """Models that were described by a program, each with its version 1."""

    def __init__(self, configs: Iterable[model_config_pb2.ModelConfig]) -> None:
        self._configs = {config.name: config for config in configs}

    def names(self) -> list[str]:
        """All of them."""
        return sorted(self._configs)

    def describe(self, name: str) -> Description | None:
        """The model as it was given."""
        if name not in self._configs:
            return None
        config = completed(self._configs[name], name)
        check_parameters(config, kind_of(config))
        return Description(name, config, Path(), (1,))

    def override(self, name: str, config_json: str | None, files: Mapping[str, bytes]) -> Description | None:
        """The configuration is the program's; ConfigError for another one."""
        if config_json is not None or files:
            raise ConfigError(f"model '{name}' was not read from a repository: its configuration cannot be replaced")
        return self.describe(name)

    def stamp(self, name: str) -> int | None:
        """They do not change."""
        return 0


Repository = FolderRepository | MemoryRepository
"""Models by name."""


class _SentFiles:
    """A temporary folder with files that came over the network; removed with the last description of it."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hasten-model-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        for name, content in files.items():
            _write_file(self.folder, name, content)


def _read_config(folder: Path) -> model_config_pb2.ModelConfig:
    path = folder / CONFIG
    try:
        return parse_config(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        return model_config_pb2.ModelConfig()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _description(
    name: str, folder: Path, given: model_config_pb2.ModelConfig, auto_complete: bool, keep: object = None
) -> Description:
    if not auto_complete and not given.ListFields():
        raise ConfigError(f"{folder / CONFIG} must be there, since configurations are not completed")
    config = completed(given, name, auto_complete=auto_complete)
    check_parameters(config, kind_of(config))
    return Description(name, config, folder, _versions(folder, config), keep)


def _versions(folder: Path, config: model_config_pb2.ModelConfig) -> tuple[int, ...]:
    """Versions to serve: folders with a number above 0 for a name, as far as the policy wants them."""
    names = [path.name for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()]
    found = sorted({int(name) for name in names if str(int(name)) == name and int(name) > 0})
    policy = config.version_policy
    if policy.HasField("specific"):
        return tuple(number for number in found if number in policy.specific.versions)
    if policy.HasField("all"):
        return tuple(found)
    return tuple(found[-policy.latest.num_versions :])


def _is_inside(name: str) -> bool:
    """Whether a path is relative and leads to what is below its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and not any(part == ".." or "\0" in part for part in path.parts)


def _write_file(root: Path, name: str, content: bytes) -> None:
    """Write `file:1/config.ini` as `1/config.ini` below `root`; ConfigError for a path that leads out of it."""
    path = PurePosixPath(name.removeprefix("file:"))
    if not _is_inside(str(path)):
        raise ConfigError(f"file {name!r} has a path that leads out of the model's folder")
    target = root.joinpath(*path.parts)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"file {name!r} cannot be written: {error}") from error
