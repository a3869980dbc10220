"""Tables that users write: rows of a CSV or Parquet file, here or on s3://."""

import csv
import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from adaconv import storage
from adaconv.errors import UsageError

_TOO_MANY = "\0"  # what DictReader puts a row's fields under for which the first line has no name


def read_table(uri: str, *, flag: str) -> list[tuple[str, dict[str, Any]]]:
    """Each row, and where it is, for messages.

    Args:
        uri: of the file: Parquet by its extension, else CSV.
        flag: that names the file.

    Raises:
        UsageError: it is not there, is no such file, has no rows, or a row has more fields than the first line.
    """
    rows = []
    for number, row in enumerate(_rows(storage.absolute(uri), flag), 1):
        where = f"{flag} {uri}, row {number}"
        if _TOO_MANY in row:
            expected = len(row) - 1
            found = expected + len(row[_TOO_MANY])
            raise UsageError(f"{where}: expected {expected} fields, as the first line has, found {found}")
        rows.append((where, row))
    if not rows:
        raise UsageError(f"{flag} {uri}: expected rows, found none")
    return rows


def _rows(uri: str, flag: str) -> list[dict[str, Any]]:
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        raise UsageError(f"{flag} {uri}: expected a table, found nothing there") from None
    except IsADirectoryError:
        raise UsageError(f"{flag} {uri}: expected a table, found a folder") from None
    if uri.endswith(".parquet"):
        try:
            rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(data)).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:  # which Arrow raises of a damaged row group
            raise UsageError(f"{flag} {uri}: expected a Parquet file, found: {error}") from None
        return rows
    try:
        text = io.StringIO(data.decode("utf-8-sig"), newline="")
        return list(csv.DictReader(text, restkey=_TOO_MANY, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{flag} {uri}: expected a CSV file in UTF-8, found: {error}") from None
