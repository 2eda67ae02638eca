#!/usr/bin/env python3
"""A real corpus and its tokenizer from text that every machine has: the Python standard library.

    scripts/quickstart_corpus.py --output-dir quickstart/corpus

Writes parquet shards (data/*.parquet; a document is a few paragraphs of a source file or a help topic) and a
byte-level BPE tokenizer (tokenizer/). The same Python version gives the same bytes. The folder appears only
when it is whole; one that is there already is left as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.tools.library_corpus import build
from argonne.tools.script import OneLineParser, run_script


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser("A corpus and a tokenizer from Python's own sources and help.")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of data/ and tokenizer/")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens of the tokenizer (%(default)s)")
    parser.add_argument("--shard-mib", type=float, default=2.0, help="text in a shard, MiB (%(default)s)")
    options = parser.parse_args(argv)

    def work() -> None:
        print(build(options.output_dir, vocab_size=options.vocab_size, shard_mib=options.shard_mib))

    return run_script(work)


if __name__ == "__main__":
    sys.exit(main())
