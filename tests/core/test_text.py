import pytest

from hasten.core.errors import InvalidRequestError
from hasten.core.text import from_command_line, from_json, require_utf8, utf8_lines

OTHER_ENDS = "a\fb\vc\x1cd\x1de\x1ef\x85g\u2028h\u2029i\rj"
"""All that str.splitlines takes for the end of a line as well."""


@pytest.mark.parametrize("text", ["", "plain", "caf\u00e9 \u65e5\u672c \U0001f525", "\u2028\u0085"])
def test_text_that_utf8_encodes_passes(text: str) -> None:
    require_utf8("prompt", text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\ud83d", r"stop is not valid UTF-8: it has the lone surrogate \ud83d at position 1"),
        ("abc\udcffd", r"stop is not valid UTF-8: it has the lone surrogate \udcff at position 3"),
    ],
)
def test_a_lone_surrogate_is_refused_by_the_fields_name(text: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        require_utf8("stop", text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\n\r\ntwo\r\n", ["one", "", "two"]),
        (b"\xef\xbb\xbfone\n", ["one"]),
        (
            "page\f one\v\x1c\x1d\x1e\x85\u2028\u2029 two\r three\n".encode(),
            ["page\f one\v\x1c\x1d\x1e\x85\u2028\u2029 two\r three"],
        ),
    ],
)
def test_lines_end_at_line_feeds_alone(data: bytes, lines: list[str]) -> None:
    assert utf8_lines(data) == lines


def test_lines_of_bytes_that_are_no_utf8() -> None:
    with pytest.raises(UnicodeDecodeError):
        utf8_lines(b"a\xff\n")


def test_arguments_that_the_locale_could_not_decode_are_utf8() -> None:
    assert from_command_line("caf\u00e9") == "caf\u00e9"
    assert from_command_line("caf\udcc3\udca9") == "caf\u00e9"
    assert from_command_line("abc\udcff") == "abc\udcff"
    assert from_command_line("abc\ud83d") == "abc\ud83d"


@pytest.mark.parametrize("depth", [10_000, 1_000_000])
def test_json_that_is_nested_too_deeply_is_a_wrong_value(depth: int) -> None:
    with pytest.raises(ValueError, match=r"^it is nested too deeply$"):
        from_json("[" * depth)


def test_constants_of_json_are_numbers_or_what_a_function_makes_of_them() -> None:
    assert from_json(b'{"a": [1, Infinity]}') == {"a": [1, float("inf")]}
    assert from_json("[NaN]", str.lower) == ["nan"]
