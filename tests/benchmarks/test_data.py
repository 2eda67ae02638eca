"""The data benchmark, whole, on a corpus of a moment: it runs, and every row has its numbers."""

import math
import os

import pytest

import argonne.benchmarks.data as benchmark_data
import argonne.benchmarks.data_corpus as data_corpus
import argonne.testing.corpus as corpus


@pytest.mark.slow
def test_every_row_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    for name, value in {
        "VOCABULARY": 400,
        "BLOCK_SIZE": 16,
        "SAMPLES": 4,
        "FIRST_TOKENS": 1000,
        "FEED_STEPS": 5,
        "SHARD_MIB": 0.012,
        "ROW_GROUP_MIB": 0.004,
    }.items():
        for module in (benchmark_data, data_corpus):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(data_corpus, "documents", lambda: corpus.short_texts(200, 300))
    cores = os.sched_getaffinity(0)
    report = benchmark_data.run(1)
    assert os.sched_getaffinity(0) == cores
    assert "200 documents" in report.title
    assert {row.target for row in report.rows} == {0.95, 0.90, 1.1, 1.2, None}
    for row in report.rows:
        assert math.isfinite(row.ratio) and row.ours > 0 and row.peer > 0, row.name
        assert row.spread is not None
