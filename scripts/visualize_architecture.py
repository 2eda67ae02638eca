"""Show a model as it lies on the ranks: text for a terminal, and a picture.

    python scripts/visualize_architecture.py --model argonne-2.0 --tp 8
    python scripts/visualize_architecture.py --model argonne-2.0 --tp 8 --sp --dp 2 --output layout.svg
    python scripts/visualize_architecture.py --checkpoint-path FILE.pth --tp 4 --output a.svg --output a.png

Shapes and slices come from the slice map that training uses. Pictures need matplotlib (the extra "plot").
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.config.presets import PRESETS, REFERENCE
from argonne.errors import ConfigError, RunError
from argonne.tools.script import OneLineParser, run_script

if TYPE_CHECKING:
    from argonne.tools.architecture_layout import Half, Layout, Weight

_RANKS_LISTED = 12


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser("Show a model as it lies on the ranks, as text and picture.")
    add = parser.add_argument
    add(
        "--model",
        "--model-config",
        metavar="NAME",
        help="an Argonne preset, a config.json, or llama, mistral, qwen2, qwen3 or gpt2 (argonne-2.0)",
    )
    add("--checkpoint-path", metavar="FILE", help="take the shape from a checkpoint")
    add(
        "--tp",
        "-N",
        "--tensor-parallel-size",
        type=int,
        default=8,
        metavar="N",
        help="ranks of a replica (8)",
    )
    add("--sp", "--sequence-parallel", action="store_true", help="sequence parallel")
    add("--dp", type=int, default=1, metavar="D", help="replicas (1)")
    add("--batch-size", type=int, default=4, help="sequences of a micro-batch, for the tables (4)")
    add("--seq-len", type=int, help="tokens of a sequence, for the tables (the context length)")
    add("--vocab-size", type=int, help="vocabulary of a preset (its own, else 151665)")
    add(
        "--output",
        action="append",
        default=[],
        metavar="FILE",
        help="a picture: .svg or .png; may be repeated",
    )
    add("--debug", action="store_true", help="tracebacks")
    options = parser.parse_args(arguments)
    for flag in ("tp", "dp", "batch_size", "seq_len", "vocab_size"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            parser.error(f"--{flag.replace('_', '-')} {value}: give at least 1")
    for output in options.output:
        if Path(output).suffix not in (".svg", ".png"):
            parser.error(f"--output {output}: give a name that ends in .svg or .png")
    return options


# ---------------------------------------------------------------------------------------------------
# Text, at most 80 columns wide


def stack_lines(layout: Layout) -> list[str]:
    """The whole model in short, with its collectives."""
    local = f"{layout.embedding.local_shape[0]:,}"
    whole = "whole, own positions" if _divides_positions(layout) else "whole on every rank"
    loss = ("2 small all-reduces", "nothing") if layout.tp_size > 1 else ("nothing", "nothing")
    rows = [
        ("", "", ("forward", "backward")),
        ("tokens", "the same on every rank", ("", "")),
        ("embedding", f"{local} of {layout.vocab_size:,} rows each", layout.embedding_exit),
        (f"{layout.num_layers} blocks", "one is shown below; each", layout.block_traffic),
        ("final norm", whole, ("", "")),
        ("head", "the embedding's slice" if layout.tied else f"{local} rows each", layout.head_entrance),
        ("loss", "on slices, nothing gathered", loss),
    ]
    lines = []
    for index, (name, where, (forward, backward)) in enumerate(rows):
        arrow = "v" if index > 1 else " "
        last, *more = textwrap.wrap(backward, 16, break_on_hyphens=False) or [""]
        lines.append(f"{arrow} {name:11}{where:28}{forward:22} {last}".rstrip())
        lines += [f"{'':64}{rest}" for rest in more]
    return ["The stack" + lines[0][9:], *lines[1:]]


def _divides_positions(layout: Layout) -> bool:
    return layout.sequence_parallel and layout.tp_size > 1


def half_lines(layout: Layout, half: Half) -> list[str]:
    """One half of a block as a flow from top to bottom."""

    def names(weights: Sequence[Weight]) -> str:
        return "  ".join(weight.short for weight in weights)

    def shapes(weights: Sequence[Weight]) -> str:
        return " ".join(f"({weight.local_shape[0]},{weight.local_shape[1]})" for weight in weights)

    entrance, leaving = layout.entrance, layout.exit
    between, _, rest = half.between.partition(":")
    what, _, counts = between.partition(" on ")
    whole = "whole on every rank" + (", own positions" if _divides_positions(layout) else "")
    head_norms = [("  ".join(half.head_norms), "whole, on local heads; gradients are summed")]
    steps = [
        (half.norm, whole),
        ("[ entrance ]", f"forward {entrance[0]}, backward {entrance[1]}"),
        (names(half.columns), f"column: {shapes(half.columns)} each"),
        *(head_norms if half.head_norms else ()),
        (what, f"{counts or rest.strip() or 'elementwise'}, nothing sent"),
        (names(half.rows), f"row: {shapes(half.rows)} each, partial sums"),
        ("[ exit ]", f"forward {leaving[0]}, backward {leaving[1]}"),
        *([(half.out_norm, whole)] if half.out_norm is not None else ()),
    ]
    lines = ["  |", "  +---------------."]
    for name, remark in steps:
        first, *more = textwrap.wrap(remark, 46, break_on_hyphens=False)
        lines.append(f"  |{name:^29} {first}")
        lines += [f"  |{'|':^29} {rest}" for rest in more] or [f"  |{'|':^29}".rstrip()]
    if not lines[-1].endswith("|"):
        lines.append(f"  |{'|':^29}".rstrip())
    lines[-1] = "  (+)<------------'"
    return lines


def slice_lines(layout: Layout, half: Half) -> list[str]:
    """Which part of each weight of one half of a block every rank holds."""
    from argonne.tools.architecture_layout import holders

    weights = (*half.columns, *half.rows)
    columns = []
    for weight in weights:
        held: dict[int, list[tuple[int, int, str]]] = {rank: [] for rank in range(layout.tp_size)}
        for (start, stop), ranks in holders(layout, weight):
            for rank in ranks:
                copied = "*" if rank != ranks[0] else ""
                if held[rank] and held[rank][-1][1:] == (start, copied):
                    start = held[rank].pop()[0]
                held[rank].append((start, stop, copied))
        cells = [weight.short, weight.cut_of, _by(weight.shape), _by(weight.local_shape)]
        runs = ["+".join(f"{start}:{stop}{copied}" for start, stop, copied in held[r]) for r in held]
        columns.append(cells + [run or "padding" for run in runs])
    labels = ["", "cut by", "unsharded", "on a rank"] + [f"rank {rank}" for rank in range(layout.tp_size)]
    widths = [max(map(len, column)) + 2 for column in columns]
    order = "inputs x outputs" if weights[0].dimension == 1 else "outputs x inputs"
    lines = [f"Slices of the {half.title}'s weights ({order}; a column layer's bias goes with its outputs)"]
    lines = textwrap.wrap(lines[0], 80)
    shown = list(range(len(labels)))
    if layout.tp_size > _RANKS_LISTED:
        shown = [*range(4 + 4), len(labels) - 1]
    for row in shown:
        cells = [f"{column[row]:>{width}}" for column, width in zip(columns, widths, strict=True)]
        if row == len(labels) - 1 and len(shown) < len(labels):
            lines.append("  ...")
        lines.append(f"  {labels[row]:10}" + "".join(cells))
    if any("*" in cell for column in columns for cell in column):
        lines.append("  * a copy of key/value heads that another rank owns; their gradients are summed")
    if any(weight.is_padded for weight in weights):
        lines.append("  slices are of equal size; the last ones are filled up with zeros")
    if any(weight.is_uneven for weight in weights):
        lines.append("  ranks hold different numbers of heads; the largest slice is shown as a rank's")
    return lines


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def cost_lines(layout: Layout) -> list[str]:
    """Tensor, pipeline and data parallelism of this model on as many ranks."""
    from argonne.tp.costs import calls, readable_bytes

    replicas = textwrap.wrap(layout.replicas() or "", 78, initial_indent="  ", subsequent_indent="  ")
    if layout.tp_size == 1:
        return ["One rank holds the whole model: nothing is divided", *replicas]
    batch = f"{layout.batch[0]} x {layout.batch[1]} tokens"
    head = f"{'weights':>13}{'states':>10}{'activations':>12}{'sent':>9}{'calls':>6}"
    lines = [f"Ways to put this model on {layout.tp_size} ranks: each rank, a step of {batch}"]
    lines.append(f"  {'':27}{head}")
    for split in layout.splits:
        lines.append(
            f"  {split.name:27}{split.parameters_per_rank:>13,}{readable_bytes(split.state_bytes):>10}"
            f"{readable_bytes(split.activation_bytes):>12}{readable_bytes(split.sent_bytes):>9}"
            f"{calls(split.step):>6}"
        )
    lines.append("  and the ranks wait for")
    lines += [f"  {split.name:27} {split.waits}" for split in layout.splits]
    lines.append("  states: fp32 weight, gradient and Adam (16 bytes a parameter); activations:")
    lines.append("  16 bit, none recomputed; calls: collectives, or a pipeline's sends")
    return [*lines, *replicas]


def text(layout: Layout) -> str:
    """Everything for a terminal."""
    lines = textwrap.wrap(layout.title, 80)
    lines += textwrap.wrap(layout.subtitle, 78, initial_indent="  ", subsequent_indent="  ")
    lines += ["", *stack_lines(layout), ""]
    lines += [f"One block; residual stream {layout.stream} on a rank"]
    for half in layout.halves:
        lines += half_lines(layout, half)
    lines += ["  |", "  v"]
    for half in layout.halves:
        lines += ["", *slice_lines(layout, half)]
    return "\n".join([*lines, "", *cost_lines(layout)])


# ---------------------------------------------------------------------------------------------------
# The run


def show(options: argparse.Namespace) -> None:
    """Print the text and write the pictures."""
    from argonne.tools.architecture_layout import lay_out
    from argonne.tools.model_sources import REFERENCE_VOCAB_SIZE, choose_source

    name, vocab_size = options.model, options.vocab_size
    if options.checkpoint_path is None:
        name = name or REFERENCE
        if name in PRESETS and vocab_size is None:
            vocab_size = PRESETS[name].get("vocab_size", REFERENCE_VOCAB_SIZE)
    source = choose_source(
        name, options.checkpoint_path, tp_size=options.tp, layers=None, vocab_size=vocab_size
    )
    model = source.build_empty()
    context = getattr(model.config, "max_position_embeddings", 4096)
    layout = lay_out(
        model,
        source.label,
        source.describe(),
        tp_size=options.tp,
        dp_size=options.dp,
        sequence_parallel=options.sp,
        batch=(options.batch_size, options.seq_len or int(context)),
    )
    print(text(layout))
    if not options.output:
        return
    print()
    try:
        from argonne.tools.architecture_picture import draw
    except ModuleNotFoundError as error:
        raise ConfigError(f"--output needs matplotlib ({error}): pip install matplotlib") from error
    for output in options.output:
        path = Path(output)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(layout, path)
        except OSError as error:
            raise RunError(
                f"--output {path} cannot be written ({error.strerror}): give another name"
            ) from error
        print(f"wrote {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run_script(lambda: show(options), debug=options.debug)


if __name__ == "__main__":
    sys.exit(main())
