"""Pictures as PNG, read by the format's own description."""

import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import pytest

from hasten.bench.charts import WIDTH, Bar, bars, write_sheet
from hasten.bench.svg import PALETTE
from hasten.cli.main import main
from hasten.core import extras
from hasten.core.errors import ConfigError

PICTURES = [bars("seconds", [Bar("one", 1.0, "1"), Bar("two", 2.0, "2")])]


def pixels(file: Path) -> list[bytes]:
    """The rows of a PNG of 8 bits a channel with alpha: 4 bytes a pixel."""
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, kind = struct.unpack(">2I2B", data[16:26])
    assert (depth, kind) == (8, 6)
    packed, at = b"", 8
    while at < len(data):
        length, name = struct.unpack(">I4s", data[at : at + 8])
        packed += data[at + 8 : at + 8 + length] if name == b"IDAT" else b""
        at += length + 12
    lines, row, raw = [], bytes(4 * width), zlib.decompress(packed)
    for start in range(0, len(raw), 4 * width + 1):
        row = unfiltered(raw[start], raw[start + 1 : start + 1 + 4 * width], row)
        lines.append(row)
    assert len(lines) == height
    return lines


def unfiltered(kind: int, line: bytes, above: bytes) -> bytes:
    """A row of which the differences to its neighbours are given."""
    row = bytearray(line)
    for at in range(len(row)):
        left, up, corner = (row[at - 4], above[at], above[at - 4]) if at >= 4 else (0, above[at], 0)
        nearest = min((left, up, corner), key=lambda each: abs(left + up - corner - each))
        row[at] = (row[at] + (0, left, up, (left + up) // 2, nearest)[kind]) % 256
    return bytes(row)


def test_a_sheet_as_png_shows_bars_and_letters(tmp_path: Path) -> None:
    file = tmp_path / "plot.png"
    write_sheet(str(file), "two bars", PICTURES)
    rows = pixels(file)
    assert len(rows[0]) == 4 * 2 * WIDTH
    colors = {row[at : at + 3] for row in rows for at in range(0, len(row), 4)}
    assert rows[0][:3] == bytes.fromhex(PALETTE["ground"][1:])
    assert {bytes.fromhex(PALETTE[name][1:]) for name in ("series-1", "ink")} <= colors, "bars, and letters"


def test_a_png_needs_packages_that_are_named_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "font_roboto" else find_spec(name))
    file = tmp_path / "plot.png"
    assert main(["bench", "latency", str(tmp_path / "no model"), "--plot", str(file)]) == 2
    assert "needs font-roboto, which is not installed; run: pip install 'hasten[png]'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="font-roboto"):
        write_sheet(str(file), "none", PICTURES)
    assert not file.exists()
