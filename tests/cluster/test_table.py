"""What tables and plain data are made of."""

import json
import re
import time
from datetime import UTC, datetime, timedelta, timezone

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hasten.cluster import table
from hasten.cluster.backend import Instance, Job, Status

BEGAN = datetime(2026, 8, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0s"),
        (0, "0s"),
        (59.9, "59s"),
        (60, "1m"),
        (3599, "59m"),
        (3600, "1h"),
        (86399, "23h"),
        (86400, "1d"),
        (86400 * 364.9, "364d"),
        (86400 * 365, "1y"),
        (86400 * 1000, "2y"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert table.short_duration(seconds) == text


def test_columns() -> None:
    assert table.columns(("A", "LONG"), [("four", "x"), ("y", "")]) == ["A     LONG", "four  x", "y"]
    assert table.columns(("A", "LONG"), [("b", "c")], ruled=True) == ["A  LONG", "-  ----", "b  c"]
    assert table.columns(("A", "B"), []) == ["A  B"]
    assert table.columns(("A", "B"), [("{0}", "{}")]) == ["A    B", "{0}  {}"]


@pytest.mark.parametrize(
    ("status", "instances", "allocated"),
    [
        (Status.PENDING, (Status.PENDING,), "0"),
        (Status.RUNNING, (Status.RUNNING, Status.PENDING), "2"),
        (Status.QUEUING, (), "N/A"),
        (Status.SUCCEEDED, (Status.SUCCEEDED,), "N/A"),
        (Status.FAILED, (Status.RUNNING,), "N/A"),
    ],
)
def test_allocated_gpus(status: Status, instances: tuple[Status, ...], allocated: str) -> None:
    result = tuple(Instance(name=str(rank), status=each, created=BEGAN, gpus=2) for rank, each in enumerate(instances))
    job = Job(name="x", namespace="n", status=status, created=BEGAN, ended=BEGAN, gpus=4, instances=result)
    assert table.job_lines([job])[1].split() == ["x", status, "PYTORCHJOB", "0s", "4", allocated, "N/A"]


def a_job() -> Job:
    end = BEGAN + timedelta(seconds=1.25)
    return Job(name="ü\n", namespace="n", status=Status.FAILED, created=BEGAN, ended=end, reason="no: 'yes'")


def test_plain_data() -> None:
    plain = table.plain(a_job())
    assert plain["status"] == "FAILED"
    assert type(plain["status"]) is str
    assert (plain["created"], plain["started"], plain["duration"]) == ("2026-08-01T12:00:00Z", None, 1.25)
    assert table.plain(BEGAN.astimezone(timezone(timedelta(hours=8)))) == "2026-08-01T12:00:00Z"
    assert table.plain({"ports": (1, 2.5, True)}) == {"ports": [1, 2.5, True]}


def test_json_and_yaml_say_the_same() -> None:
    jobs = [a_job(), a_job()]
    assert json.loads(table.as_json(jobs)) == yaml.safe_load(table.as_yaml(jobs)) == table.plain(jobs)


def test_yaml_of_several_documents() -> None:
    shared = {"a": "x" * 300}
    text = table.as_yaml({"one": shared, "two": shared}, {"three": "line\nline"})
    assert list(yaml.safe_load_all(text)) == [{"one": shared, "two": shared}, {"three": "line\nline"}]
    assert "&" not in text
    assert text.count("---\n") == 1
    assert table.as_yaml() == ""


@pytest.mark.parametrize(
    "text",
    [
        "a\nb",
        " a\nb \n\n",
        "a\tb\n\n  c",
        "\n",
        "- a: b # c\n",
        "a\r\nb",
        "\x00\n",
        "é\u2028\n",
        "'\"\n${A}\n",
        "~",
        "1",
    ],
)
def test_texts_survive_yaml(text: str) -> None:
    assert yaml.safe_load(table.as_yaml({"command": text})) == {"command": text}


YAML_1_1 = re.compile(
    r"y|Y|yes|Yes|YES|n|N|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF"
    r"|~|null|Null|NULL||<<|="
    r"|[-+]?0b[0-1_]+|[-+]?0[0-7_]+|[-+]?(0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+|[-+]?[1-9][0-9_]*(:[0-5]?[0-9])+"
    r"|[-+]?([0-9][0-9_]*)?\.[0-9.]*([eE][-+][0-9]+)?|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+\.[0-9_]*"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    r"|[0-9]{4}-[0-9]{2}-[0-9]{2}"
    r"|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt]|[ \t]+)[0-9]{1,2}:[0-9]{2}:[0-9]{2}(\.[0-9]*)?"
    r"([ \t]*(Z|[-+][0-9]{1,2}(:[0-9]{2})?))?"
)
"""What the types of yaml.org/type are written as."""
YAML_1_2 = re.compile(
    r"null|Null|NULL|~||true|True|TRUE|false|False|FALSE|[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
    r"|[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
"""The tags of the core schema, yaml.org/spec/1.2.2 chapter 10.3."""
AMBIGUOUS = (
    *("y", "Y", "n", "yes", "No", "on", "OFF", "true", "False", "~", "null", "Null", "", "=", "<<"),
    *("1e-3", "1E3", "0809", "12e4567", "0x1F", "0o17", "0b101", "1_000", "12:30:45", "190:20:30.15", "-1", "+1"),
    *(".5", "5.", "-.5", ".inf", "-.INF", ".NaN", "2026-01-02", "2026-01-02T03:04:05Z", "2026-1-2 3:04:05"),
)


@pytest.mark.parametrize("text", AMBIGUOUS)
def test_texts_that_look_like_something_else_are_quoted(text: str) -> None:
    for data, line in (({"value": text}, f"value: '{text}'\n"), ([text], f"- '{text}'\n")):
        assert table.as_yaml(data) == line
    assert table.as_yaml({text: 1}).startswith(f"'{text}': ")


def test_other_texts_are_not_quoted() -> None:
    for text in (
        "bloom",
        "2Gi",
        "500m",
        "IfNotPresent",
        "/mnt/model",
        "apps/v1",
        "no-op",
        "yesterday",
        "1-worker",
        "v1",
    ):
        assert table.as_yaml({"value": text}) == f"value: {text}\n"
    assert table.as_yaml({"a": True, "b": None, "c": 1, "d": 0.5}) == "a: true\nb: null\nc: 1\nd: 0.5\n"


NUMBERISH = st.text("0123456789abcdefoxABCDEFXO_.:+-eEtTzZyYnN~ ", max_size=12)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(NUMBERISH, st.text(max_size=30), st.from_regex(YAML_1_1, fullmatch=True)))
def test_any_text_is_a_text_to_any_reader(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    for data in ({"value": text}, [text], {text: "value"}, {"deep": [{"env": [{"name": "A", "value": text}]}]}):
        written = table.as_yaml(data)
        assert yaml.safe_load(written) == data
    plain = table.as_yaml([text]).removeprefix("- ").removesuffix("\n")
    if not plain.startswith(("'", '"', "|")):
        assert plain == text
        assert not YAML_1_1.fullmatch(plain)
        assert not YAML_1_2.fullmatch(plain)


def test_lines_are_written_as_lines() -> None:
    assert table.as_yaml({"command": "first $x\nsecond"}) == "command: |-\n  first $x\n  second\n"


def test_a_thousand_jobs_are_a_matter_of_milliseconds() -> None:
    instances = tuple(Instance(name=f"i{rank}", status=Status.RUNNING, created=BEGAN) for rank in range(2))
    jobs = [
        Job(name=f"job-{number}", namespace="n", status=Status.RUNNING, created=BEGAN, instances=instances)
        for number in range(1000)
    ]
    seconds = []
    for _ in range(10):  # garbage of other tests may be collected in some
        began = time.process_time()
        assert len(table.job_lines(jobs, namespaces=True)) == 1001
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.1
