"""Pretrain an Argonne model with tensor parallelism, from scratch or from a checkpoint.

    torchrun --standalone --nproc_per_node=8 resume_pretrain_tensor.py --tokenizer-path TOKENIZER

Read `train` and what it calls from top to bottom: connect, choose a checkpoint, open the data, build, split
and load, loop, close. Flags are parsed before torch is imported, so that ``--help`` and a wrong flag answer
at once.
"""

from __future__ import annotations

if __name__ == "__main__":  # first of all: Ctrl-C during any import below ends in one line
    from argonne.run.signals import leave_on_signals

    leave_on_signals()

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from argonne.config.command_line import parse_recipe
from argonne.config.recipe import Recipe, recipe_values
from argonne.errors import RunError

if TYPE_CHECKING:
    from argonne.config.options import RunConfig
    from argonne.ranks.launch import Environment
    from argonne.ranks.world import World
    from argonne.run.control import RunControl
    from argonne.run.report import RunReport
    from argonne.training.setup import Start
    from argonne.training.state import Run

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
    recipe = parse_recipe(argv)
    config = recipe.config
    if config.recipe.rehearse:
        rehearse(sys.argv[1:] if argv is None else argv)
    if config.planning.plan is not None:
        return show_plan(recipe)

    from argonne.ranks.launch import Environment

    try:
        environment = Environment.read(config.parallel.local_rank)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code

    prepare_gpus(config, environment)
    from argonne.ranks.world import disconnect
    from argonne.run.control import RunControl
    from argonne.run.processes import leave
    from argonne.run.report import RunReport
    from argonne.run.traces import enable_flight_recorder

    enable_flight_recorder(output_dir := Path(config.output.output_dir), os.environ)
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
    warn_of_libraries(report)
    try:
        code = train(recipe, environment, control, report)
        disconnect()
        leave(code)
    except Exception as error:  # noqa: BLE001 - the process ends here, as one that gloo's threads cannot abort
        code, line = end_with_error(error, environment, control, debug=config.debug)
    report.close()
    leave(code, line)


def end_with_error(
    error: Exception, environment: Environment, control: RunControl, *, debug: bool
) -> tuple[int, str | None]:
    """Tell the other ranks and the status: the exit code, and the line to print. A fault of this program
    shows its traceback.
    """
    from argonne.ranks.faults import run_error_of

    problem = None
    if isinstance(error, RunError | RuntimeError):
        problem = run_error_of(error, control.explain, environment)
    if debug or problem is None:
        traceback.print_exception(problem or error)
    return control.fail(problem)


def warn_of_libraries(report: RunReport) -> None:
    """Say on rank 0 which library is not of a version that the suite is tested with."""
    from argonne.ranks.libraries import outside_range

    if report.active and (outside := outside_range()) is not None:
        report.warn(outside)


def rehearse(argv: Sequence[str]) -> NoReturn:
    """Become the program that rehearses the recipe, which starts this script on a small copy of it."""
    root = str(Path(__file__).resolve().parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-m", "argonne.tools.rehearsal", *argv]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})


def show_plan(recipe: Recipe) -> int:
    """Print what the run would need, and end: --plan."""
    from argonne.training.plan_text import plan_text

    try:
        print(plan_text(recipe))
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def train(recipe: Recipe, environment: Environment, control: RunControl, report: RunReport) -> int:
    """The whole run. Returns the exit code; raises RunError where it cannot go on."""
    from argonne.training.setup import choose_start, claim_output, show_configuration
    from argonne.training.stage_change import enter_next_stage

    world = connect_ranks(recipe, environment, control)
    ended = claim_output(control, world)
    if ended is not None:
        why = f" ({ended[1]})" if ended[1] else ""
        report.info(f"An earlier attempt of this launch has {ended[0]}{why}: nothing is left to do")
        return control.finish(*ended)
    show_configuration(recipe, report)
    start = choose_start(recipe.config, control, report, world)
    run = build_run(recipe, start, control, report, world)
    stopped = loop(run)
    while not stopped and enter_next_stage(run):
        stopped = loop(run)
    return close(run, stopped)


# ------------------------------------------------------------------ connect


def prepare_gpus(config: RunConfig, environment: Environment) -> None:
    """Set what CUDA, NCCL and the allocator read; before torch is imported.

    The model is not open yet: where the flags do not name its heads, they are taken to be Argonne 2.0's.
    """
    from argonne.config.presets import PRESETS, REFERENCE
    from argonne.ranks.gpu_environment import one_queue_helps, set_gpu_environment

    options = config.parallel
    heads = {**PRESETS[REFERENCE], **(config.model.settings or {})}["num_attention_heads"]
    fsdp = options.data_parallel != "ddp"
    one_queue = one_queue_helps(environment, options.tensor_parallel_size, heads, fsdp=fsdp)
    set_gpu_environment(os.environ, one_queue=one_queue)


def connect_ranks(recipe: Recipe, environment: Environment, control: RunControl) -> World:
    """Join the other ranks, watch each other from then on, and check that all were started alike."""
    from argonne.ranks.agree import check_same
    from argonne.ranks.flight_recorder import recorded_groups
    from argonne.ranks.meeting import await_ranks, open_store, private_store
    from argonne.ranks.world import AGREEMENT_TIMEOUT, COLLECTIVE_TIMEOUT, choose_device, connect
    from argonne.run.stalls import collective_limit
    from argonne.training.build import choose_tp_size
    from checkpointing import require_safe_torch

    config = recipe.config
    require_safe_torch()
    device = choose_device(environment)
    stall_timeout = config.control.stall_timeout
    meeting_timeout = timedelta(seconds=stall_timeout) if stall_timeout > 0 else AGREEMENT_TIMEOUT
    store = open_store(environment, timeout=meeting_timeout)
    if store is not None:
        control.join(private_store(store), environment.master.rpartition(":")[0])
        await_ranks(environment, store, timeout=meeting_timeout)
        control.all_joined()
    limit = collective_limit(stall_timeout, least=COLLECTIVE_TIMEOUT.total_seconds())
    world = connect(environment, device, store, timeout=timedelta(seconds=limit))
    control.progress.completed_work = partial(recorded_groups, device)
    check_same(recipe_values(recipe), world)
    if config.model.settings is not None:  # a degree that cannot work is refused before anything is read
        choose_tp_size(config.model.settings, config.parallel.tensor_parallel_size, world)
    return world


# ------------------------------------------------------------------ build, split, load


def build_run(recipe: Recipe, start: Start, control: RunControl, report: RunReport, world: World) -> Run:
    """The data at its place, the split model with its weights, and what else the loop works with."""
    from argonne.training import setup
    from argonne.training.auto_layout import choose_layout
    from argonne.training.build import make_parallel
    from argonne.training.fit import require_memory_ahead
    from argonne.training.header import introduce, open_metrics
    from argonne.training.keeper import CheckpointKeeper
    from argonne.training.profiling import StepProfiler
    from argonne.training.run_data import RunData
    from argonne.training.spike_guard import SpikeGuard
    from argonne.training.stage_change import begin_stage, choose_stage
    from argonne.training.state import Run
    from argonne.training.step import TrainingStep

    view, metadata, step = start.view, start.metadata, start.step
    choice = choose_layout(recipe, start, report, world)
    parallel = make_parallel(start.settings, choice.recipe.config.parallel, world)
    stages = choose_stage(choice.recipe, metadata, step, parallel, report)
    stage, config = stages.current, stages.current.config
    require_memory_ahead(stages, start.settings, parallel)
    place = (config, start.tokenizer, metadata, step, stage.samples_per_step, report, world)
    data, feed = setup.open_feed(*place, start.settings["vocab_size"], new_stage=step == stages.first_step)
    held_out = setup.validation_sets(config, start.tokenizer, parallel)
    trained = setup.build(config, start.settings, parallel)
    setup.check_room_on_rank_0(config, trained, stages, step, world)
    setup.fill(config, trained, start, report)
    control.progress.collectives = trained.tensor_parallel.group.counters
    keeper = CheckpointKeeper(trained, config, control, report)
    introduce(report, stages, trained, data, control.launch, step, start=start.reason, saving=keeper.mode)
    setup.verify_if_asked(config, trained, control, report)
    # Nothing refuses the run from here on: what an earlier one left in its folder is replaced.
    setup.keep_configuration(recipe, report, world, chosen=choice.flags)
    open_metrics(report, config, trained, step, stages.end)
    spikes = SpikeGuard(config.control.spike_action)
    run = Run(
        stages=stages,
        settings=start.settings,
        trained=trained,
        one_step=TrainingStep(trained, config.training, stage.accumulation, spikes.judge_of_steps),
        feed=feed,
        data=RunData(opened=data, report=report),
        tokenizer=start.tokenizer,
        keeper=keeper,
        control=control,
        report=report,
        validation_sets=held_out,
        spikes=spikes,
        profiler=StepProfiler.of(config.output, parallel),
    )
    run.restore(view)
    begin_stage(run, metadata)
    return run


# ------------------------------------------------------------------ loop


def loop(run: Run) -> bool:
    """Train until the last step of the stage or until a rank is asked to stop; True where it was stopped."""
    from argonne.training import between_steps
    from argonne.training.ledger import StepLedger
    from argonne.training.state import stopwatch

    control, keeper, last_step = run.control, run.keeper, run.stages.last_step
    if run.step >= last_step:
        run.report.info(run.finished_before())
    else:
        run.feed.wait()  # maybe hours for a token cache: until the loop begins, a signal ends the run at once
    control.record(total_steps=run.stages.end)
    control.begin(run.step)
    between_steps.validate_if_missed(run)
    run.garbage.begin()
    stop, steps = False, StepLedger(run)
    while run.step < last_step and not stop:
        between_steps.begin_step(run)
        since = stopwatch()
        batch = run.feed.next()
        votes = steps.take(batch, keeper.votes(stop=control.stop_flag), since=since)
        if votes is None:
            continue  # gone back: the checkpoint has all that a step's end would save
        if votes.failed:
            keeper.wait()  # raises what went wrong in the background
        stop = votes.stop
        between_steps.end_step(run)
        if not stop:
            between_steps.validate_if_due(run)
        last = stop or run.step == last_step
        if last or keeper.due(run.step, votes):
            stop = steps.settle().stop or stop
            run.save(whole=stop or run.step == run.stages.end)
        if not stop:
            between_steps.sample_if_due(run)
    return stop


# ------------------------------------------------------------------ close


def close(run: Run, stopped: bool) -> int:
    """Prove the last checkpoint, export a finished model where asked, end together; the exit code."""
    from argonne.ranks.agree import barrier
    from argonne.training.final_model import export_if_asked

    control, report, world = run.control, run.report, run.trained.parallel
    run.garbage.end()
    run.profiler.close()
    run.feed.close()
    run.keeper.close(save_again=run.save)
    if not stopped:
        export_if_asked(run.config, run.newest_checkpoint, run.settings, world, control, report)
    barrier(world)
    state, reason = ("stopped", control.stop_reason()) if stopped else ("finished", None)
    report.info(f"{state.capitalize()} at step {run.step}" + (f" ({reason})" if reason else ""))
    report.finish(state, reason)
    report.close()
    return control.finish(state, reason)


if __name__ == "__main__":
    sys.exit(main())
