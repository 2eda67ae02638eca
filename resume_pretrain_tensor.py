"""Pretrain an Argonne model with tensor parallelism, from scratch or from a checkpoint.

    torchrun --standalone --nproc_per_node=8 resume_pretrain_tensor.py --tokenizer-path TOKENIZER

Read `train` and what it calls from top to bottom: connect, choose a checkpoint, open the data, build, split
and load, loop, close. Flags are parsed before torch is imported, so that ``--help`` and a wrong flag answer
at once.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from argonne.config.command_line import flag_values, parse_command_line
from argonne.config.options import RunConfig, derive_accumulation
from argonne.errors import RunError

if TYPE_CHECKING:
    from argonne.ranks.launch import Environment
    from argonne.ranks.world import World
    from argonne.run.control import RunControl
    from argonne.run.report import RunReport
    from argonne.training.setup import Start
    from argonne.training.state import Run

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""Of each collective of the model."""


KEY_CLASSES = {
    "TensorParallelModel": "tp_shard",
    "shard_tensor_parallel": "tp_shard",
    "DataPosition": "data_stream",
}
"""Names that can be imported from here, and the door that each stands behind."""


def __getattr__(name: str) -> Any:
    """The key classes, imported when they are asked for: ``--help`` needs no torch."""
    if name in KEY_CLASSES:
        return getattr(importlib.import_module(KEY_CLASSES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run and end the process: 0 (done), 1 (failed), 2 (wrong flags) or 75 (stopped by a signal, saved)."""
    config = parse_command_line(argv)
    if config.planning.plan is not None:
        return show_plan(config)

    from argonne.ranks.faults import run_error_of
    from argonne.ranks.launch import Environment
    from argonne.ranks.world import disconnect
    from argonne.run.control import RunControl
    from argonne.run.report import RunReport
    from argonne.run.traces import enable_flight_recorder

    output_dir = Path(config.output.output_dir)
    try:
        environment = Environment.read(config.parallel.local_rank)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    enable_flight_recorder(output_dir, os.environ)
    report = RunReport(output_dir, rank=environment.rank, log_interval=config.output.log_interval)
    control = RunControl(
        output_dir,
        rank=environment.rank,
        world_size=environment.world_size,
        launch=environment.launch,
        max_run_time=config.control.max_run_time,
        stall_timeout=config.control.stall_timeout,
        warn=report.warn,
    )
    control.start()
    try:
        code = train(config, environment, control, report)
        disconnect()
        leave(code)
    except (RunError, RuntimeError) as error:
        problem = run_error_of(error, control.explain)
        if problem is None:
            raise
    if config.debug:
        traceback.print_exception(problem)
    code, line = control.fail(problem)
    report.close()
    leave(code, line)


def show_plan(config: RunConfig) -> int:
    """Print what the run would need, and end: --plan."""
    from argonne.training.plan_text import plan_text

    try:
        print(plan_text(config))
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def leave(code: int, line: str | None = None) -> NoReturn:
    """Say the last line and end the process without its threads.

    They may still sit in collectives or store calls that no peer will answer, and C++ aborts a process whose
    interpreter goes away under them.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream that was closed or broke
        if line is not None:
            print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(code)


def train(config: RunConfig, environment: Environment, control: RunControl, report: RunReport) -> int:
    """The recipe. Returns the exit code; raises RunError where the run cannot go on."""
    from argonne.training.setup import choose_start, claim_output

    world = connect_ranks(config, environment, control)
    ended = claim_output(control, world)
    if ended is not None:
        report.info(f"An earlier attempt of this launch {ended[0]} ({ended[1]}): there is nothing left to do")
        return control.finish(*ended)
    start = choose_start(config, control, report, world)
    run = build_run(config, start, control, report, world)
    stopped = loop(run)
    return close(run, stopped)


# ------------------------------------------------------------------ connect


def connect_ranks(config: RunConfig, environment: Environment, control: RunControl) -> World:
    """Join the other ranks, watch each other from then on, and check that all were started alike."""
    from argonne.ranks.agree import check_same
    from argonne.ranks.meeting import await_ranks, open_store, private_store
    from argonne.ranks.world import AGREEMENT_TIMEOUT, choose_device, connect
    from argonne.training.build import choose_tp_size
    from checkpointing import require_safe_torch

    require_safe_torch()
    device = choose_device(environment)
    stall_timeout = config.control.stall_timeout
    meeting_timeout = timedelta(seconds=stall_timeout) if stall_timeout > 0 else AGREEMENT_TIMEOUT
    store = open_store(environment, timeout=meeting_timeout)
    if store is not None:
        control.join(private_store(store))
        await_ranks(environment, store, timeout=meeting_timeout)
        control.all_joined()
    world = connect(environment, device, store, timeout=COLLECTIVE_TIMEOUT)
    check_same(flag_values(config), world)
    if config.model.settings is not None:  # a degree that cannot work is refused before anything is read
        choose_tp_size(config.model.settings, config.parallel.tensor_parallel_size, world)
    return world


# ------------------------------------------------------------------ build, split, load


def build_run(config: RunConfig, start: Start, control: RunControl, report: RunReport, world: World) -> Run:
    """The data at its place, the split model with its weights, and what else the loop works with."""
    from argonne.ranks.world import build_parallel
    from argonne.training.build import build_model, choose_tp_size, fill_weights
    from argonne.training.fit import require_memory
    from argonne.training.header import estimated_save, open_metrics, run_facts, warn_ahead
    from argonne.training.keeper import CheckpointKeeper
    from argonne.training.setup import check_room_on_rank_0, open_feed, verify_if_asked
    from argonne.training.state import Run
    from argonne.training.step import TrainingStep

    training, view = config.training, start.view
    tp_size = choose_tp_size(start.settings, config.parallel.tensor_parallel_size, world)
    parallel = build_parallel(world, tp_size)
    accumulation = derive_accumulation(training, parallel.dp_size)
    samples_per_step = training.batch_size * accumulation * parallel.dp_size
    require_memory(config, start.settings, parallel)
    opened, feed = open_feed(config, start, samples_per_step, report, world)

    trained = build_model(start.settings, config.parallel, training, parallel)
    first_step = view.step if view is not None else 0
    check_room_on_rank_0(config, trained, first_step, world)
    loaded = fill_weights(trained, view, training.seed)
    for warning in loaded.warnings if loaded is not None else ():
        report.warn(warning)

    control.progress.collectives = trained.tensor_parallel.group.counters
    open_metrics(report, config, trained, first_step)
    save = estimated_save(report, config, trained)
    warn_ahead(report, config, control.launch, save, first_step)
    report.header(
        run_facts(config, trained, opened, samples_per_step=samples_per_step, start=start.reason, save=save)
    )
    verify_if_asked(config, trained, control, report)
    run = Run(
        config=config,
        settings=start.settings,
        trained=trained,
        one_step=TrainingStep(trained, training, accumulation),
        feed=feed,
        opened=opened,
        tokenizer=start.tokenizer,
        keeper=CheckpointKeeper(trained, config.checkpoint, Path(config.output.output_dir), control, report),
        control=control,
        report=report,
        samples_per_step=samples_per_step,
    )
    run.restore(view)
    return run


# ------------------------------------------------------------------ loop


def loop(run: Run) -> bool:
    """Train until the last step or until a rank is asked to stop; True where it was stopped."""
    from argonne.training.state import stopwatch
    from argonne.training.step import Votes

    config, control, keeper = run.config, run.control, run.keeper
    if run.step >= config.training.total_steps:
        run.report.info(f"Nothing to train: step {run.step}, --total-steps {config.training.total_steps}")
    else:
        run.feed.wait()  # maybe hours for a token cache: until the loop begins, a signal ends the run at once
    control.begin(run.step)
    stop = False
    while run.step < config.training.total_steps and not stop:
        started = stopwatch()
        batch = run.feed.next()
        mine = Votes(stop=control.stop_flag, busy=keeper.busy, spoiled=keeper.spoiled())
        result = run.one_step.run(batch, run.step, votes=mine)
        run.complete(batch, result, stopwatch() - started)
        run.check_replicas_if_due()

        stop = result.votes.stop
        last = stop or run.step == config.training.total_steps
        if last or keeper.due(run.step, result.votes):
            run.save()
        if config.output.sample_interval and run.step % config.output.sample_interval == 0 and not stop:
            run.sample()
    return stop


# ------------------------------------------------------------------ close


def close(run: Run, stopped: bool) -> int:
    """Prove the last checkpoint, export a finished model where asked, end together; the exit code."""
    from argonne.ranks.agree import barrier
    from argonne.training.setup import export_if_asked

    control, report, world = run.control, run.report, run.trained.parallel
    run.feed.close()
    run.keeper.close(save_again=run.save)
    if not stopped:
        export_if_asked(run.config, run.keeper.newest, run.settings, world, control, report)
    barrier(world)
    state, reason = ("stopped", control.stop_reason()) if stopped else ("finished", None)
    report.info(f"{state.capitalize()} at step {run.step}" + (f" ({reason})" if reason else ""))
    report.finish(state, reason)
    report.close()
    return control.finish(state, reason)


if __name__ == "__main__":
    sys.exit(main())
