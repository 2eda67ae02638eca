"""The data benchmark, whole, on a corpus of a moment: it runs, and every row has its numbers."""

import math
import os
from typing import Any
from unittest import mock

import pytest

import argonne.benchmarks.data as benchmark_data
import argonne.benchmarks.data_corpus as data_corpus
import argonne.testing.corpus as corpus
from argonne.benchmarks.common import ROUNDS


def test_rows_at_the_default_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow peers take fewer rounds than the rest; no row may set one beside the other."""
    two = {"pipeline", "bare", "datasets_pass", "by_processes"}
    monkeypatch.setattr(benchmark_data, "mixed", lambda *_: None)
    monkeypatch.setattr(benchmark_data, "shuffled", lambda *_: None)
    for name in (*two, "first_batch", "opened_late", "datasets_interleaved", "datasets_stream"):
        answer: Any = (2.0, 1.0) if name in two else 3.0
        monkeypatch.setattr(benchmark_data, name, lambda *_, answer=answer, **__: answer)
    names = ("cpu of 1", "cpu of 2", "cpu of rank 0 of 2", "cpu of rank 1 of 2")
    monkeypatch.setattr(
        benchmark_data, "cpu_of_ranks", lambda _, rounds: {name: [1.0] * rounds for name in names}
    )
    rows = benchmark_data.rows_of(benchmark_data.measure(mock.MagicMock(rows=100), ROUNDS))
    ratios = {row.name: row.ratio for row in rows}
    assert ratios.pop("rate of a mixture of three sources / datasets interleaved") == 1.5
    assert set(ratios.values()) == {1.0}


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
    report = benchmark_data.run(4)
    assert os.sched_getaffinity(0) == cores
    assert "200 documents" in report.title
    assert {row.target for row in report.rows} == {0.95, 0.90, 1.1, 1.2, None}
    for row in report.rows:
        assert math.isfinite(row.ratio) and row.ours > 0 and row.peer > 0, row.name
        assert row.spread is not None
