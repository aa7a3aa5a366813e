import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hasten.core.errors import ConfigError
from hasten.server.options import LogOptions
from hasten.server.protocol.settings import LogSettings, TraceSettings
from hasten.server.types import ServiceError


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("tests.log")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield logger
    logger.handlers.clear()


def written(logger: logging.Logger, options: LogOptions | None = None) -> io.StringIO:
    stream = io.StringIO()
    logger.addHandler(LogSettings(options or LogOptions(), stream))
    return stream


def test_a_line_looks_like_tritons(logger: logging.Logger) -> None:
    stream = written(logger)
    logger.info("Started HTTPService at %s", "0.0.0.0:8000")
    # I1123 09:09:53.563181 1763 http_server.cc:4713] "Started HTTPService at 0.0.0.0:18000"
    index = r"\d+ test_settings\.py:\d+\]"
    form = rf'I\d{{4}} \d\d:\d\d:\d\d\.\d{{6}} {index} "Started HTTPService at 0\.0\.0\.0:8000"\n'
    assert re.fullmatch(form, stream.getvalue())


def test_a_line_in_iso_format(logger: logging.Logger) -> None:
    stream = written(logger, LogOptions(log_format="ISO8601"))
    logger.warning("careful")
    assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ W \d+ test_settings\.py:\d+\] "careful"\n', stream.getvalue())


def test_a_record_is_an_object_of_json(logger: logging.Logger) -> None:
    stream = written(logger, LogOptions(log_format="json"))
    logger.info("\n%s", "+--+\n|é|")
    logger.warning("call %s", 'x"\ny', extra={"fields": {"status": "200", "duration_ms": 1.5}})
    try:
        raise ValueError("wrong")
    except ValueError:
        logger.exception("failed")
    table, call, failure = map(json.loads, stream.getvalue().splitlines())
    assert (table["message"], table["level"], table["logger"]) == ("+--+\n|é|", "info", "tests.log")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", table["time"])
    assert table["where"].startswith("test_settings.py:")
    assert (call["message"], call["level"]) == ('call x"\ny', "warning")
    assert (call["status"], call["duration_ms"]) == ("200", 1.5)
    assert failure["exception"].endswith("ValueError: wrong")


def test_a_message_cannot_pass_for_another_line(logger: logging.Logger) -> None:
    stream = written(logger)
    message = 'x"\nE1123 09:09:53.563181 1 server.py:1] "forged'
    logger.info("%s", message)
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line.partition("] ")[2]) == message


def test_a_table_stands_on_lines_of_its_own(logger: logging.Logger) -> None:
    stream = written(logger)
    logger.info("\n%s", "+--+\n")
    heading, table, empty = stream.getvalue().split("\n", 2)
    assert heading.endswith("] ")
    assert (table, empty) == ("+--+", "\n")


def test_each_severity_is_turned_on_and_off_while_it_runs(logger: logging.Logger) -> None:
    stream = io.StringIO()
    settings = LogSettings(stream=stream)
    logger.addHandler(settings)

    def shown() -> str:
        stream.seek(0)
        stream.truncate()
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logger.log(level, "x")
        return "".join(line[0] for line in stream.getvalue().splitlines())

    assert shown() == "IWE"
    settings.update({"log_verbose_level": 1, "log_warning": False})
    assert shown() == "IIE"
    settings.update({"log_verbose_level": 0, "log_info": False, "log_error": False})
    assert shown() == ""


def test_a_traceback_is_shown(logger: logging.Logger) -> None:
    stream = written(logger)
    try:
        raise ValueError("why")
    except ValueError:
        logger.exception("failed")
    assert stream.getvalue().startswith("E")
    assert "ValueError: why" in stream.getvalue()


def test_hastens_log_goes_to_the_file_and_is_given_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "log"
    file.write_text("before\n")
    logs = LogSettings(LogOptions(log_file=str(file)))
    logs.start()
    try:
        logging.getLogger("hasten.server.x").info("here")
        logging.getLogger("uvicorn.error").info("not here")
        logging.getLogger("uvicorn.error").warning("here too")
    finally:
        logs.stop()
    first, *lines = file.read_text().splitlines()
    assert first == "before"
    assert [line.partition("] ")[2] for line in lines] == ['"here"', '"here too"']
    assert not logging.getLogger("hasten").handlers
    assert not sys.stderr.closed
    assert capsys.readouterr().err == ""


def test_records_are_made_where_they_are_shown() -> None:
    logs, log = LogSettings(stream=io.StringIO()), logging.getLogger("hasten.server.x")
    logs.start()
    try:
        assert not log.isEnabledFor(logging.DEBUG)
        logs.update({"log_verbose_level": 1})
        assert log.isEnabledFor(logging.DEBUG)
        logs.update({"log_verbose_level": 0})
        assert not log.isEnabledFor(logging.DEBUG)
    finally:
        logs.stop()
    assert log.getEffectiveLevel() == logging.getLogger().level


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write the log to"):
        LogSettings(LogOptions(log_file=str(tmp_path / "no" / "log"))).start()


def test_a_full_disk_is_one_line_and_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    logs = LogSettings(LogOptions(log_file="/dev/full"))
    logs.start()
    try:
        for _ in range(1000):
            logging.getLogger("hasten.server.x").info("lost")
    finally:
        logs.stop()
    first, last = capsys.readouterr().err.splitlines()
    reason = "hasten: cannot write the log to /dev/full: No space left on device; messages lost so far: "
    assert (first, last) == (reason + "1", reason + "1000")


def test_all_settings_are_changed_or_none() -> None:
    logs, traces = LogSettings(), TraceSettings()
    with pytest.raises(ServiceError):
        logs.update({"log_info": False, "log_format": "x"})
    assert logs.get()["log_info"] is True
    with pytest.raises(ServiceError):
        traces.update({"trace_rate": ["5"], "trace_count": ["x"]})
    assert traces.get()["trace_rate"] == ["1000"]
