"""One table from one file: Parquet, CSV, TSV or JSON lines, each also gzipped, into Arrow.

Nothing is interpreted here: text files give text columns (so that an identifier such as 007 or NA stays what
it is), and every table knows how to say where one of its rows stands, for errors that name file and line.

CSV: comma, double quotes, UTF-8, a header line. TSV: tab, no quoting (a title may begin with a quote), UTF-8,
a header line. JSON lines: one object per line. Parquet and JSON keep their types.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from genrec.errors import GenrecError

KINDS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
SHOWN = 60  # longest piece of a file that an error repeats, in characters
BLOCK = 1 << 24  # bytes; the longest line that the fast parsers take


@dataclass(frozen=True)
class RawTable:
    """A table as it was read. name: what errors call it; path and kind say how to find the line of a row."""

    name: str
    table: pa.Table
    path: Path | None = None
    kind: str = "memory"

    def where(self, row: int) -> str:
        """The place of a 0-based row for a person: "line 7" in a text file, else "row 7", counted from 1."""
        lines = _first_lines(self.path, self.kind) if self.path else iter(())
        try:
            for i, line in enumerate(lines):
                if i == row:
                    return f"line {line}"
        except csv.Error:  # a field beyond the csv module's limit
            pass
        return f"row {row + 1}"

    def error(self, row: int, column: str, value: object, problem: str) -> GenrecError:
        """The error for one bad value: file, line, column, the value (bounded), what is wrong and how to mend it."""
        return GenrecError(f"{self.name}, {self.where(row)}, column {column!r}: {shown(value)} {problem}")


def shown(value: object) -> str:
    """A value as an error may repeat it: quoted, control characters escaped, at most SHOWN characters."""
    text = repr(str(value)[: SHOWN + 1])
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def nearest(name: str, choices: Iterable[str]) -> str:
    """ " Did you mean ...?" for the choice closest to a name, or nothing."""
    close = difflib.get_close_matches(name.lower(), list(choices), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def file_kind(path: Path) -> str | None:
    """csv, tsv, jsonl or parquet by the file's name (with or without .gz), else None."""
    name = path.name.lower().removesuffix(".gz")
    return KINDS.get(Path(name).suffix)


def read_table(path: Path) -> RawTable:
    """Reads one file. Raises GenrecError when it is missing, empty, cut off, or not of its kind."""
    kind = file_kind(path)
    if kind is None:
        raise GenrecError(f"{path}: unknown kind of file; use one of {', '.join(KINDS)}, each also with .gz")
    data = read_bytes(path)
    if not data.strip(b"\xef\xbb\xbf \t\r\n"):
        raise GenrecError(f"{path} is empty")
    if kind == "parquet":
        try:
            table = pa.parquet.read_table(pa.BufferReader(data))
        except (pa.ArrowException, OSError) as error:
            raise GenrecError(f"{path} is not a readable Parquet file ({one_line(error)}); it may be cut off") from None
    elif kind == "jsonl":
        table = _json_table(path, data)
    else:
        table = parse_delimited(str(path), data, "," if kind == "csv" else "\t", quoted=kind == "csv")
    if table.num_rows == 0:
        raise GenrecError(f"{path} is empty: it has a header and no rows")
    return RawTable(str(path), table, path, kind)


def read_bytes(path: Path) -> bytes:
    """A file's content, gunzipped where its name ends in .gz."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise GenrecError(f"{path} is missing") from None
    except OSError as error:
        raise GenrecError(f"cannot read {path}: {error.strerror}") from None
    if path.name.lower().endswith(".gz") and data:
        try:
            return gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            raise GenrecError(f"{path} is not a complete gzip file; it may be cut off: fetch it again") from None
    return data


def parse_delimited(name: str, data: bytes, delimiter: str, quoted: bool, columns: list[str] | None = None) -> pa.Table:
    """Delimited UTF-8 text to a table of text columns. columns: the names, where the text has no header line.

    Raises GenrecError on a repeated column name, a row of another width, an unclosed quote, or other encodings.
    """
    header = columns or _header(name, data, delimiter, quoted)
    for i, column in enumerate(header):
        if column in header[:i]:
            raise GenrecError(f"{name}: the column {shown(column)} appears twice in the header; rename one")
    if quoted and data.count(b'"') % 2:
        _check_quotes(name, data, delimiter)
    bad: list[Any] = []

    def remember(row: Any) -> str:
        bad.append(row)
        return "error"

    def parse(threads: bool) -> pa.Table:
        return pa.csv.read_csv(
            pa.BufferReader(data),
            read_options=pa.csv.ReadOptions(use_threads=threads, block_size=BLOCK, column_names=columns),
            parse_options=pa.csv.ParseOptions(
                delimiter=delimiter,
                quote_char='"' if quoted else False,
                newlines_in_values=quoted,
                invalid_row_handler=remember,
            ),
            convert_options=pa.csv.ConvertOptions(column_types={c: pa.string() for c in header}),
        )

    try:
        return parse(threads=True)
    except pa.ArrowInvalid as error:
        if "UTF8" in str(error):
            raise GenrecError(f"{name} is not UTF-8 text; save it as UTF-8") from None
        if not bad:
            raise GenrecError(f"{name} cannot be read: {one_line(error)}") from None
    bad.clear()
    try:
        parse(threads=False)  # one thread counts rows
    except pa.ArrowInvalid:
        row = bad[0]
    raise GenrecError(
        f"{name}, row {row.number} (the header counts): {row.actual_columns} values where the header has "
        f"{row.expected_columns}: {shown(row.text)}; quote values that contain the separator"
    )


def one_line(error: BaseException) -> str:
    """The first line of an error's message, bounded."""
    text = str(error).strip().split("\n")[0]
    return text[:200]


def _header(name: str, data: bytes, delimiter: str, quoted: bool) -> list[str]:
    first = data.lstrip(b"\xef\xbb\xbf\r\n").split(b"\n", 1)[0]
    try:
        text = first.decode("utf-8").rstrip("\r")
    except UnicodeDecodeError:
        raise GenrecError(f"{name} is not UTF-8 text; save it as UTF-8") from None
    return next(csv.reader([text], delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE))


def _check_quotes(name: str, data: bytes, delimiter: str) -> None:
    """An odd number of quotes may be a quote that never closes, which would swallow the rest of the file."""
    reader = csv.reader(io.StringIO(data.decode("utf-8", "replace"), newline=""), delimiter=delimiter, strict=True)
    start = 1
    try:
        for _ in reader:
            start = reader.line_num + 1
    except csv.Error:
        raise GenrecError(f"{name}, line {start}: a quote that is not closed, or text after a closing quote") from None


def _json_table(path: Path, data: bytes) -> pa.Table:
    """Arrow's parser where it can; else line by line, which names a bad line and bears columns of mixed types."""
    try:
        return pa.json.read_json(pa.BufferReader(data), read_options=pa.json.ReadOptions(block_size=BLOCK))
    except (pa.ArrowException, UnicodeDecodeError):
        pass
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise GenrecError(
                f"{path}, line {number}: not valid JSON: {shown(line.decode('utf-8', 'replace'))}"
            ) from None
        if not isinstance(value, dict):
            raise GenrecError(
                f"{path}, line {number}: one JSON object per line is expected, not {shown(json.dumps(value))}"
            )
        rows.append(value)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({_storable(name): _json_column([row.get(name) for row in rows]) for name in names})


def _json_column(values: list[Any]) -> pa.Array:
    """One column; as text (JSON for what is no text) where its values share no type."""
    try:
        return pa.array(values)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        texts = [v if isinstance(v, str) or v is None else json.dumps(v, ensure_ascii=False) for v in values]
        return pa.array([None if t is None else _storable(t) for t in texts], pa.string())


def _storable(text: str) -> str:
    """Lone surrogates, which JSON can spell and UTF-8 cannot, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _first_lines(path: Path, kind: str) -> Iterator[int]:
    """The 1-based first line of every data row of a text file, in order."""
    if kind == "jsonl":
        yield from (n for n, line in enumerate(read_bytes(path).split(b"\n"), start=1) if line.strip())
    elif kind in ("csv", "tsv"):
        text = io.StringIO(read_bytes(path).decode("utf-8-sig", "replace"), newline="")
        reader = csv.reader(text) if kind == "csv" else csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
        start, header = 1, True
        for row in reader:
            if row and not header:
                yield start
            header = header and not row
            start = reader.line_num + 1
