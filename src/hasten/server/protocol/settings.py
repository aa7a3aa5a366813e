"""Trace and log settings as Triton's clients see and change them, and the server's log.

Nothing is traced, so `trace_level` stays OFF: what would start tracing is an error. What a log setting says is done.
"""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from hasten.core.errors import ConfigError
from hasten.core.text import shortened
from hasten.server.options import LOG_FORMATS, LogOptions
from hasten.server.types import ErrorKind, ServiceError, invalid

_LOG_DEFAULTS = LogOptions()
_LOGGERS = {"hasten": logging.INFO, "uvicorn.error": logging.WARNING, "opentelemetry": logging.WARNING}
"""What is logged by whom, unless the log is verbose. Records that nobody sees are not made: each takes 20 us."""
_TRACE_DEFAULTS = {
    **{"trace_level": "OFF", "trace_rate": "1000", "trace_count": "-1", "log_frequency": "0", "trace_file": ""},
    "trace_mode": "triton",
}
_RANGE = {"trace_rate": (0, 2**32 - 1), "trace_count": (-1, 2**31 - 1), "log_frequency": (0, 2**32 - 1)}
"""The smallest and the largest value that each may have."""
_MOST_VERBOSE = 2**31 - 1
_LEVELS = ("OFF", "TIMESTAMPS", "TENSORS")


_LOST_EVERY_S = 60.0
_LONGEST_MESSAGE = 8000
"""Characters of a message in the log: some of them name what a client sent."""


class TraceSettings:
    """Settings for all models, and for some of them others."""

    def __init__(self) -> None:
        self._models: dict[str, dict[str, str]] = {}
        """By a model's name; "": those of all."""

    def get(self, model: str = "") -> dict[str, list[str]]:
        """What holds for a model, or for all; every setting as a list of texts."""
        settings = _TRACE_DEFAULTS | self._models.get("", {}) | self._models.get(model, {})
        return {key: [value] for key, value in settings.items()}

    def update(self, values: Mapping[str, Sequence[str] | None], model: str = "") -> None:
        """Change settings; None or nothing sets one back. All or none are changed."""
        changed = dict(self._models.get(model, {}))
        for key, given in values.items():
            value = _trace_value(key, given)
            if value is None:
                changed.pop(key, None)
            else:
                changed[key] = value
        self._models[model] = changed


def _trace_value(key: str, given: Sequence[str] | None) -> str | None:
    """The text to keep of a setting, None to keep none; ServiceError for what is not known or not done."""
    if key == "trace_file":
        raise ServiceError(ErrorKind.UNSUPPORTED, "trace file location can not be updated through network protocol")
    if key not in _TRACE_DEFAULTS:
        raise invalid(f"trace setting '{key}' is not known; there are: {', '.join(_TRACE_DEFAULTS)}")
    if not given:
        return None
    if key == "trace_level":
        _check_trace_level(given)
        return None
    if len(given) > 1:
        raise invalid(f"expect only 1 value for '{key}'")
    (text,) = given
    if key == "trace_mode":
        if text != "triton":
            raise ServiceError(ErrorKind.UNSUPPORTED, f"trace mode '{text}' is not supported; use triton")
        return None
    try:
        number = int(text)
    except ValueError:
        raise invalid(f"Unable to parse '{key}', got: {text}") from None
    least, most = _RANGE[key]
    if number > most:
        raise invalid(f"Unable to parse '{key}', value is out of range [ {least}, {most} ], got: {text}")
    if number < least:
        raise invalid(f"Unable to parse '{key}'. Expecting value >= {least}, got:{text}")
    return str(number)


def _check_trace_level(given: Sequence[str]) -> None:
    if "OFF" in given and len(given) > 1:
        raise invalid("Expect only one trace level 'OFF' is specified")
    for level in given:
        if level not in _LEVELS:
            raise invalid(f"trace level '{level}' is not known; there are: {', '.join(_LEVELS)}")
        if level != "OFF":
            raise invalid("Attempting to set invalid trace setting :trace file name is not given")


class LogSettings(logging.Handler):
    """What the server writes to its log, and what writes it: to a stream, by default standard error.

    Records are written the way Triton does: a heading and the message in quotes, or a table on lines of its own. As
    JSON each is an object on one line, with the `fields` that the record may have besides.
    """

    def __init__(self, options: LogOptions = _LOG_DEFAULTS, stream: TextIO | None = None) -> None:
        super().__init__()
        self._values: dict[str, Any] = {
            **{name: getattr(options, name) for name in ("log_file", "log_info", "log_warning", "log_error")},
            **{"log_verbose_level": options.log_verbose, "log_format": options.log_format},
        }
        self._stream = stream or sys.stderr
        self._file: TextIO | None = None
        self._lost, self._lost_reported = 0, -_LOST_EVERY_S
        self.addFilter(self._shows)

    def get(self) -> dict[str, Any]:
        """All settings."""
        return dict(self._values)

    def update(self, values: Mapping[str, Any]) -> None:
        """Change settings; None leaves one as it is. All or none are changed."""
        changed = dict(self._values)
        for key, value in values.items():
            if key == "log_file":
                raise ServiceError(
                    ErrorKind.UNSUPPORTED, "log file location can not be updated through network protocol"
                )
            if key not in changed:
                raise invalid(f"log setting '{key}' is not known; there are: {', '.join(changed)}")
            if value is not None:
                changed[key] = _log_value(key, value)
        self._values = changed
        if self in logging.getLogger("hasten").handlers:
            self._set_level()

    def _set_level(self) -> None:
        verbose = self._values["log_verbose_level"]
        logging.getLogger("hasten").setLevel(logging.DEBUG if verbose else _LOGGERS["hasten"])

    def _shows(self, record: logging.LogRecord) -> bool:
        """Whether a record is written."""
        levels = ((logging.ERROR, "log_error"), (logging.WARNING, "log_warning"), (logging.INFO, "log_info"))
        setting = next((setting for level, setting in levels if record.levelno >= level), "log_verbose_level")
        return bool(self._values[setting])

    def start(self) -> None:
        """Write the log of hasten, and warnings of its HTTP server, to the settings' file or to the stream."""
        if name := self._values["log_file"]:
            try:
                self._stream = self._file = Path(name).open("a", encoding="utf-8")  # noqa: SIM115 - closed by close
            except OSError as error:
                raise ConfigError(f"cannot write the log to {name}: {error.strerror}") from error
        for logger, level in _LOGGERS.items():
            logging.getLogger(logger).addHandler(self)
            logging.getLogger(logger).setLevel(level)
            logging.getLogger(logger).propagate = False
        self._set_level()

    def stop(self) -> None:
        """Undo `start`."""
        for logger in _LOGGERS:
            logging.getLogger(logger).removeHandler(self)
            logging.getLogger(logger).setLevel(logging.NOTSET)
            logging.getLogger(logger).propagate = True
        self.close()

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._report_lost(error)
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record. A file that cannot be written is reported on standard error, at most once a minute."""
        try:
            self._stream.write(self.format(record))
            self._stream.flush()
        except OSError as error:
            self._lost += 1
            if time.monotonic() - self._lost_reported >= _LOST_EVERY_S:
                self._report_lost(error)
        except Exception:
            self.handleError(record)

    def _report_lost(self, error: OSError) -> None:
        if self._file is None or sys.stderr is None or not self._lost:
            return
        name = self._values["log_file"]
        text = f"hasten: cannot write the log to {name}: {error.strerror}; messages lost so far: {self._lost}\n"
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()
        self._lost_reported = time.monotonic()

    def format(self, record: logging.LogRecord) -> str:
        """The lines of one record. A message is quoted, so that it cannot pass for another line."""
        message = record.getMessage()
        if self._values["log_format"] == "json":
            return _json_line(record, shortened(message.strip("\n"), _LONGEST_MESSAGE))
        table = message.startswith("\n")
        shown = message if table else json.dumps(shortened(message, _LONGEST_MESSAGE), ensure_ascii=False)
        if record.exc_info:
            shown += "\n" + logging.Formatter().formatException(record.exc_info)
        return f"{self._heading(record)} {shown}\n"

    def _heading(self, record: logging.LogRecord) -> str:
        """What a line begins with: severity, time, process and place."""
        severity = {logging.ERROR: "E", logging.WARNING: "W", logging.INFO: "I"}.get(record.levelno, "I")
        moment = time.gmtime(record.created)
        where = f"{os.getpid()} {record.filename}:{record.lineno}]"
        if self._values["log_format"] == "ISO8601":
            return f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', moment)} {severity} {where}"
        return f"{severity}{time.strftime('%m%d %H:%M:%S', moment)}.{int(record.created % 1 * 1e6):06d} {where}"


def _log_value(key: str, value: Any) -> Any:
    if key == "log_format":
        if not isinstance(value, str):
            raise invalid(f"expect string for '{key}'")
        if value not in LOG_FORMATS:
            raise invalid(f"invalid argument for log_format, got: {value}")
    elif key == "log_verbose_level":
        if type(value) is not int or not 0 <= value <= _MOST_VERBOSE:
            raise invalid(f"expect int32 for '{key}'")
    elif type(value) is not bool:
        raise invalid(f"expect boolean for '{key}'")
    return value


def _json_line(record: logging.LogRecord, message: str) -> str:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    fields: dict[str, Any] = {
        "time": f"{moment}.{int(record.created % 1 * 1e6):06d}Z",
        "level": record.levelname.lower(),
        "logger": record.name,
        "where": f"{record.filename}:{record.lineno}",
        "pid": os.getpid(),
        "message": message,
    }
    fields |= getattr(record, "fields", {})
    if record.exc_info:
        fields["exception"] = logging.Formatter().formatException(record.exc_info)
    return json.dumps(fields, ensure_ascii=False) + "\n"
