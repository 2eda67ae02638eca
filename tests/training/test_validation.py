"""Validation: the first samples of a set, the same loss in every layout, training left as it is."""

import math
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from argonne.config.options import ParallelOptions
from argonne.errors import DataError
from argonne.ranks.world import Parallel
from argonne.run.evaluations import ValidationRecord
from argonne.testing.corpus import build_tokenizer, short_texts, small_corpus, write_shards
from argonne.testing.distributed import make_parallel, run_ranks
from argonne.testing.models import random_tokens
from argonne.testing.sources import source_options
from argonne.training.build import TrainedModel, build_model, fill_weights
from argonne.training.step import TrainingStep, Votes
from argonne.training.validation import ValidationSet, _micro_batches, load_sets, validate
from data_stream import SourceOptions, load_tokenizer, read_held_out
from model import ArgonneConfig, ArgonneModel
from tests.training.small_run import BLOCK, SEED, SETTINGS, batch_of, trained_model, training_options

SAMPLES = 7
FAMILY = {**SETTINGS, "qk_norm": True, "logit_softcap": 15.0, "z_loss_weight": 0.01}


def options_for(glob: str, block_size: int = BLOCK) -> SourceOptions:
    return source_options(glob, block_size=block_size, samples_per_step=1, num_proc=1)


def set_of(parallel: Parallel, batch_size: int = 2, samples: int = SAMPLES) -> ValidationSet:
    """Random tokens as a set, this replica's share."""
    tokens = random_tokens(batch=samples, length=BLOCK + 1, seed=9).to(torch.int32)
    return ValidationSet(
        name="held", samples=samples, block_size=BLOCK, text_bytes=500,
        micro_batches=tuple(_micro_batches(tokens, batch_size, parallel.dp_rank, parallel.dp_size)),
    )  # fmt: skip


# ------------------------------------------------------------------ what a set is


def test_the_first_samples_are_those_of_the_packed_stream(tmp_path: Path) -> None:
    glob, folder, texts = small_corpus(tmp_path, documents=12, length=200)
    tokenizer = load_tokenizer(str(folder))
    held = read_held_out("web", glob, options_for(glob), tokenizer, samples=5)
    stream, touched, filled = [], 0, 0
    for text in texts:
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if filled < 5 * BLOCK + 1:
            touched += len(text.encode())
        stream += ids
        filled += len(ids)
    expected = [stream[i * BLOCK : (i + 1) * BLOCK + 1] for i in range(5)]
    assert held.tokens.tolist() == expected
    assert held.text_bytes == touched < sum(len(text.encode()) for text in texts)


def test_with_holdout_a_set_of_training_shards_is_their_held_out_documents(tmp_path: Path) -> None:
    glob, folder, texts = small_corpus(tmp_path, documents=40, length=200)
    tokenizer = load_tokenizer(str(folder))
    options = replace(options_for(glob), holdout=4)
    kept = [
        text
        for text in texts
        if int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") % 4 == 0
    ]
    assert 0 < len(kept) < len(texts)
    held = read_held_out("web", glob, options, tokenizer, samples=3)
    stream = [
        token
        for text in kept * 20
        for token in (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    ]
    assert held.tokens[:, :-1].reshape(-1).tolist() == stream[: 3 * BLOCK]
    (tmp_path / "other").mkdir()
    others = replace(options, data_glob=small_corpus(tmp_path / "other", documents=5, length=200)[0])
    assert read_held_out("web", glob, others, tokenizer, samples=3).tokens.tolist() != held.tokens.tolist()


def test_bytes_are_those_of_utf_8_and_a_small_set_is_repeated(tmp_path: Path) -> None:
    text = "naïve Ångström 你好 " * 3
    write_shards(tmp_path / "data", [text, None, ""], shards=1)
    tokenizer = load_tokenizer(str(build_tokenizer(tmp_path / "tokenizer")))
    length = len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
    glob = str(tmp_path / "data" / "*.parquet")
    once = read_held_out("web", glob, options_for(glob, length - 1), tokenizer, 1)
    thrice = read_held_out("web", glob, options_for(glob, length), tokenizer, 2)
    assert len(text) < len(text.encode())
    assert once.text_bytes == len(text.encode()) and thrice.text_bytes == 3 * len(text.encode())
    assert thrice.tokens[0, 0] == thrice.tokens[0, -1] == thrice.tokens[1, 0]


@pytest.mark.parametrize("kind", ["missing", "damaged", "without text", "another column"])
def test_a_set_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    glob = str(tmp_path / "data" / "*.parquet")
    tokenizer = load_tokenizer(str(build_tokenizer(tmp_path / "tokenizer")))
    texts: list[str | None] = [None] * 4 if kind == "without text" else list(short_texts(4))
    if kind != "missing":
        paths = write_shards(tmp_path / "data", texts, shards=1, column="x" if "column" in kind else "text")
        if kind == "damaged":
            content = bytearray(paths[0].read_bytes())
            content[20:120] = bytes(100)
            paths[0].write_bytes(content)
    with pytest.raises(DataError, match=r"^--eval-data web: ") as caught:
        read_held_out("web", glob, options_for("unused"), tokenizer, 3)
    assert "--data-glob" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("samples", [1, 4, 7, 12])
def test_every_sample_falls_to_one_replica(samples: int, dp_size: int) -> None:
    tokens = torch.arange(samples * 4, dtype=torch.int32).view(samples, 4)
    shares = [list(_micro_batches(tokens, 2, rank, dp_size)) for rank in range(dp_size)]
    assert len({len(share) for share in shares}) == 1
    rows = []
    for share in shares:
        for inputs, targets in share:
            assert inputs.shape == targets.shape == (2, 3)
            for row, target in zip(inputs, targets, strict=True):
                if target[0] != -100:
                    assert torch.equal(row[1:], target[:-1])
                    rows.append(int(row[0]))
                else:
                    assert bool((target == -100).all())
    assert sorted(rows) == tokens[:, 0].tolist()


# ------------------------------------------------------------------ the loss


def built(rank: int, world_size: int, tp_size: int, settings: dict[str, Any], **options: Any) -> TrainedModel:
    parallel = make_parallel(rank, world_size, tp_size)
    trained = build_model(settings, ParallelOptions(**options), training_options(), parallel)
    fill_weights(trained, None, SEED)
    return trained


def loss_on(
    rank: int, world_size: int, tp_size: int, settings: dict[str, Any], options: dict[str, Any]
) -> float:
    trained = built(rank, world_size, tp_size, settings, **options)
    return validate(trained, set_of(trained.parallel), 3).loss


def test_the_loss_is_the_cross_entropy_of_a_plain_model() -> None:
    """Against torch's cross entropy on a Hugging Face model's logits; the z-loss is no part of it."""
    trained = built(0, 1, 1, FAMILY)
    plain = ArgonneModel(ArgonneConfig(**FAMILY))
    plain.load_state_dict({name: p.detach() for name, p in trained.model.named_parameters()}, strict=False)
    plain.tie_weights()
    tokens = random_tokens(batch=SAMPLES, length=BLOCK + 1, seed=9)
    with torch.no_grad():
        logits = plain.eval()(input_ids=tokens[:, :-1]).logits.double()
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    record = validate(trained, set_of(trained.parallel), 3)
    assert record.loss == pytest.approx(expected, rel=1e-6)
    assert (record.samples, record.tokens, record.step) == (SAMPLES, SAMPLES * BLOCK, 3)
    assert trained.model.training and trained.model.config.z_loss_weight == 0.01


@pytest.mark.parametrize(
    ("world_size", "tp_size", "options"),
    [
        (2, 2, {"sequence_parallel": True}),
        (2, 1, {}),
        (2, 1, {"data_parallel": "ddp"}),
        (4, 2, {"sequence_parallel": True, "activation_checkpointing": "selective"}),
    ],
)
def test_every_layout_gives_the_same_loss(world_size: int, tp_size: int, options: dict[str, Any]) -> None:
    alone = loss_on(0, 1, 1, FAMILY, {})
    losses = run_ranks(loss_on, world_size, tp_size, FAMILY, options)
    assert len(set(losses)) == 1
    assert losses[0] == pytest.approx(alone, rel=1e-6)


def test_a_record_has_the_numbers_of_its_definition() -> None:
    record = ValidationRecord(
        step=5, name="web", loss=2.0, samples=3, tokens=48, text_bytes=200, seconds=0.5, extra={"stage": "a"}
    )
    line = record.line()
    assert line["perplexity"] == pytest.approx(math.e**2)
    assert line["bits_per_byte"] == pytest.approx(2.0 * math.log2(math.e) * 48 / 200)
    assert list(line)[:5] == ["step", "name", "loss", "perplexity", "bits_per_byte"]
    assert {key: line[key] for key in ("samples", "tokens", "seconds", "stage")} == {
        "samples": 3, "tokens": 48, "seconds": 0.5, "stage": "a",
    }  # fmt: skip


# ------------------------------------------------------------------ training goes on as without


def trained_weights(
    rank: int, world_size: int, tp_size: int, options: dict[str, Any], validates: bool
) -> list[Any]:
    trained = built(rank, world_size, tp_size, FAMILY, **options)
    step = TrainingStep(trained, training_options(), 1)
    found: list[Any] = []
    for number in range(4):
        result = step.run(batch_of(2 * trained.parallel.dp_size, seed=number), number, votes=Votes())
        found.append((result.totals.loss, result.totals.grad_norm))
        if validates:
            validate(trained, set_of(trained.parallel), number)
        # What a save reads at this place: the slices, never a gathered parameter.
        found.append({name: value.clone() for name, value in trained.parameters().items()})
    return found


def same(one: list[Any], other: list[Any]) -> bool:
    for mine, theirs in zip(one, other, strict=True):
        if isinstance(mine, tuple):
            if mine != theirs:
                return False
        elif not all(torch.equal(mine[name], theirs[name]) for name in mine):
            return False
    return True


def compared_on(rank: int, world_size: int, tp_size: int, options: dict[str, Any]) -> bool:
    runs = [trained_weights(rank, world_size, tp_size, options, validates) for validates in (True, False)]
    return same(*runs)


@pytest.mark.parametrize(
    ("world_size", "tp_size", "options"),
    [(2, 2, {"sequence_parallel": True}), (2, 1, {}), (2, 1, {"data_parallel": "ddp"}), (4, 2, {})],
)
def test_training_is_the_same_bit_for_bit(world_size: int, tp_size: int, options: dict[str, Any]) -> None:
    assert all(run_ranks(compared_on, world_size, tp_size, options))


def test_training_alone_is_the_same_bit_for_bit() -> None:
    before = torch.get_rng_state()
    assert compared_on(0, 1, 1, {})
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
def test_compiled_blocks_are_not_compiled_again() -> None:
    torch._dynamo.reset()
    trained = built(0, 1, 1, SETTINGS, compile=True)
    step = TrainingStep(trained, training_options(), 1)
    step.run(batch_of(2), 0, votes=Votes())
    step.run(batch_of(2, seed=1), 1, votes=Votes())
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    assert before > 0
    eager = built(0, 1, 1, SETTINGS)
    eager.model.load_state_dict(trained.model.state_dict())
    compiled_loss = validate(trained, set_of(trained.parallel), 2).loss
    assert compiled_loss == validate(eager, set_of(eager.parallel), 2).loss
    step.run(batch_of(2, seed=2), 2, votes=Votes())
    assert counters["stats"]["unique_graphs"] == before


def test_sets_reach_every_rank(tmp_path: Path) -> None:
    glob, folder, _ = small_corpus(tmp_path, documents=12, length=200)
    tokenizer = load_tokenizer(str(folder))
    trained = trained_model()
    (found,) = load_sets(
        (("web", glob),), options_for("unused"), tokenizer,
        samples=3, batch_size=2, parallel=trained.parallel,
    )  # fmt: skip
    held = read_held_out("web", glob, options_for("unused"), tokenizer, 3)
    assert (found.name, found.samples, found.text_bytes) == ("web", 3, held.text_bytes)
    assert found.micro_batches[1][0][0].tolist() == held.tokens[2, :-1].tolist()
