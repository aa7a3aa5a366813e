"""Whether what a benchmark wrote has the form that its schema promises."""

from collections.abc import Mapping
from typing import Any

import jsonschema  # type: ignore[import-untyped]

from hasten.bench import schema


def form_errors(report: Mapping[str, Any]) -> list[str]:
    """What is wrong with a report, read from JSON."""
    validator = jsonschema.Draft202012Validator(schema.schema(report["benchmark"]))
    return [error.message for error in validator.iter_errors(report)]
