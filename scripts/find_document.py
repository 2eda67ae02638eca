#!/usr/bin/env python3
"""Say which steps of a run, and which of its kept checkpoints, saw a document, a text or a shard.

    scripts/find_document.py RUN --document SHARD:ROW [SHARD:ROW ...]
    scripts/find_document.py RUN --text TEXT
    scripts/find_document.py RUN --shard SHARD
    scripts/find_document.py RUN --text TEXT --exclude-list FILE

RUN is a run's --output-dir; rows count from 0. --text finds the documents that hold the text. The answer
comes from the positions in the metrics and is exact: a step saw a document when a token of it was an
input or a target of a step whose update was made. Nothing is tokenized; with --no-packing, the documents that
are asked about are. --exclude-list adds the documents to a list, with the hashes of their texts, for
resume_pretrain_tensor.py or branch_run.py --exclude-documents FILE.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.errors import ConfigError, RunError
from argonne.tools.kept_run import KeptRun
from argonne.tools.script import OneLineParser, run_script

if TYPE_CHECKING:
    from argonne.config.recipe import Recipe
    from argonne.tools.document_sights import Wanted


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, metavar="RUN", help="the --output-dir of a run")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--document", nargs="+", metavar="SHARD:ROW", help="rows of shards")
    what.add_argument("--text", help="part of a document's text, as it stands there")
    what.add_argument("--shard", nargs="+", help="shards by their names")
    parser.add_argument("--exclude-list", type=Path, metavar="FILE", help="add the documents to this list")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)

    def work() -> None:
        run = KeptRun(options.run)
        recipe = run.recipe()
        if options.exclude_list is not None and options.shard:
            raise ConfigError("--exclude-list takes documents: give --document or --text, not --shard")
        found: list[str] = []
        for wanted in asked(options, recipe):
            found += report(run, recipe, wanted)
        if options.exclude_list is not None:
            print(added(options.exclude_list, found))

    return run_script(work)


def asked(options: argparse.Namespace, recipe: Recipe) -> list[Wanted]:
    """What is looked for; raises ConfigError."""
    from argonne.tools.document_sights import Wanted
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


def report(run: KeptRun, recipe: Recipe, wanted: Wanted) -> list[str]:
    """Print the steps and the kept checkpoints; the lines of a list that names the document."""
    from argonne.data.excluded import list_line
    from argonne.tools.document_steps import sights
    from argonne.tools.find_text import sources_with

    lines = []
    if wanted.row is not None:
        texts = sources_with(recipe, wanted)
        if not texts:
            raise ConfigError(
                f"{wanted.shard}:{wanted.row} is no document that the run trains on: the row is not there, "
                "empty, or held out (--document)"
            )
        lines = [list_line(source, wanted.shard, wanted.row, text) for source, text in texts.items()]
    name = wanted.shard if wanted.row is None else f"{wanted.shard}:{wanted.row}"
    name = f"{wanted.source}: {name}" if wanted.source else name
    found = list(sights(run, recipe, [wanted]))
    steps = sorted({sight.step for sight in found})
    if not steps:
        print(f"{name}: no step saw it; kept checkpoints without it: {run.kept()}")
        return lines
    print(f"{name}: seen in steps {', '.join(ranges(steps))}")
    for source, epoch in sorted({(sight.source, sight.epoch) for sight in found}):
        its = sorted({one.step for one in found if (one.source, one.epoch) == (source, epoch)})
        label = f"source {source}, " if source else ""
        print(f"  {label}epoch {epoch}: steps {', '.join(ranges(its))}")
    after = [str(step) for step in run.checkpoints if step >= steps[0]]
    before = [str(step) for step in run.checkpoints if step < steps[0]]
    print(f"  kept checkpoints that saw it: {', '.join(after) or 'none'}")
    print(f"  kept checkpoints without it: {', '.join(before) or 'none'}")
    return lines


def added(path: Path, lines: Sequence[str]) -> str:
    """Add the lines that a list has not yet; what to say of it. Raises RunError."""
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        new = [line for line in dict.fromkeys(lines) if line not in before.splitlines()]
        end = "" if not before or before.endswith("\n") else "\n"
        with path.open("a", encoding="utf-8") as file:
            file.write(end + "".join(f"{line}\n" for line in new))
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be written (--exclude-list): {error}: name another file") from error
    return f"{path}: {len(new)} documents added, {len(lines) - len(new)} were there"


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
