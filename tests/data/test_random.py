"""Random corpora, splits and interruptions against a second reading of the stream's definition.

The reference below is written from the definition alone: lists of Python integers, no code of the suite.
Each case prints its seed, so that a failure can be had again.
"""

import hashlib
import json
import random
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import argonne.data.encoder_pool as encoder_pool
import argonne.data.stream as data_stream
import argonne.data.tokenizer as data_tokenize
import argonne.testing.corpus as corpus
from argonne.data.feed import StepBatch
from argonne.data.source import DataProgress, SourceOptions
from argonne.testing.sources import source_options
from data_stream import OpenedStream, open_stream

PIECE = 700
"""Stands for 2^20 characters."""


def natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.findall(r"\d+|\D+", name.lower())]


def document_ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = []
    while len(text) > PIECE:
        cut = text[:PIECE].rfind("\n") + 1
        piece = text[: cut if cut > 0 else PIECE]
        ids, text = ids + tokenizer(piece, add_special_tokens=False)["input_ids"], text[len(piece) :]
    return [*ids, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


@dataclass
class Reference:
    """All documents of one epoch with their places."""

    documents: list[tuple[str, int, list[int]]]
    """(file name, row, ids)"""
    skipped: list[tuple[str, int, str]]
    """(file name, row, null_rows or empty_rows)"""
    names: list[str]

    @classmethod
    def read(cls, folder: Path, tokenizer: Any) -> "Reference":
        names = sorted((path.name for path in folder.iterdir()), key=natural)
        found = cls([], [], names)
        for name in names:
            for row, text in enumerate(pq.read_table(folder / name)["text"].to_pylist()):
                if text:
                    found.documents.append((name, row, document_ids(tokenizer, text)))
                else:
                    found.skipped.append((name, row, "null_rows" if text is None else "empty_rows"))
        return found

    @property
    def length(self) -> int:
        return sum(len(ids) for _, _, ids in self.documents)

    def tokens(self, start: int, count: int) -> list[int]:
        flat = [token for _, _, ids in self.documents for token in ids]
        return [flat[index % len(flat)] for index in range(start, start + count)]

    def place(self, token: int) -> dict[str, Any]:
        epoch, rest = divmod(token, self.length)
        for name, row, ids in self.documents:
            if rest < len(ids):
                return {"epoch": epoch, "file_name": name, "row": row, "token_offset": rest}
            rest -= len(ids)
        raise AssertionError

    def counts(self, token: int) -> dict[str, int]:
        """Rows before the document in which this token of the stream lies."""
        here = self.place(token)
        counted = {"documents": 0, "null_rows": 0, "empty_rows": 0}
        rows = [(name, row, "documents") for name, row, _ in self.documents] + self.skipped
        for name, row, kind in rows:
            before = (self.names.index(name), row) < (self.names.index(here["file_name"]), here["row"])
            counted[kind] += here["epoch"] + before
        return counted

    def windows(self, size: int) -> list[tuple[str, int, int, list[int]]]:
        return [
            (name, row, start, ids[start : start + size + 1])
            for name, row, ids in self.documents
            for start in range(0, len(ids) - size, size)
        ]


def write_random_corpus(folder: Path, rng: random.Random, first: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    texts = iter(corpus.short_texts(120, rng.choice([30, 150, 400]), skip=rng.randrange(500)))
    for number in range(rng.randint(1, 5)):
        rows: list[str | None] = []
        for _ in range(rng.choice([0, 1, 5, 20])):
            kind = rng.random()
            long = "".join(next(texts) for _ in range(2)) * rng.randint(1, 3) if kind < 0.1 else ""
            rows.append(
                None
                if kind > 0.9
                else ""
                if kind > 0.85
                else long.replace("\n", rng.choice(["\n", " "])) or next(texts)
            )
        if number == 0:
            rows.append(next(texts))
        schema_type = rng.choice([pa.string(), pa.large_string()])
        name = rng.choice(["s_{}", "S_{:03d}", "s_{:07d}"]).format(first + 7 * number)
        pq.write_table(
            pa.table({"other": list(range(len(rows))), "text": pa.array(rows, schema_type)}),
            folder / f"{name}.parquet",
            row_group_size=rng.randint(1, 30),
            compression=rng.choice(["none", "snappy", "zstd"]),
            use_dictionary=rng.random() < 0.5,
            data_page_size=rng.choice([64, 1 << 20]),
        )


def random_split(rng: random.Random) -> tuple[int, int, int]:
    """(batch size, accumulation, replicas)"""
    return rng.randint(1, 3), rng.randint(1, 3), rng.choice([1, 2, 4])


def gathered(tokens: np.ndarray, split: tuple[int, int, int]) -> list[list[int]]:
    """The sequences that the ranks see, put where the definition says sample number n goes."""
    batch_size, accumulation, replicas = split
    batch = StepBatch(tokens=torch.from_numpy(tokens), stream_hash="", progress=None, wait_seconds=0.0)
    found: dict[int, list[int]] = {}
    for micro_step in range(accumulation):
        for rank in range(replicas):
            inputs, targets = batch.micro_batch(
                micro_step, batch_size=batch_size, dp_rank=rank, dp_size=replicas, device="cpu"
            )
            for index in range(batch_size):
                sample = (micro_step * replicas + rank) * batch_size + index
                assert inputs[index, 1:].tolist() == targets[index, :-1].tolist()
                found[sample] = [*inputs[index].tolist(), int(targets[index, -1])]
    return [found[sample] for sample in range(batch_size * accumulation * replicas)]


def restart(
    options: SourceOptions, tokenizer: Any, source: OpenedStream, progress: DataProgress
) -> OpenedStream:
    saved = json.loads(json.dumps([source.position_dict(progress), source.state_dict(progress)]))
    return open_stream(options, tokenizer, saved_position=saved[0], saved_state=saved[1], global_step=1)


def chained(stream_hash: str, sample: list[int]) -> str:
    content = bytes.fromhex(stream_hash) + struct.pack(f"<{len(sample)}i", *sample)
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def run_case(seed: int, folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    monkeypatch.setattr(data_tokenize, "PIECE_CHARACTERS", PIECE)
    monkeypatch.setattr(encoder_pool, "usable_cpus", lambda: 3)
    write_random_corpus(folder, rng)
    reference = Reference.read(folder, tokenizer)
    packing = rng.random() < 0.7
    sizes = [len(ids) for _, _, ids in reference.documents]
    size = rng.randint(1, 200) if packing else rng.randint(1, max(1, max(sizes) - 1))
    options = source_options(str(folder), block_size=size, samples_per_step=1, packing=packing)
    taken, stream_hash, samples, expected = 0, "0" * 32, 0, reference.windows(size)
    source: OpenedStream | None = None
    progress: DataProgress | None = None
    for _ in range(rng.randint(1, 6)):
        split = random_split(rng)
        count = split[0] * split[1] * split[2]
        if packing and rng.random() < 0.3:
            size = rng.randint(1, 200)
        monkeypatch.setattr(data_stream, "BATCH_CHARACTERS", rng.choice([1, 300, 1 << 18]))
        options = replace(options, samples_per_step=count, num_proc=rng.randint(1, 3), block_size=size)
        if source is None or progress is None:
            source = open_stream(options, tokenizer)
        else:
            source = restart(options, tokenizer, source, progress)
        for _ in range(rng.randint(1, 5)):
            step = source.source.next_step()
            progress = step.progress
            for sample in gathered(step.tokens, split):
                if packing:
                    assert sample == reference.tokens(taken, size + 1)
                    taken += size
                else:
                    assert sample == expected[taken % len(expected)][3]
                    taken += 1
                stream_hash, samples = chained(stream_hash, sample), samples + 1
            assert (progress.stream_hash, progress.samples) == (stream_hash, samples)
            place = source.position_dict(progress)
            if packing:
                assert place.items() >= reference.place(taken).items()
                counts = progress.counts._asdict()
                assert {key: counts[key] for key in ("documents", "null_rows", "empty_rows")} == (
                    reference.counts(taken)
                )
            else:
                name, row, start, _ = expected[taken % len(expected)]
                assert (place["file_name"], place["row"], place["token_offset"]) == (name, row, start)
                assert place["epoch"] == taken // len(expected)
        source.source.close()


def run_pipeline_case(seed: int, folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk k of a row was used: on with token (k + 1) * B of it, past its end with the next row."""
    print(f"pipeline seed {seed}")
    rng = random.Random(seed)
    monkeypatch.setattr(data_tokenize, "PIECE_CHARACTERS", PIECE)
    monkeypatch.setattr(data_stream, "BATCH_CHARACTERS", rng.choice([1, 300, 1 << 18]))
    write_random_corpus(folder, rng)
    reference = Reference.read(folder, tokenizer)
    for _ in range(6):
        size, epoch, global_step = rng.randint(1, 120), rng.randint(0, 3), rng.choice([0, 1, 9])
        number = rng.randrange(len(reference.documents))
        name, row, ids = reference.documents[number]
        chunk = rng.randint(0, len(ids) // size + 2)
        used = (chunk + 1 if global_step else chunk) * size
        start = sum(len(ids) for _, _, ids in reference.documents[:number]) + min(used, len(ids))
        saved = {"streaming": True, "current_file_idx": reference.names.index(name), "epoch": epoch}
        saved |= {"position_in_file": row, "chunk_offset": chunk, "current_position": 0}
        options = source_options(str(folder), block_size=size, samples_per_step=3, num_proc=1)
        source = open_stream(options, tokenizer, saved_position=saved, global_step=global_step)
        step = source.source.next_step()
        source.source.close()
        assert step.tokens[0].tolist() == reference.tokens(start, size + 1)
        token = epoch * reference.length + start + 3 * size
        assert source.position_dict(step.progress).items() >= reference.place(token).items()


@pytest.mark.parametrize("seed", range(6))
def test_a_random_run(seed: int, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_case(seed, tmp_path / "data", tokenizer, monkeypatch)


@pytest.mark.parametrize("seed", range(4))
def test_a_random_pipeline_position(
    seed: int, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_pipeline_case(seed, tmp_path / "data", tokenizer, monkeypatch)


@pytest.mark.slow
def test_many_random_runs(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = random.SystemRandom().randrange(10**6)
    for seed in range(first, first + 25):
        run_case(seed, tmp_path / f"run {seed}", tokenizer, monkeypatch)
        run_pipeline_case(seed, tmp_path / f"pipeline {seed}", tokenizer, monkeypatch)
