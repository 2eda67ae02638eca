"""Two lm-eval tasks made from held-out text, which need no network: bits per byte, and the true continuation.

Tasks are lm-eval's configurations as dictionaries; lm-eval itself is not imported here.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from argonne.errors import DataError, one_line

CHOICES = 4
_METRICS = ("bits_per_byte", "byte_perplexity", "word_perplexity")
_LEAST_CHARACTERS = 80
_SHOWN_CHARACTERS = 400
_CONTINUED_CHARACTERS = 80


def read_documents(pattern: str, column: str, limit: int) -> list[str]:
    """The first ``limit`` documents that are not empty of parquet, JSON-lines or text files (one each).

    Raises DataError naming the glob, file or column.
    """
    paths = sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise DataError(f"--text {pattern} matches no file: quote the glob, or give another")
    documents: list[str] = []
    for path in paths:
        for text in _texts(Path(path), column):
            if text and text.strip():
                documents.append(text)
            if len(documents) == limit:
                return documents
    if not documents:
        raise DataError(f"--text {pattern} holds no text in {len(paths)} files: give others")
    return documents


def _texts(path: Path, column: str) -> Iterator[str | None]:
    try:
        if path.suffix == ".parquet":
            yield from _parquet_texts(path, column)
        elif path.suffix in (".jsonl", ".ndjson"):
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    yield json.loads(line)[column]
        else:
            yield path.read_text(encoding="utf-8")
    except KeyError as error:
        raise DataError(f"--text {path} has no {column!r} in a line: give --text-column") from error
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"--text {path} cannot be read: {one_line(error)[:200]}") from error


def _parquet_texts(path: Path, column: str) -> Iterator[str | None]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            columns = ", ".join(file.schema_arrow.names)
            raise DataError(f"--text {path} has no column {column!r}: --text-column takes one of {columns}")
        for batch in file.iter_batches(columns=[column]):
            yield from batch.column(0).to_pylist()


def held_out_tasks(documents: Sequence[str]) -> list[dict[str, Any]]:
    """``held_out_text`` and, where there are enough long documents, ``held_out_continuation``."""
    tasks = [
        _task(
            "held_out_text",
            [{"text": text} for text in documents],
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="text",
            metric_list=[
                {"metric": name} for name in ("bits_per_byte", "byte_perplexity", "word_perplexity")
            ],
        )
    ]
    questions = continuation_questions(documents)
    if questions:
        tasks.append(
            _task(
                "held_out_continuation",
                questions,
                output_type="multiple_choice",
                doc_to_text="context",
                doc_to_choice="choices",
                doc_to_target="label",
                target_delimiter="",
                metric_list=[{"metric": "acc"}],
            )
        )
    return tasks


def continuation_questions(documents: Sequence[str]) -> list[dict[str, Any]]:
    """Half of each document's beginning, and four continuations of which one is its own."""
    halves = []
    for text in documents:
        if len(text) >= _LEAST_CHARACTERS:
            middle = min(len(text) // 2, _SHOWN_CHARACTERS)
            halves.append((text[:middle], text[middle : middle + _CONTINUED_CHARACTERS]))
    if len({continuation for _, continuation in halves}) < CHOICES:
        return []
    questions = []
    for index, (context, own) in enumerate(halves):
        others = [halves[(index + step) % len(halves)][1] for step in range(1, len(halves))]
        wrong = [other for other in dict.fromkeys(others) if other != own][: CHOICES - 1]
        label = index % CHOICES
        questions.append(
            {"context": context, "choices": [*wrong[:label], own, *wrong[label:]], "label": label}
        )
    return questions


def _task(name: str, rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    def dataset(**_: Any) -> dict[str, Any]:
        import datasets

        return {"test": datasets.Dataset.from_list(rows)}

    return {"task": name, "custom_dataset": dataset, "test_split": "test", "num_fewshot": 0, **settings}
