"""Pictures of benchmarks as PNG: their SVG drawn by resvg, in a font that is installed with it (the extra `png`)."""

from pathlib import Path

from hasten.core.errors import ConfigError
from hasten.core.extras import require_extra
from hasten.core.files import write_bytes

_ZOOM = 2
"""Pixels for each unit of a picture, as on a screen of high density."""
ENDING = ".png"


def is_png(path: str | Path) -> bool:
    """Whether a file of this name is to be a PNG."""
    return Path(path).suffix.lower() == ENDING


def require_png(path: str | None) -> None:
    """ConfigError where a file of this name is to be a PNG and the extra that draws it is not installed."""
    if path is not None and is_png(path):
        require_extra("png", f"a picture such as {path}")


def require_picture(path: str | None) -> None:
    """ConfigError where a picture with this name could not be drawn: it is of another kind, or an extra is missing."""
    if path is None:
        return
    if Path(path).suffix.lower() not in ("", ".svg", ENDING):
        raise ConfigError(f"cannot draw {path}: pictures are SVG or PNG; give a file that ends in .svg or .png")
    require_png(path)


def write_png(path: Path, document: str) -> None:
    """Draw an SVG document; an OSError names the file."""
    require_png(str(path))
    import font_roboto
    import resvg_py

    data = resvg_py.svg_to_bytes(
        svg_string=document, zoom=_ZOOM, font_files=[font_roboto.Roboto], sans_serif_family="Roboto"
    )
    write_bytes(path, bytes(data))
