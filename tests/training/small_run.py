"""A small model on one process with what the training room needs around it."""

from pathlib import Path
from typing import Any

import torch

from argonne.config.options import DataOptions, ParallelOptions, RunConfig, TrainingOptions
from argonne.config.run_options import CheckpointOptions, OutputOptions
from argonne.ranks.launch import Environment
from argonne.run.control import RunControl
from argonne.run.lock import prepare_output_dir
from argonne.run.report import RunReport
from argonne.testing.distributed import make_parallel
from argonne.testing.models import SMALL, random_tokens
from argonne.training.build import TrainedModel, build_model, fill_weights
from argonne.training.stages import PlannedStage, Stages
from data_stream import StepBatch

BLOCK = 16
SETTINGS: dict[str, Any] = {**SMALL, "tie_word_embeddings": True}
SEED = 5


def training_options(**changes: Any) -> TrainingOptions:
    """Ten steps of two sequences of 16 tokens."""
    common: dict[str, Any] = {"batch_size": 2, "block_size": BLOCK, "learning_rate": 1e-2, "seed": SEED}
    common |= {"min_learning_rate": 1e-3, "warmup_steps": 2, "total_steps": 10, "dtype": "fp32"}
    return TrainingOptions(**{**common, **changes})


def trained_model(rank: int = 0, world_size: int = 1, **changes: Any) -> TrainedModel:
    """Split over all ranks, with drawn weights; collective."""
    parallel = make_parallel(rank, world_size, world_size)
    trained = build_model(SETTINGS, ParallelOptions(), training_options(**changes), parallel)
    fill_weights(trained, None, SEED)
    return trained


def batch_of(samples: int, seed: int = 0) -> StepBatch:
    """The batch of one step, without a place in any data."""
    tokens = random_tokens(batch=samples, length=BLOCK + 1, seed=seed).to(torch.int32)
    return StepBatch(tokens=tokens, stream_hash="", progress=None, wait_seconds=0.25)


def run_config(output_dir: Path, **groups: Any) -> RunConfig:
    """``groups``: options in place of the small run's."""
    common: dict[str, Any] = {
        "training": training_options(),
        "data": DataOptions(tokenizer_path="tok"),
        "output": OutputOptions(output_dir=str(output_dir), log_interval=1),
        "checkpoint": CheckpointOptions(checkpoint_interval=4, keep_checkpoints=2),
    }
    return RunConfig(**{**common, **groups})


def single_stage(config: RunConfig, samples_per_step: int = 2) -> Stages:
    """The stages of a run that has none."""
    stage = PlannedStage(name="", config=config, samples_per_step=samples_per_step, accumulation=1)
    return Stages(planned=(stage,))


def control_and_report(output_dir: Path) -> tuple[RunControl, RunReport]:
    """Of a run that has its folder and takes no signals."""
    prepare_output_dir(output_dir)
    report = RunReport(output_dir, rank=0, log_interval=1)
    launch = Environment.read(environ={}).launch
    control = RunControl(output_dir, rank=0, world_size=1, launch=launch, warn=report.warn)
    return control, report
