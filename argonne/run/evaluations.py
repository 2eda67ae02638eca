"""``stats/eval_metrics.jsonl``: one JSON object per validation and set."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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

    def text(self) -> str:
        """One line for the console."""
        line = self.line()
        per_byte = "" if line["bits_per_byte"] is None else f" | Bits per byte: {line['bits_per_byte']:.4f}"
        return (
            f"Validation {self.name} at step {self.step} | Loss: {self.loss:.4f} | "
            f"Perplexity: {line['perplexity']:.2f}{per_byte}"
        )
