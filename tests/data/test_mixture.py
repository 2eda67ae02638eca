"""Mixtures: the rule, the tokens and the places against a second reading; resumed in any layout."""

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import argonne.data.encoder_pool as encoder_pool
import argonne.data.stream as data_stream
from argonne.data.mixture import MixtureRule
from argonne.data.source import chain_hash
from data_stream import open_stream
from tests.data.mixture_samples import WEIGHTS, Naive, options_of, run_steps, write_sources
from tests.data.naive import mixture_order
from tests.data.shard_samples import resume


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_sources(tmp_path_factory.mktemp("sources"))


# ------------------------------------------------------------------ the rule


@pytest.mark.parametrize(
    "weights",
    [
        ["1"],
        ["1", "1", "1"],
        ["0.5", "0.5"],
        ["0.7", "0.2", "0.1"],
        ["3", "0.001"],
        ["1e-3", "2.5", ".5", "7."],
    ],
)
def test_the_rule_is_the_definition(weights: list[str]) -> None:
    rule = MixtureRule(weights)
    assert [rule.choose() for _ in range(300)] == mixture_order(weights, 300)


def test_random_weights_and_interruptions() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        weights = [f"{rng.randint(1, 9999) / 10 ** rng.randint(0, 4):f}" for _ in range(rng.randint(1, 9))]
        expected, rule = mixture_order(weights, 200), MixtureRule(weights)
        for number, source in enumerate(expected):
            if rng.random() < 0.1:
                rule = MixtureRule(weights, rule.taken)
            assert rule.choose() == source, (seed, number)


def test_shares_are_exact_and_floating_point_would_not_be() -> None:
    """After as many samples as the weights have parts each source has its own; a third of 0.1 is not 0.3."""
    rule = MixtureRule(["0.1", "0.2", "0.3", "0.4"])
    for _ in range(5000):
        rule.choose()
    assert rule.taken == [500, 1000, 1500, 2000] and rule.n == 5000
    large = MixtureRule(["1", "2"], [10**15, 2 * 10**15])
    assert [large.choose() for _ in range(6)] == [1, 0, 1, 1, 0, 1]


# ------------------------------------------------------------------ the tokens


@pytest.mark.parametrize(("seed", "workers"), [(None, 1), (3, 3)])
def test_tokens_places_and_shares(
    folders: dict[str, Path], tokenizer: Any, seed: int | None, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain and shuffled: every sample from the right source, and of that source the next one."""
    monkeypatch.setattr(data_stream, "BATCH_CHARACTERS", 3000)
    naive = Naive(folders, tokenizer, WEIGHTS, seed)
    shuffled: dict[str, Any] = {} if seed is None else {"shuffle": True, "seed": seed}
    options = options_of(folders, block_size=24, samples_per_step=7, num_proc=workers, **shuffled)
    opened = open_stream(options, tokenizer)
    stream_hash, total = "0" * 32, Counter[str]()
    for number in range(120):
        step = opened.source.next_step()
        order, tokens = naive.samples(7, 24, done=7 * number)
        assert step.tokens.tolist() == tokens
        assert step.sources is not None and [list(WEIGHTS)[i] for i in step.sources] == order
        total.update(order)
        stream_hash = chain_hash(stream_hash, np.array(tokens))
        assert step.progress.stream_hash == stream_hash and step.progress.samples == 7 * (number + 1)
        saved = opened.position_dict(step.progress)
        assert saved["mixture"] == {"weights": WEIGHTS, "n": 7 * (number + 1)}
        for name, place in saved["sources"].items():
            here = (place["epoch"], place["file_name"], place["row"], place["token_offset"])
            naive.streams[name].sample(total[name], 24)
            assert here == naive.streams[name].places[total[name] * 24]
            assert place["samples"] == total[name]
            assert {"streaming", "current_file_idx", "position_in_file", "chunk_offset"} <= set(place)
        metrics = step.progress.metrics()
        assert metrics["samples_by_source"] == {name: total[name] for name in WEIGHTS}
        assert metrics["tokens_by_source"] == {name: 24 * total[name] for name in WEIGHTS}
    assert metrics["epoch_by_source"]["web"] >= 1
    opened.source.close()
    shares = {name: Fraction(weight) for name, weight in WEIGHTS.items()}
    assert all(abs(total[name] - shares[name] * 840) <= 1 for name in WEIGHTS)


def test_resume_at_every_step_in_another_layout(folders: dict[str, Path], tokenizer: Any) -> None:
    """The samples depend on nothing but their number: another G, other workers, any interruption."""
    options = options_of(folders, block_size=40, samples_per_step=6, shuffle=True, seed=1)
    source = open_stream(options, tokenizer)
    steps = [source.source.next_step() for _ in range(20)]
    source.source.close()
    flat = np.concatenate([step.tokens for step in steps])
    for index, step in enumerate(steps[:-1]):
        again = resume(source, step.progress, options, tokenizer)
        after = again.source.next_step()
        again.source.close()
        assert again.notices == () and np.array_equal(after.tokens, steps[index + 1].tokens)
        assert after.progress == steps[index + 1].progress
        other = replace(options, samples_per_step=5, num_proc=2)
        again = resume(source, step.progress, other, tokenizer)
        after = again.source.next_step()
        again.source.close()
        begin = 6 * (index + 1)
        assert np.array_equal(after.tokens, flat[begin : begin + 5])


def test_without_streaming_each_source_has_its_own_permutation(
    folders: dict[str, Path], tokenizer: Any, tmp_path: Path
) -> None:
    options = options_of(folders, streaming=False, cache_dir=tmp_path, samples_per_step=9, seed=5)
    source = open_stream(options, tokenizer)
    steps = [source.source.next_step() for _ in range(6)]
    alone = {}
    for part in options.mix:
        single = open_stream(replace(options, mix=(), data_glob=part.glob, samples_per_step=60), tokenizer)
        alone[part.name] = single.source.next_step().tokens
    order = mixture_order(list(WEIGHTS.values()), 54)
    found = np.concatenate([step.tokens for step in steps])
    for number, name in enumerate(WEIGHTS):
        mine = found[np.array(order) == number]
        assert np.array_equal(mine, alone[name][: len(mine)])
    again = resume(source, steps[2].progress, options, tokenizer)
    assert np.array_equal(again.source.next_step().tokens, steps[3].tokens)


def test_reading_ahead_is_shared_by_need(
    folders: dict[str, Path], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches that three sources submit before they are consumed are those of one source and one each."""
    monkeypatch.setattr(data_stream, "BATCH_CHARACTERS", 1)
    submitted = []

    class Counting(encoder_pool.EncoderPool):
        def submit(self, texts: Any, last: Any) -> Any:
            submitted.append(len(texts))
            return super().submit(texts, last)

    monkeypatch.setattr("data_stream.EncoderPool", Counting)
    options = options_of(folders, block_size=8, samples_per_step=3, num_proc=2)
    opened = open_stream(options, tokenizer)
    workers = min(2, encoder_pool.usable_cpus())
    progress = opened.source.next_step().progress
    opened.source.close()
    consumed = progress.counts.documents + len(WEIGHTS)
    assert len(submitted) <= consumed + data_stream.BATCHES_PER_WORKER * workers + 3 * len(WEIGHTS)


# ------------------------------------------------------------------ random runs


def run_case(seed: int, folders: Mapping[str, Path], tokenizer: Any) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    names = rng.sample(list(folders), rng.randint(1, len(folders)))
    weights = {name: f"{rng.randint(1, 999) / 10 ** rng.randint(0, 3):f}" for name in names}
    shuffle, stream_seed, size = rng.random() < 0.5, rng.randrange(2**31), rng.randint(1, 120)
    naive = Naive(folders, tokenizer, weights, stream_seed if shuffle else None)
    common = {"block_size": size, "shuffle": shuffle, "seed": stream_seed}
    done, after = 0, None
    for _ in range(rng.randint(1, 5)):
        count = rng.randint(1, 12)
        options = options_of(folders, weights, samples_per_step=count, num_proc=rng.randint(1, 3), **common)
        opened = open_stream(options, tokenizer) if after is None else resume(*after, options, tokenizer)
        for step in run_steps(opened, rng.randint(1, 6)):
            assert step.tokens.tolist() == naive.samples(count, size, done)[1]
            done += count
        after = opened, step.progress


@pytest.mark.parametrize("seed", range(4))
def test_a_random_mixture(seed: int, folders: dict[str, Path], tokenizer: Any) -> None:
    run_case(seed, folders, tokenizer)


@pytest.mark.slow
def test_many_random_mixtures(folders: dict[str, Path], tokenizer: Any) -> None:
    first = random.SystemRandom().randrange(10**6)
    for seed in range(first, first + 40):
        run_case(seed, folders, tokenizer)
