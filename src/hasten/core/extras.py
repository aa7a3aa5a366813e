"""Optional dependencies: the extras of pyproject.toml, and the error of a command that lacks one."""

from collections.abc import Mapping
from importlib.util import find_spec

from hasten.core.errors import ConfigError

EXTRAS: Mapping[str, Mapping[str, str]] = {
    "serve": {
        "grpc": "grpcio",
        "httptools": "httptools",
        "msgspec": "msgspec",
        "starlette": "starlette",
        "tritonclient": "tritonclient[grpc]",
        "uvicorn": "uvicorn",
    },
    "cluster": {"kubernetes": "kubernetes", "msgspec": "msgspec", "yaml": "pyyaml"},
    "batch": {"msgspec": "msgspec"},
    "grammar": {"llguidance": "llguidance"},
    "parquet": {"pyarrow": "pyarrow"},
    "png": {"font_roboto": "font-roboto", "resvg_py": "resvg_py"},
    "otel": {
        "opentelemetry.exporter.otlp.proto.http": "opentelemetry-exporter-otlp-proto-http",
        "opentelemetry.sdk": "opentelemetry-sdk",
    },
    "ray": {"msgspec": "msgspec", "ray": "ray"},
}
"""For each extra the packages that it does not work without: name of the import -> name on the package index."""


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package that it belongs to
        return False


def require_extra(extra: str, who: str) -> None:
    """ConfigError that names the packages of an extra that are missing, where `who` needs them."""
    missing = [package for module, package in EXTRAS[extra].items() if not _is_there(module)]
    if missing:
        raise ConfigError(
            f"{who} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            f"run: pip install 'hasten[{extra}]'"
        )
