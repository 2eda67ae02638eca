"""Distillation shown on a small corpus: a student alone and beside its teacher, from several seeds.

The runs are those of resume_pretrain_tensor.py, in processes of their own. Corpus, batch, rate and validation
set are the same on both sides; a seed draws the initial weights and the order of the data.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argonne.errors import RunError
from argonne.files import OutputFolder
from argonne.tools.library_corpus import build

ALONE, TAUGHT = "alone", "with the teacher"
TEACHER = {
    "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 512, "max_position_embeddings": 128, "qk_norm": True,
}  # fmt: skip
STUDENT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 176, "max_position_embeddings": 128, "qk_norm": True,
}  # fmt: skip

Curve = list[tuple[int, float]]
"""(step, validation loss in nats a token)"""


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """How much is trained."""

    folder: Path
    seeds: Sequence[int] = (0, 1, 2)
    teacher_steps: int = 800
    steps: int = 400
    alpha: float = 0.5
    temperature: float = 1.0

    def curves(self) -> dict[str, list[Curve]]:
        """ALONE and TAUGHT -> a curve for each seed; what an earlier call has finished is read."""
        build(self.folder / "corpus", vocab_size=2048, shard_mib=2.0)
        for name, shape in (("teacher", TEACHER), ("student", STUDENT)):
            (self.folder / f"{name}.json").write_text(json.dumps(shape), encoding="utf-8")
        model = self.folder / "teacher" / "model"
        self._train(
            "teacher", "teacher", 0, self.teacher_steps, 32, "--min-learning-rate", "2e-4",
            "--final-model-dir", str(model),
        )  # fmt: skip
        teaching = [
            "--teacher-path", str(model), "--distill-alpha", str(self.alpha),
            "--distill-temperature", str(self.temperature),
        ]  # fmt: skip
        found: dict[str, list[Curve]] = {ALONE: [], TAUGHT: []}
        for seed in self.seeds:
            for side, flags in ((ALONE, []), (TAUGHT, teaching)):
                name = f"student_{'alone' if side is ALONE else 'taught'}_{seed}"
                constant = ["--lr-schedule", "constant", "--min-learning-rate", "4e-3"]
                found[side].append(self._train(name, "student", seed, self.steps, 16, *constant, *flags))
        return found

    def teacher_loss(self) -> float:
        """The teacher's own on the validation set."""
        return _curve(self.folder / "teacher")[-1][1]

    def _train(self, name: str, shape: str, seed: int, steps: int, batch: int, *flags: str) -> Curve:
        output = self.folder / name
        found = _curve(output)
        if found and found[-1][0] == steps:
            return found
        print(f"{name}: {steps} steps ...", flush=True)
        script = importlib.util.find_spec("resume_pretrain_tensor")
        assert script is not None and script.origin is not None
        data = str(self.folder / "corpus" / "data" / "*.parquet")
        command = [
            sys.executable, script.origin, "--output-dir", str(output), "--seed", str(seed),
            "--model-config", str(self.folder / f"{shape}.json"),
            "--tokenizer-path", str(self.folder / "corpus" / "tokenizer"),
            "--data-glob", data, "--holdout", "10", "--shuffle",
            "--batch-size", str(batch), "--block-size", "128", "--total-steps", str(steps),
            "--learning-rate", "4e-3", "--warmup-steps", "20",
            "--eval-data", f"held={data}", "--eval-interval", "25", "--eval-samples", "128",
            "--sample-interval", "0", *flags,
        ]  # fmt: skip
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            raise RunError(f"{name} ended with code {done.returncode}: {(said or [done.stderr[-500:]])[0]}")
        return _curve(output)


def _curve(output: Path) -> Curve:
    path = OutputFolder(output).eval_metrics
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [(record["step"], record["loss"]) for record in map(json.loads, lines)]


def steps_to(curve: Curve, loss: float) -> float:
    """The step at which a curve is first as low, on the line between two validations; inf: never."""
    for (step, above), (later, below) in itertools.pairwise(curve):
        if below <= loss:
            return step + (later - step) * max(0.0, above - loss) / (above - below)
    return math.inf


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the curves show. ``loss`` is the worst with which a student alone ends: all of them reach it."""

    loss: float
    teacher_loss: float
    steps: Mapping[str, list[float]]
    """Steps to ``loss`` by side, a number for each seed."""
    final: Mapping[str, list[float]]
    """Last validation loss, likewise."""

    @classmethod
    def of(cls, curves: Mapping[str, Sequence[Curve]], teacher_loss: float) -> Outcome:
        loss = max(curve[-1][1] for curve in curves[ALONE])
        return cls(
            loss=loss,
            teacher_loss=teacher_loss,
            steps={side: [steps_to(curve, loss) for curve in found] for side, found in curves.items()},
            final={side: [curve[-1][1] for curve in found] for side, found in curves.items()},
        )

    def table(self) -> str:
        """For a terminal and a document."""
        lines = [
            f"| student | steps to {self.loss:.3f} | of each seed | last loss |",
            "| --- | --- | --- | --- |",
        ]
        for side in self.steps:
            mean, error = mean_and_error(self.steps[side])
            each = ", ".join(f"{value:.0f}" for value in self.steps[side])
            last, spread = mean_and_error(self.final[side])
            lines.append(f"| {side} | {mean:.0f} ± {error:.0f} | {each} | {last:.3f} ± {spread:.3f} |")
        return "\n".join(lines)


def draw(curves: Mapping[str, Sequence[Curve]], outcome: Outcome, output: Path) -> bool:
    """Means with a band of one standard error, and each seed's curve, thin; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    for color, (side, found) in zip(("C0", "C1"), curves.items(), strict=True):
        steps = [step for step, _ in found[0]]
        for curve in found:
            axes.plot(steps, [loss for _, loss in curve], color=color, linewidth=0.6, alpha=0.5)
        pairs = [mean_and_error([loss for _, loss in at]) for at in zip(*found, strict=True)]
        low, high = [mean - error for mean, error in pairs], [mean + error for mean, error in pairs]
        axes.plot(steps, [mean for mean, _ in pairs], color=color, linewidth=1.8, label=f"student {side}")
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    _mark(axes, outcome)
    axes.set(xlabel="optimizer step", ylabel="validation loss (nats a token)")
    axes.set_title(f"Mean of {len(curves[ALONE])} seeds, band: standard error", fontsize=10)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    vector = output.suffix == ".svg"
    options: dict[str, Any] = {"metadata": {"Date": None, "Creator": None}} if vector else {"dpi": 130}
    with pyplot.rc_context({"svg.hashsalt": "distillation"}):
        figure.savefig(output, **options)
    pyplot.close(figure)
    return True


def _mark(axes: Any, outcome: Outcome) -> None:
    for loss, text in ((outcome.loss, "reached by all"), (outcome.teacher_loss, "the teacher")):
        axes.axhline(loss, color="tab:gray", linestyle="--", linewidth=0.9)
        axes.annotate(
            f"{text}: {loss:.2f}", (0, loss), xycoords=("axes fraction", "data"), xytext=(4, -10),
            textcoords="offset points", ha="left", color="tab:gray", fontsize=8,
        )  # fmt: skip
