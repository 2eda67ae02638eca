"""``stats/eval_metrics.jsonl``: one JSON object per validation and set."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from argonne.run.metrics import MetricsFile

LARGEST_EXPONENT = 700.0
"""Beyond it exp overflows."""


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """One validation set after a step."""

    step: int
    """steps completed"""
    name: str
    loss: float
    """nats per token"""
    samples: int
    tokens: int
    """predicted tokens: samples x block size"""
    text_bytes: int
    """UTF-8 bytes of the documents that the samples touch; 0: not known"""
    seconds: float
    extra: Mapping[str, Any] = field(default_factory=dict)
    """further keys of the line"""

    def line(self) -> dict[str, Any]:
        """The JSON object of ``stats/eval_metrics.jsonl``."""
        perplexity = math.exp(self.loss) if self.loss < LARGEST_EXPONENT else self.loss * math.inf
        bits = None
        if self.text_bytes:
            bits = self.loss / math.log(2.0) * self.tokens / self.text_bytes
        return {
            "step": self.step,
            "name": self.name,
            "loss": self.loss,
            "perplexity": perplexity,
            "bits_per_byte": bits,
            "samples": self.samples,
            "tokens": self.tokens,
            "seconds": self.seconds,
            **self.extra,
        }


class ValidationFile:
    """The lines up to the step that the run starts from, and those of its validations.

    Made where there are lines to be dropped, else with the first one.
    """

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

    def write(self, record: ValidationRecord) -> str:
        """Append a line; returns it as the console shows it."""
        if self._file is None:
            self._file = self._open()
        line = record.line()
        self._file.write(line)
        per_byte = "" if line["bits_per_byte"] is None else f" | Bits per byte: {line['bits_per_byte']:.4f}"
        return (
            f"Validation {record.name} at step {record.step} | Loss: {record.loss:.4f} | "
            f"Perplexity: {line['perplexity']:.2f}{per_byte}"
        )

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        if self._file is not None:
            self._file.close()
