"""Where documents begin: known to the stream exactly, and handed to every rank beside the tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from argonne.data.feed import FEED_TIMEOUT, StepFeed
from argonne.data.tokenizer import load_tokenizer, plain_ids
from argonne.testing.corpus import build_tokenizer, short_texts, write_shards
from argonne.testing.distributed import run_ranks
from data_stream import SourceOptions, open_stream
from tests.data.shard_samples import options_for, resume, texts_of

TEXTS = ["one <|endoftext|> two", "", *short_texts(20, 90), "b", None, "<|endoftext|>"]
"""Two documents hold the text of the EOS token, which a tokenizer turns into its id."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("marks")
    write_shards(folder / "data", TEXTS, shards=2)
    return folder / "data", load_tokenizer(str(build_tokenizer(folder / "tokenizer")))


def marked_stream(tokenizer: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, number of the document of each) of the endless stream."""
    ids: list[int] = []
    owners: list[int] = []
    number = 0
    while len(ids) < length:
        for text in filter(None, TEXTS):
            own = [*plain_ids(tokenizer, text), tokenizer.eos_token_id]
            ids += own
            owners += [number] * len(own)
            number += 1
    return np.array(ids), np.array(owners)


def check_steps(source: Any, tokenizer: Any, steps: range, options: SourceOptions) -> Any:
    size, count = options.block_size, options.samples_per_step
    ids, owners = marked_stream(tokenizer, steps.stop * size * count + 1)
    step = None
    for number in steps:
        step = source.next_step()
        first = number * size * count
        assert (step.tokens[:, :-1].ravel() == ids[first : first + size * count]).all()
        mine = owners[first : first + size * count].reshape(count, size)
        assert (step.starts[:, 1:] == (mine[:, 1:] != mine[:, :-1])).all()
    return step


def test_marks_are_the_streams_own(corpus: tuple[Path, Any]) -> None:
    """Also where a document holds an EOS of its own, over epochs, and after a resume within a document."""
    folder, tokenizer = corpus
    assert tokenizer.eos_token_id in plain_ids(tokenizer, TEXTS[0] or "")
    options = options_for(folder, block_size=16, samples_per_step=3, document_attention=True)
    opened = open_stream(options, tokenizer)
    step = check_steps(opened.source, tokenizer, range(7), options)
    opened.source.close()
    again = resume(opened, step.progress, options, tokenizer)
    check_steps(again.source, tokenizer, range(7, 80), options)
    again.source.close()


def test_tokens_and_hash_do_not_change(corpus: tuple[Path, Any]) -> None:
    folder, tokenizer = corpus
    plain, before = texts_of(folder, tokenizer, 5)
    marked, after = texts_of(folder, tokenizer, 5, document_attention=True)
    assert marked == plain and after.stream_hash == before.stream_hash
    opened = open_stream(options_for(folder), tokenizer)
    assert opened.source.next_step().starts is None
    opened.source.close()


def test_a_shuffled_sample_keeps_its_marks(corpus: tuple[Path, Any], tmp_path: Path) -> None:
    folder, tokenizer = corpus
    options = options_for(folder, streaming=False, cache_dir=tmp_path, document_attention=True)
    source = open_stream(options, tokenizer).source
    ids, owners = marked_stream(tokenizer, 1)
    places = {tuple(ids[i : i + 9]): i for i in range(0, len(ids) - 9, 8)}
    assert len(places) == len(range(0, len(ids) - 9, 8)), "a sample stands twice: choose other texts"
    for _ in range(20):
        step = source.next_step()
        for tokens, starts in zip(step.tokens, step.starts, strict=True):  # type: ignore[arg-type]
            mine = owners[places[tuple(tokens)] :][:8]
            assert (starts[1:] == (mine[1:] != mine[:-1])).all()


def test_alone_cut_documents_have_one_document_a_sample(corpus: tuple[Path, Any]) -> None:
    folder, tokenizer = corpus
    source = open_stream(options_for(folder, packing=False, document_attention=True), tokenizer).source
    assert not any(source.next_step().starts[:, 1:].any() for _ in range(5))  # type: ignore[index]
    source.close()


def handed_out(rank: int, world_size: int, folder: str, tokenizer_path: str) -> list[Any]:
    group = dist.new_group(backend="gloo", timeout=FEED_TIMEOUT)
    options = options_for(Path(folder), block_size=16, samples_per_step=4, document_attention=True)
    source = open_stream(options, load_tokenizer(tokenizer_path)).source if rank == 0 else None
    with StepFeed(source, samples_per_step=4, block_size=16, group=group) as feed:
        batches = [feed.next() for _ in range(5)]
        place = {"batch_size": 2, "dp_rank": rank, "dp_size": 2, "device": "cpu"}
        for batch in batches:
            mine = batch.micro_documents(0, **place)  # type: ignore[arg-type]
            assert mine is not None and batch.document_ids is not None
            assert mine.equal(batch.document_ids[2 * rank : 2 * rank + 2])
        answer = [(batch.tokens.numpy(), batch.document_ids.numpy()) for batch in batches]  # type: ignore[union-attr]
        dist.barrier(group=dist.group.WORLD)
    return answer


def test_every_rank_gets_the_marks(corpus: tuple[Path, Any]) -> None:
    folder, tokenizer = corpus
    ids, owners = marked_stream(tokenizer, 5 * 64 + 1)
    for batches in run_ranks(handed_out, 2, str(folder), tokenizer.name_or_path):
        for number, (tokens, documents) in enumerate(batches):
            first = number * 64
            assert (tokens[:, :-1].ravel() == ids[first : first + 64]).all()
            assert (tokens[:, 1:].ravel() == ids[first + 1 : first + 65]).all()
            mine = owners[first : first + 64].reshape(4, 16)
            assert ((documents[:, 1:] == documents[:, :-1]) == (mine[:, 1:] == mine[:, :-1])).all()
