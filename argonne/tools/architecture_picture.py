"""The architecture script's picture: the stack, one block with its slices and collectives, a table."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from argonne.tools.architecture_layout import Half, Layout, Weight, holders
from argonne.tp.costs import calls, readable_bytes

_WIDTH, _HEIGHT = 170.0, 128.5
"""Units of a tenth of an inch."""
_INK, _FAINT, _PAPER = "#1f2430", "#6b7280", "#ffffff"
_WHOLE, _LOCAL, _EDGE = "#eef0f3", "#fff7e0", "#9aa1ac"
_COLLECTIVE, _LOCAL_STEP = "#c2410c", "#9aa1ac"
_RANKS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#9c755f")
_SMALLEST = 5.0


class Canvas:
    """Boxes, arrows and text that is made smaller rather than cut, in units of a tenth of an inch."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(_WIDTH / 10, _HEIGHT / 10), facecolor=_PAPER)
        self._agg = FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self.axes.set_xlim(0, _WIDTH)
        self.axes.set_ylim(0, _HEIGHT)
        self.axes.axis("off")

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: float = 9,
        *,
        width: float | None = None,
        align: str = "center",
        color: str = _INK,
        bold: bool = False,
    ) -> None:
        """Centred vertically on y; shrunk until it is at most ``width`` units wide."""
        drawn = self.axes.text(
            x,
            y,
            words,
            fontsize=size,
            ha=align,
            va="center",
            color=color,
            weight="bold" if bold else "normal",
        )
        if width is None:
            return
        extent = drawn.get_window_extent(self._agg.get_renderer()).width / self.figure.dpi * 10
        if extent > width:
            drawn.set_fontsize(max(_SMALLEST, size * width / extent))

    def box(self, x: float, y: float, width: float, height: float, color: str, edge: str = _EDGE) -> None:
        """A rounded box; (x, y) is its lower left corner."""
        style = "round,pad=0,rounding_size=0.8"
        self.axes.add_patch(
            FancyBboxPatch(
                (x, y), width, height, boxstyle=style, facecolor=color, edgecolor=edge, linewidth=0.9
            )
        )

    def bar(self, x: float, y: float, width: float, height: float, color: str) -> None:
        self.axes.add_patch(
            Rectangle((x, y), width, height, facecolor=color, edgecolor=_PAPER, linewidth=0.6)
        )

    def frame(self, x: float, y: float, width: float, height: float) -> None:
        self.axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=_EDGE, linewidth=0.9))

    def line(self, points: Sequence[tuple[float, float]], color: str = _FAINT, width: float = 1.1) -> None:
        self.axes.plot(*zip(*points, strict=True), color=color, linewidth=width, solid_capstyle="round")

    def arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.axes.add_patch(
            FancyArrowPatch(
                start,
                end,
                arrowstyle="-|>",
                mutation_scale=9,
                color=_FAINT,
                linewidth=1.1,
                shrinkA=0,
                shrinkB=0,
            )
        )


def _rank_color(rank: int) -> str:
    return _RANKS[rank % len(_RANKS)]


def _block_rows(num_layers: int, each: str) -> list[tuple[str, str]]:
    """Name and remark of the blocks that the stack shows: the first, what stands for the others, the last."""
    if num_layers < 3:
        return [("block 0", "shown on the right"), ("block 1", each)][:num_layers]
    return [("block 0", "shown on the right"), ("...", each), (f"block {num_layers - 1}", "")]


def _stack(canvas: Canvas, layout: Layout, x: float, top: float, width: float) -> None:
    """The whole model from tokens to loss, with what is communicated."""
    canvas.text(x, top, "The stack", 12, align="left", bold=True)
    if layout.tp_size > 1:
        words = "collectives: forward / backward"
        canvas.text(x + width, top, words, 8.5, align="right", color=_COLLECTIVE)
    local = layout.embedding.local_shape[0]
    head = "the embedding's slice" if layout.tied else f"{local:,} rows a rank"
    norm = "whole; own positions" if layout.sequence_parallel else "whole on every rank"
    forward, backward = layout.block_traffic
    each = "" if layout.tp_size == 1 else f"each block: {forward} / {backward}"
    blocks = _block_rows(layout.num_layers, each)
    padded = ", padded" if layout.embedding.is_padded else ""
    steps: list[tuple[str, str, str, str]] = [
        ("tokens", "the same on every rank", _PAPER, ""),
        (layout.embedding.short, f"{local:,} of {layout.vocab_size:,} rows a rank{padded}", _LOCAL,
         _collective(layout.embedding_exit)),
        *((name, remark, _LOCAL, "") for name, remark in blocks),
        (layout.final_norm.rpartition(".")[2], norm, _WHOLE, _collective(layout.head_entrance)),
        (layout.plan.head, head, _LOCAL, ""),
        ("loss", "on vocabulary slices", _LOCAL, ""),
    ]  # fmt: skip
    height, gap = 5.4, 3.2
    y = top - 4 - height
    for index, (name, remark, color, after) in enumerate(steps):
        canvas.box(x, y, width, height, color)
        middle = y + height / 2
        canvas.text(x + width / 2, middle + (1.1 * bool(remark)), name, 10, width=width - 2)
        if remark:
            color = _COLLECTIVE if remark == each else _FAINT
            canvas.text(x + width / 2, middle - 1.3, remark, 8.5, width=width - 2, color=color)
        if index < len(steps) - 1:
            canvas.arrow((x + width / 2, y), (x + width / 2, y - gap))
            if after:
                canvas.text(
                    x + width / 2 + 1,
                    y - gap / 2,
                    after,
                    8.5,
                    align="left",
                    color=_COLLECTIVE,
                    width=width / 2 + 1,
                )
        y -= height + gap
    if layout.tp_size > 1:
        canvas.text(
            x + width / 2, y + gap + 1, "2 small all-reduces, logits never gathered", 8.5,
            width=width + 2, color=_COLLECTIVE,
        )  # fmt: skip


def _collective(pair: tuple[str, str]) -> str:
    """ "all-reduce / identity", or nothing where neither direction communicates."""
    return "" if pair == ("identity", "identity") else f"{pair[0]} / {pair[1]}"


def _weight(canvas: Canvas, layout: Layout, weight: Weight, x: float, y: float, width: float) -> None:
    """A weight as a rectangle cut into the ranks' slices; (x, y) is the lower left corner, 13 units high."""
    height = 13.0
    extent = weight.shape[weight.dimension]
    for (start, stop), ranks in holders(layout, weight):
        low, high = start / extent, stop / extent
        color = _rank_color(ranks[0])
        label = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        if weight.dimension == 0:
            canvas.bar(x, y + height * (1 - high), width, height * (high - low), color)
            thick, room = height * (high - low), width
            place = (x + width / 2, y + height * (1 - (low + high) / 2))
        else:
            canvas.bar(x + width * low, y, width * (high - low), height, color)
            thick, room = width * (high - low), 0.8 * width * (high - low)
            place = (x + width * (low + high) / 2, y + height / 2)
        if thick >= 1.0:
            canvas.text(*place, label, min(8.0, 5.6 * thick), color=_PAPER, bold=True, width=room)
    canvas.frame(x, y, width, height)
    shape = " x ".join(map(str, weight.shape))
    local = " x ".join(map(str, weight.local_shape))
    kept = ", padded" if weight.is_padded else ", copies" if weight.is_copied else ""
    canvas.text(x + width / 2, y + height + 3.1, weight.short, 9.5, bold=True, width=width + 3)
    canvas.text(x + width / 2, y + height + 1.2, shape, 8.5, width=width + 3, color=_FAINT)
    most = "at most " if weight.is_uneven else ""
    canvas.text(x + width / 2, y - 1.5, f"{most}{local} a rank{kept}", 8.5, width=width + 3.2)


def _gate(canvas: Canvas, name: str, pair: tuple[str, str], x: float, y: float, width: float) -> None:
    """An entrance or exit: what it does forward and backward."""
    talks = pair != ("identity", "identity")
    canvas.box(x, y, width, 4.2, "#fdeee4" if talks else _WHOLE, _COLLECTIVE if talks else _EDGE)
    canvas.text(x + 2, y + 2.1, name, 9.5, align="left", bold=True, color=_COLLECTIVE if talks else _FAINT)
    canvas.text(
        x + width - 2,
        y + 2.1,
        f"forward: {pair[0]}     backward: {pair[1]}",
        8.5,
        align="right",
        width=width - 14,
    )


def _half(canvas: Canvas, layout: Layout, half: Half, x: float, top: float, width: float) -> None:
    """Attention or MLP, from the residual stream at the top back into it at the bottom."""
    canvas.text(x, top, f"One block: {half.title}", 12, align="left", bold=True)
    left, flow, inner = x + 1, x + 5, width - 5
    middle = flow + inner / 2
    canvas.text(
        x + 0.2, top - 3.4, f"residual stream {layout.stream} on a rank", 8.5, align="left", color=_FAINT
    )
    y = top - 6
    start = y
    canvas.line([(left, y), (middle, y)])
    canvas.arrow((middle, y), (middle, y - 2.2))
    y -= 6.6
    canvas.box(middle - 14, y, 28, 4.4, _WHOLE)
    norm = "a slice of the positions" if layout.sequence_parallel and layout.tp_size > 1 else "all positions"
    canvas.text(middle, y + 2.2, f"{half.norm}: whole weight, {norm}", 8.5, width=27.4)
    canvas.arrow((middle, y), (middle, y - 2.2))
    y -= 6.4
    _gate(canvas, "entrance", layout.entrance, flow, y, inner)
    canvas.arrow((middle, y), (middle, y - 2.2))
    y -= 20.5
    count = len(half.columns)
    each = min(14.0, (inner - 4.0 * (count - 1)) / count)
    first = middle - (count * each + (count - 1) * 4.0) / 2
    for index, weight in enumerate(half.columns):
        _weight(canvas, layout, weight, first + index * (each + 4.0), y, each)
    canvas.arrow((middle, y - 2.8), (middle, y - 4.6))
    y -= 9.0
    canvas.box(middle - 22, y, 44, 4.4, _LOCAL)
    raised = 1.0 if half.head_norms else 0.0
    if half.head_norms:
        canvas.text(middle, y + 3.2, f"{', '.join(half.head_norms)} on local heads, then", 8.5, width=42)
    canvas.text(middle, y + 2.2 - raised, f"{half.between}, no communication", 8.5, width=42)
    canvas.arrow((middle, y), (middle, y - 1.8))
    y -= 19.6
    for weight in half.rows:
        _weight(canvas, layout, weight, middle - 10, y, 20)
    canvas.arrow((middle, y - 2.8), (middle, y - 4.4))
    y -= 8.6
    _gate(canvas, "exit", layout.exit, flow, y, inner)
    bottom = y - 3.2
    canvas.line([(left, start), (left, bottom + 1.2)], width=2.2)
    canvas.line([(middle, y), (middle, bottom)])
    canvas.arrow((middle, bottom), (left + 1.4, bottom))
    if half.out_norm is not None:
        centre = (left + middle) / 2
        canvas.box(centre - 7, bottom - 1.4, 14, 2.8, _WHOLE)
        canvas.text(centre, bottom, half.out_norm, 8.5, width=13.4)
    canvas.text(left, bottom, "+", 12, bold=True)
    canvas.arrow((left, bottom - 1.2), (left, bottom - 3.2))


_COLUMNS = (
    ("weights", 62.0),
    ("states", 77.0),
    ("activations", 92.0),
    ("sent", 107.0),
    ("collectives", 122.0),
)


def _table(canvas: Canvas, layout: Layout, x: float, top: float) -> None:
    """Ways to put the model on as many ranks."""
    batch = f"{layout.batch[0]} x {layout.batch[1]} tokens"
    title = f"Ways to put this model on {layout.tp_size} ranks (each rank, a step of {batch})"
    canvas.text(x, top, title, 12, align="left", bold=True)
    y = top - 3.4
    for name, right in _COLUMNS:
        canvas.text(right, y, name, 8.5, align="right", color=_FAINT)
    canvas.text(126, y, "waits for", 8.5, align="left", color=_FAINT)
    used = "tensor + sequence parallel" if layout.sequence_parallel else "tensor parallel (here)"
    for split in layout.splits:
        y -= 2.5
        bold = split.name == used
        values = (
            f"{split.parameters_per_rank:,}",
            readable_bytes(split.state_bytes),
            readable_bytes(split.activation_bytes),
            readable_bytes(split.sent_bytes),
            str(calls(split.step)),
        )
        canvas.text(x, y, split.name, 9, align="left", bold=bold, width=36)
        for (_, right), value in zip(_COLUMNS, values, strict=True):
            canvas.text(right, y, value, 9, align="right", bold=bold)
        canvas.text(126, y, split.waits, 8.5, align="left", width=_WIDTH - 129)
    note = (
        "states: fp32 weight, gradient and Adam, 16 bytes a parameter; activations: 16 bit, none recomputed"
    )
    canvas.text(x, y - 3, note, 8.5, align="left", color=_FAINT)
    _replicas(canvas, layout, x, y - 5.8)


def _replicas(canvas: Canvas, layout: Layout, x: float, y: float) -> None:
    """What data parallelism adds."""
    for line, words in enumerate(textwrap.wrap(layout.replicas() or "", 170)):
        canvas.text(x, y - 2.3 * line, words, 9, align="left")


def _legend(canvas: Canvas, layout: Layout, right: float, y: float) -> None:
    """Colours of the ranks."""
    shown = min(layout.tp_size, len(_RANKS))
    x = right - 4.4 * shown
    for rank in range(shown):
        canvas.bar(x + 4.4 * rank, y - 1.1, 3.6, 2.2, _rank_color(rank))
        canvas.text(x + 4.4 * rank + 1.8, y, str(rank), 8, color=_PAPER, bold=True)
    more = " (colours repeat)" if layout.tp_size > shown else ""
    canvas.text(x - 1.5, y, f"tensor-parallel rank{more}", 9, align="right", color=_FAINT)


def draw(layout: Layout, path: Path) -> None:
    """Write the picture; the suffix, .svg or .png, decides the format."""
    matplotlib.rcParams["svg.fonttype"] = "path"
    paint(layout).figure.savefig(path, dpi=130, facecolor=_PAPER)


def paint(layout: Layout) -> Canvas:
    """The whole picture."""
    canvas = Canvas()
    canvas.text(5, _HEIGHT - 4.5, layout.title, 17, align="left", bold=True, width=100)
    canvas.text(5, _HEIGHT - 8, layout.subtitle, 10, align="left", color=_FAINT, width=_WIDTH - 10)
    _legend(canvas, layout, _WIDTH - 5, _HEIGHT - 4.5)
    top = _HEIGHT - 13
    _stack(canvas, layout, 5, top, 34)
    _half(canvas, layout, layout.halves[0], 50, top, 56)
    _half(canvas, layout, layout.halves[1], 112, top, 53)
    if layout.tp_size > 1:
        _table(canvas, layout, 5, 28)
    else:
        canvas.text(5, 28, "One rank holds the whole model: nothing is divided", 12, align="left", bold=True)
        _replicas(canvas, layout, 5, 25)
    return canvas
