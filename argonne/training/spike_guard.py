"""What ``--spike-action`` makes of a spike: a skipped step or a rewind, and the records of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from argonne.run.report import RunReport
from argonne.training.optimizer import StepTotals
from argonne.training.spikes import Spike, SpikeRule

SPIKES_KEY = "spike_rule"
"""Of a checkpoint: what the rule remembers."""
MOST_REWINDS = 3
"""To one checkpoint; further spikes on the way from it are skipped."""


class SpikeGuard:
    """Judges the steps of a stage by the totals that all ranks share, so that they agree.

    Args:
        action: of ``--spike-action``.
    """

    def __init__(self, action: str) -> None:
        self.action = action
        self._rule = SpikeRule()
        self._checkpoint: Path | None = None
        self._rewinds = 0
        self._behind: dict[str, Any] = {}
        self._note: dict[str, Any] = {}

    @property
    def judge_of_steps(self) -> Callable[[StepTotals], Spike | None] | None:
        """`judge`, or None where nothing is done about a spike: a step then need not wait for its totals."""
        return None if self.action == "none" else self.judge

    def judge(self, totals: StepTotals) -> Spike | None:
        """The spike of a step whose totals are finite."""
        return self._rule.judge({"loss": totals.loss, "grad_norm": totals.grad_norm})

    def begin_stage(self) -> None:
        """Other data and batches have losses and norms of their own: the rule begins anew."""
        self._rule = SpikeRule()

    def may_go_back_to(self, checkpoint: Path) -> bool:
        """Whether the checkpoint may be rewound to once more."""
        return checkpoint != self._checkpoint or self._rewinds < MOST_REWINDS

    def skipped(
        self,
        spike: Spike,
        step: int,
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        report: RunReport,
    ) -> dict[str, Any]:
        """Record that the update of ``step`` was left out; keys for its metrics line.

        ``before`` and ``after``: the data positions between which its documents lie.
        """
        record = {"step": step, "action": "skip", **asdict(spike)}
        report.spike(
            {**record, "data_before": dict(before), "data_after": dict(after)},
            f"Spike at step {step}: {spike.describe()}: the step was skipped",
        )
        return {"skipped": "spike", "spike": asdict(spike)}

    def rewound(
        self,
        spike: Spike,
        step: int,
        *,
        checkpoint: Path,
        back_to: int,
        data_from: Mapping[str, Any],
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        report: RunReport,
        place: Mapping[str, Any],
        passed_over: int,
    ) -> None:
        """Record that the run went back from ``step`` to the checkpoint after ``back_to`` steps.

        ``data_from``: the position in the checkpoint; from there, or from where the last way back to it
        went on, to ``after`` the data was passed over. ``place``: ``after`` as the metrics have it;
        ``passed_over``: batches from the checkpoint's place to there.
        """
        if checkpoint != self._checkpoint:
            self._checkpoint, self._rewinds, self._behind = checkpoint, 0, dict(data_from)
        self._rewinds += 1
        record = {"step": step, "action": "rewind", **asdict(spike), "back_to_step": back_to}
        places = {"data_from": self._behind, "data_before": dict(before), "data_after": dict(after)}
        report.spike(
            {**record, **places},
            f"Spike at step {step}: {spike.describe()}: back to {checkpoint} (step {back_to}), passing over "
            f"the data of steps {back_to + 1} to {step}",
        )
        self._behind = dict(after)
        # A key of its own: the next step may be a spike, too, and a skipped one.
        rewound = {"from_step": step, "to_step": back_to, "passed_over": passed_over}
        self._note = {
            "spike": {**asdict(spike), "step": step, "back_to_step": back_to},
            "rewound": {**rewound, "data_position": dict(place)},
        }

    def take_note(self) -> dict[str, Any]:
        """Keys of the first metrics line after a rewind, once."""
        note, self._note = self._note, {}
        return note

    def metadata(self) -> dict[str, Any]:
        """The keys of a checkpoint; none without an action."""
        return {} if self.action == "none" else {SPIKES_KEY: self._rule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What a checkpoint has under SPIKES_KEY; an empty one leaves the rule at its beginning."""
        self._rule.load_state_dict(state)
