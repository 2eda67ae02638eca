"""Runs to look back on, the documents of each of their steps by counting tokens, and what the tools say."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from argonne.testing.launch import ROOT, SCHEDULE, SHAPE, environment, launch
from argonne.tools.document_sights import Wanted
from argonne.tools.document_steps import sights
from argonne.tools.kept_run import KeptRun
from tests.data.excluded_samples import Place, Token, ids, tokens_of
from tests.data.naive import natural_rows

SIZE, G = 64, 2


def train(corpus: Path, output: Path, *flags: Any, steps: int = 9, processes: int = 1, **more: Any) -> None:
    """A run over ``corpus`` with a checkpoint after every third step."""
    data = ["--tokenizer-path", corpus / "tokenizer"]
    if "--data-glob" not in flags:
        data += ["--data-glob", f"{corpus}/data/*.parquet"]
    common = [
        *SHAPE,
        *SCHEDULE,
        "--warmup-steps",
        2,
        "--total-steps",
        steps,
        "--checkpoint-interval",
        3,
        "--keep-checkpoints",
        9,
    ]
    done = launch(processes, *data, *common, "--output-dir", output, *flags, **more)
    assert done.code == 0, done.stderr


def documents_in(corpus: Path, tokenizer: Any) -> list[list[Token]]:
    """The tokens of each document."""
    return tokens_of(natural_rows(corpus / "data"), tokenizer)


def write_token_corpus(corpus: Path, documents: Sequence[Sequence[Token]], path: Path) -> str:
    """The same documents as a list column; returns the pattern."""
    path.mkdir()
    for name in sorted({document[0].place[0] for document in documents}):
        rows = [ids(document) for document in documents if document[0].place[0] == name]
        pq.write_table(pa.table({"ids": pa.array(rows, pa.list_(pa.int32()))}), path / name, row_group_size=5)
    return f"{path}/*.parquet"


def of_steps(samples: Sequence[Sequence[Token]], batches: Sequence[int]) -> dict[int, set[Place]]:
    """Step -> the documents of its samples, targets included; ``batches``: the batch of each step, from 0."""
    return {
        step: {token.place for sample in samples[G * batch : G * batch + G] for token in sample}
        for step, batch in enumerate(batches, 1)
    }


def said_by_ledger(output: Path, places: Sequence[Place]) -> dict[Place, set[int]]:
    """Document -> the steps that the ledger says."""
    run = KeptRun(output)
    return {place: {sight.step for sight in sights(run, run.recipe(), [Wanted(*place)])} for place in places}


def expected_of_ledger(steps: dict[int, set[Place]], places: Sequence[Place]) -> dict[Place, set[int]]:
    return {place: {step for step, held in steps.items() if place in held} for place in places}


def replayed(output: Path, step: int, page: Path, processes: int = 1) -> str:
    """What the script prints of a step."""
    script = [
        str(ROOT / "scripts" / "replay_step.py"),
        str(output),
        "--step",
        str(step),
        "--output",
        str(page),
    ]
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launcher, *script], capture_output=True, text=True, env=environment(), timeout=180
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def documents_said(said: str) -> dict[Place, tuple[float, float, int]]:
    """Document -> (loss, gradient norm, tokens), of the first ones by loss."""
    form = r"^by loss \d+: loss ([\d.]+), gradient norm ([\d.e+-]+), (\d+) tokens, ([\w.]+), row (\d+),"
    return {
        (name, int(row)): (float(loss), float(norm), int(tokens))
        for loss, norm, tokens, name, row in re.findall(form, said, re.MULTILINE)
    }


def inputs_of(samples: Sequence[Sequence[Token]], batch: int) -> dict[Place, int]:
    """Document -> its input tokens in a batch."""
    found: dict[Place, int] = {}
    for sample in samples[G * batch : G * batch + G]:
        for token in sample[:-1]:
            found[token.place] = found.get(token.place, 0) + 1
    return found


def drop_checkpoint(output: Path, step: int) -> None:
    from argonne.testing.launch import checkpoint

    checkpoint(output, step).unlink()


def stats_of(output: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "stats" / name).read_text().splitlines()]
