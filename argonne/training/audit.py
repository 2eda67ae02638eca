"""When a layer is audited and what follows: ``--audit-interval`` and ``--audit-action``.

Every N steps one layer, in rotation, keeps what it is given and gives in the step's first micro-batch
(``argonne.verification.block_tap``); after the step one rank of each replica, in rotation too, recomputes it
(``argonne.verification.layer_audit``). Nothing of the training changes by it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from argonne.config.options import RunConfig
from argonne.errors import AuditError, rank_list
from argonne.files import OutputFolder
from argonne.ranks.agree import gather_objects, on_rank_0
from argonne.ranks.replicas import local_tensor
from argonne.run.metrics import MetricsFile
from argonne.training.build import TrainedModel
from argonne.verification.block_tap import BlockTap, checksums
from argonne.verification.layer_audit import Compared, LayerAudit, furthest
from argonne.verification.plain_blocks import room_needed
from argonne.verification.replicas import odd_ranks, shared_parameters, sums_of_copies
from checkpointing import own_checkpoints

if TYPE_CHECKING:
    from argonne.training.state import Run


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Whose turn it is at one audit."""

    layer: int
    oracle: int
    """Tensor-parallel rank, of every replica, that recomputes it."""

    @classmethod
    def of(cls, number: int, layers: int, tp_size: int) -> Turn:
        """Of audit ``number``, from 0: each lap over the layers gives each of them another oracle."""
        lap, layer = divmod(number, layers)
        return cls(layer=layer, oracle=(layer + lap) % tp_size)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one oracle found, or what the ranks found without one."""

    oracle: int | None
    """World rank; None: no recomputation was needed to see it."""
    worst: Compared | None
    """What is furthest off, or nearest to it."""
    off: int = 0
    """Comparisons beyond their limits, of ``compared``."""
    compared: int = 0
    fault: str = ""
    """What is wrong, in words; empty where all is within its limits."""

    @classmethod
    def of_oracle(cls, found: Sequence[Compared], rank: int) -> Verdict:
        """``found`` on world rank ``rank``."""
        worst = furthest(found)
        off = sum(one.excess > 1.0 for one in found)
        fault = ""
        if off:
            far = f"{worst.error:.1e} (limit {worst.limit:.0e})"
            fault = f"{worst.tensor} on {rank_list(worst.ranks)} is off by {far}, recomputed by rank {rank}"
        return cls(oracle=rank, worst=worst, off=off, compared=len(found), fault=fault)

    def record(self) -> dict[str, Any]:
        """Its part of a line of ``stats/audit.jsonl``."""
        worst = {} if self.worst is None else asdict(self.worst)
        counts = {"off": self.off, "compared": self.compared}
        return {"ok": not self.fault, "oracle_rank": self.oracle, **worst, **counts, "fault": self.fault}


@dataclass(frozen=True, kw_only=True)
class _Rest:
    """The weights of a layer after a step: nothing changes them before the next one."""

    step: int
    layer: int
    sums: torch.Tensor


class SelfAudit:
    """The audits of one run, each begun before its step and judged after it."""

    def __init__(self) -> None:
        self._tap: BlockTap | None = None
        self._rest: _Rest | None = None
        self.last_held: int | None = None
        """Step of the last audit of this process that held."""

    def begin_step(self, run: Run) -> None:
        """The next step is about to be started; collective where an audit is due with it."""
        self.close()
        step = run.step + 1
        if not is_due(run.config, step):
            return
        layer = turn_of(run, step).layer
        if not _has_room(run.trained, layer, run.config):
            run.report.warn("an audit was skipped: too little free memory on the devices", f"(step {step})")
            return
        self._tap = BlockTap(run.trained.model, layer)

    def end_step(self, run: Run) -> None:
        """A step has been taken: judge what its audit saw; collective.

        Raises:
            AuditError: on all ranks, where it did not hold and ``--audit-action`` is stop.
        """
        tap, self._tap = self._tap, None
        if tap is not None:
            tap.remove()
            with run.control.phase("audit"):
                self._judge(run, tap)
        if is_due(run.config, run.step + 1):
            layer = turn_of(run, run.step + 1).layer
            weights = dict(run.trained.model.blocks[layer].named_parameters())
            self._rest = _Rest(step=run.step, layer=layer, sums=checksums(weights))

    def close(self) -> None:
        """Take off what was put on for a step that did not come to its end."""
        if self._tap is not None:
            self._tap.remove()
        self._tap = None

    def _judge(self, run: Run, tap: BlockTap) -> None:
        started, step = time.monotonic(), run.step
        rest, self._rest = self._rest, None
        known = rest is not None and (rest.step, rest.layer) == (step - 1, tap.index)
        before = rest.sums if known and rest is not None else None
        verdict = judge(run.trained, tap, turn_of(run, step).oracle, before)
        found = {"ok": None, "skipped": "not finite"} if verdict is None else verdict.record()
        seconds = time.monotonic() - started
        _write(run, {"step": step, "layer": tap.index, **found, "seconds": seconds, **run.stages.label()})
        if verdict is None:
            return
        if not verdict.fault:
            self.last_held = step
            return
        line = f"audit at step {step}: layer {tap.index}: {verdict.fault}"
        if verdict.off > 1:
            line += f"; {verdict.off} of {verdict.compared} comparisons are off"
        if run.config.control.audit_action == "warn":
            run.report.warn(line)
            return
        run.keeper.wait()
        raise AuditError(f"{line}; {self._way_back(run)}")

    def _way_back(self, run: Run) -> str:
        """From which checkpoint to go on."""
        suspect = "the run ends without saving; suspect the device or a kernel"
        if self.last_held is None:
            return f"{suspect}; no audit of this process held: resume from a checkpoint that you trust"
        folder, held = OutputFolder(Path(run.config.output.output_dir)).pretrained, self.last_held
        path = on_rank_0(lambda: _newest_until(folder, held), run.trained.parallel)
        way = "no checkpoint is that old" if path is None else f"resume with --checkpoint-path {path}"
        return f"{suspect}; the last audit that held was at step {held}: {way}"


def is_due(config: RunConfig, step: int) -> bool:
    """Whether step ``step``, from 1, is audited."""
    interval = config.control.audit_interval
    return bool(interval) and step % interval == 0


def turn_of(run: Run, step: int) -> Turn:
    """The layer and the oracle of an audited step: the same in a resumed run."""
    number = step // run.config.control.audit_interval - 1
    return Turn.of(number, len(run.trained.model.blocks), run.trained.parallel.tp_size)


def _write(run: Run, record: dict[str, Any]) -> None:
    """Append to ``stats/audit.jsonl``: what an audit found stays, also where the run is resumed before it."""
    if run.trained.parallel.rank == 0:
        path = OutputFolder(Path(run.config.output.output_dir)).audits
        file = MetricsFile(path, sys.maxsize, run.report.warn)
        file.write(record)
        file.close()


def _newest_until(folder: Path, step: int) -> str | None:
    return next((str(path) for saved, path in own_checkpoints(folder) if saved <= step), None)


def _has_room(trained: TrainedModel, layer: int, config: RunConfig) -> bool:
    """Whether every GPU has what an audit takes; the same on all ranks. Collective with GPUs."""
    device = trained.parallel.device
    if device.type != "cuda":
        return True
    tokens = (config.training.batch_size, config.training.block_size)
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    fits = room_needed(trained.model, layer, tokens, trained.dtype) <= free
    return all(gather_objects(fits, trained.parallel))


# ----------------------------------------------------------------------------------- the verdict


def judge(
    trained: TrainedModel, tap: BlockTap, oracle: int, rest: torch.Tensor | None = None
) -> Verdict | None:
    """What all ranks make of a layer's pass, the same on all; collective. None: it was not finite.

    ``oracle`` is the tensor-parallel rank that recomputes it, ``rest`` the checksums of its weights after the
    step before.
    """
    told = gather_objects((tap.complete and _is_finite(tap), _changed(tap, rest)), trained.parallel)
    if not all(finite for finite, _ in told):
        return None
    spoiled = [(rank, change) for rank, (_, change) in enumerate(told) if change is not None]
    if spoiled:
        rank, (name, when) = spoiled[0]
        name, others = tap.prefix + name, rank_list(rank for rank, _ in spoiled)
        return Verdict(oracle=None, worst=_known(name, rank), fault=f"{name} on {others} changed {when}")
    differing = _unequal_copy(trained, tap)
    if differing is not None:
        return differing
    verdict = _recomputed(trained, tap, oracle)
    if not verdict.fault or trained.parallel.tp_size == 1:
        return verdict
    accused = verdict.worst.ranks if verdict.worst is not None else ()
    return _with_second(verdict, _recomputed(trained, tap, _second(trained, oracle, accused)))


def _is_finite(tap: BlockTap) -> bool:
    """Whether what came into the block, both ways, is finite: only then is there something to judge."""
    kept = tap.activations
    return all(bool(kept[name].isfinite().all()) for name in ("input", "gradient of the output"))


def _changed(tap: BlockTap, rest: torch.Tensor | None) -> tuple[str, str] | None:
    """A parameter of this rank whose bits changed where nothing may change them, and when."""
    for sums, later, when in (
        (rest, tap.before, "between the step before and this one"),
        (tap.before, tap.after, "between forward and backward pass"),
    ):
        if sums is None or later is None:
            continue
        differs = (sums != later).tolist()
        if any(differs):
            return list(tap.parameters)[differs.index(True)], when
    return None


def _known(name: str, rank: int) -> Compared:
    return Compared(tensor=name, ranks=(rank,), own=True, error=math.inf, limit=0.0)


def _unequal_copy(trained: TrainedModel, tap: BlockTap) -> Verdict | None:
    """A weight of the layer of which a rank holds another copy than the others; the same on all ranks."""
    names = [name for name in shared_parameters(trained.slice_map) if name.startswith(tap.prefix)]
    weights = {tap.prefix + name: local_tensor(weight) for name, weight in tap.weights.items()}
    for name, sums in sums_of_copies(weights, trained.slice_map, trained.parallel, names):
        odd, same = odd_ranks(sums)
        if odd:
            fault = f"{name} on {rank_list(odd)} is not the copy that rank {same} holds"
            return Verdict(oracle=None, worst=_known(name, odd[0]), fault=fault)
    return None


def _recomputed(trained: TrainedModel, tap: BlockTap, oracle: int) -> Verdict:
    """The verdict of that replica's oracle that is furthest from holding; the same on all ranks."""
    parallel = trained.parallel
    found = LayerAudit(trained.model, tap, parallel, trained.dtype).compare(oracle)
    own = Verdict.of_oracle(found, parallel.rank) if found else None
    verdicts = [verdict for verdict in gather_objects(own, parallel) if verdict is not None]
    return max(verdicts, key=lambda verdict: verdict.worst.excess)


def _second(trained: TrainedModel, oracle: int, accused: Sequence[int]) -> int:
    """Another tensor-parallel rank to recompute it: one that is not accused, where there is one."""
    size = trained.parallel.tp_size
    others = [(oracle + distance) % size for distance in range(1, size)]
    blamed = {rank % size for rank in accused}
    return next((rank for rank in others if rank not in blamed), others[0])


def _with_second(first: Verdict, second: Verdict) -> Verdict:
    """The first verdict, and what a second oracle says of it: the fault may be the first one's own."""
    assert first.worst is not None and second.worst is not None
    if not second.fault:
        opinion = f"rank {second.oracle} finds nothing: suspect rank {first.oracle}"
    elif second.worst.ranks == first.worst.ranks:
        opinion = f"rank {second.oracle} finds {rank_list(first.worst.ranks)} off, too"
    else:
        opinion = f"rank {second.oracle} finds {second.worst.tensor} on {rank_list(second.worst.ranks)} off"
    fields = {name: getattr(first, name) for name in ("oracle", "worst", "off", "compared")}
    return Verdict(**fields, fault=f"{first.fault}; {opinion}")
