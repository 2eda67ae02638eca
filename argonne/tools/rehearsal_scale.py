"""A recipe made small: the same switches, stages, data and layout; little width, short blocks, few steps."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from argonne.config.mixture import MixedSource
from argonne.config.options import AUTO, ParallelOptions, RunConfig, TrainingOptions
from argonne.config.presets import PRESETS, REFERENCE
from argonne.config.recipe import Recipe, Stage
from argonne.tools.library_corpus import build
from argonne.tools.rehearsal_targets import scaled_distillation

SMALLEST_BLOCK = 64
STEPS = 24
"""Optimizer steps of each stage."""
INTERVAL = 8
"""Steps between checkpoints, validations and samples."""
EVAL_SAMPLES = 4
HELD_OUT = "rehearsal"
"""Name of the validation set of a recipe that has none."""


@dataclass(kw_only=True)
class Scaled:
    """A recipe for this machine."""

    recipe: Recipe
    notes: list[str] = field(default_factory=list)
    """What differs from the real one beside its size."""


def scaled_model(settings: Mapping[str, Any] | None, block_sizes: Mapping[int, int]) -> dict[str, Any]:
    """The model's own switches and ratio of heads, at a small width; ``block_sizes``: real -> scaled."""
    given = dict(settings or PRESETS[REFERENCE])
    ratio = given["num_attention_heads"] // given["num_key_value_heads"]
    context = given["max_position_embeddings"]
    fitting = [small for real, small in block_sizes.items() if real <= context]
    small = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "num_attention_heads": 2 * ratio,
        "head_dim": 16,
        "intermediate_size": 160,
        "max_position_embeddings": max(fitting, default=SMALLEST_BLOCK),
    }
    if given.get("local_attention_window") is not None:
        small["local_attention_window"] = SMALLEST_BLOCK // 4
    kept = {key: value for key, value in given.items() if value is not None and key != "vocab_size"}
    return {**kept, **small}


def scaled_blocks(recipe: Recipe) -> dict[int, int]:
    """Real -> scaled block size: each next longer one is twice as long."""
    sizes = sorted({stage.config.training.block_size for stage in recipe.stages})
    return {size: SMALLEST_BLOCK * 2**index for index, size in enumerate(sizes)}


def scaled_training(training: TrainingOptions, blocks: Mapping[int, int], replicas: int) -> TrainingOptions:
    """The schedule's kind and rates over few steps; gradients are accumulated where the recipe does."""
    real = training.gradient_accumulation_steps or (
        (training.global_batch_size or 1) // (training.batch_size * replicas)
    )
    cooldown = training.cooldown_steps
    return dataclasses.replace(
        training,
        block_size=blocks[training.block_size],
        batch_size=2,
        global_batch_size=None,
        gradient_accumulation_steps=2 if real > 1 else 1,
        total_steps=STEPS,
        total_tokens=None,
        warmup_steps=min(training.warmup_steps, 3),
        cooldown_steps=None if cooldown is None else min(cooldown, STEPS // 2),
    )


class LibraryData:
    """Shards of Python's own library, a part for each source that this machine lacks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: list[Path] = []
        self._sources: dict[str, Path] = {}
        self.used: list[str] = []
        """The names that it stands in for."""

    @property
    def tokenizer(self) -> Path:
        self._build()
        return self._folder / "library" / "tokenizer"

    def _build(self) -> None:
        if not self._shards:
            build(self._folder / "library", vocab_size=2048, shard_mib=0.5)
            self._shards = sorted((self._folder / "library" / "data").glob("*.parquet"))

    def shards_for(self, name: str) -> str:
        """A glob of two shards that no other name has, as far as there are so many."""
        self._build()
        if name not in self._sources:
            place = self._folder / "sources" / f"{len(self._sources)}"
            place.mkdir(parents=True)
            first = 2 * len(self._sources)
            for number in (first, first + 1):
                shard = self._shards[number % len(self._shards)]
                os.link(shard, place / shard.name)
            self._sources[name] = place
            self.used.append(name)
        return f"{self._sources[name]}/*.parquet"


def _is_here(pattern: str) -> bool:
    path = os.path.expanduser(pattern)
    return os.path.exists(path) or bool(glob.glob(path, recursive=True))


def _scaled_stage(stage: Stage, config: RunConfig, data: LibraryData) -> Stage:
    """The stage's configuration with data that is here."""
    old = config.data
    mix = tuple(
        MixedSource(name, weight, pattern if _is_here(pattern) else data.shards_for(name))
        for name, weight, pattern in old.data_mix
    )
    globs = old.data_glob
    if not mix:
        wanted = (pattern if _is_here(pattern) else data.shards_for("data-glob") for pattern in globs)
        globs = tuple(dict.fromkeys(wanted))
    sets = tuple(
        (name, pattern if _is_here(pattern) else data.shards_for(f"{name} (validation)"))
        for name, pattern in config.evaluation.eval_data
    ) or ((HELD_OUT, data.shards_for("the validation set")),)
    return dataclasses.replace(
        stage,
        config=dataclasses.replace(
            config,
            data=dataclasses.replace(old, data_mix=mix, data_glob=globs, num_proc=1, data_cache_dir=None),
            evaluation=dataclasses.replace(
                config.evaluation, eval_data=sets, eval_interval=INTERVAL, eval_samples=EVAL_SAMPLES
            ),
        ),
    )


def _scaled_parallel(options: ParallelOptions, degree: int | str, on_gpus: bool) -> ParallelOptions:
    return dataclasses.replace(
        options,
        tensor_parallel_size=degree,
        compile=options.compile and on_gpus,
        async_tp=options.async_tp and on_gpus,
        local_rank=None,
    )


def scale(recipe: Recipe, folder: Path, *, processes: int, on_gpus: bool) -> Scaled:
    """The recipe for ``processes`` on this machine, with all its files under ``folder``."""
    config, blocks, data = recipe.config, scaled_blocks(recipe), LibraryData(folder)
    scaled = Scaled(recipe=recipe)
    settings = scaled_model(config.model.settings, blocks)
    shape = folder / "config.json"
    shape.write_text(json.dumps({"model_type": "argonne2", **settings}, indent=2))
    asked = config.parallel.tensor_parallel_size
    wanted = asked if isinstance(asked, int) else processes
    degree = max(d for d in (1, 2) if processes % d == 0 and d <= wanted)
    replicas = max(1, 8 // wanted)
    tokenizer = config.data.tokenizer_path
    if not _is_here(tokenizer):
        scaled.notes.append(f"tokenizer {tokenizer} is not here: one trained on Python's library instead")
        tokenizer = str(data.tokenizer)
    if config.parallel.compile and not on_gpus:
        scaled.notes.append("compile is left out on the CPU")
    stages = []
    for stage in recipe.stages:
        old = stage.config
        new = dataclasses.replace(
            old,
            model=dataclasses.replace(old.model, model_config=str(shape), settings=settings),
            training=scaled_training(old.training, blocks, replicas),
            parallel=_scaled_parallel(old.parallel, degree if asked != AUTO else AUTO, on_gpus),
            checkpoint=dataclasses.replace(
                old.checkpoint, checkpoint_path=None, force_from_scratch=False,
                checkpoint_interval=INTERVAL, keep_every=0,
            ),
            output=dataclasses.replace(
                old.output, output_dir=str(folder / "run"), final_model_dir=str(folder / "model"),
                log_interval=INTERVAL, sample_interval=INTERVAL if old.output.sample_interval else 0,
            ),
            control=dataclasses.replace(old.control, max_run_time=None),
            distillation=scaled_distillation(old.distillation, folder, scaled.notes),
            data=dataclasses.replace(old.data, tokenizer_path=tokenizer),
        )  # fmt: skip
        stages.append(_scaled_stage(stage, new, data))
    if data.used:
        scaled.notes.append(
            f"Python's library stands in for {', '.join(data.used)}, which this machine lacks"
        )
    if degree != wanted and asked != AUTO:
        scaled.notes.append(f"tensor parallel {degree} in place of {wanted}")
    scaled.recipe = Recipe(stages=tuple(stages))
    return scaled


def total_steps(recipe: Recipe) -> int:
    """Optimizer steps of all stages."""
    return sum(stage.config.training.total_steps for stage in recipe.stages)


def stop_after(recipe: Recipe) -> int:
    """The step after which the rehearsal is stopped: in the second stage where there is one."""
    first = recipe.stages[0].config.training.total_steps
    return first + 2 if len(recipe.stages) > 1 else first // 4


def names(stages: Sequence[Stage]) -> str:
    """The stages as the table shows them."""
    return ", ".join(stage.name for stage in stages if stage.name) or "one"
