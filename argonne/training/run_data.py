"""Where the data of a run stands: after each step, in its metrics and in its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from argonne.config.options import RunConfig
from argonne.files import write_text
from argonne.run.report import RunReport
from argonne.training.data_places import data_source
from data_stream import DataProgress, Exclusion, OpenedStream, list_text


@dataclass(eq=False, kw_only=True)
class RunData:
    """Rank 0's source and the place in it; on the other ranks both are None and nothing is recorded."""

    opened: OpenedStream | None
    report: RunReport
    progress: DataProgress | None = None
    """Where the data stands after the last batch trained on."""
    places: dict[str, Any] = field(default_factory=dict)
    """Where earlier stages left data that this one does not read."""

    def begin(self) -> None:
        """The data stands where the source begins."""
        self.progress = self.opened.start if self.opened is not None else None
        if self.progress is not None:
            self.report.note(data_skipped=list(self.progress.skipped))
        if self.opened is not None and self.opened.exclusion.rows:
            self._keep_list(self.opened.exclusion)

    def _keep_list(self, exclusion: Exclusion) -> None:
        """For those who look back: the metrics name the list of excluded documents by its digest."""
        path = self.report.output.excluded(exclusion.digest)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, list_text(exclusion))
        except OSError as error:
            self.report.warn(f"{path} cannot be written ({error.strerror}): a replay will not know the list")

    def advance(self, progress: DataProgress | None) -> dict[str, Any]:
        """Go to the place after a step; its keys for the metrics. Reports what was newly skipped."""
        known = len(self.progress.skipped) if self.progress is not None else 0
        self.progress = progress
        if progress is None:
            return {}
        extra = dict(progress.metrics())
        if self.opened is not None and (digest := self.opened.exclusion.digest):
            extra["excluded_list"] = digest
        if new := progress.skipped[known:]:
            extra["data_skipped"] = list(new)
            self.report.note(data_skipped=list(progress.skipped))
            for skip in new:
                what = f"{skip['rows']} rows from row {skip['row']} on of {skip['file_name']}"
                self.report.warn("data was skipped (--skip-bad-shards):", f"{what}: {skip['reason']}")
        return extra

    def source_losses(
        self, samples: Sequence[int], losses: Sequence[float], block_size: int
    ) -> dict[str, Any]:
        """Of a mixture: the mean loss of the step's tokens of each source that has any.

        ``samples`` and ``losses``: of each source in the step, their number and their tokens' summed loss.
        """
        if self.opened is None:
            return {}
        means = {
            name: loss / (count * block_size)
            for name, loss, count in zip(self.opened.source_names, losses, samples, strict=False)
            if count
        }
        return {"loss_by_source": means}

    def position(self) -> dict[str, Any]:
        """``data_position`` after the last batch trained on."""
        if self.opened is None or self.progress is None:
            return {}
        return self.opened.position_dict(self.progress)

    def place(self) -> dict[str, Any]:
        """`position` as the metrics have it."""
        return {} if self.progress is None else dict(self.progress.metrics().get("data_position", {}))

    def metadata(self, config: RunConfig, *, staged: bool) -> dict[str, Any]:
        """The keys of a checkpoint about the data; there on rank 0 only. ``staged``: in a run with stages."""
        if self.opened is None or self.progress is None:
            return {}
        found: dict[str, Any] = {
            "data_position": self.position(),
            "data_state": self.opened.state_dict(self.progress),
        }
        if staged:
            found |= {"data_source": data_source(config), "data_places": self.places}
        return found
