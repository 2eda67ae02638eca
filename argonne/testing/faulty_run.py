"""The training script with one fault in it, for the tests of whole runs.

    torchrun ... faulty_run.py FAULT-AS-JSON FLAGS...

The fault is ``{"kind": ..., "rank": ..., ...}`` and happens on that rank only:

- ``kill``: SIGKILL at the ``operation``-th file operation inside a save, a write being half done.
- ``full``: writes to files with ``where`` in their path fail after ``bytes`` bytes, with ``error`` (ENOSPC).
- ``nan``: the loss is NaN in steps ``first`` to ``last``; ``gradient`` instead spoils one gradient.
- ``spike``: one gradient is ``factor`` times what it should be in some steps, the ``batches``, counted from 1
  in this process; the rule judges from ``least`` steps on.
- ``perturb``: one element of ``name`` changes before step ``step``.
- ``kernel``: from step ``step`` on attention gets the first token of each sequence wrong.
- ``spoil``: a bit of every checkpoint flips on its way to the disk (``times`` times).
- ``slow_save``: every save takes ``seconds`` more.
- ``slow``: reading a checkpoint back takes ``seconds`` more.
- ``clock``: the wall clock jumps by days at every look.
- ``exit``: the process ends without a word in step ``step`` (of attempt ``attempt`` of the launch only).
- ``bug``: an exception that no one expected in step ``step``.
- ``hang``: step ``step`` does not begin.
- ``early``: SIGKILL before the first step, when ``function`` of ``module`` is called (of attempt 0 only).
- ``signal``: the process sends itself ``number`` inside ``phase`` (step, save, copy, sample), the
  ``count``-th time.
"""

import errno
import importlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

Fault = dict[str, Any]


def in_saves(call: Callable[[], None]) -> None:
    """Run ``call`` when a save begins on this rank."""
    import argonne.training.saving as saving

    def faulty(save: Callable[..., Any]) -> Callable[..., Any]:
        def faulty_save(*args: Any, **kwargs: Any) -> Any:
            call()
            return save(*args, **kwargs)

        return faulty_save

    saving.save_checkpoint = faulty(saving.save_checkpoint)


def in_steps(call: Callable[[Any, int], None]) -> None:
    """Run ``call(training step, step)`` before each optimizer step; ``step`` counts from 1."""
    from argonne.training.step import TrainingStep

    start = TrainingStep.start

    def faulty_start(self: Any, batch: Any, step: int, **kwargs: Any) -> Any:
        call(self, step + 1)
        return start(self, batch, step, **kwargs)

    TrainingStep.start = faulty_start  # type: ignore[method-assign]


def kill(fault: Fault) -> None:
    from argonne.testing.checkpoint_crash import kill_at

    saves = [0]

    def begin() -> None:
        saves[0] += 1
        if saves[0] == fault.get("save", 1):
            kill_at(fault["operation"])

    in_saves(begin)


def full(fault: Fault) -> None:
    write, written = os.write, [0]

    def limited(descriptor: int, data: Any) -> int:
        if fault["where"] not in os.readlink(f"/proc/self/fd/{descriptor}"):
            return write(descriptor, data)
        written[0] += len(data)
        if written[0] > fault["bytes"]:
            number = getattr(errno, fault.get("error", "ENOSPC"))
            raise OSError(number, os.strerror(number))
        return write(descriptor, data)

    os.write = limited


def nan(fault: Fault) -> None:
    def spoil(one_step: Any, step: int) -> None:
        spoils = fault["first"] <= step <= fault["last"]
        if fault.get("gradient"):
            for name, parameter in one_step._trained.model.named_parameters():
                if name == fault["gradient"]:
                    handle = parameter.register_hook(lambda grad: grad * float("nan") if spoils else grad)
                    handles.append(handle)
            while len(handles) > 1:
                handles.pop(0).remove()
            return
        accumulate = type(one_step).accumulate

        def spoiled(batch: Any) -> Any:
            loss, by_source = accumulate(one_step, batch)
            return loss * (float("nan") if spoils else 1.0), by_source

        one_step.accumulate = spoiled

    handles: list[Any] = []
    in_steps(spoil)


def spike(fault: Fault) -> None:
    counted, handles = [0], list[Any]()

    def spoil(one_step: Any, step: int) -> None:
        counted[0] += 1
        factor = fault["factor"] if counted[0] in fault["batches"] else 1.0
        while handles:
            handles.pop().remove()
        weight = dict(one_step._trained.model.named_parameters())["blocks.1.mlp.up_proj.weight"]
        handles.append(weight.register_hook(lambda gradient: gradient * factor))

    in_steps(spoil)


def perturb(fault: Fault) -> None:
    def change(one_step: Any, step: int) -> None:
        if step == fault["step"]:
            one_step._trained.parameters()[fault["name"]].view(-1)[0] += 1e-3

    in_steps(change)


def kernel(fault: Fault) -> None:
    import torch

    import model

    attend = model.sdpa_attention

    def break_it(one_step: Any, step: int) -> None:
        if step == fault["step"]:
            model.sdpa_attention = wrong  # type: ignore[assignment]

    def wrong(*args: Any) -> Any:
        output = attend(*args)
        return torch.cat([output[:, :, :1] * 0.5, output[:, :, 1:]], dim=2)

    in_steps(break_it)


def spoil(fault: Fault) -> None:
    fsync, left = os.fsync, [fault.get("times", 1)]

    def flipping(descriptor: int) -> None:
        fsync(descriptor)
        if ".saving" in os.readlink(f"/proc/self/fd/{descriptor}") and left[0]:
            left[0] -= 1
            middle = os.fstat(descriptor).st_size // 2
            byte = os.pread(descriptor, 1, middle)
            os.pwrite(descriptor, bytes([byte[0] ^ 16]), middle)

    os.fsync = flipping  # type: ignore[assignment]


def slow(fault: Fault) -> None:
    import argonne.checkpoint.verifier as checkpointing

    verify = checkpointing.verify_checkpoint

    def slow_verify(path: Path, *, from_disk: bool = False) -> Any:
        if from_disk:
            time.sleep(fault["seconds"])
        return verify(path, from_disk=from_disk)

    checkpointing.verify_checkpoint = slow_verify


def slow_save(fault: Fault) -> None:
    in_saves(lambda: time.sleep(fault["seconds"]))


def in_copies(call: Callable[[], None]) -> None:
    """Run ``call`` in the middle of each copy to host memory."""
    from checkpointing import HostCopy

    take = HostCopy.take

    def faulty_take(self: Any, parameters: Any, adam: Any) -> None:
        take(self, parameters, {})
        call()
        take(self, parameters, adam)

    HostCopy.take = faulty_take  # type: ignore[method-assign]


def clock(fault: Fault) -> None:
    wall, looks = time.time, itertools.count()
    time.time = lambda: wall() + (next(looks) * 7919 % 41 - 20) * 86400.0


def leave(fault: Fault) -> None:
    def end(one_step: Any, step: int) -> None:
        if step == fault["step"]:
            os._exit(1)

    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt == fault.get("attempt", attempt):
        in_steps(end)


def bug(fault: Fault) -> None:
    def fail(one_step: Any, step: int) -> None:
        if step == fault["step"]:
            raise TypeError("a fault of this program")

    in_steps(fail)


def hang(fault: Fault) -> None:
    in_steps(lambda one_step, step: time.sleep(1000) if step == fault["step"] else None)


def early(fault: Fault) -> None:
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        module = importlib.import_module(fault["module"])
        setattr(module, fault["function"], lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))


def send(fault: Fault) -> None:
    """At the first file operation of a save, the first token of a sample, or in the middle of a step."""
    number = signal.Signals[fault["number"]]

    def once() -> None:
        sent.append(True)
        if len(sent) == fault.get("count", 1):
            os.kill(os.getpid(), number)

    sent: list[bool] = []
    if fault["phase"] == "save":
        in_saves(once)
    elif fault["phase"] == "copy":
        in_copies(once)
    elif fault["phase"] == "sample":
        from argonne.training import between_steps

        generate = between_steps.generate_text

        def faulty_generate(*args: Any, **kwargs: Any) -> str:
            once()
            return generate(*args, **kwargs)

        between_steps.generate_text = faulty_generate
    else:
        in_steps(lambda one_step, step: once() if step == fault["step"] else None)


FAULTS: dict[str, Callable[[Fault], None]] = {
    "kill": kill,
    "full": full,
    "nan": nan,
    "spike": spike,
    "perturb": perturb,
    "kernel": kernel,
    "spoil": spoil,
    "slow": slow,
    "slow_save": slow_save,
    "clock": clock,
    "exit": leave,
    "bug": bug,
    "hang": hang,
    "early": early,
    "signal": send,
}


def main() -> int:
    fault: Fault = json.loads(sys.argv[1])
    from resume_pretrain_tensor import main as train

    if "least" in fault:  # on all ranks, which judge alike
        import argonne.training.spikes as rule

        rule.LEAST = fault["least"]
    if int(os.environ.get("RANK", "0")) == fault["rank"]:
        FAULTS[fault["kind"]](fault)
    return train(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
