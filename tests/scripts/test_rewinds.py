"""What the records of ways back say, those of older versions included."""

import json
from pathlib import Path
from typing import Any

import pytest

from argonne.errors import DataError
from argonne.files import OutputFolder
from argonne.tools.rewinds import WaysBack, positions_of


def back(step: int, to: int, begin: int, end: int) -> dict[str, Any]:
    """A line of spikes.jsonl: data from row ``begin`` to row ``end`` was passed over."""
    places = {"data_from": {"row": begin}, "data_after": {"row": end}}
    return {"step": step, "action": "rewind", "back_to_step": to, **places}


def folder_of(tmp_path: Path, *lines: dict[str, Any]) -> OutputFolder:
    folder = OutputFolder(tmp_path)
    folder.stats.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    folder.spikes.write_text(text + '{"step": 9, "action"')
    return folder


def noted(step: int, spike: int, to: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "spike": {"step": spike, "back_to_step": to}, **more}


def test_the_line_itself_is_enough(tmp_path: Path) -> None:
    told = {"from_step": 7, "to_step": 4, "passed_over": 5, "data_position": {"row": 50}}
    ways = WaysBack(OutputFolder(tmp_path))
    line = {"step": 5, "rewound": told, "skipped": "spike", "spike": {"quantity": "loss"}}
    assert ways.passed_over(line) == 5 and ways.place_of(line) == {"": {"row": 50}}
    assert ways.passed_over({"step": 6}) == 0 and ways.place_of({"step": 6}) is None


def test_lines_of_older_versions_are_looked_up_among_the_spikes(tmp_path: Path) -> None:
    spikes = [back(7, 4, 40, 70), back(6, 4, 70, 90), {"step": 8, "action": "skip"}, back(7, 6, 92, 99)]
    ways = WaysBack(folder_of(tmp_path, *spikes))
    line = noted(5, 6, 4)
    assert ways.passed_over(line) == 3 + 2  # both ways back led to step 4
    assert ways.place_of(line) == {"": {"row": 90}}
    assert ways.passed_over(noted(7, 7, 6)) == 1 and ways.place_of(noted(7, 7, 6)) == {"": {"row": 99}}
    with pytest.raises(DataError, match=r"spikes\.jsonl lacks the rewind from step 8 to step 4"):
        ways.passed_over(noted(5, 8, 4))


def test_places_of_a_mixture_and_none(tmp_path: Path) -> None:
    places = {"web": {"row": 3}, "code": {"row": 1}}
    assert positions_of({"step": 1, "data_position": {"sources": places, "mixture": {}}}) == places
    with pytest.raises(DataError, match="step 4 has no data_position"):
        positions_of({"step": 4})
