"""The formula of elementwise bytes against the counter of the real step, at several shapes and degrees."""

import json
from typing import Any

import pytest

from argonne.benchmarks.traffic import Case, counted
from argonne.config.derived import width_multiple
from argonne.config.options import ParallelOptions
from argonne.tp.costs import ModelOutline
from argonne.tp.elementwise import UPDATE_BYTES, elementwise_bytes
from argonne.tp.plan_memory import Layout, LayoutSizes
from argonne.tp.shape_only import shape_only
from tests import ROOT

COUNTED: dict[str, dict[str, Any]] = json.loads((ROOT / "benchmarks" / "traffic.json").read_text())["data"]


def sizes_of(case: Case, **more: Any) -> LayoutSizes:
    model = shape_only({**case.settings(), "head_dim": case.settings().get("head_dim")})
    layout = Layout(
        tp_size=case.tp_size, batch_size=case.batch_size, block_size=case.block_size,
        sequence_parallel=case.sequence_parallel, recomputation=case.recomputation, **more,
    )  # fmt: skip
    pad_to = width_multiple(ParallelOptions(), on_gpu=True)  # as the counter's runs
    return LayoutSizes(ModelOutline.of(model, pad_to), model, layout)


@pytest.mark.parametrize("name", COUNTED)
def test_the_formula_gives_what_was_counted(name: str) -> None:
    """The counts are the benchmark's, which CI counts again."""
    counts = COUNTED[name]
    case = Case(**{key: counts[key] for key in Case.__dataclass_fields__})
    sizes = sizes_of(case)
    assert elementwise_bytes(sizes) == pytest.approx(counts["elementwise_bytes"], rel=0.02)
    assert sizes.held * UPDATE_BYTES == pytest.approx(counts["update_bytes"], rel=0.01)


SHAPES = {
    "tp 4": Case(tp_size=4),
    "tp 2, sequence parallel": Case(tp_size=2, sequence_parallel=True),
    "tp 1": Case(tp_size=1, batch_size=1),
    "one sequence, sequence parallel": Case(batch_size=1, sequence_parallel=True),
    "short blocks": Case(block_size=1024),
    "more sequences": Case(batch_size=8),
    "full": Case(recomputation="full"),
    "full, sequence parallel": Case(recomputation="full", sequence_parallel=True),
    "3.0, tp 4": Case(preset="argonne-3.0", tp_size=4, block_size=1024),
    "2.5, tp 7": Case(preset="argonne-2.5", tp_size=7, block_size=1024),
    "4.0, tp 1, full": Case(preset="argonne-4.0", tp_size=1, recomputation="full"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_and_degrees_within_five_per_cent(name: str) -> None:
    micro_batch, update = counted(SHAPES[name])
    sizes = sizes_of(SHAPES[name])
    assert elementwise_bytes(sizes) == pytest.approx(micro_batch.total, rel=0.05)
    assert sizes.held * UPDATE_BYTES == pytest.approx(update.total, rel=0.05)


def test_replicas_and_accumulation_add_copies() -> None:
    alone = elementwise_bytes(sizes_of(Case(tp_size=2)))
    sharded = elementwise_bytes(sizes_of(Case(tp_size=2), dp_size=4))
    kept = elementwise_bytes(sizes_of(Case(tp_size=2), dp_size=4, keeps_gathered=True))
    accumulated = elementwise_bytes(sizes_of(Case(tp_size=2), accumulation=2))
    assert kept < sharded and alone < accumulated
