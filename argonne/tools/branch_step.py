"""The checkpoint at which a branch that leaves documents out begins: from before it had seen any of them."""

from __future__ import annotations

from dataclasses import replace

from argonne.config.options import RunConfig
from argonne.config.recipe import Recipe
from argonne.data.source import SourceOptions
from argonne.errors import CheckpointError, ConfigError, DataError
from argonne.tools.kept_run import KeptRun


def choose_step(run: KeptRun, recipe: Recipe, asked: int | None) -> int:
    """The step of the kept checkpoint: the one ``asked`` for, or the last from before the listed documents.

    Raises ConfigError where there is neither, CheckpointError where no checkpoint fits, DataError for a list
    that cannot be used.
    """
    lists = {stage.config.data.exclude_documents for stage in recipe.stages} - {None}
    if asked is not None and asked not in run.checkpoints:
        run.checkpoint(asked)  # says which are kept
    if not lists:
        if asked is None:
            raise ConfigError("--step is missing: give the step of a kept checkpoint, or --exclude-documents")
        return asked
    if asked is not None and any(stage.config.data.allow_data_change for stage in recipe.stages):
        return asked
    return _without(run, recipe, asked, ", ".join(sorted(map(str, lists))))


def _without(run: KeptRun, recipe: Recipe, asked: int | None, named: str) -> int:
    from argonne.training.exclusion import first_read, last_before
    from data_stream import load_tokenizer, open_sources

    data = recipe.config.data
    tokenizer = load_tokenizer(data.tokenizer_path, data.trust_remote_code)
    stages = [(stage.config, _options(stage.config, len(recipe.stages))) for stage in recipe.stages]
    for _, options in stages:
        open_sources(options)  # what is wrong with the list is said of the list
    if asked is not None:
        read = first_read(run.checkpoints[asked], asked, stages, tokenizer)
        if read is None:
            return asked
    found = last_before(run.output, stages, tokenizer)
    if asked is not None:
        remedy = f"give --step {found[0]}" if found else "start anew"
        raise DataError(
            f"--step {asked}: its checkpoint had seen {read} (--exclude-documents {named}): {remedy}"
        )
    if found is None:
        raise CheckpointError(
            f"every checkpoint that {run.output.pretrained} keeps had seen a document of --exclude-documents "
            f"{named} (kept are {run.kept()}): start anew with the list"
        )
    return found[0]


def _options(config: RunConfig, stages: int) -> SourceOptions:
    from argonne.training.setup import source_options

    options = source_options(config, samples_per_step=1)
    return replace(options, keeps_index=False, exclude_elsewhere=stages > 1)
