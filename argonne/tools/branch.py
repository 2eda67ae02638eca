"""A new run from a kept checkpoint of another: hard links, records up to its step, its own configuration."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from argonne.config.command_line import build_parser, parse_recipe
from argonne.config.flags import parse_given
from argonne.config.recipe import Recipe, recipe_values
from argonne.config.recipe_file import recipe_toml
from argonne.errors import CheckpointError, ConfigError, RunError
from argonne.files import OutputFolder, json_safe, synchronize, write_json, write_text
from argonne.tools.kept_run import KeptRun

ORIGIN = "branch.json"
"""In ``stats/`` of a branch: the run, step and checkpoint that it came from, and what was changed."""
_FIXED = {
    "output_dir": "the new folder is the second argument",
    "checkpoint_path": "a branch begins at --step",
    "force_from_scratch": "a branch begins at --step",
    "init_from": "a branch begins at --step",
    "plan": "give it to resume_pretrain_tensor.py",
    "rehearse": "give it to resume_pretrain_tensor.py",
}


def branch_recipe(run: KeptRun, new: Path, recipe_file: str | None, flags: Sequence[str]) -> Recipe:
    """The recipe of the branch: the run's, or ``recipe_file``'s, under ``flags``.

    Raises ConfigError for a flag that a branch cannot take, SystemExit for a wrong one.
    """
    given, _ = parse_given(build_parser(), list(flags))
    for name, reason in _FIXED.items():
        if name in given:
            raise ConfigError(f"--{name.replace('_', '-')} is not for a branch ({reason}): leave it out")
    own = ("--output-dir", str(new), *flags)
    recipe = run.recipe(own) if recipe_file is None else parse_recipe(["--config", recipe_file, *own])
    stages = []
    for stage in recipe.stages:
        config = stage.config
        # What the first start of the run began with would lead away from the branch's checkpoint.
        checkpoint = replace(
            config.checkpoint, checkpoint_path=None, force_from_scratch=False, init_from=None
        )
        output = config.output
        if "final_model_dir" not in given and recipe_file is None:
            output = replace(output, final_model_dir=None)  # the run's own export is not replaced
        data = config.data
        if not data.streaming and data.data_cache_dir is None and run.output.cache.is_dir():
            data = replace(data, data_cache_dir=str(run.output.cache))
        stages.append(replace(stage, config=replace(config, checkpoint=checkpoint, output=output, data=data)))
    return Recipe(stages=tuple(stages))


def changed_flags(before: Recipe, after: Recipe) -> dict[str, list[Any]]:
    """Flag -> [value in the run, value in the branch], of those that differ."""
    old, new = recipe_values(before), recipe_values(after)
    names = [name for name in {**old, **new} if name != "--output-dir"]
    # What the new folder implies is no change of the training.
    names = [name for name in names if not name.startswith("--output-dir of stage ")]
    return {
        name: [json_safe(old.get(name)), json_safe(new.get(name))]
        for name in names
        if old.get(name) != new.get(name)
    }


def require_new(new: Path) -> None:
    """ConfigError unless ``new`` is free: not there, or an empty folder."""
    if new.is_dir() and not any(new.iterdir()):
        return
    if new.exists() or new.is_symlink():
        what = "holds a run" if KeptRun(new).output.stats.is_dir() else "is not empty"
        raise ConfigError(f"{new} {what if new.is_dir() else 'is a file'}: give a new folder")


def make_branch(run: KeptRun, new: Path, step: int, recipe: Recipe) -> list[str]:
    """Fill ``new``; what is to be said of it, a line each.

    The folder gets its name when all is in it. Raises CheckpointError for a checkpoint that is not kept or
    spoiled, RunError where the folder cannot be written.
    """
    from checkpointing import verify_checkpoint

    require_new(new)
    checkpoint = run.checkpoint(step)
    verify_checkpoint(checkpoint)
    changes = changed_flags(run.recipe(), recipe)
    try:
        with _folder_beside(new) as folder:
            output = OutputFolder(folder)
            output.pretrained.mkdir()
            output.stats.mkdir()
            copied = [_link(part, output.pretrained / part.name) for part in _parts(checkpoint)]
            _copy_records(run.output, output, step)
            write_text(output.run_config, _configuration(run, step, recipe))
            origin = {"run": str(run.folder.resolve()), "step": step, "checkpoint": checkpoint.name}
            origin |= {"made": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "changed": changes}
            write_json(output.stats / ORIGIN, origin)
            synchronize(output.pretrained)
    except OSError as error:
        raise RunError(f"{new} cannot be written ({error.strerror}): name another folder") from error
    lines = [f"{new}: a branch of {run.folder} at step {step}"]
    lines += [line for line in copied if line]
    lines += [f"changed: {name}: {_shown(old)} -> {_shown(value)}" for name, (old, value) in changes.items()]
    training = recipe.config.training
    if len(recipe.stages) == 1 and training.total_tokens is None and training.total_steps <= step:
        lines.append(
            f"warning: --total-steps {training.total_steps} leaves nothing to train after step {step}: "
            "give a larger one"
        )
    return [*lines, "start it from the folder in which the run was started:", start_command(run, new)]


def start_command(run: KeptRun, new: Path) -> str:
    """The command line that starts the branch on as many processes as the run had last."""
    config = shlex.quote(str(OutputFolder(new).run_config))
    return (
        f"torchrun --standalone --nproc_per_node={run.processes} resume_pretrain_tensor.py --config {config}"
    )


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value)


def _parts(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint."""
    from argonne.checkpoint.part_names import part_name, siblings

    named = part_name(checkpoint.name)
    return [checkpoint] if named is None else siblings(checkpoint, named)


@contextmanager
def _folder_beside(new: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``new`` at the end; a failure leaves nothing of it."""
    real = new.resolve()
    real.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{real.name}.partial-", dir=real.parent))
    try:
        umask = os.umask(0o077)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)
        yield folder
        os.rename(folder, real)  # onto an empty folder too, and onto nothing else
        synchronize(real.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _link(source: Path, target: Path) -> str | None:
    """A second name of the file; where the filesystem refuses, a copy and a line that says so.

    Checkpoints are replaced whole and never written into, so that the two runs do not touch each other.
    """
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError as error:
        shutil.copyfile(real, target)
        synchronize(target)
        if target.stat().st_size != real.stat().st_size:
            raise CheckpointError(f"{source} changed while it was copied: try again") from error
        return f"{source.name} was copied: the filesystem makes no hard link ({error.strerror})"
    return None


def _copy_records(old: OutputFolder, new: OutputFolder, step: int) -> None:
    """Metrics, validations, samples and spikes up to ``step``, and the statistics of its checkpoint.

    And the lists of excluded documents, which the metrics name.
    """
    pairs = [(getattr(old, name), getattr(new, name)) for name in _RECORDS]
    for source, target in pairs:
        if not source.is_file():
            continue
        with source.open("rb") as lines, target.open("wb") as kept:
            kept.writelines(line for line in lines if _is_up_to(line, step))
    for kept in old.excluded("*").parent.glob("*.jsonl"):
        target = new.excluded(kept.stem)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(kept, target)
    statistics = old.current_stats(step)
    if statistics.is_file():
        shutil.copyfile(statistics, new.current_stats(step))


_RECORDS = ("metrics", "eval_metrics", "samples", "spikes")


def _is_up_to(line: bytes, step: int) -> bool:
    """Whether a line is whole and of a step that the branch shares."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    found = record.get("step") if isinstance(record, dict) else None
    return line.endswith(b"\n") and isinstance(found, int) and found <= step


def _configuration(run: KeptRun, step: int, recipe: Recipe) -> str:
    return f"# A branch of {str(run.folder.resolve())!r} at step {step}; see {ORIGIN}.\n{recipe_toml(recipe)}"
