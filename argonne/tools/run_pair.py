"""The same short runs in two checkouts: one process, tensor and data parallelism, a resume, an export."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from argonne.errors import RunError
from argonne.tools.run_differences import first_difference, first_tensor_difference, read_records

ENTRY = "resume_pretrain_tensor.py"
STEPS, SAVED_AT = 6, 3
TIMEOUT = 600.0
"""Seconds after which a run counts as hung."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run: its name, its number of processes, its flags beyond the common ones."""

    name: str
    processes: int
    flags: tuple[str, ...] = ()
    resumes: str | None = None
    """Case whose checkpoint of step SAVED_AT this one starts from."""


CASES = (
    Case(name="tp 1", processes=1),
    Case(
        name="tp 2, sequence parallel",
        processes=2,
        flags=("--tensor-parallel-size", "2", "--sequence-parallel"),
    ),
    Case(name="tp 2 x dp 2", processes=4, flags=("--tensor-parallel-size", "2")),
    Case(
        name="tp 2, resumed from tp 1",
        processes=2,
        flags=("--tensor-parallel-size", "2"),
        resumes="tp 1",
    ),
)
EXPORTED = CASES[-1]


def is_checkout(path: Path) -> bool:
    return (path / ENTRY).is_file()


def _run(checkout: Path, command: Sequence[str | Path], what: str) -> None:
    """Run a command of a checkout, with that checkout's modules; raises RunError with its last words."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        and not name.startswith(("TORCHELASTIC", "MASTER_"))
    }
    # One thread a process: the order in which a product is summed may depend on the number of threads.
    environment = {**kept, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{what} did not end within {TIMEOUT:.0f} s: run it by hand") from error
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        said = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[-1])
        raise RunError(f"{what} failed ({said}): run it by hand: {' '.join(map(str, command))}")


def build_corpus(folder: Path) -> None:
    """The quickstart's corpus and tokenizer, made once by this checkout for both."""
    root = Path(__file__).resolve().parents[2]
    command: list[str | Path] = [
        sys.executable,
        root / "scripts" / "quickstart_corpus.py",
        "--output-dir",
        folder,
    ]
    _run(root, [*command, "--vocab-size", "512"], "the corpus")


def checkpoint_of(folder: Path, step: int) -> Path:
    return folder / "pretrained" / f"tensor_parallel_checkpoint_step_{step}.pth"


def case_folder(work: Path, case: str) -> Path:
    return work / case.replace(", ", "_").replace(" ", "_")


def run_case(checkout: Path, case: Case, corpus: Path, work: Path) -> Path:
    """Train STEPS optimizer steps in one checkout; returns the output folder."""
    folder = case_folder(work, case.name)
    launcher: list[str | Path] = [sys.executable]
    if case.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.processes}"]
    start = "NONE" if case.resumes is None else checkpoint_of(case_folder(work, case.resumes), SAVED_AT)
    command: list[str | Path] = [*launcher, checkout / ENTRY, "--output-dir", folder]
    command += ["--tokenizer-path", corpus / "tokenizer", "--data-glob", f"{corpus}/data/*.parquet"]
    command += ["--model-config", "argonne-tiny", "--block-size", "64", "--batch-size", "2"]
    command += ["--global-batch-size", "8", "--dtype", "fp32", "--learning-rate", "3e-3"]
    command += ["--total-steps", str(STEPS), "--warmup-steps", "2", "--checkpoint-path", start]
    command += ["--checkpoint-interval", str(SAVED_AT), "--num-proc", "1", *case.flags]
    _run(checkout, command, f"{case.name} in {checkout}")
    return folder


def export(checkout: Path, folder: Path, corpus: Path) -> Path:
    """Export a run's last checkpoint with the checkout's own command; returns the new folder."""
    target = folder / "export"
    command: list[str | Path] = [sys.executable, checkout / "scripts" / "export_hf.py"]
    command += ["--checkpoint-path", checkpoint_of(folder, STEPS), "--output-dir", target]
    _run(checkout, [*command, "--tokenizer-path", corpus / "tokenizer"], f"the export in {checkout}")
    return target


def compare_checkouts(
    first: Path, second: Path, work: Path, *, tolerance: float, say: Callable[[str], None]
) -> str | None:
    """Run every case in both checkouts, below ``work``; the first difference in words, or None.

    ``say`` gets a line for each case that is equal. The exported tensors are compared byte for byte unless a
    tolerance was given. Raises RunError where a run fails.
    """
    corpus = work / "corpus"
    build_corpus(corpus)
    for case in CASES:
        folders = [
            run_case(root, case, corpus, work / name) for root, name in ((first, "first"), (second, "second"))
        ]
        records = [read_records(folder) for folder in folders]
        found = first_difference(*records, tolerance=tolerance)
        if found is not None:
            return f"{case.name}: {found}"
        say(f"{case.name}: {len(records[0])} steps equal, last loss {records[0][-1]['loss']!r}")
        if case is EXPORTED and tolerance == 0.0:
            exports = [
                export(root, folder, corpus) for root, folder in zip((first, second), folders, strict=True)
            ]
            found = first_tensor_difference(*exports)
            if found is not None:
                return f"export: {found}"
            say("export: every tensor equal, byte for byte")
    return None
