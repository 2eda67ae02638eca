#!/usr/bin/env python3
"""Turn text files, JSON lines or a `datasets` folder into parquet shards that train well.

    scripts/prepare_data.py notes/*.md book.txt.gz --output-dir data/books
    scripts/prepare_data.py crawl/*.jsonl.zst --text-field content --output-dir data/crawl
    scripts/prepare_data.py saved_dataset/ --output-dir data/saved
    scripts/prepare_data.py data/crawl --tokenize TOKENIZER --output-dir data/tokens

Shards are named 000_00000.parquet and on, hold one `text` column, row groups of a few MiB (what a resume has
to read again) and a checksum on each page (so that a flipped bit is noticed). They appear only when all are
written, beside prepare_data.json, which lists them: --overwrite deletes nothing that is not on that list.

Text files: UTF-8, or UTF-16 and UTF-32 with a byte order mark; the mark is taken off; CRLF and CR become LF.
JSON: one object a line (lines end with LF, CRLF or CR), or one array of objects; texts are kept as they are.

With --tokenize the shards hold token ids, the same stream as tokenizing while training; inputs may be shards
too, and work that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import glob
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.errors import ConfigError
from argonne.tools.output_folder import check_output, new_folder
from argonne.tools.raw_documents import dataset_texts, file_texts, find_inputs
from argonne.tools.script import OneLineParser, run_script
from argonne.tools.shard_writer import ShardWriter


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
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what this script wrote there before",
    )
    add_tokenizing(parser)
    return parser


def add_tokenizing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenize", metavar="TOKENIZER", help="write token ids, EOS after each document")
    parser.add_argument(
        "--token-format",
        choices=["parquet", "bin"],
        default="parquet",
        help="a list column (input_ids), or flat files in the layout of llm.c (%(default)s)",
    )
    parser.add_argument(
        "--num-proc", type=int, default=8, help="tokenizing workers, at most one per CPU core (%(default)s)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="let the tokenizer run its own code")


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)

    def work() -> None:
        check_options(options)
        try:
            told = prepare(options)
        except KeyboardInterrupt:
            kept = "whole shards are kept" if options.tokenize else "nothing was written"
            print(f"error: interrupted: {kept}; run it again", file=sys.stderr)
            raise
        print(told)

    return run_script(work)


def check_options(options: argparse.Namespace) -> None:
    for flag in ("shard_mib", "row_group_mib"):
        if getattr(options, flag) <= 0:
            raise ConfigError(f"--{flag.replace('_', '-')} {getattr(options, flag)} must be positive")
    if options.num_proc < 1:
        raise ConfigError(f"--num-proc {options.num_proc} must be at least 1")
    options.output_dir = Path(os.path.expanduser(options.output_dir))


def prepare(options: argparse.Namespace) -> str:
    """Write the shards; returns what there is now, in two lines."""
    from tqdm import tqdm

    kind, files = find_inputs(options)
    check_output(options.output_dir, files, options.overwrite)
    if options.tokenize is not None:
        from argonne.tools.tokenizing import tokenize

        return tokenize(options, kind, files)
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
        f"train on them with --data-glob {shell_glob(options.output_dir)}"
    )


def shell_glob(folder: Path) -> str:
    """The shards in ``folder`` as a pattern for a shell, whatever characters its name has."""
    start = "" if folder.is_absolute() else "./"  # a name may begin with - or ~
    pattern = glob.escape(f"{start}{folder}" if str(folder)[:1] in "-~" else str(folder)) + "/*.parquet"
    quoted = shlex.quote(pattern)
    return quoted if quoted.startswith("'") else f"'{pattern}'"


if __name__ == "__main__":
    sys.exit(main())
