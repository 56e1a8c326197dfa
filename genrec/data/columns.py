"""One checked column at a time: identifiers, numbers, times, text and category paths out of a table as it was read.

Timestamps are numbers (unix seconds, or milliseconds: taken for that when the median is above 1e11, which in
seconds would be the year 5138) or ISO dates and times (UTC where they name no zone) from 1970 to 2100.

Item text is a stranger's: control and formatting characters become spaces, and it is cut at MAX_TEXT characters.
"""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from genrec.data.readers import RawTable
from genrec.errors import GenrecError

MAX_TEXT = 500  # characters of a title or field
MAX_NAME = 100  # characters of one category
MAX_PATH = 16  # categories of one item
MAX_ID = 256  # characters of an identifier
LATEST = 4102444800.0  # 2100-01-01, unix seconds
MILLISECONDS = 1e11  # a median above this is milliseconds
UNSAFE = r"[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\s]+"  # control, invisible formatting (bidi too), separators, blanks
UNPRINTABLE = r"[\p{Cc}\p{Zl}\p{Zp}\x{202A}-\x{202E}\x{2066}-\x{2069}]"  # control, line ends, bidi overrides
NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"


def plain(raw: RawTable, column: str) -> pa.Array:
    """A column as one array; large, view and dictionary-encoded text as plain text."""
    values = raw.table[column].combine_chunks()
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        kind = pa.string()
    return values if kind == values.type else pc.cast(values, kind)


def is_number(kind: pa.DataType) -> bool:
    """Integers, floats and decimals."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def identifiers(raw: RawTable, column: str) -> pa.Array:
    """Identifiers as trimmed text. Whole numbers are fine; empty, overlong or unprintable ones are not."""
    values = plain(raw, column)
    kind = values.type
    if not (pa.types.is_string(kind) or pa.types.is_integer(kind)):
        first = values.drop_null()
        raise raw.error(
            0, column, first[0].as_py() if len(first) else None, f"is {kind}; identifiers are text or whole numbers"
        )
    ids = pc.utf8_trim_whitespace(pc.cast(values, pa.string()))
    bad = pc.fill_null(pc.equal(pc.utf8_length(ids), 0), True)
    if (row := _first_true(bad)) is not None:
        raise raw.error(row, column, values[row].as_py() or "", "is empty; every row needs an identifier")
    bad = pc.or_(pc.greater(pc.utf8_length(ids), MAX_ID), pc.match_substring_regex(ids, UNPRINTABLE))
    if (row := _first_true(bad)) is not None:
        raise raw.error(
            row, column, values[row].as_py(), f"is no identifier: at most {MAX_ID} characters, no control characters"
        )
    return ids


def numbers(raw: RawTable, column: str) -> np.ndarray:
    """A column as float64 [rows]; NaN where empty. Raises GenrecError on anything else, infinity too."""
    values = plain(raw, column)
    if pa.types.is_string(values.type):
        text = pc.utf8_trim_whitespace(values)
        text = pc.if_else(pc.is_in(pc.utf8_lower(text), pa.array(["", "nan", "null"])), None, text)
        bad = pc.fill_null(pc.invert(pc.match_substring_regex(text, NUMBER)), False)
        if (row := _first_true(bad)) is not None:
            raise raw.error(row, column, values[row].as_py(), "is not a number")
        values = pc.cast(text, pa.float64())
    elif not is_number(values.type) and values.null_count < len(values):
        row = int(np.argmax(values.is_valid().to_numpy(zero_copy_only=False)))
        raise raw.error(row, column, values[row].as_py(), f"is {values.type}, not a number")
    out = pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False).astype(np.float64)
    if (infinite := np.flatnonzero(np.isinf(out))).size:
        raise raw.error(int(infinite[0]), column, out[infinite[0]], "is not a finite number")
    return out


def timestamps(raw: RawTable, column: str) -> tuple[np.ndarray, str]:
    """A column as unix seconds, float64 [rows], and a note that says how it was read."""
    values = plain(raw, column)
    kind = values.type
    if pa.types.is_temporal(kind) and not pa.types.is_time(kind) and not pa.types.is_duration(kind):
        out, note = _seconds(values), "dates (UTC)"
    elif pa.types.is_string(kind) and not _looks_numeric(values):
        out, note = _iso_seconds(raw, column, values), "ISO dates (UTC where no zone is named)"
    else:
        out, note = numbers(raw, column), "unix seconds"
        if ((out >= 19700101) & (out <= 21001231)).all():
            raise raw.error(0, column, values[0].as_py(), "looks like a date as YYYYMMDD; write YYYY-MM-DD")
        if not np.isnan(out).all() and np.nanmedian(out) > MILLISECONDS:
            if (mixed := np.flatnonzero(out < MILLISECONDS)).size:
                row = int(mixed[0])
                raise raw.error(
                    row, column, values[row].as_py(), "is no time in milliseconds, as most of the column is"
                )
            out, note = out / 1000, "unix milliseconds, divided by 1000"
    for bad, problem in (
        (np.isnan(out), "is no time; every interaction needs one"),
        (out < 0, "is before 1970; give unix seconds, milliseconds or ISO dates"),
        (out > LATEST, "is after the year 2100; give unix seconds, milliseconds or ISO dates"),
    ):
        if bad.any():
            row = int(np.argmax(bad))
            raise raw.error(row, column, values[row].as_py(), problem)
    return out, note


def texts(raw: RawTable, column: str) -> pa.Array:
    """A column as clean text: lists joined, unsafe characters replaced, bounded; "" where empty."""
    values = plain(raw, column)
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        values = pc.binary_join(pc.cast(values, pa.list_(pa.string())), " ")
    try:
        values = pc.cast(values, pa.string())
    except pa.ArrowException:
        raise GenrecError(f"{raw.name}, column {column!r} holds {values.type}; text is expected") from None
    return clean(values, MAX_TEXT)


def clean(values: pa.Array, longest: int) -> pa.Array:
    """Text fit to be shown: runs of unsafe characters and blanks become one space, ends trimmed, cut at `longest`."""
    values = pc.utf8_slice_codeunits(values, 0, 8 * longest)  # bounds the work on hostile lengths
    values = pc.utf8_trim_whitespace(pc.replace_substring_regex(values, UNSAFE, " "))
    return pc.fill_null(pc.utf8_trim_whitespace(pc.utf8_slice_codeunits(values, 0, longest)), "")


def categories(raw: RawTable, column: str) -> pa.Array:
    """A column as lists of clean category names, broad to narrow; text is split at "|" or ">"."""
    values = plain(raw, column)
    if pa.types.is_integer(values.type):
        values = pc.cast(values, pa.string())
    if pa.types.is_string(values.type):
        values = pc.split_pattern_regex(values, r"[|>]")
    elif pa.types.is_null(values.type):
        values = pc.cast(values, pa.list_(pa.string()))
    try:
        lists = pc.cast(values, pa.list_(pa.string()))
    except pa.ArrowException:
        raise GenrecError(
            f"{raw.name}, column {column!r} holds {values.type}; a list of names, or text split at '|', is expected"
        ) from None
    parents = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    names = clean(pc.list_flatten(lists), MAX_NAME)
    rank = np.arange(len(parents)) - np.searchsorted(parents, parents)
    keep = pc.not_equal(names, "").to_numpy(zero_copy_only=False) & (rank < MAX_PATH)
    counts = np.bincount(parents[keep], minlength=len(lists))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), names.filter(pa.array(keep)))


def _first_true(mask: pa.Array) -> int | None:
    row = mask.index(True).as_py()
    return None if row < 0 else row


def _looks_numeric(values: pa.Array) -> bool:
    """By the first filled value; a later one of the other sort is then reported as wrong."""
    filled = values.filter(pc.fill_null(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(values)), 0), False))
    if len(filled) == 0:
        return True
    first = filled[:1]
    return (
        bool(pc.match_substring_regex(pc.utf8_trim_whitespace(first), NUMBER)[0].as_py()) or first[0].as_py() == "nan"
    )


def _seconds(values: pa.Array) -> np.ndarray:
    micro = pc.cast(pc.cast(values, pa.timestamp("us", getattr(values.type, "tz", None)), safe=False), pa.int64())
    return pc.cast(micro, pa.float64()).to_numpy(zero_copy_only=False) / 1e6


def _iso_seconds(raw: RawTable, column: str, values: pa.Array) -> np.ndarray:
    text = pc.utf8_trim_whitespace(values)
    for kind in (pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            return _seconds(pc.cast(text, kind))
        except pa.ArrowException:
            pass
    out = np.full(len(text), np.nan)
    for row, value in enumerate(text.to_pylist()):
        if not value:
            continue
        try:
            when = datetime.datetime.fromisoformat(value)
        except ValueError:
            raise raw.error(row, column, value, "is no time; give unix seconds, milliseconds or ISO dates") from None
        out[row] = (when if when.tzinfo else when.replace(tzinfo=datetime.UTC)).timestamp()
    return out
