"""A Parquet file as the input of a batch."""

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Raw

from hasten.batch.source import Row, Source
from hasten.core.errors import ConfigError
from hasten.core.extras import require_extra
from hasten.core.files import reading

_ROWS_AT_ONCE = 1024
_BODY = "body"
_encode = msgspec.json.Encoder(enc_hook=str).encode


class Parquet(Source):
    """Columns are the fields of rows. A value that is null is left out; a `body` that is a text is JSON itself."""

    def rows(self) -> Iterator[Row]:
        """The rows in order; ConfigError where the file is damaged, or pyarrow is not installed."""
        require_extra("parquet", f"{self.path}, a Parquet file,")
        from pyarrow import ArrowException, parquet

        number = 0
        with reading(f"rows from {self.path}"), self.path.open("rb") as file:
            try:
                for batch in parquet.ParquetFile(file).iter_batches(_ROWS_AT_ONCE):
                    for row in batch.to_pylist():
                        yield Row(number, _json(row), "row")
                        number += 1
            except ArrowException as error:
                first = str(error).partition("\n")[0]
                raise ConfigError(f"{self.path} cannot be read as a Parquet file ({first}); copy it again") from error


def _json(row: dict[str, Any]) -> bytes:
    """A row as the JSON that it would be in a file of lines."""
    fields = _without_nulls(row)
    if isinstance(fields.get(_BODY), str):
        fields[_BODY] = Raw(fields[_BODY].encode())
    return _encode(fields)


def _without_nulls(value: Any) -> Any:
    """The same without the fields that other rows have, of which a column has null for this one."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
