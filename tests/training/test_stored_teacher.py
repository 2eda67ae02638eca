"""Runs from stored targets: as beside the teacher, exact at a resume, and every mistake one line."""

import dataclasses
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from teacher_targets import main as make_targets

from argonne.config.command_line import parse_recipe
from argonne.config.options import RunConfig
from argonne.errors import ConfigError, DataError
from argonne.testing.corpus import small_corpus
from argonne.testing.distributed import make_parallel
from argonne.testing.launch import SCHEDULE, SHAPE, checkpoint, launch, metrics
from argonne.tools.rehearsal_targets import scaled_distillation
from argonne.training.stored_teacher import open_stored
from argonne.training.teacher_plan import teacher_cost
from data_stream import StepBatch, TargetsFolder, load_tokenizer
from tests.scripts.test_teacher_targets import Corpus, samples_of
from tests.training.test_teacher_run import llama
from tp_shard import Layout

STEPS, BLOCK = 6, 64
LOSS = ["--distill-alpha", "0.3", "--distill-temperature", "2"]
Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Prepared:
    folder: Path
    flags: list[str]
    teacher: Path
    tokenizer: Path

    def make(self, name: str, *more: Any) -> Path:
        arguments = ["--targets", self.folder / name, "--teacher-path", self.teacher, *self.flags, *LOSS]
        arguments += ["--output-dir", self.folder / "made", *more]
        assert make_targets([str(argument) for argument in arguments]) == 0
        return self.folder / name

    def config(self, targets: Path, *more: Any) -> RunConfig:
        flags = [*self.flags, *LOSS, "--teacher-targets", targets, *more]
        return parse_recipe([str(flag) for flag in flags]).config


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("stored")
    glob, tokenizer, _ = small_corpus(folder, documents=60, length=600)
    flags = ["--tokenizer-path", str(tokenizer), "--data-glob", glob, *SHAPE, *SCHEDULE]
    flags += ["--total-steps", str(STEPS)]
    return Prepared(folder, flags, llama(folder / "teacher", 520, tokenizer), tokenizer)


@pytest.fixture(scope="module")
def whole(prepared: Prepared) -> Path:
    """Targets with the whole vocabulary in float32."""
    return prepared.make("whole", "--top-k", 512, "--targets-dtype", "fp32")


@pytest.fixture(scope="module")
def few(prepared: Prepared) -> Path:
    return prepared.make("few", "--top-k", 8)


def trained(processes: int, output: Path, prepared: Prepared, *flags: Any) -> Lines:
    finished = launch(processes, *prepared.flags, *LOSS, *flags, "--output-dir", output)
    assert finished.code == 0, finished.stderr
    return metrics(output)


def test_a_run_weighs_what_is_stored(tmp_path: Path, prepared: Prepared, few: Path) -> None:
    finished = launch(1, *prepared.flags, *LOSS, "--teacher-targets", few, "--output-dir", tmp_path)
    assert finished.code == 0, finished.stderr
    assert f"Teacher: targets in {few} (of" in finished.stdout
    assert "samples 0 to 11), 0.3 x cross entropy + 0.7 x forward" in finished.stdout
    lines = metrics(tmp_path)
    assert len(lines) == STEPS
    for line in lines:
        assert line["loss"] == pytest.approx(0.3 * line["ce_loss"] + 0.7 * line["kd_loss"], rel=1e-6)
        assert line["kd_loss"] > 0


def opened(config: RunConfig, prepared: Prepared, **place: Any) -> Any:
    tokenizer = load_tokenizer(str(prepared.tokenizer), False)
    state = {"data_state": {"samples": place.get("samples", 0)}}
    parallel = make_parallel(0, 1, 1)
    return open_stored(config, place.get("vocab_size", 512), parallel, tokenizer, state, place.get("step", 0))


def test_what_the_targets_were_made_for_must_be_the_runs(prepared: Prepared, few: Path) -> None:
    opened(prepared.config(few), prepared)
    for flags, said in (
        (["--block-size", 32], "was made for --block-size 64, and the run has 32: change it, or make others"),
        (["--distill-temperature", 1], "was made for --distill-temperature 2.0, and the run has 1.0"),
        (["--document-attention"], "was made for --document-attention False, and the run has True"),
    ):
        with pytest.raises(ConfigError, match=said):
            opened(prepared.config(few, *flags), prepared)
    with pytest.raises(ConfigError, match="was made for a vocabulary of 512, and the run has 600"):
        opened(prepared.config(few), prepared, vocab_size=600)
    other = small_corpus(prepared.folder / "elsewhere", documents=20, vocab_size=400)[1]
    config = prepared.config(few, "--tokenizer-path", other)
    with pytest.raises(ConfigError, match=f"another tokenizer than --tokenizer-path {other}"):
        opened(config, dataclasses.replace(prepared, tokenizer=other))


def test_targets_that_end_too_soon_are_said_before_the_first_step(prepared: Prepared, few: Path) -> None:
    config = prepared.config(few, "--total-steps", 9)
    with pytest.raises(
        DataError, match="has the samples 0 to 11, enough for 6 of the 9 steps to go, which take"
    ):
        opened(config, prepared)
    with pytest.raises(DataError, match="enough for 3 of the 5 steps to go, which take the samples 6 to 15"):
        opened(config, prepared, samples=6, step=4)
    opened(config, prepared, samples=12, step=9)  # it has finished


def test_damage_is_said_before_the_first_step(prepared: Prepared, few: Path, tmp_path: Path) -> None:
    shutil.copytree(few, tmp_path / "few")
    for place in (100, -100):
        data = bytearray((few / "targets.bin").read_bytes())
        data[place] ^= 1
        (tmp_path / "few" / "targets.bin").write_bytes(data)
        with pytest.raises(
            DataError, match=r"targets\.bin is damaged at sample (0|11): copy the folder again"
        ):
            opened(prepared.config(tmp_path / "few"), prepared)


def batches(prepared: Prepared) -> Iterator[StepBatch]:
    corpus = Corpus(prepared.folder, prepared.tokenizer, prepared.teacher)
    tokens = samples_of(corpus, 12, "--block-size", BLOCK)
    for first in range(0, 12, 2):
        step = torch.from_numpy(tokens[first : first + 2])
        yield StepBatch(tokens=step, stream_hash="", progress=None, wait_seconds=0.0, first_sample=first)


def test_each_replica_reads_its_own_rows(prepared: Prepared, few: Path) -> None:
    teacher = opened(prepared.config(few), prepared)
    for batch in batches(prepared):
        place = {"batch_size": 2, "dp_rank": 0, "dp_size": 1, "device": "cpu"}
        together = teacher.targets(batch, 0, place)
        assert together.ids.shape == (2 * BLOCK, 8) and together.log_rest.shape == (2 * BLOCK,)
        for rank in range(2):
            of_one = {**place, "batch_size": 1, "dp_rank": rank, "dp_size": 2}
            rows = slice(rank * BLOCK, (rank + 1) * BLOCK)
            assert torch.equal(teacher.targets(batch, 0, of_one).ids, together.ids[rows])
            micro = teacher.targets(batch, rank, {**place, "batch_size": 1})
            assert torch.equal(micro.log_probs, together.log_probs[rows])
    moved = dataclasses.replace(batch, first_sample=8)
    with pytest.raises(
        DataError, match=r"sample 8 was 000_\d+\.parquet row \d+ token \d+, epoch 0, its tokens"
    ):
        teacher.targets(moved, 0, place)


def test_the_plan_counts_the_targets(prepared: Prepared, few: Path) -> None:
    layout = Layout(tp_size=2, batch_size=2, block_size=BLOCK, element_bytes=4)
    options = prepared.config(few).distillation
    cost = teacher_cost(options, layout, 512, 8)
    files = [few / name for name in ("samples.bin", "targets.bin")]
    assert cost.stored_samples == 12 and cost.weights == cost.flops == cost.parameters == 0
    assert cost.figures(12) == {"teacher_targets_bytes": sum(file.stat().st_size for file in files)}
    missing = dataclasses.replace(options, teacher_targets=str(few / "none"))
    planned = teacher_cost(missing, layout, 151_665, 8)
    assert planned.sample_bytes == 64 + BLOCK * 388 and planned.stored_samples == 0
    assert planned.total > cost.total > 0


def test_a_rehearsal_has_targets_of_its_own(prepared: Prepared, few: Path, tmp_path: Path) -> None:
    options, notes = prepared.config(few).distillation, []  # type: ignore[var-annotated]
    small = scaled_distillation(options, tmp_path, notes)
    assert small == dataclasses.replace(options, teacher_targets=str(tmp_path / "targets"))
    assert notes.pop() == f"targets are made anew for the small samples, by {prepared.teacher}"
    shutil.copytree(few, tmp_path / "few")
    folder = TargetsFolder(tmp_path / "few")
    folder.write_header(dataclasses.replace(folder.read_header(), teacher_path=str(tmp_path / "gone")))
    moved = dataclasses.replace(options, teacher_targets=str(folder.root))
    assert not scaled_distillation(moved, tmp_path, notes).is_on
    assert notes == [f"teacher {tmp_path / 'gone'} is not here: stored targets are left out"]


# ------------------------------------------------------------------ slow: whole runs


def assert_alike(lines: Lines, expected: Lines) -> None:
    for line, wanted in zip(lines, expected, strict=True):
        assert line["stream_hash"] == wanted["stream_hash"]
        for key in ("loss", "ce_loss", "kd_loss"):
            assert line[key] == pytest.approx(wanted[key], rel=3e-5), (line["step"], key)
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=3e-4)


LAYOUTS: list[tuple[int, list[str]]] = [
    (1, []),
    (2, ["--sequence-parallel"]),
    (4, ["--loss-chunk-tokens", "7", "--tensor-parallel-size", "2", "--batch-size", "1"]),
    (2, ["--loss-chunk-tokens", "0", "--activation-checkpointing", "full"]),
    (2, ["--tensor-parallel-size", "1", "--batch-size", "1", "--data-parallel", "ddp"]),
    (1, ["--batch-size", "1", "--gradient-accumulation-steps", "2"]),
    (2, ["--compile"]),
]


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory, prepared: Prepared) -> dict[str, Lines]:
    """The runs beside the teacher itself, by divergence."""
    root = tmp_path_factory.mktemp("beside")
    return {
        kind: trained(
            1, root / kind, prepared, "--teacher-path", prepared.teacher, "--distill-divergence", kind
        )
        for kind in ("forward", "reverse")
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forward", "reverse"])
@pytest.mark.parametrize(("processes", "flags"), LAYOUTS)
def test_the_whole_vocabulary_teaches_as_the_teacher_does(
    tmp_path: Path,
    prepared: Prepared,
    whole: Path,
    beside: dict[str, Lines],
    processes: int,
    flags: list[str],
    kind: str,
) -> None:
    given = ["--teacher-targets", whole, "--distill-divergence", kind, *flags]
    assert_alike(trained(processes, tmp_path, prepared, *given), beside[kind])


@pytest.mark.slow
def test_a_resume_goes_on_bit_for_bit_and_names_other_targets(
    tmp_path: Path, prepared: Prepared, few: Path
) -> None:
    targets = tmp_path / "targets"
    shutil.copytree(few, targets)
    common = [*prepared.flags, *LOSS, "--checkpoint-interval", 3, "--output-dir", tmp_path / "run"]
    assert launch(1, *common, "--teacher-targets", targets).code == 0
    expected = metrics(tmp_path / "run")
    checkpoint(tmp_path / "run", 6).unlink()
    resumed = launch(1, *common, "--teacher-targets", targets)
    assert resumed.code == 0 and "Changed since" not in resumed.stdout
    keys = ("step", "loss", "ce_loss", "kd_loss", "grad_norm")
    found = [[line[key] for key in keys] for line in metrics(tmp_path / "run")]
    assert found == [[line[key] for key in keys] for line in expected]
    names = [TargetsFolder(targets).read_header().identity]
    shutil.rmtree(targets)
    shutil.copytree(prepared.make("nine", "--top-k", 9), targets)
    names.append(TargetsFolder(targets).read_header().identity)
    checkpoint(tmp_path / "run", 6).unlink()
    changed = launch(1, *common, "--teacher-targets", targets)
    said = f"--teacher-targets was {targets} ({names[0]}), is {targets} ({names[1]})"
    assert changed.code == 0 and said in changed.stdout
    without = launch(1, *prepared.flags, "--total-steps", 7, "--output-dir", tmp_path / "run")
    assert f"--teacher-targets was {targets} ({names[1]}), is none" in without.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [["--shuffle"], ["--no-packing"], ["--no-streaming"], ["--data-mix", "a=2:{0}", "b=1:{0}"]]
)
def test_other_data_is_one_line_with_the_place(
    tmp_path: Path, prepared: Prepared, few: Path, flags: list[str]
) -> None:
    data = prepared.flags[3]
    own = [flag.format(data) for flag in flags]
    base = prepared.flags if "--data-mix" not in own else [*prepared.flags[:2], *prepared.flags[4:]]
    here = dataclasses.replace(prepared, flags=base)
    finished = launch(2, *base, *LOSS, *own, "--teacher-targets", few, "--output-dir", tmp_path / "run")
    # A rank says nothing where a lower one does within a second, which a busy machine may not manage.
    assert finished.code == 1 and len(set(finished.errors())) == 1, finished.stderr
    place = r"sample (\d+) was 000_\d+\.parquet row \d+ token \d+, epoch 0, its tokens"
    (number,) = re.findall(f"--teacher-targets {few}: {place}", finished.errors()[0])
    # Alone in its document, or from the first source, the first sample is the same.
    assert (int(number) > 0) == (own[0] in ("--no-packing", "--data-mix"))
    targets = here.make("own" + own[0], "--top-k", 8, *own)
    lines = trained(2, tmp_path / "sound", here, *own, "--teacher-targets", targets)
    assert len(lines) == STEPS and all(line["kd_loss"] > 0 for line in lines)


@pytest.mark.slow
def test_a_shard_that_was_rewritten_is_named_where_it_begins_to_differ(
    tmp_path: Path, prepared: Prepared, few: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.copytree(prepared.folder / "data", tmp_path / "data")
    first = tmp_path / "data" / "000_00000.parquet"
    table = pq.read_table(first)
    texts = table.column("text").to_pylist()
    texts[2] = "Another text. " + texts[2]
    pq.write_table(table.set_column(0, "text", pa.array(texts)), first, row_group_size=7)
    flags = [*prepared.flags[:3], tmp_path / "data", *prepared.flags[4:]]
    finished = launch(1, *flags, *LOSS, "--teacher-targets", few, "--output-dir", tmp_path / "run")
    (error,) = finished.errors()
    assert finished.code == 1
    assert "000_00000.parquet row 1 token" in error or "000_00000.parquet row 2 token" in error
    done = metrics(tmp_path / "run")
    number = int(error.partition("sample ")[2].split()[0])
    assert number > 0 and len(done) == number // 2


@pytest.mark.slow
def test_targets_of_a_run_that_has_begun_go_on_from_its_checkpoint(
    tmp_path: Path, prepared: Prepared
) -> None:
    """Three steps without a teacher, then three from targets of the samples that follow."""
    short = [*prepared.flags, "--total-steps", 3, "--warmup-steps", 2]
    assert launch(1, *short, "--output-dir", tmp_path / "run").code == 0
    targets = prepared.make("later", "--top-k", 8, "--output-dir", tmp_path / "run")
    header = TargetsFolder(targets).read_header()
    assert (header.first_sample, header.samples) == (6, 6)
    lines = trained(1, tmp_path / "run", prepared, "--teacher-targets", targets)
    assert ["kd_loss" in line for line in lines] == [False] * 3 + [True] * 3
    fresh = launch(
        1, *prepared.flags, *LOSS, "--teacher-targets", targets, "--output-dir", tmp_path / "fresh"
    )
    assert "has the samples 6 to 11, enough for none of the 6 steps to go" in fresh.errors()[0]


@pytest.mark.slow
def test_missing_targets_are_one_line_on_all_ranks(tmp_path: Path, prepared: Prepared) -> None:
    finished = launch(
        2, *prepared.flags, *LOSS, "--teacher-targets", tmp_path / "none", "--output-dir", tmp_path / "run"
    )
    assert finished.code == 1 and len(finished.errors()) == 1, finished.stderr
    assert f"--teacher-targets {tmp_path / 'none'} is no folder" in finished.errors()[0]
