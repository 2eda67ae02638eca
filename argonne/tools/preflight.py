"""The checks before a long run: each on all ranks, one table, nothing written to the output folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from argonne.config.options import RunConfig
from argonne.config.recipe import Recipe, recipe_values
from argonne.errors import EXIT_FAILURE, DeviceError, RunError, first_line, one_line
from argonne.ranks.agree import barrier, check_same, gather_objects
from argonne.ranks.faults import run_error_of
from argonne.ranks.launch import Environment
from argonne.ranks.meeting import await_ranks, open_store
from argonne.ranks.world import Parallel, World, choose_device, connect, disconnect
from argonne.run.control import RunControl
from argonne.run.report import RunReport
from argonne.tools import preflight_inputs, preflight_machine, preflight_steps
from argonne.training.auto_layout import resolve_layout
from argonne.training.build import make_parallel
from argonne.training.setup import Start
from argonne.training.stages import Stages
from checkpointing import require_safe_torch

LONGEST_WAIT = 300.0
"""Seconds that ranks wait for each other, unless --stall-timeout is shorter."""
COLLECTIVE_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    check: str
    found: str
    """Where it is not ok: what is wrong, and the remedy."""
    ok: bool


class QuietReport(RunReport):
    """Keeps the warnings and remarks of a run's own set-up for the end of the table."""

    def __init__(self, folder: Path, *, rank: int) -> None:
        super().__init__(folder, rank=rank, log_interval=1)
        self.said: list[str] = []

    def info(self, text: str) -> None:
        """Keep a remark."""
        self.said.append(text)

    def warn(self, message: str, detail: str = "") -> None:
        """Keep a warning."""
        self.said.append(f"{message} {detail}".rstrip())


@dataclass(kw_only=True)
class Preflight:
    """What the checks know of each other; the same on all ranks but for rank 0's tokenizer."""

    recipe: Recipe
    """Its caches lie in a temporary folder."""
    output_dir: Path
    environment: Environment
    control: RunControl
    report: QuietReport
    world: World
    rows: list[Row] = field(default_factory=list)
    start: Start | None = None
    parallel: Parallel | None = None
    stages: Stages | None = None

    @property
    def config(self) -> RunConfig:
        """Of the stage in which the run begins; of the first one until that is known."""
        return self.recipe.config if self.stages is None else self.stages.current.config

    @property
    def ok(self) -> bool:
        """Whether every check so far held."""
        return all(row.ok for row in self.rows)

    def check(self, name: str, work: Callable[[], str]) -> bool:
        """Do one check on all ranks and add its row: rank 0's finding, or the first rank's trouble."""
        found, trouble = "", ""
        try:
            found = work()
        except (RunError, RuntimeError, OSError, ValueError) as error:
            trouble = _words(error)
        troubles = gather_objects(trouble, self.world)
        said = next((text for text in troubles if text), "")
        self.rows.append(Row(check=name, found=said or found, ok=not said))
        return not said


def _words(error: Exception) -> str:
    if isinstance(error, RunError | RuntimeError):
        known = run_error_of(error, lambda cause: DeviceError(f"a collective failed: {first_line(cause)}"))
        return one_line(known or error)
    return f"{type(error).__name__}: {one_line(error)}"


def table(rows: list[Row]) -> str:
    """A line a check: its name, ok or FAIL, what was found or the remedy."""
    width = max(len(row.check) for row in rows)
    return "\n".join(f"{row.check:<{width}}  {'ok  ' if row.ok else 'FAIL'}  {row.found}" for row in rows)


# ------------------------------------------------------------------ join


def join(recipe: Recipe, environment: Environment) -> tuple[World, str]:
    """All ranks on their devices, and a line about the endpoint. Raises RunError where they cannot join."""
    require_safe_torch()
    stall = recipe.config.control.stall_timeout
    timeout = timedelta(seconds=min(stall or LONGEST_WAIT, LONGEST_WAIT))
    store = open_store(environment, timeout=timeout)
    if store is None:
        return connect(
            environment, choose_device(environment), None, timeout=COLLECTIVE_TIMEOUT
        ), "one process"
    await_ranks(environment, store, timeout=timeout)
    trouble = ""
    try:
        device: Any = choose_device(environment)
    except DeviceError as error:
        trouble = str(error)
    # Every rank has to learn of it before the process group, which would wait for the one that is missing.
    keys = [f"device/{rank}" for rank in range(environment.world_size)]
    store.set(keys[environment.rank], trouble)
    if troubles := [text.decode() for key in keys if (text := store.get(key))]:
        raise DeviceError(troubles[0])
    seconds = preflight_machine.store_seconds(store)
    world = connect(environment, device, store, timeout=COLLECTIVE_TIMEOUT)
    slowest = max(gather_objects(seconds, world))
    return (
        world,
        f"{environment.master}: {world.world_size} ranks joined, {1e3 * slowest:.1f} ms a round trip",
    )


# ------------------------------------------------------------------ all checks


def run_checks(flight: Preflight) -> None:
    """Every check in order, on all ranks. What needs a check that did not hold is not made."""
    world = flight.world
    checks: tuple[tuple[str, Callable[[], str], tuple[str, ...]], ...] = (
        ("flags", lambda: _same_flags(flight), ()),
        ("devices", lambda: preflight_machine.devices(world), ()),
        ("clocks", lambda: preflight_machine.clocks(world), ()),
        ("tokenizer", lambda: preflight_inputs.tokenizer(flight.config, world), ()),
        ("shards", lambda: preflight_inputs.shards(flight.recipe, world), ()),
        ("model", lambda: _model(flight), ("flags", "tokenizer")),
        ("layout", lambda: _layout(flight), ("model", "shards")),
        ("validation", lambda: preflight_inputs.validation(flight), ("layout",)),
        ("memory", lambda: preflight_inputs.memory(flight), ("layout",)),
        ("disk", lambda: preflight_inputs.disk(flight), ("layout",)),
        ("collectives", lambda: preflight_machine.collectives(flight), ("layout",)),
        ("two steps", lambda: preflight_steps.two_steps(flight), ("memory", "collectives")),
    )
    for name, work, needed in checks:
        missing = [row.check for row in flight.rows if row.check in needed and not row.ok]
        if missing:
            row = Row(check=name, found=f"not checked: mend {', '.join(missing)} first", ok=False)
            flight.rows.append(row)
        else:
            flight.check(name, work)


def _same_flags(flight: Preflight) -> str:
    # What every rank has for itself is taken out: its temporary folder.
    values = {
        name: value for name, value in recipe_values(flight.recipe).items() if "data-cache-dir" not in name
    }
    check_same(values, flight.world)
    stages = len(flight.recipe.stages)
    return f"the same on all ranks{f', {stages} stages' if stages > 1 else ''}"


def _model(flight: Preflight) -> str:
    flight.start, said = preflight_inputs.start(flight)
    return said


def _layout(flight: Preflight) -> str:
    assert flight.start is not None
    choice = resolve_layout(flight.recipe, flight.start.settings, flight.world)
    flight.recipe = choice.recipe
    flight.parallel = make_parallel(flight.start.settings, flight.config.parallel, flight.world)
    flight.stages, said = preflight_inputs.layout(flight)
    return said


def preflight(recipe: Recipe, environment: Environment) -> int:
    """Join, check, print the table on rank 0; 0 where all is ok, else 1. Leaves the process group."""
    with tempfile.TemporaryDirectory(prefix="argonne-preflight-") as folder:
        own = replace(recipe, stages=tuple(_elsewhere(stage, Path(folder)) for stage in recipe.stages))
        try:
            world, endpoint = join(recipe, environment)
        except (RunError, RuntimeError, OSError) as error:
            row = Row(check="endpoint", found=_words(error), ok=False)
            print(table([row]) if environment.rank == 0 else f"error: {row.found}", flush=True)
            return EXIT_FAILURE
        report = QuietReport(Path(folder), rank=environment.rank)
        flight = Preflight(
            recipe=own,
            output_dir=Path(recipe.config.output.output_dir),
            environment=environment,
            control=RunControl(
                Path(folder), rank=world.rank, world_size=world.world_size, launch=environment.launch,
                warn=report.warn,
            ),
            report=report,
            world=world,
        )  # fmt: skip
        flight.rows.append(Row(check="endpoint", found=endpoint, ok=True))
        run_checks(flight)
        if world.rank == 0:
            notes = [f"note: {text}" for text in dict.fromkeys(report.said)]
            print("\n".join([table(flight.rows), *notes, _verdict(flight)]), flush=True)
        barrier(world)  # the table is out before torchrun sees a rank end with 1
        disconnect()
    return 0 if flight.ok else EXIT_FAILURE


def _elsewhere(stage: Any, folder: Path) -> Any:
    """A stage whose caches lie in ``folder``."""
    data = replace(stage.config.data, data_cache_dir=str(folder))
    return replace(stage, config=replace(stage.config, data=data))


def _verdict(flight: Preflight) -> str:
    failed = [row.check for row in flight.rows if not row.ok]
    return f"Not ready: {', '.join(failed)}" if failed else "Ready: every check held"
