"""Replays and the ledger over every kind of stream, across ways back, skipped steps and changed lists."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from argonne.testing.corpus import small_corpus
from argonne.testing.launch import metrics
from tests.data.excluded_samples import (
    Token,
    blocks_of,
    shuffled_blocks,
    tokens_of,
    windows_of,
    write_list,
)
from tests.data.naive import shuffled_rows
from tests.scripts.past_runs import (
    SIZE,
    G,
    documents_in,
    documents_said,
    drop_checkpoint,
    expected_of_ledger,
    inputs_of,
    of_steps,
    replayed,
    said_by_ledger,
    train,
    write_token_corpus,
)

pytestmark = pytest.mark.slow
SEED = 42
CONSTANT = ["--lr-schedule", "constant"]
"""A longer run has the rates of a shorter one."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    small_corpus(folder, documents=36, length=200)
    return folder


@pytest.fixture(scope="module")
def documents(corpus: Path) -> list[list[Token]]:
    return documents_in(corpus, AutoTokenizer.from_pretrained(corpus / "tokenizer"))


def samples_of(kind: str, corpus: Path, documents: list[list[Token]]) -> list[list[Token]]:
    """The first samples of a stream."""
    if "shuffle" in kind:
        tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
        documents = tokens_of(shuffled_rows(corpus / "data", SEED, 0), tokenizer)
    samples = blocks_of(documents, SIZE)
    if "no-packing" in kind:
        samples = [window for document in documents for window in windows_of(document, SIZE)]
    if "no-streaming" in kind:
        return [sample for _, sample in islice(shuffled_blocks(samples, SEED), 40)]
    return samples * 2 if "no-packing" in kind else samples


def flags_of(kind: str, corpus: Path, documents: list[list[Token]], folder: Path) -> list[str]:
    flags = [f"--{part}" for part in kind.split() if part not in ("text", "tokens")]
    if "tokens" in kind:
        pattern = write_token_corpus(corpus, documents, folder / "tokens")
        flags += ["--token-column", "ids", "--data-glob", pattern]
    return flags


@pytest.mark.parametrize(
    "kind",
    [
        *("shuffle", "no-packing", "no-packing shuffle", "no-streaming", "no-streaming no-packing"),
        *("tokens", "tokens no-packing", "tokens no-streaming"),
    ],
)
def test_every_stream(kind: str, corpus: Path, documents: list[list[Token]], tmp_path: Path) -> None:
    train(corpus, tmp_path / "run", *flags_of(kind, corpus, documents, tmp_path), steps=6)
    samples = samples_of(kind, corpus, documents)
    steps = of_steps(samples, range(6))
    places = [document[0].place for document in documents]
    assert said_by_ledger(tmp_path / "run", places) == expected_of_ledger(steps, places)
    said = replayed(tmp_path / "run", 5, tmp_path / "page.html")
    assert "the same step, bit for bit" in said
    inputs = inputs_of(samples, 4)
    found = documents_said(said)
    assert {place: tokens for place, (_, _, tokens) in found.items()} == inputs or len(inputs) > 5


def test_across_ways_back(corpus: Path, documents: list[list[Token]], tmp_path: Path) -> None:
    """Twice back to step 3 from step 6, and once to step 6 from step 8."""
    output = tmp_path / "run"
    fault = {"kind": "spike", "batches": [6, 9, 14], "factor": 1000, "least": 2}
    train(corpus, output, "--spike-action", "rewind", fault=fault)
    batches = [0, 1, 2, 9, 10, 11, 14, 15, 16]
    assert [line["step"] for line in metrics(output) if "rewound" in line] == [4, 7]
    samples = samples_of("", corpus, documents)
    places = [document[0].place for document in documents]
    expected = expected_of_ledger(of_steps(samples, batches), places)
    assert said_by_ledger(output, places) == expected
    for step in (4, 6, 8):
        said = replayed(output, step, tmp_path / "page.html")
        assert "the same step, bit for bit" in said
        assert set(documents_said(said)) <= set(inputs_of(samples, batches[step - 1]))
    drop_checkpoint(output, 6)
    assert "bit for bit" in replayed(output, 9, tmp_path / "page.html")
    (output / "stats" / "spikes.jsonl").unlink()  # the metrics say it all
    assert said_by_ledger(output, places) == expected


def test_across_a_skipped_step(corpus: Path, documents: list[list[Token]], tmp_path: Path) -> None:
    output = tmp_path / "run"
    fault = {"kind": "spike", "batches": [4], "factor": 1000, "least": 2}
    train(corpus, output, "--spike-action", "skip", steps=6, fault=fault)
    drop_checkpoint(output, 6)
    said = replayed(output, 6, tmp_path / "page.html")
    assert "step_3.pth" in said and "the same step, bit for bit" in said
    places = [document[0].place for document in documents]
    steps = {**of_steps(samples_of("", corpus, documents), range(6)), 4: set()}
    assert said_by_ledger(output, places) == expected_of_ledger(steps, places)


@pytest.mark.parametrize("kind", ["text", "no-packing", "no-streaming"])
def test_across_a_changed_list(kind: str, corpus: Path, documents: list[list[Token]], tmp_path: Path) -> None:
    """Documents are left out from step 5 on; the checkpoint of that time is gone, and so is their list."""
    output, flags = tmp_path / "run", [*flags_of(kind, corpus, documents, tmp_path), *CONSTANT]
    samples = samples_of(kind, corpus, documents)
    behind = {token.place for sample in samples[: 4 * G] for token in sample}
    ahead = [token.place for sample in samples[4 * G : 6 * G] for token in sample]
    listed = [place for place in dict.fromkeys(ahead) if place not in behind][:2]
    assert listed
    train(corpus, output, *flags, steps=4)
    exclude = write_list(tmp_path / "list", listed)
    train(corpus, output, *flags, "--exclude-documents", exclude, "--checkpoint-path", output, steps=6)
    exclude.unlink()
    if kind == "text":
        stream = [token for sample in samples for token in sample[:-1]]
        rest = [token for token in stream[4 * G * SIZE :] if token.place not in listed]
        after = [rest[at : at + SIZE + 1] for at in range(0, 2 * G * SIZE, SIZE)]
    else:
        after = [one for one in samples[4 * G :] if not {token.place for token in one} & set(listed)]
    samples = [*samples[: 4 * G], *after]
    places = [document[0].place for document in documents]
    assert said_by_ledger(output, places) == expected_of_ledger(of_steps(samples, range(6)), places)
    drop_checkpoint(output, 4)
    said = replayed(output, 6, tmp_path / "page.html")
    assert "step_3.pth" in said and "bit for bit" in said


@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_documents_are_measured_on_several_replicas(
    parallel: str, corpus: Path, documents: list[list[Token]], tmp_path: Path
) -> None:
    output, flags = tmp_path / "run", ["--data-parallel", parallel, "--tensor-parallel-size", 1]
    train(corpus, output, *flags, "--batch-size", 1, steps=4, processes=2)
    said = [replayed(output, 4, tmp_path / "page.html", processes) for processes in (2, 1)]
    assert "tensor parallel 1 x data parallel 2" in said[0] and "bit for bit" in said[0]
    several, one = map(documents_said, said)
    assert list(several) == list(one) and several
    for place, (loss, norm, tokens) in one.items():
        assert several[place][0] == pytest.approx(loss, abs=2e-4)
        assert several[place][1] == pytest.approx(norm, rel=1e-3) and several[place][2] == tokens
    total: Any = sum(loss * tokens for loss, _, tokens in several.values())
    record = metrics(output)[3]
    if sum(tokens for *_, tokens in several.values()) == G * SIZE:
        assert total / (G * SIZE) == pytest.approx(record["loss"], abs=1e-3)
