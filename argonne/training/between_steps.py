"""What is due between steps: validation, samples, audits, checks of the replicas, the profile, garbage."""

from __future__ import annotations

import dataclasses

from argonne.ranks.agree import broadcast_object
from argonne.training.generation import generate_text
from argonne.training.state import Run
from argonne.training.validation import validate
from argonne.verification.replicas import check_replicas


def begin_step(run: Run) -> None:
    """What comes before each step: the begin of a profile, of an audit."""
    run.profiler.before_step(run.step + 1)
    run.audit.begin_step(run)


def end_step(run: Run) -> None:
    """What follows each step: a profile's end, the collector, an audit, a check of replicas; collective."""
    found = run.profiler.after_step(run.step)
    if found is not None:
        run.report.info(found)
    run.garbage.after_step(run.step)
    run.audit.end_step(run)
    check_replicas_if_due(run)


def is_anything_due(run: Run) -> bool:
    """Whether something that looks at the run may follow the step just taken: on all ranks alike."""
    config, step = run.config, run.step
    intervals = (
        config.checkpoint.checkpoint_interval,
        config.evaluation.eval_interval,
        config.output.sample_interval,
        config.parallel.replica_check_interval,
        config.control.audit_interval,
    )
    return step == run.stages.last_step or any(every and step % every == 0 for every in intervals)


def check_replicas_if_due(run: Run) -> None:
    """Compare what several ranks hold alike; PeerError on all ranks where a copy has drifted."""
    interval = run.config.parallel.replica_check_interval
    if interval and run.step % interval == 0:
        check_replicas(run.trained.parameters(), run.trained.slice_map, run.trained.parallel)


def validate_if_due(run: Run) -> None:
    """Measure the validation sets at their interval and after the last step; collective."""
    interval = run.config.evaluation.eval_interval
    due = run.step == run.stages.last_step or (interval and run.step % interval == 0)
    if not due or not run.validation_sets:
        return
    with run.control.phase("validate"):
        for validation_set in run.validation_sets:
            record = validate(run.trained, validation_set, run.step)
            run.report.validation(dataclasses.replace(record, extra=run.stages.label()))


def validate_if_missed(run: Run) -> None:
    """A run that was stopped where a validation was due makes it when it is resumed; collective."""
    if run.step and run.validation_sets:
        recorded = run.report.evaluations
        done = recorded is not None and recorded.last_step == run.step
        if not broadcast_object(done, run.trained.parallel):
            validate_if_due(run)


def sample_if_due(run: Run) -> None:
    """Generate, print and record a text at the interval of --sample-interval; collective."""
    output = run.config.output
    if not output.sample_interval or run.step % output.sample_interval:
        return
    with run.control.phase("sample"):
        seed = run.config.training.seed + run.step
        text = generate_text(run.trained, run.tokenizer, prompt=output.sample_prompt, seed=seed)
    run.report.sample(run.step, text, prompt=output.sample_prompt, extra=run.stages.label())
