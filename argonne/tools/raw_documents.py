"""The documents of raw inputs: text files, JSON lines (packed or not) and `datasets` folders."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from argonne.errors import ConfigError, DataError
from argonne.tools.shard_writer import MIB, ShardWriter

CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".br": "brotli"}
PACKED = tuple(CODECS)
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


def find_inputs(options: argparse.Namespace) -> tuple[str, list[Path]]:
    """The kind of input and its files in natural order; ConfigError where there is none or two kinds."""
    from argonne.data.shards import natural_key

    files: list[Path] = []
    for name in options.inputs:
        path = Path(name).expanduser()
        if not path.exists():
            raise DataError(f"no file or folder {name!r}: give existing inputs")
        if is_dataset(path) or options.format == "datasets":
            if len(options.inputs) > 1:
                raise ConfigError(f"{name!r} is a datasets folder: give it alone")
            return "datasets", [path]
        found = [entry for entry in path.rglob("*") if entry.is_file()] if path.is_dir() else [path]
        files += sorted(found, key=natural_key)
    if not files:
        raise DataError(f"no file in {options.inputs[0]!r}: give text files, JSON lines or a datasets folder")
    return "files", files


def is_dataset(path: Path) -> bool:
    return path.is_dir() and any(
        (path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")
    )


def dataset_texts(folder: Path, options: argparse.Namespace) -> Any:
    """The texts of a folder that `datasets` saved."""
    import datasets

    from argonne.data.formats import one_line

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{folder} is not a datasets folder: {one_line(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if options.split not in loaded:
            raise DataError(f"{folder} has no split {options.split!r}: --split takes {', '.join(loaded)}")
        loaded = loaded[options.split]
    if options.text_field not in loaded.column_names:
        columns = ", ".join(loaded.column_names)
        raise DataError(f"{folder} has no column {options.text_field!r}: --text-field takes one of {columns}")
    kind = str(getattr(loaded.features[options.text_field], "dtype", "not text"))
    if kind not in ("string", "large_string", "string_view"):
        raise DataError(f"{folder}: the column {options.text_field!r} is {kind}, not text: give --text-field")
    return loaded[options.text_field]


def file_texts(
    path: Path, options: argparse.Namespace, writer: ShardWriter, bar: Any
) -> Iterator[str | None]:
    """The documents of one file, unpacked on the way; ``bar`` counts the bytes read."""
    import pyarrow as pa

    from argonne.data.formats import one_line

    name = path.name.lower()
    packed = name.endswith(PACKED)
    inner = Path(name).stem if packed else name
    is_json = options.format == "jsonl" or (options.format == "auto" and inner.endswith(JSON_SUFFIXES))
    begun = bar.n
    try:
        with open(path, "rb") as raw:
            refuse_columns(path, raw.read(6))
            raw.seek(0)
            unpacked = (
                pa.CompressedInputStream(pa.PythonFile(raw), CODECS[Path(name).suffix]) if packed else raw
            )
            with io.TextIOWrapper(
                io.BufferedReader(unpacked, MIB), encoding="utf-8", errors="surrogateescape"
            ) as lines:
                for text in split_texts(path, lines, is_json, options, writer):
                    bar.update(begun + raw.tell() - bar.n)
                    yield text
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}: {one_line(error)}") from error
    bar.update(begun + path.stat().st_size - bar.n)


def refuse_columns(path: Path, magic: bytes) -> None:
    if magic.startswith((b"PAR1", b"ARROW1")):
        raise DataError(f"{path} is a parquet or Arrow file: train on it as it is, with --data-glob")


def split_texts(
    path: Path, lines: TextIO, is_json: bool, options: argparse.Namespace, writer: ShardWriter
) -> Iterator[str | None]:
    """The documents in an open file."""
    if is_json:
        yield from json_texts(path, lines, options, writer)
        return
    if options.document == "file":
        texts: Iterator[str] = iter([lines.read()])
    elif options.document == "line":
        texts = (line.rstrip("\r\n") for line in lines)
    else:
        texts = paragraphs(lines)
    for text in texts:
        if "\0" in text:
            raise DataError(f"{path} is not a text file (it has zero bytes): leave it out")
        yield text


def json_texts(
    path: Path, lines: TextIO, options: argparse.Namespace, writer: ShardWriter
) -> Iterator[str | None]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield json_text(line, options.text_field)
        except (ValueError, TypeError) as error:
            if not options.skip_bad_lines:
                raise DataError(f"{path}, line {number}: {error}, or --skip-bad-lines") from error
            writer.skipped += 1


def json_text(line: str, field: str) -> str | None:
    """The text in one line; ValueError or TypeError with the remedy where there is none."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{error}: one JSON object a line is wanted") from error
    if not isinstance(record, dict):
        raise TypeError(f"a {type(record).__name__}: one JSON object a line is wanted")
    if field not in record:
        raise ValueError(f"no field {field!r}: --text-field takes one of {', '.join(record) or 'none'}")
    text = record[field]
    if text is not None and not isinstance(text, str):
        raise TypeError(f"{field!r} is {type(text).__name__}, not text: give another --text-field")
    return text


def paragraphs(lines: TextIO) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph)
            paragraph = []
    if paragraph:
        yield "".join(paragraph)
