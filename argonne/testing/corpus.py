"""Small real corpora and a small tokenizer for tests, from the Python standard library's own sources.

Everything is deterministic, so that two calls in two processes give the same bytes.
"""

import functools
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from argonne.tools.bpe_trainer import train_tokenizer

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.lru_cache(maxsize=1)
def standard_library_texts() -> tuple[str, ...]:
    """The texts of the standard library's top-level modules, smallest name first."""
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            texts.append(text)
    return tuple(texts)


def short_texts(count: int, length: int = 400, skip: int = 0) -> list[str]:
    """``count`` different texts of about ``length`` characters (a third to three halves of it)."""
    pieces: list[str] = []
    for text in standard_library_texts():
        start = 0
        while start < len(text) and len(pieces) < skip + count:
            size = length // 3 + (len(pieces) * 7919) % (length * 7 // 6)
            pieces.append(text[start : start + size])
            start += size
        if len(pieces) >= skip + count:
            break
    if len(pieces) < skip + count:
        raise ValueError(f"only {len(pieces)} texts of {length} characters in the standard library")
    return pieces[skip:]


def build_tokenizer(folder: Path, vocab_size: int = 512) -> Path:
    """Train a byte-level BPE tokenizer and save it as a Hugging Face tokenizer folder; returns the folder."""
    texts = standard_library_texts()[:30]
    return train_tokenizer(texts, folder, vocab_size=vocab_size, pattern=PATTERN, normalize=True)


def write_shards(
    folder: Path, texts: Sequence[str | None], shards: int = 3, row_group_rows: int = 7, column: str = "text"
) -> list[Path]:
    """Spread ``texts`` in order over parquet shards named 000_00000.parquet and on; returns their paths."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(shards):
        rows = list(texts[len(texts) * index // shards : len(texts) * (index + 1) // shards])
        path = folder / f"000_{index:05d}.parquet"
        table = pa.table({column: pa.array(rows, pa.string()), "id": pa.array(range(len(rows)), pa.int64())})
        pq.write_table(table, path, row_group_size=row_group_rows, write_page_checksum=True)
        paths.append(path)
    return paths


def small_corpus(
    folder: Path, documents: int = 60, length: int = 400, shards: int = 3, vocab_size: int = 512
) -> tuple[str, Path, list[str]]:
    """A corpus with its tokenizer: (data glob, tokenizer folder, the texts in stream order)."""
    texts = short_texts(documents, length)
    write_shards(folder / "data", texts, shards)
    return str(folder / "data" / "*.parquet"), build_tokenizer(folder / "tokenizer", vocab_size), texts
