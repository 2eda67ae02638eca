"""The documents of raw inputs: text files, JSON lines (packed or not) and `datasets` folders."""

from __future__ import annotations

import argparse
import codecs
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from argonne.errors import ConfigError, DataError
from argonne.tools.output_folder import is_manifest, written_files
from argonne.tools.shard_writer import MIB, ShardWriter

CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".br": "brotli"}
PACKED = tuple(CODECS)
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


def find_inputs(options: argparse.Namespace) -> tuple[str, list[Path]]:
    """The kind of input and its files, each once, in natural order; ConfigError where there are two kinds."""
    from argonne.data.find_shards import natural_key

    files: dict[str, Path] = {}
    for name in options.inputs:
        path = Path(name if os.path.lexists(name) else os.path.expanduser(name))
        if not path.exists():
            raise DataError(f"no file or folder {name!r}: give existing inputs")
        if is_dataset(path) or options.format == "datasets":
            if len({os.path.realpath(other) for other in options.inputs}) > 1:
                raise ConfigError(f"{name!r} is a datasets folder: give it alone")
            return "datasets", [path]
        for file in (
            sorted(files_below(path, options.output_dir), key=natural_key) if path.is_dir() else [path]
        ):
            files.setdefault(os.path.realpath(file), file)
    if not files:
        raise DataError(f"no file in {options.inputs[0]!r}: give text files, JSON lines or a datasets folder")
    return "files", list(files.values())


def files_below(folder: Path, output: Path) -> list[Path]:
    """The files of a folder and its subfolders, links followed, without hidden ones, manifests and an earlier
    output."""
    from argonne.data.find_shards import folders_below, is_linked, is_system_name

    paths = [
        Path(below, name)
        for below in folders_below(str(folder))
        for name in os.listdir(below)
        if not is_system_name(name) and not is_manifest(Path(below, name))
    ]
    broken = [path for path in paths if not path.exists()]
    if broken:
        raise DataError(f"{broken[0]} is a link to nothing: repair or remove it")
    own = {output.resolve() / name for name in written_files(output)} if output.is_dir() else set()
    # What is reached without a link comes first, and is what a file that is reached twice is called.
    return sorted((path for path in paths if path.is_file() and path.resolve() not in own), key=is_linked)


def is_dataset(path: Path) -> bool:
    return path.is_dir() and any(
        (path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")
    )


def dataset_texts(folder: Path, options: argparse.Namespace) -> Any:
    """The texts of a folder that `datasets` saved."""
    import datasets

    from argonne.errors import one_line

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

    from argonne.errors import one_line

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
            buffered = io.BufferedReader(unpacked, MIB)
            encoding = encoding_of(buffered.peek(4)[:4])
            errors = "surrogateescape" if encoding == "utf-8-sig" else "replace"
            with io.TextIOWrapper(buffered, encoding=encoding, errors=errors) as lines:
                for text in split_texts(path, lines, is_json, options, writer):
                    bar.update(begun + raw.tell() - bar.n)
                    yield text
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}: {one_line(error)}") from error
    bar.update(begun + path.stat().st_size - bar.n)


def encoding_of(head: bytes) -> str:
    """The encoding that a file's byte order mark names, else UTF-8; the codec takes the mark off."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


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


class BrokenArrayError(ValueError):
    """A JSON array that cannot be read any further."""


def json_texts(
    path: Path, lines: TextIO, options: argparse.Namespace, writer: ShardWriter
) -> Iterator[str | None]:
    for place, record in json_records(lines):
        try:
            yield json_text(record, options.text_field)
        except BrokenArrayError as error:  # skipping it would lose all that follows
            raise DataError(f"{path}, {place}: {error}: repair it, or make JSON lines of it") from error
        except (ValueError, TypeError) as error:
            if not options.skip_bad_lines:
                raise DataError(f"{path}, {place}: {error}, or --skip-bad-lines") from error
            writer.skipped += 1


def json_records(lines: TextIO) -> Iterator[tuple[str, Any]]:
    """(place, record) of each line, or of each element of a file that is one array.

    What is no JSON is a ValueError in place of the record.
    """
    is_first = True
    for number, line in enumerate(lines, 1):
        line = line.lstrip("\ufeff")  # files with byte order marks may have been joined
        if not line.strip():
            continue
        if is_first and begins_array(line):
            yield from array_records(line, lines)
            return
        is_first = False
        yield f"line {number}", parsed(line)


def begins_array(line: str) -> bool:
    """Whether a file's first line begins one array of all its records, and is not a record of its own."""
    if not line.lstrip().startswith("["):
        return False
    record = parsed(line)
    return not isinstance(record, list) or all(isinstance(element, dict) for element in record)


def parsed(text: str) -> Any:
    """The JSON value, or the ValueError that says why there is none."""
    try:
        return json.loads(text)
    except RecursionError:
        return ValueError("nested too deeply")
    except ValueError as error:
        return ValueError(f"{error}: one JSON object a line, or one array of objects, is wanted")


def array_records(start: str, lines: TextIO) -> Iterator[tuple[str, Any]]:
    """The elements of one array, read a stretch at a time."""
    decoder, text, number = json.JSONDecoder(), start.lstrip()[1:], 0
    while True:
        text = text.lstrip()
        if number and text.startswith(","):
            text = text[1:].lstrip()
        if text.startswith("]"):
            break
        try:
            element, end = decoder.raw_decode(text)
            if end == len(text):
                raise ValueError("perhaps not the end of it")
        except RecursionError:
            yield f"element {number + 1}", BrokenArrayError("nested too deeply")
            return
        except ValueError as error:
            more = lines.read(max(MIB, len(text)))
            if not more:
                yield (
                    f"element {number + 1}",
                    BrokenArrayError(f"{error}: the rest cannot be read"),
                )
                return
            text += more
            continue
        number += 1
        yield f"element {number}", element
        text = text[end:]
    rest = (text[1:] + lines.read(MIB)).strip()
    if rest:
        yield f"element {number + 1}", BrokenArrayError("more text behind the array")


def json_text(record: Any, field: str) -> str | None:
    """The text in one record; ValueError or TypeError with the remedy where there is none."""
    if isinstance(record, ValueError):
        raise record
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
