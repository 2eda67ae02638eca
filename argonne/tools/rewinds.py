"""The rewinds in a run's records: which data each passed over."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from argonne.errors import DataError
from argonne.files import OutputFolder

Record = Mapping[str, Any]


def positions_of(record: Record) -> dict[str, Mapping[str, Any]]:
    """Where each source stands after a step, by its name, "" of the only one; DataError without a place."""
    place = record.get("data_position")
    if not isinstance(place, dict):
        raise DataError(f"step {record['step']} has no data_position in its metrics: no document is found")
    sources = place.get("sources")
    return dict(sources) if isinstance(sources, dict) else {"": place}


class WaysBack:
    """What the first step after each rewind says of it; runs of older versions say it in spikes.jsonl."""

    def __init__(self, folder: OutputFolder) -> None:
        self._records = list(_rewinds(folder))

    def place_of(self, record: Record) -> dict[str, Mapping[str, Any]] | None:
        """Where the data of a step began; None: where that of the step before it ended."""
        told = record.get("rewound")
        if isinstance(told, dict) and isinstance(told.get("data_position"), dict):
            return positions_of({"step": record["step"], **told})
        last = self._last(record)
        if last is None:
            return None
        return positions_of({"step": record["step"], "data_position": last["data_after"]})

    def passed_over(self, record: Record) -> int:
        """Batches between the end of the step before and the beginning of this one's data."""
        told = record.get("rewound")
        if isinstance(told, dict):
            return int(told["passed_over"])
        last, batches = self._last(record), 0
        while last is not None:
            batches += int(last["step"]) - int(last["back_to_step"])
            last = next((one for one in self._records if one is not last and _leads_to(one, last)), None)
        return batches

    def _last(self, record: Record) -> Record | None:
        """The rewind that a step's line of an older version follows."""
        spike = record.get("spike") or {}
        if "back_to_step" not in spike:
            return None
        key = (spike["step"], spike["back_to_step"])
        found = [one for one in self._records if (one["step"], one["back_to_step"]) == key]
        if not found:
            raise DataError(
                f"stats/spikes.jsonl lacks the rewind from step {key[0]} to step {key[1]}: restore it"
            )
        return found[-1]


def _leads_to(one: Record, other: Record) -> bool:
    """Whether ``other`` went back to the same checkpoint once more, and on from where ``one`` had ended."""
    same = one["back_to_step"] == other["back_to_step"]
    return bool(same and one["data_after"] == other["data_from"])


def _rewinds(folder: OutputFolder) -> Iterator[Record]:
    if folder.spikes.is_file():
        for line in folder.spikes.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # torn by a crash
                continue
            if isinstance(record, dict) and record.get("action") == "rewind":
                yield record
