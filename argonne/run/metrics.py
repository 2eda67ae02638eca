"""``stats/*_metrics.jsonl``: one JSON object per optimizer step or validation; how fast a device could go."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from argonne.files import json_safe

# Dense bf16 peak in FLOP/s, from the makers' data sheets; the more particular names come first.
_PEAK_FLOPS: tuple[tuple[frozenset[str], float], ...] = tuple(
    (frozenset(words.split()), peak)
    for words, peak in (
        ("H100 PCIE", 756e12),
        ("H100 NVL", 835e12),
        ("H100", 989e12),
        ("H200", 989e12),
        ("GH200", 989e12),
        ("H800", 989e12),
        ("H20", 148e12),
        ("B200", 2250e12),
        ("GB200", 2500e12),
        ("A100", 312e12),
        ("A800", 312e12),
        ("A40", 150e12),
        ("A10", 125e12),
        ("L40S", 362e12),
        ("L40", 181e12),
        ("L4", 121e12),
        ("4090", 165e12),
        ("3090", 71e12),
        ("MI300X", 1307e12),
    )
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """FLOP/s of one device in dense bf16 or fp16 products; None where it is not known."""
    if dtype == "fp32":
        return None
    words = set(re.split(r"[\s\-_]+", device_name.upper()))
    return next((peak for name, peak in _PEAK_FLOPS if name <= words), None)


class MetricsFile:
    """The lines up to the step that the run starts from, then one appended and flushed per step.

    Training outlives a full or broken disk: ``warn`` is told, the lines wait in memory (the newest 10,000)
    and are written when the disk takes them again.
    """

    WAITING = 10_000

    def __init__(self, path: Path, first_step: int, warn: Callable[[str], None]) -> None:
        """``first_step``: optimizer steps completed so far; what lies beyond is replaced."""
        self._path, self._warn = path, warn
        self._file: int | None = None
        self._waiting: list[bytes] = []
        self.last_step = 0
        """Of the last line that was kept or written; 0 without any."""
        self._open(first_step)

    def _open(self, step: int) -> None:
        try:
            self._keep_until(step)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            self._warn(
                f"{self._path} cannot be written ({error.strerror}): the run goes on without these metrics"
            )

    def rewind(self, step: int) -> None:
        """The run goes back to ``step``: what lies beyond is replaced by what comes."""
        if self._file is None:
            return
        self.close()
        self._waiting = [line for line in self._waiting if _step_of(line) <= step]
        self.last_step = 0
        self._open(step)
        if self._waiting:
            self.last_step = _step_of(self._waiting[-1])

    def _keep_until(self, step: int) -> None:
        """Drop later lines and torn ones; the file is replaced whole, never half."""
        if not self._path.exists():
            return
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        with self._path.open("rb") as old, temporary.open("wb") as new:
            for line in old:
                if 0 < _step_of(line) <= step:
                    new.write(line)
                    self.last_step = _step_of(line)
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, self._path)

    def write(self, record: dict[str, Any]) -> None:
        """Append one step's record."""
        if self._file is None:
            return
        self.last_step = record["step"]
        self._waiting.append(json.dumps(json_safe(record)).encode() + b"\n")
        del self._waiting[: -self.WAITING]
        data = b"".join(self._waiting)
        try:
            size = os.fstat(self._file).st_size
            if os.write(self._file, data) < len(data):
                os.ftruncate(self._file, size)  # no torn line stays behind
                raise OSError(28, "no space left on the device")
        except OSError as error:
            self._warn(f"{self._path} cannot be written ({error.strerror}): training goes on, the lines wait")
            return
        self._waiting.clear()

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class LaterFile:
    """A MetricsFile that is made where there are lines to be dropped, else with its first line."""

    def __init__(self, path: Path, first_step: int, warn: Callable[[str], None]) -> None:
        """``first_step``: optimizer steps completed so far; what lies beyond is replaced."""
        self._path, self._first_step, self._warn = path, first_step, warn
        self._file: MetricsFile | None = self._open() if path.exists() else None

    def _open(self) -> MetricsFile:
        return MetricsFile(self._path, self._first_step, self._warn)

    @property
    def last_step(self) -> int:
        """Of the last line; 0 without any."""
        return self._file.last_step if self._file is not None else 0

    def write(self, record: dict[str, Any]) -> None:
        """Append a record, which has its ``step``."""
        if self._file is None:
            self._file = self._open()
        self._file.write(record)

    def rewind(self, step: int) -> None:
        """The run goes back to ``step``: what lies beyond is replaced by what comes."""
        if self._file is not None:
            self._file.rewind(step)

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        if self._file is not None:
            self._file.close()


def _step_of(line: bytes) -> int:
    """The step of a line; -1 where the line is torn or not ours."""
    if not line.endswith(b"\n"):
        return -1
    try:
        record = json.loads(line)
    except ValueError:
        return -1
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else -1
