"""Two runs compared: the first step and figure in which their metrics differ, the bytes of their exports."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from argonne.errors import DataError

METRICS = Path("stats") / "training_metrics.jsonl"
FIGURES = ("stream_hash", "tokens_processed", "lr", "loss", "grad_norm")
"""What two runs of the same training share. A step's inputs come first, so that the cause is named before its
effect. Times, rates and memory are the machine's and are not compared."""

Record = Mapping[str, Any]


def metrics_path(path: Path) -> Path:
    """The metrics file that ``path`` is, or that a run with this --output-dir has written."""
    return path / METRICS if path.is_dir() else path


def read_records(path: Path) -> list[dict[str, Any]]:
    """One dictionary per optimizer step. Raises DataError for a missing, empty or foreign file."""
    path = metrics_path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not JSON lines ({error})"
        raise DataError(
            f"{path}: {reason}: give a metrics file, the --output-dir of a run, or a checkout"
        ) from error
    if not all(isinstance(record, dict) and isinstance(record.get("step"), int) for record in records):
        raise DataError(f"{path}: a line names no step: give the training_metrics.jsonl of a run")
    if not records:
        raise DataError(f"{path}: no step yet: wait for the run's first step")
    return records


def _equal(first: Any, second: Any, tolerance: float) -> bool:
    if first == second:
        return True
    if isinstance(first, (int, float)) and isinstance(second, (int, float)):
        return math.isclose(first, second, rel_tol=tolerance, abs_tol=0.0)
    return False


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value!r} ({value.hex()})"
    return "absent" if value is None else str(value)


def first_difference(
    first: Sequence[Record], second: Sequence[Record], *, tolerance: float = 0.0
) -> str | None:
    """The first step and figure that differ, in words; None for equal runs.

    ``tolerance`` is relative; 0.0 asks for the same bits (JSON keeps every digit of a float64). A figure that
    neither run records is passed over; one that only one of them records is a difference.
    """
    for one, other in zip(first, second, strict=False):
        if one["step"] != other["step"]:
            return f"step {one['step']} in the first run stands beside step {other['step']} in the second"
        for figure in FIGURES:
            here, there = one.get(figure), other.get(figure)
            if not _equal(here, there, tolerance):
                values = f"{_show(here)} in the first run, {_show(there)} in the second"
                return f"step {one['step']}, {figure}: {values}"
    if len(first) != len(second):
        return f"the first run has {len(first)} steps, the second {len(second)}; those of both are equal"
    return None


def compared_figures(first: Sequence[Record], second: Sequence[Record]) -> list[str]:
    """The figures that at least one run records."""
    return [
        figure for figure in FIGURES if any(record.get(figure) is not None for record in (*first, *second))
    ]


def tensor_digests(folder: Path) -> dict[str, str]:
    """Tensor name -> dtype, shape and SHA-256 of its bytes, over all safetensors files of an export.

    Raises DataError where there is none. (Format: 8 bytes of header length, a JSON header, the data.)
    """
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, stop = entry["data_offsets"]
                file.seek(8 + length + start)
                digest = hashlib.sha256(file.read(stop - start)).hexdigest()
                found[name] = f"{entry['dtype']} {entry['shape']} {digest[:16]}"
    if not found:
        raise DataError(f"{folder} holds no safetensors file: give the folder of an export")
    return found


def first_tensor_difference(first: Path, second: Path) -> str | None:
    """The first tensor, by name, in which two exports differ; None where all bytes are equal."""
    one, other = tensor_digests(first), tensor_digests(second)
    for name in sorted({*one, *other}):
        here, there = one.get(name, "absent"), other.get(name, "absent")
        if here != there:
            return f"tensor {name}: {here} in the first export, {there} in the second"
    return None
