"""scripts/teacher_targets.py: what it stores is the teacher's word on the run's samples, however made."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from prepare_data import main as prepare
from teacher_targets import main
from transformers import LlamaForCausalLM

from argonne.config.command_line import parse_recipe
from argonne.data.target_file import TargetsFolder, TargetsReader
from argonne.testing.corpus import short_texts, small_corpus, write_shards
from argonne.testing.launch import environment
from argonne.tools import target_making
from argonne.tools.likely_tokens import most_likely
from argonne.training.setup import source_options
from argonne.verification.simulate import simulate
from data_stream import load_tokenizer, open_stream
from tests import ROOT
from tests.training.test_teacher_run import llama
from tp_shard import SimulatedTPGroup

BLOCK, TEMPERATURE, STEPS, BATCH = 32, 2.0, 5, 2


@dataclass(frozen=True)
class Corpus:
    folder: Path
    tokenizer: Path
    teacher: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def run_flags(self, *more: Any) -> list[str]:
        """Those of a run from the stored targets, but for the targets."""
        flags = [
            "--tokenizer-path", self.tokenizer, "--model-config", "argonne-tiny", "--block-size", BLOCK,
            "--batch-size", BATCH, "--total-steps", STEPS, "--warmup-steps", 1, "--num-proc", 1,
            "--output-dir", self.folder / "run",
        ]  # fmt: skip
        if not {"--data-mix", "--data-glob"} & set(map(str, more)):
            flags += ["--data-glob", self.data]
        return [str(flag) for flag in (*flags, *more)]

    def make(self, name: str, *more: Any) -> int:
        own = ["--targets", str(self.folder / name), *self.asking()]
        return main([*own, *self.run_flags(*more)])

    def asking(self) -> list[str]:
        return ["--teacher-path", str(self.teacher), "--distill-temperature", str(TEMPERATURE)]

    def reader(self, name: str) -> TargetsReader:
        return TargetsReader(TargetsFolder(self.folder / name))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("targets")
    _, tokenizer, _ = small_corpus(folder, documents=40, length=300)
    write_shards(folder / "other", short_texts(30, 300, skip=40), shards=2)
    tokenize = ["--tokenize", str(tokenizer), "--token-format", "bin", "--output-dir", str(folder / "bin")]
    assert prepare([str(folder / "data"), *tokenize]) == 0
    return Corpus(folder, tokenizer, llama(folder / "teacher", 520, tokenizer))


def samples_of(corpus: Corpus, count: int, *more: Any, per_step: int = 1) -> np.ndarray:
    """The run's own samples, by its own stream."""
    config = parse_recipe(corpus.run_flags(*more)).config
    opened = open_stream(source_options(config, per_step), load_tokenizer(str(corpus.tokenizer), False))
    try:
        steps = [opened.source.next_step().tokens for _ in range(-(-count // per_step))]
    finally:
        opened.source.close()
    return np.concatenate(steps)[:count]


def test_it_stores_the_teachers_most_likely_tokens(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    assert corpus.make("plain", "--top-k", 7) == 0
    said = capsys.readouterr().out
    assert f"10 samples of {BLOCK} tokens in" in said and "32 a token (top 7, float16)" in said
    reader, tokens = corpus.reader("plain"), samples_of(corpus, STEPS * BATCH, per_step=BATCH)
    reader.check(0, tokens)
    header = reader.header
    assert (header.samples, header.form.temperature, header.form.vocab_size) == (10, TEMPERATURE, 512)
    teacher = LlamaForCausalLM.from_pretrained(corpus.teacher)
    with torch.no_grad():
        logits = teacher(torch.from_numpy(tokens[:, :-1]).long()).logits[..., :512].flatten(0, 1)
    log_probs = torch.log_softmax(logits.double() / TEMPERATURE, dim=-1)
    values, ids = log_probs.topk(7)
    found = reader.read(0, 10)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(found.log_probs, values, rtol=2**-10)
    rest = log_probs.scatter(1, ids, -torch.inf).exp().sum(dim=1)
    np.testing.assert_allclose(np.exp(found.log_rest), rest, rtol=1e-4)
    assert header.mean_rest == pytest.approx(rest.mean().item(), rel=1e-4)
    assert f"mean mass of the rest {header.mean_rest:.4g} at temperature 2" in said


STREAMS: dict[str, list[Any]] = {
    "packed": [],
    "shuffled": ["--shuffle"],
    "alone": ["--no-packing"],
    "cached": ["--no-streaming"],
    "mixed": ["--data-mix", "web=0.7:{data}", "other=0.3:{other}"],
    "held": ["--holdout", 4],
    "tokens": ["--data-glob", "{bin}"],
    "mixed and shuffled": ["--shuffle", "--data-mix", "web=2:{data}", "other=1:{other}"],
}


ALSO = ("packed", "shuffled", "mixed", "cached", "held", "alone")
"""Parts of what the others do together, and streams that are rare."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ALSO else ()) for name in STREAMS]
)
def test_whatever_the_stream_the_samples_are_the_runs(corpus: Corpus, name: str) -> None:
    """More than an epoch of most; made in two goes, the second from the place that the first one kept."""
    places = {part: str(corpus.folder / part) for part in ("data", "other", "bin")}
    flags = [str(flag).format(**places) for flag in STREAMS[name]]
    assert corpus.make(name, *flags, "--samples", 37, "--top-k", 2, "--batch-size", 5) == 0
    assert corpus.make(name, *flags, "--samples", 150, "--top-k", 2, "--batch-size", 4) == 0
    reader = corpus.reader(name)
    assert reader.header.samples == 150
    tokens = samples_of(corpus, 150, *flags, per_step=6)
    reader.check(0, tokens)
    reader.read(0, 150)
    entries = reader.read_entries(0, 150)
    assert len({reader.place(entry) for entry in entries}) == 150
    if "mix" in "".join(flags):
        assert sorted(set(entries["source"].tolist())) == [0, 1]
        assert {reader.place(entry).split()[2] for entry in entries} == {"'web'", "'other'"}


def test_the_place_of_a_sample_is_where_its_tokens_are(corpus: Corpus) -> None:
    assert corpus.make("places", "--samples", 60, "--top-k", 1) == 0
    reader, tokenizer = corpus.reader("places"), load_tokenizer(str(corpus.tokenizer), False)
    tokens = samples_of(corpus, 60)
    files = sorted(corpus.data.glob("*.parquet"))
    for entry, sample in zip(reader.read_entries(0, 60), tokens, strict=True):
        text = pq.read_table(files[entry["file"]]).column("text")[int(entry["row"])].as_py()
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        there = ids[entry["token_offset"] : entry["token_offset"] + BLOCK + 1]
        assert sample[: len(there)].tolist() == there


def test_it_goes_on_to_the_same_bytes(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off by an error after some batches, with what was stored since the last header."""
    assert corpus.make("whole", "--top-k", 5, "--samples", 24) == 0
    monkeypatch.setattr(target_making, "COMMIT_SECONDS", 0.0)
    real, calls = target_making.targets_of, []

    def fails(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(target_making, "targets_of", fails)
    assert corpus.make("cut", "--top-k", 5, "--samples", 24) == 130
    assert corpus.reader("cut").header.samples == 10
    with (corpus.folder / "cut" / "targets.bin").open("ab") as file:
        file.write(b"torn")
    assert corpus.make("cut", "--top-k", 5, "--samples", 24) == 0
    for name in ("samples.bin", "targets.bin"):
        assert (corpus.folder / "cut" / name).read_bytes() == (corpus.folder / "whole" / name).read_bytes()
    assert corpus.reader("cut").header.mean_rest == pytest.approx(corpus.reader("whole").header.mean_rest)
    assert corpus.make("cut", "--top-k", 5, "--samples", 24) == 0  # nothing is left to do


def test_the_steps_of_all_replicas_are_counted_by_the_global_batch(corpus: Corpus) -> None:
    """16 sequences a step are 2 micro-batches of 2 on 4 replicas."""
    split = ["--global-batch-size", 16, "--gradient-accumulation-steps", 2, "--total-steps", 3]
    assert corpus.make("global", "--top-k", 1, *split) == 0
    assert corpus.reader("global").header.samples == 3 * 16


@pytest.mark.parametrize("k", [4, 12])
@pytest.mark.parametrize("size", [2, 4])
def test_vocabulary_slices_find_the_same_tokens(size: int, k: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 12) * 3
    expected = most_likely(logits.clone(), k, 1.5, range(12), SimulatedTPGroup.create(1)[0])
    width = 12 // size + 1  # the last slice is short, or empty

    def work(group: SimulatedTPGroup) -> tuple[torch.Tensor, ...]:
        rows = range(min(12, group.rank * width), min(12, (group.rank + 1) * width))
        return most_likely(logits[:, rows.start : rows.stop].clone(), k, 1.5, rows, group)

    for found in simulate(SimulatedTPGroup.create(size), work):
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1:], expected[1:])


def test_mistakes_are_one_line(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(code: int, *arguments: Any) -> str:
        capsys.readouterr()
        try:
            found = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            found = int(str(ended.code))
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert found == code and len(errors) == 1, errors
        return errors[0]

    flags = corpus.run_flags()
    own = ["--targets", corpus.folder / "new"]
    teacher = corpus.asking()
    assert "--targets is required" in fails(2, *teacher, *flags)
    assert "--top-k 0: must be at least 1" in fails(2, *own, *teacher, *flags, "--top-k", 0)
    assert "--teacher-path is required" in fails(2, *own, *flags)
    assert "--plan is the run's" in fails(2, *own, *teacher, *flags, "--plan")
    automatic = ["--tensor-parallel-size", "auto"]
    assert "give --global-batch-size, or --samples" in fails(2, *own, *teacher, *flags, *automatic)
    assert "is no folder" in fails(2, *own, "--teacher-path", corpus.folder / "none", *flags)
    vast = fails(1, *own, *teacher, *flags, "--samples", 10**12)
    assert "bytes more, and" in vast and "lower --samples" in vast
    shutil.rmtree(corpus.folder / "new", ignore_errors=True)
    assert corpus.make("taken", "--samples", 2) == 0
    taken = ["--targets", corpus.folder / "taken", *teacher, *flags]
    assert "top k is 64 there, and 3 is asked for" in fails(2, *taken, "--top-k", 3)
    assert "temperature is 2.0 there" in fails(2, *taken, "--distill-temperature", 1)
    (corpus.folder / "taken" / "targets.json").unlink()
    assert "has a targets.bin and no targets.json" in fails(1, *taken)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [[], ["--teacher-device-map", "tensor-parallel"], ["--teacher-device-map", "auto"]]
)
def test_two_ranks_store_the_same(corpus: Corpus, tmp_path: Path, flags: list[str]) -> None:
    assert corpus.make("one", "--top-k", 9, "--samples", 21) == 0
    name = f"two{len(''.join(flags))}"
    arguments = ["--targets", corpus.folder / name, *corpus.asking(), "--top-k", 9]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, ROOT / "scripts" / "teacher_targets.py", *arguments, "--samples", 21, *flags]
    done = subprocess.run(
        [str(word) for word in (*command, *corpus.run_flags())],
        env=environment(), capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("21 samples of") == 1
    one, two = corpus.reader("one"), corpus.reader(name)
    assert two.header.samples == 21
    two.check(0, samples_of(corpus, 21))
    first, second = one.read(0, 21), two.read(0, 21)
    np.testing.assert_array_equal(first.ids, second.ids)
    np.testing.assert_allclose(first.log_probs, second.log_probs, rtol=2**-10)
    np.testing.assert_allclose(first.log_rest, second.log_rest, rtol=1e-4)
    assert one.header.mean_rest == pytest.approx(two.header.mean_rest, rel=1e-5)


@pytest.mark.slow
def test_killed_it_goes_on(corpus: Corpus) -> None:
    """kill -9 in the middle: what the header vouches for stands, and the rest is made."""
    folder = corpus.folder / "killed"
    arguments = ["--targets", folder, *corpus.asking(), "--samples", 4000, "--top-k", 50]
    script = (
        "import argonne.tools.target_making as m, teacher_targets as s, sys; m.COMMIT_SECONDS = 0.1; "
        "s.main(sys.argv[1:])"
    )
    env = {**environment(), "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
    command = [sys.executable, "-c", script, *arguments, *corpus.run_flags()]
    process = subprocess.Popen([str(word) for word in command], env=env, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        header = folder / "targets.json"
        if header.exists() and json.loads(header.read_text())["samples"] > 20:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.01)
    assert process.returncode == -signal.SIGKILL
    kept = corpus.reader("killed").header.samples
    assert 20 < kept < 4000
    assert corpus.make("killed", "--top-k", 50, "--samples", kept + 30) == 0
    reader = corpus.reader("killed")
    reader.check(0, samples_of(corpus, kept + 30))
    reader.read(0, kept + 30)
