"""Rows of text from a user's file: a table, JSON lines, or plain text whose documents blank lines part."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastpeft.compare.errors import BadInput

TABLES = (".csv", ".tsv", ".jsonl")
PLAIN = ".txt"
_JSON_KINDS = {"text": (str, type(None)), "label": (str, int, type(None))}


class Row(NamedTuple):
    """A text, its label where it has one, and the number of the row it came from, the header being row 1."""

    number: int
    text: str
    label: str = ""


def check(path: Path, kinds: tuple[str, ...], else_: str) -> None:
    """Refuse a file that isn't there or whose ending is none of `kinds`; `else_` is what may be given instead.

    Raises:
        BadInput: with the reason.
    """
    if path.suffix.lower() not in kinds:
        raise BadInput(f"--data {path}: expected {else_} or a file ending in {', '.join(kinds)}")
    if not path.exists():
        raise BadInput(f"--data {path}: no such file")


def read(path: Path, columns: tuple[str, ...]) -> list[Row]:
    """The rows of a file; of a table or JSON lines these columns, `text` first.

    Raises:
        BadInput: it can't be read, has no rows or not these columns, or a row isn't one.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadInput(f"--data {path}: can't be read: {error.strerror}") from None
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadInput(f"--data {path}: is UTF-16: save it as UTF-8")
    # Bytes that aren't UTF-8 become surrogates, so that the rows they are in can be named.
    text = raw.decode("utf-8-sig", errors="surrogateescape")
    kind = path.suffix.lower()
    if kind == PLAIN:
        rows = _documents(text)
    elif kind == ".jsonl":
        rows = _json_rows(text, path, columns)
    else:
        rows = _table_rows(text, path, columns, "\t" if kind == ".tsv" else ",")
    return list(rows)


def _documents(text: str) -> Iterator[Row]:
    """What lies between blank lines, numbered by its first line."""
    line, at = 1, 0
    for found in re.finditer(r"\S[^\n]*(?:\n[^\n]*\S[^\n]*)*", text):
        line, at = line + text.count("\n", at, found.start()), found.start()
        yield Row(line, found.group())


def _table_rows(text: str, path: Path, columns: tuple[str, ...], delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    # A text that begins with a quote, and isn't quoted, would else go on over the rows below.
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        if table.fieldnames is None:
            raise BadInput(f"--data {path}: the file is empty")
        _need_columns(table.fieldnames, path, columns)
        for name in columns:
            if list(table.fieldnames).count(name) > 1:
                raise BadInput(f"--data {path}: two columns are named {name!r}")
        for number, fields in enumerate(table, 2):
            if None in fields:
                raise BadInput(f"--data {path}: row {number} has more fields than the header: quote its text")
            yield Row(number, *(fields[name] or "" for name in columns))
    except csv.Error as error:
        raise BadInput(
            f"--data {path}: line {table.reader.line_num}: {error}: a field that begins with a quote has to end with "
            "one, and doubles those in it"
        ) from None


def _json_rows(text: str, path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number of too many digits is a ValueError too
            raise BadInput(
                f"--data {path}: row {number} is not JSON: {getattr(error, 'msg', error)}"
            ) from None
        if not isinstance(fields, dict):
            raise BadInput(f"--data {path}: row {number} is not a JSON object")
        _need_columns(fields, path, columns, f"row {number}: ")
        for name in columns:
            if not isinstance(fields[name], _JSON_KINDS[name]):
                raise BadInput(f"--data {path}: row {number}: {name} is {json.dumps(fields[name])[:40]}")
        values = [fields[name] for name in columns]
        yield Row(number, *("" if value is None else str(value) for value in values))


def _need_columns(found: Any, path: Path, columns: tuple[str, ...], where: str = "") -> None:
    for name in columns:
        if name not in found:
            there = ", ".join(map(str, found))[:80]
            raise BadInput(f"--data {path}: {where}no {name!r} column (columns: {there})")
