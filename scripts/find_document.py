#!/usr/bin/env python3
"""Say which steps of a run, and which of its kept checkpoints, saw a document, a text or a shard.

    scripts/find_document.py RUN --document SHARD:ROW [SHARD:ROW ...]
    scripts/find_document.py RUN --text TEXT
    scripts/find_document.py RUN --shard SHARD

RUN is a run's --output-dir; rows count from 0. --text finds the documents that hold the text. The answer
comes from the positions in the metrics and is exact: a step saw a document when a token of it was an
input or a target of a step whose update was made. Nothing is tokenized.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.errors import ConfigError
from argonne.tools.kept_run import KeptRun
from argonne.tools.script import OneLineParser, run_script

if TYPE_CHECKING:
    from argonne.config.recipe import Recipe
    from argonne.tools.document_steps import Wanted


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, metavar="RUN", help="the --output-dir of a run")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--document", nargs="+", metavar="SHARD:ROW", help="rows of shards")
    what.add_argument("--text", help="part of a document's text, as it stands there")
    what.add_argument("--shard", nargs="+", help="shards by their names")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)

    def work() -> None:
        run = KeptRun(options.run)
        recipe = run.recipe()
        for wanted in asked(options, recipe):
            report(run, recipe, wanted)

    return run_script(work)


def asked(options: argparse.Namespace, recipe: Recipe) -> list[Wanted]:
    """What is looked for; raises ConfigError."""
    from argonne.tools.document_steps import Wanted
    from argonne.tools.find_text import documents_with

    if options.shard:
        return [Wanted(shard, None) for shard in options.shard]
    if options.text is not None:
        if not options.text:
            raise ConfigError("--text is empty: give a part of a document")
        found = documents_with(recipe, options.text)
        if not found:
            raise ConfigError("no document of the run's data holds the text (--text)")
        return found
    documents = []
    for text in options.document:
        shard, _, row = text.rpartition(":")
        if not shard or not row.isdecimal():
            raise ConfigError(f"--document {text}: give SHARD:ROW")
        documents.append(Wanted(shard, int(row)))
    return documents


def report(run: KeptRun, recipe: Recipe, wanted: Wanted) -> None:
    """Print the steps and the kept checkpoints."""
    from argonne.tools.document_steps import sights
    from argonne.tools.find_text import is_document

    if wanted.row is not None and not is_document(recipe, wanted):
        raise ConfigError(
            f"{wanted.shard}:{wanted.row} is no document that the run trains on: the row is not there, "
            "empty, or held out (--document)"
        )
    name = wanted.shard if wanted.row is None else f"{wanted.shard}:{wanted.row}"
    found = list(sights(run, recipe, [wanted]))
    steps = sorted({sight.step for sight in found})
    if not steps:
        print(f"{name}: no step saw it; kept checkpoints without it: {run.kept()}")
        return
    print(f"{name}: seen in steps {', '.join(ranges(steps))}")
    for source, epoch in sorted({(sight.source, sight.epoch) for sight in found}):
        its = sorted({one.step for one in found if (one.source, one.epoch) == (source, epoch)})
        label = f"source {source}, " if source else ""
        print(f"  {label}epoch {epoch}: steps {', '.join(ranges(its))}")
    after = [str(step) for step in run.checkpoints if step >= steps[0]]
    before = [str(step) for step in run.checkpoints if step < steps[0]]
    print(f"  kept checkpoints that saw it: {', '.join(after) or 'none'}")
    print(f"  kept checkpoints without it: {', '.join(before) or 'none'}")


def ranges(steps: Sequence[int]) -> Iterator[str]:
    """Ascending numbers as ``3``, ``5 to 9``."""
    begin = 0
    for end in range(1, len(steps) + 1):
        if end == len(steps) or steps[end] != steps[end - 1] + 1:
            first, last = steps[begin], steps[end - 1]
            yield str(first) if first == last else f"{first} to {last}"
            begin = end


if __name__ == "__main__":
    sys.exit(main())
