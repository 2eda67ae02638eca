"""Ask a teacher about every sample of a run's stream, and store its most likely tokens."""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from argonne.config.distillation import check_folder
from argonne.config.recipe import Recipe
from argonne.data.source import DataProgress
from argonne.data.target_file import Targets, TargetsFolder, TargetsForm, TargetsHeader
from argonne.errors import ConfigError, DataError, RunError
from argonne.ranks.agree import barrier, broadcast_object, gather_objects, on_all, on_rank_0
from argonne.ranks.launch import Environment
from argonne.ranks.world import Parallel, World, build_parallel, disconnect
from argonne.run.control import RunControl
from argonne.run.report import RunReport
from argonne.tools.likely_tokens import targets_of
from argonne.tools.preflight import QuietReport, join
from argonne.tools.sample_places import SampleByPlace
from argonne.tools.script import said_by_rank_0
from argonne.tools.target_writer import FLAG, TargetsWriter, refuse_others, require_room
from argonne.training.build import choose_dtype, choose_tp_size
from argonne.training.setup import Start, choose_start, data_on_rank_0
from argonne.training.stages import PlannedStage, plan_stages
from argonne.training.teacher import Teacher, open_teacher
from data_stream import OpenedStream, StepBatch, StepFeed, tokenizer_fingerprint
from model import ArgonneConfig, ArgonneModel
from tp_shard import TPGroup, as_tp_group, shard_tensor_parallel, vocabulary_slice

COMMIT_SECONDS = 30.0
"""Time between two headers: what a writer that is cut off has to do again at most."""
_SAMPLED_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The script's own flags."""

    folder: Path
    top_k: int
    dtype: str
    samples: int | None
    """None: what the run's steps take."""


def teacher_fingerprint(folder: Path) -> str:
    """Hash of a teacher's configuration, and of the names, the sizes and samples of its weights."""
    digest = hashlib.blake2b(digest_size=16)
    files = sorted(
        path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth", ".pt")
    )
    for path in [folder / "config.json", *files]:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in sorted({0, max(0, size // 2), max(0, size - _SAMPLED_BYTES)}):
                file.seek(place)
                digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def as_one_replica(recipe: Recipe) -> PlannedStage:
    """The run's steps, as one replica would take them: how they are split matters to no sample."""
    stage = recipe.stages[0]
    training = stage.config.training
    if training.global_batch_size is not None:
        training = replace(training, gradient_accumulation_steps=None)
    one = replace(stage, config=replace(stage.config, training=training))
    return plan_stages(Recipe(stages=(one,)), 1)[0]


def header_and_samples(
    folder: TargetsFolder, asked: Asked, stage: PlannedStage, start: Start
) -> tuple[TargetsHeader, int]:
    """What is there or is to be made, and how many samples are wanted in all; of rank 0.

    Raises ConfigError where other targets are there, DataError where the folder is damaged.
    """
    options, training = stage.config.distillation, stage.config.training
    vocab_size = start.settings["vocab_size"]
    teacher = Path(str(options.teacher_path)).expanduser()
    check_folder(teacher)
    done = int((start.metadata.get("data_state") or {}).get("samples") or 0)
    header = TargetsHeader(
        form=TargetsForm(
            block_size=training.block_size,
            vocab_size=vocab_size,
            top_k=min(asked.top_k, vocab_size),
            temperature=options.distill_temperature,
            dtype=asked.dtype,
            document_attention=stage.config.data.document_attention,
            tokenizer=tokenizer_fingerprint(start.tokenizer),
            teacher=teacher_fingerprint(teacher),
        ),
        first_sample=done,
        samples=0,
        teacher_path=str(options.teacher_path),
        files={},
    )
    end = done + (training.total_steps - start.step) * stage.samples_per_step
    if folder.header.exists():
        there = folder.read_header()
        refuse_others(folder, there, header)
        header = there
    elif folder.records.exists():
        raise DataError(
            f"{FLAG} {folder.root} has a {folder.records.name} and no {folder.header.name}: restore that, or "
            "name another folder"
        )
    return header, asked.samples or end - header.first_sample


class TargetMaking:
    """All that makes the targets of one stream; collective in all its parts."""

    def __init__(self, recipe: Recipe, asked: Asked, world: World, start: Start, report: RunReport) -> None:
        self.asked, self.start, self.report = asked, start, report
        self.folder = TargetsFolder(asked.folder)
        self.stage = as_one_replica(recipe)
        self.config = config = self.stage.config
        if world.local_world_size != world.world_size:
            raise ConfigError(
                f"{world.world_size} processes on several hosts write one file: start them on one host"
            )
        split = config.distillation.teacher_device_map == "tensor-parallel"
        size = choose_tp_size(start.settings, config.parallel.tensor_parallel_size, world) if split else 1
        self.parallel: Parallel = build_parallel(world, size)
        self.header, self.wanted = on_rank_0(
            lambda: header_and_samples(self.folder, asked, self.stage, start), self.parallel
        )
        self.rest = 0.0
        """Sum over the tokens of the mass of the rest."""
        self.writer: TargetsWriter | None = None

    def stream(self) -> OpenedStream | None:
        """The run's stream of single samples, where the stored ones end; of rank 0, None elsewhere."""
        metadata = self.header.place or self.start.metadata
        if state := metadata.get("data_state"):
            metadata = {**metadata, "data_state": {**state, "samples_per_step": 1}}
        vocab_size = self.start.settings["vocab_size"]
        place = (self.config, self.start.tokenizer, metadata, self.start.step, 1, self.parallel, vocab_size)
        opened = data_on_rank_0(*place)
        for notice in opened.notices if opened is not None else ():
            self.report.warn(notice)
        return opened

    def teacher(self) -> tuple[Teacher, range]:
        """The teacher, and the ids whose logits it makes on this rank."""
        with torch.device("meta"):
            student = ArgonneModel(ArgonneConfig(**self.start.settings))
        shard_tensor_parallel(student, self.parallel.tp_group if self.parallel.tp_size > 1 else TPGroup(0, 1))
        config, training = self.config, self.config.training
        teacher = open_teacher(
            config.distillation,
            student,
            self.parallel,
            compute_dtype=choose_dtype(training.dtype, self.parallel.device),
            tokenizer=self.start.tokenizer,
            tokenizer_path=config.data.tokenizer_path,
            documents=config.data.document_attention,
            trust=config.data.trust_remote_code,
        )
        assert teacher is not None
        return teacher, vocabulary_slice(student)

    def make(self) -> None:
        """Store what is missing of the samples that are wanted."""
        opened = self.stream()
        on_rank_0(self._room, self.parallel)
        teacher, rows = self.teacher()
        if opened is not None and not self.header.files:
            names = {name: [shard.name for shard in shards] for name, shards in opened.corpora.items()}
            self.header = replace(self.header, files=names)
        count, world = self.config.training.batch_size * self.parallel.dp_size, self.parallel
        source = None if opened is None else SampleByPlace(opened.source, opened.start, count)
        feed = StepFeed(
            source,
            samples_per_step=count,
            block_size=self.config.training.block_size,
            group=world.feed_group,
            pin_memory=world.device.type == "cuda",
        )
        try:
            self._store(feed, source, opened, teacher, rows)
        finally:
            feed.close()
            if self.writer is not None:
                self.writer.close()
        barrier(world)  # no feed of this group is left on any rank

    def _room(self) -> None:
        missing = self.wanted - self.header.samples
        require_room(self.folder.root, missing * self.header.form.sample_bytes)

    def _store(
        self,
        feed: StepFeed,
        source: SampleByPlace | None,
        opened: OpenedStream | None,
        teacher: Teacher,
        rows: range,
    ) -> None:
        parallel, header = self.parallel, self.header
        writer = self.writer = on_all(
            lambda: TargetsWriter(self.folder, header, owner=parallel.rank == 0), parallel
        )
        if source is not None and not self.folder.header.exists():
            writer.commit(header)
        group = as_tp_group(parallel.tp_group) if parallel.tp_size > 1 else TPGroup(0, 1)
        self.rest = header.mean_rest * header.samples * header.form.block_size
        done, committed, progress = header.samples, time.monotonic(), None
        with tqdm(total=self.wanted, initial=done, unit="samples", disable=parallel.rank != 0 or None) as bar:
            while done < self.wanted:
                batch = feed.next()
                count = min(len(batch.tokens), self.wanted - done)
                crcs = self._records(batch, writer, teacher, rows, group, (header.first_sample + done, count))
                if source is not None:
                    taken = [source.taken.popleft() for _ in range(count)]
                    places, progress = [place for place, _ in taken], taken[-1][1]
                    tokens = batch.tokens[:count].numpy()
                    writer.write_entries(header.first_sample + done, tokens, crcs, places)
                done += count
                bar.update(count)
                if opened is not None and progress is not None:
                    if done == self.wanted or time.monotonic() - committed > COMMIT_SECONDS:
                        self._commit(writer, opened, progress, done)
                        committed = time.monotonic()
        self.header = broadcast_object(self.header, parallel)

    def _records(
        self,
        batch: StepBatch,
        writer: TargetsWriter,
        teacher: Teacher,
        rows: range,
        group: TPGroup,
        numbers: tuple[int, int],
    ) -> list[int]:
        """Store the samples (first, count) of a batch, each on the replica that it belongs to; their CRCs."""
        parallel, training, (first, count) = self.parallel, self.config.training, numbers
        size = training.batch_size
        place: Mapping[str, Any] = {
            "batch_size": size,
            "dp_rank": parallel.dp_rank,
            "dp_size": parallel.dp_size,
            "device": parallel.device,
        }
        crcs: list[int] = []
        rest, block, problem = 0.0, training.block_size, None
        word = teacher.targets(batch, 0, place)
        try:
            found = targets_of(word, self.header.form.top_k, rows, group)
            for index in range(size if parallel.tp_rank == 0 else 0):
                mine = parallel.dp_rank * size + index
                if mine < count:
                    one = Targets(*(part[index * block : (index + 1) * block] for part in found))
                    crcs.append(writer.write_record(first + mine, one))
                    rest += float(np.exp(one.log_rest, dtype=np.float64).sum())
        except RunError as error:  # of one rank, perhaps: all are to end
            problem = error
        of_all = gather_objects((crcs, rest, problem), parallel)
        for *_, other in of_all:
            if other is not None:
                raise other
        self.rest += sum(rest for _, rest, _ in of_all)
        return [crc for crcs, *_ in of_all for crc in crcs]

    def _commit(self, writer: TargetsWriter, opened: OpenedStream, progress: DataProgress, done: int) -> None:
        place = {
            "data_position": opened.position_dict(progress),
            "data_state": opened.state_dict(progress),
        }
        tokens = done * self.header.form.block_size
        self.header = replace(self.header, samples=done, mean_rest=self.rest / tokens, place=place)
        writer.commit(self.header)

    def summary(self) -> str:
        """What there is now."""
        header, form = self.header, self.header.form
        size = header.samples * form.sample_bytes
        return (
            f"{header.samples:,} samples of {form.block_size:,} tokens in {self.folder.root}: {size:,} "
            f"bytes, {form.token_bytes} a token (top {form.top_k}, {form.dtype}); mean mass of the rest "
            f"{header.mean_rest:.4g} at temperature {form.temperature:g}"
        )


def make_targets(recipe: Recipe, asked: Asked, environment: Environment) -> str:
    """Join, make what is missing, leave; the summary. Collective.

    Raises RunError, once all have joined on rank 0 alone: other ranks end with its code and without a word.
    """
    world, _ = join(recipe, environment)
    with said_by_rank_0(world.rank):
        return _make(recipe, asked, environment, world)


def _make(recipe: Recipe, asked: Asked, environment: Environment, world: World) -> str:
    with tempfile.TemporaryDirectory(prefix="argonne-targets-") as folder:
        report = QuietReport(Path(folder), rank=world.rank)
        control = RunControl(
            Path(folder), rank=world.rank, world_size=world.world_size, launch=environment.launch,
            warn=report.warn,
        )  # fmt: skip
        start = choose_start(recipe.config, control, report, world)
        if world.rank == 0:
            print(f"{start.reason}: the samples begin there", file=sys.stderr)
        making = TargetMaking(recipe, asked, world, start, report)
        if making.header.samples < making.wanted:
            making.make()
    if world.rank == 0:
        for line in dict.fromkeys(report.said):
            print(f"note: {line}", file=sys.stderr)
    disconnect()
    return making.summary()
