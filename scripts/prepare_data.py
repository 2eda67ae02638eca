#!/usr/bin/env python3
"""Turn text files, JSON lines or a `datasets` folder into parquet shards that train well.

    scripts/prepare_data.py notes/*.md book.txt.gz --output-dir data/books
    scripts/prepare_data.py crawl/*.jsonl.zst --text-field content --output-dir data/crawl
    scripts/prepare_data.py saved_dataset/ --output-dir data/saved

Shards are named 000_00000.parquet and on, hold one `text` column, row groups of a few MiB (what a resume has
to read again) and a checksum on each page (so that a flipped bit is noticed). The output folder appears only
when all of it is written.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.errors import ConfigError, DataError
from argonne.tools.script import OneLineParser, run_script
from argonne.tools.shard_writer import ShardWriter, new_folder

MIB = 1 << 20
CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".br": "brotli"}
PACKED = tuple(CODECS)
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "inputs", nargs="+", help="text or JSON-lines files, or folders (`datasets` or of files)"
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to make; new, or empty")
    parser.add_argument(
        "--format",
        choices=["auto", "text", "jsonl", "datasets"],
        default="auto",
        help="of the inputs (by their names)",
    )
    parser.add_argument("--text-field", default="text", help="JSON key or column with the text (%(default)s)")
    parser.add_argument("--split", default="train", help="split of a datasets folder (%(default)s)")
    parser.add_argument(
        "--document",
        choices=["file", "line", "paragraph"],
        default="file",
        help="what one document is in a text file; paragraphs end at an empty line (%(default)s)",
    )
    parser.add_argument("--shard-mib", type=float, default=256, help="text in a shard, MiB (%(default)s)")
    parser.add_argument(
        "--row-group-mib", type=float, default=4, help="text in a row group, MiB (%(default)s)"
    )
    parser.add_argument(
        "--compression",
        choices=["zstd", "snappy", "gzip", "none"],
        default="zstd",
        help="of the shards (%(default)s)",
    )
    parser.add_argument(
        "--skip-bad-lines", action="store_true", help="count JSON lines without text and go on"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)

    def work() -> None:
        check_options(options)
        try:
            told = prepare(options)
        except KeyboardInterrupt:
            print("error: interrupted: nothing was written; run it again", file=sys.stderr)
            raise
        print(told)

    return run_script(work)


def check_options(options: argparse.Namespace) -> None:
    for flag in ("shard_mib", "row_group_mib"):
        if getattr(options, flag) <= 0:
            raise ConfigError(f"--{flag.replace('_', '-')} {getattr(options, flag)} must be positive")
    output = options.output_dir
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file (--output-dir): give a folder")
    if output.is_dir() and any(output.iterdir()) and not options.overwrite:
        raise ConfigError(f"{output} is not empty (--output-dir): give another folder, or --overwrite")


def prepare(options: argparse.Namespace) -> str:
    """Write the shards; returns what there is now, in two lines."""
    from tqdm import tqdm

    kind, files = find_inputs(options)
    with new_folder(options.output_dir) as partial:
        writer = ShardWriter(
            partial,
            shard_mib=options.shard_mib,
            row_group_mib=options.row_group_mib,
            compression=options.compression,
        )
        if kind == "datasets":
            rows = dataset_texts(files[0], options)
            for text in tqdm(rows, desc="Writing", unit="docs", disable=None):
                writer.add(text)
        else:
            total = sum(path.stat().st_size for path in files)
            with tqdm(total=total, desc="Writing", unit="B", unit_scale=True, disable=None) as bar:
                for path in files:
                    for text in file_texts(path, options, writer, bar):
                        writer.add(text)
        writer.finish()
    counted = f"; lines without text skipped: {writer.skipped:,}" if writer.skipped else ""
    if writer.replaced:
        counted += f"; documents with bytes that are not UTF-8, replaced by U+FFFD: {writer.replaced:,}"
    size = f"{writer.total_bytes:,} bytes of text"
    return (
        f"{writer.documents:,} documents, {size} in {writer.shards} shards{counted}\n"
        f"train on them with --data-glob '{options.output_dir}/*.parquet'"
    )


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


if __name__ == "__main__":
    sys.exit(main())
