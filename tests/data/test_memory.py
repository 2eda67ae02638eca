"""Memory stays bounded by a few rows, whatever a row group holds (slow: writes gigabytes of text)."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import argonne.testing.corpus as corpus
from tests import ROOT

READ_ALL = """
import resource, sys
sys.path.insert(0, {root!r})
from data_stream import open_stream
from argonne.data.shards import open_corpus
from argonne.data.source import SourceOptions
from argonne.testing.sources import source_options
from argonne.data.position import DataPosition
from argonne.data.documents import DocumentReader
from argonne.data.tokenizer import load_tokenizer

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

tokenizer = load_tokenizer({tokenizer!r})
shards = open_corpus({path!r}, "text")
before = peak()
rows = sum(1 for _ in DocumentReader(shards, "text", DataPosition(), epochs=1))
reading = peak() - before
options = source_options({path!r}, block_size=1024, samples_per_step=8, num_proc=1)
source = open_stream(options, tokenizer).source
for _ in range(40):
    source.next_step()
source.close()
print(rows, reading, peak() - before)
"""


def peaks(path: Path, tokenizer: Path) -> tuple[int, int, int]:
    """(documents, MiB that reading all of them took at most, MiB with 40 steps of tokenizing)."""
    script = READ_ALL.format(root=str(ROOT), tokenizer=str(tokenizer), path=str(path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    rows, reading, stepping = map(int, done.stdout.split())
    return rows, reading, stepping


@pytest.mark.slow
def test_a_row_group_of_two_gigabytes(tmp_path: Path) -> None:
    text = "".join(corpus.standard_library_texts())
    rows = pa.array([text[start : start + 10_000] for start in range(0, 700_000, 70)])
    path = tmp_path / "a.parquet"
    table = pa.table({"text": pa.chunked_array([rows] * 21)})
    pq.write_table(table, path, row_group_size=len(table), compression="zstd")
    metadata = pq.ParquetFile(path).metadata
    assert metadata.num_row_groups == 1 and metadata.row_group(0).total_byte_size > 2e9
    documents, reading, stepping = peaks(path, corpus.build_tokenizer(tmp_path / "tokenizer"))
    assert documents == 21 * len(rows)
    assert reading < 150 and stepping < 300


@pytest.mark.slow
def test_a_row_of_100_megabytes(tmp_path: Path) -> None:
    text = "".join(corpus.standard_library_texts())
    big = (text * (100 * 2**20 // len(text) + 1))[: 100 * 2**20]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["before", big, "after"]}), path)
    documents, reading, stepping = peaks(path, corpus.build_tokenizer(tmp_path / "tokenizer"))
    assert documents == 3
    assert reading < 400 and stepping < 700  # Arrow's own copies of the row, then a megabyte at a time
