"""A teacher that is not run: its stored targets are read, sample by sample.

Every rank reads the rows of its own micro-batches from the folder, as it would a teacher's weights: broadcast
from rank 0 with the tokens, they would be some hundred times as many bytes. That a step's
samples are the stored ones is checked on all ranks alike, so that all end with the same line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from argonne.config.derived import derive_accumulation
from argonne.config.distillation import TARGETS_FLAG, DistillationOptions
from argonne.config.options import RunConfig
from argonne.errors import ConfigError, DataError
from argonne.ranks.agree import broadcast_object, gather_objects, on_all
from argonne.ranks.world import Parallel
from argonne.training.teacher import distillation_rule, weighing
from data_stream import (
    StepBatch,
    TargetsFolder,
    TargetsForm,
    TargetsHeader,
    TargetsReader,
    tokenizer_fingerprint,
)
from tp_shard import DistillationRule, StoredTargets


class StoredTeacher:
    """The stored targets as one rank reads them; stands where a `Teacher` would."""

    def __init__(self, reader: TargetsReader, rule: DistillationRule, text: str) -> None:
        self._reader, self._rule = reader, rule
        self.text = text
        """One line for the header."""
        self.stored = f"{reader.folder.root} ({reader.header.identity})"
        """Where, and what: other targets in the same folder have another name."""

    def targets(self, batch: StepBatch, micro_step: int, place: Mapping[str, Any]) -> StoredTargets:
        """The word on this replica's micro-batch; DataError on all ranks where the step is another one."""
        if micro_step == 0:
            self._reader.check(batch.first_sample, batch.tokens.numpy())
        size, device = place["batch_size"], place["device"]
        first = batch.first_sample + (micro_step * place["dp_size"] + place["dp_rank"]) * size
        found = self._reader.read(first, size)
        self._reader.expect(first + len(batch.tokens), size)  # the same micro-batch of the next step
        ids, log_probs, log_rest = (_on_device(part, device) for part in found)
        return StoredTargets(rule=self._rule, ids=ids, log_probs=log_probs, log_rest=log_rest)


def _on_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(values.copy() if not values.flags.writeable else values)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def open_stored(
    config: RunConfig,
    vocab_size: int,
    parallel: Parallel,
    tokenizer: Any,
    metadata: Mapping[str, Any],
    step: int,
) -> StoredTeacher:
    """The stored targets that the flags name, checked as far as they can be before a step; collective.

    ``tokenizer`` is rank 0's, ``metadata`` that of a checkpoint after ``step`` steps. Raises the same
    RunError on all ranks: DataError where the folder is missing, damaged or too short, ConfigError where it
    was made for another model, tokenizer or loss.
    """
    options = config.distillation
    assert options.teacher_targets is not None
    folder = TargetsFolder(Path(options.teacher_targets).expanduser())
    reader = on_all(lambda: TargetsReader(folder), parallel)
    header = reader.header
    _check_same_everywhere(folder, header, parallel)
    fingerprint = tokenizer_fingerprint(tokenizer) if parallel.rank == 0 else None
    _check_form(config, vocab_size, folder, header.form, broadcast_object(fingerprint, parallel))
    training = config.training
    samples = training.batch_size * derive_accumulation(training, parallel.dp_size) * parallel.dp_size
    done = int((metadata.get("data_state") or {}).get("samples") or 0)
    _check_length(folder, header, done, training.total_steps - step, samples)
    if step < training.total_steps:
        on_all(lambda: _try(reader, done), parallel)
    return StoredTeacher(reader, distillation_rule(options), _text(options, folder, header))


def _check_same_everywhere(folder: TargetsFolder, header: TargetsHeader, parallel: Parallel) -> None:
    """DataError on all ranks where two nodes have different folders under the name."""
    found = gather_objects((header.identity, header.samples), parallel)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise DataError(
                f"{TARGETS_FLAG} {folder.root} is not the same on all nodes: rank 0 has {found[0][1]} "
                f"samples of targets {found[0][0]}, rank {rank} {other[1]} of {other[0]}: copy one folder to "
                "all"
            )


def _check_form(
    config: RunConfig, vocab_size: int, folder: TargetsFolder, form: TargetsForm, tokenizer: str
) -> None:
    """ConfigError at the first thing that the targets were made for and the run has otherwise."""
    where, remedy = f"{TARGETS_FLAG} {folder.root}", "or make others (scripts/teacher_targets.py)"
    if form.tokenizer != tokenizer:
        raise ConfigError(
            f"{where} was made with another tokenizer than --tokenizer-path {config.data.tokenizer_path}: "
            f"give that one, {remedy}"
        )
    asked = {
        "vocab_size": ("a vocabulary of", vocab_size),
        "block_size": ("--block-size", config.training.block_size),
        "temperature": ("--distill-temperature", config.distillation.distill_temperature),
        "document_attention": ("--document-attention", config.data.document_attention),
    }
    for name, (what, value) in asked.items():
        made = getattr(form, name)
        if made != value:
            raise ConfigError(
                f"{where} was made for {what} {made}, and the run has {value}: change it, {remedy}"
            )


def _check_length(
    folder: TargetsFolder, header: TargetsHeader, done: int, steps: int, samples_per_step: int
) -> None:
    """DataError where the stored samples end before the run's last step."""
    if steps <= 0:
        return
    last, there = done + steps * samples_per_step, (header.end - done) // samples_per_step
    if done >= header.first_sample and last <= header.end:
        return
    enough = "none" if done < header.first_sample else f"{max(0, there):,}"
    raise DataError(
        f"{TARGETS_FLAG} {folder.root} has the samples {header.first_sample} to {header.end - 1}, enough for "
        f"{enough} of the {steps:,} steps to go, which take the samples {done} to {last - 1}: make more "
        f"(scripts/teacher_targets.py goes on where it stopped), or lower --total-steps"
    )


def _try(reader: TargetsReader, first: int) -> None:
    """Read the targets of the next sample and the last ones: damage shows before the first step."""
    for number in {first, reader.header.end - 1}:
        reader.read(number, 1)


def _text(options: DistillationOptions, folder: TargetsFolder, header: TargetsHeader) -> str:
    """What the run's header says."""
    form = header.form
    return (
        f"targets in {folder.root} (of {header.teacher_path}: top {form.top_k} and the rest, mean mass "
        f"{header.mean_rest:.2g}; samples {header.first_sample:,} to {header.end - 1:,}), "
        f"{weighing(options)}"
    )
