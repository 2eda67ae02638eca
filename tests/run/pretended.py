"""Pretended training runs (no torch: each rank starts in 0.1 s), and what is asked of them."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("pretended_rank.py")
Start = Callable[..., list[subprocess.Popen[str]]]
"""Starts the ranks of one run: ``start(world_size, environ=..., **options of pretended_rank.py)``."""


HANGING_SECONDS = 120.0
"""A rank that has not ended by then hangs; nothing here is meant to be that slow."""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANGING_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def wait_for_step(folder: Path, step: int, attempt: int = 0) -> None:
    wait_for(lambda: (folder / f"store_{attempt}" / f"step{step}_0").exists())


def ended(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and stderr of each rank; fails where one does not end."""
    deadline = time.monotonic() + HANGING_SECONDS
    outcomes = []
    for process in ranks:
        _, errors = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        outcomes.append((process.returncode, errors))
    return outcomes


def status_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stats" / "run_status.json").read_text())


def elastic(restart: int = 0, most: int = 0, run_id: str = "one") -> dict[str, str]:
    return {
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": str(restart),
        "TORCHELASTIC_MAX_RESTARTS": str(most),
    }
