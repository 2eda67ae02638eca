"""A corpus from text that every machine has: the sources and the help of the Python standard library."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from argonne.errors import DataError
from argonne.tools.bpe_trainer import train_tokenizer
from argonne.tools.output_folder import new_folder
from argonne.tools.shard_writer import ShardWriter

PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[\r\n]+|[ \t]+(?![^\s])|[ \t]+"
"""Words with their leading space, single digits, runs of signs, line ends and indentation."""
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "encodings",
    "pydoc_data",
}
DOCUMENT_CHARACTERS = 1000
LONGEST_DOCUMENT = 8000
"""Longer pieces without an empty line are tables of characters, codes or settings."""
LEAST_BYTES = 2_000_000
"""Less text than this is not worth training on: some Pythons come without the sources of their library."""
TOKENIZER_BYTES = 4_000_000
"""Text that the tokenizer learns its merges from."""


def source_documents() -> Iterator[tuple[str, str]]:
    """(name, text) of every module of the standard library, without its tests and code tables."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if not SKIPPED_FOLDERS.intersection(name.parts):
            yield name.as_posix(), path.read_text(encoding="utf-8", errors="replace")


def help_documents() -> Iterator[tuple[str, str]]:
    """(name, text) of the language reference as ``help()`` shows it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    yield from ((f"topic {name}", text) for name, text in topics.items())


def cut(text: str) -> Iterator[str]:
    """Pieces of at least DOCUMENT_CHARACTERS that end at an empty line."""
    piece = ""
    for part in text.split("\n\n"):
        piece += part + "\n\n"
        if len(piece) >= DOCUMENT_CHARACTERS:
            yield piece
            piece = ""
    if piece.strip():
        yield piece


def documents() -> list[str]:
    """The texts in an order that only their names decide, so that every batch is a mixture."""
    found = [
        (f"{name} {index}", piece)
        for name, text in (*source_documents(), *help_documents())
        for index, piece in enumerate(cut(text))
        if len(piece) <= LONGEST_DOCUMENT
    ]
    found.sort(key=lambda document: hashlib.sha256(document[0].encode()).hexdigest())
    texts = [text for _, text in found]
    size = sum(map(len, texts))
    if size < LEAST_BYTES:
        raise DataError(
            f"the standard library of {sys.executable} has only {size:,} characters of source: name another "
            "Python in ARGONNE_PYTHON"
        )
    return texts


def first_texts(texts: Sequence[str], limit: int) -> list[str]:
    """Whole texts from the beginning up to about ``limit`` characters."""
    taken, size = [], 0
    for text in texts:
        if size >= limit:
            break
        taken.append(text)
        size += len(text)
    return taken


def build(output_dir: Path, *, vocab_size: int, shard_mib: float) -> str:
    """Make the folder unless it is there; returns a line that says what it holds."""
    shards = sorted((output_dir / "data").glob("*.parquet"))
    if shards:
        return f"{output_dir} is there already: {len(shards)} shards"
    texts = documents()
    with new_folder(output_dir) as partial:
        (partial / "data").mkdir()
        writer = ShardWriter(partial / "data", shard_mib=shard_mib, row_group_mib=0.5, compression="zstd")
        for text in texts:
            writer.add(text)
        writer.finish()
        train_tokenizer(
            first_texts(texts, TOKENIZER_BYTES), partial / "tokenizer", vocab_size=vocab_size, pattern=PATTERN
        )
    return (
        f"{writer.documents:,} documents, {writer.total_bytes / 1e6:.1f} MB of text in {writer.shards} "
        f"shards; a tokenizer of {vocab_size:,} tokens"
    )
