"""The traffic of a rank: the committed count is that of the code, and the counter counts what it says."""

import json
from typing import Any

import pytest
import torch
from torch.utils.module_tracker import ModuleTracker

from argonne.benchmarks import traffic
from tests import ROOT


def moved(work: Any) -> dict[str, int]:
    counter = traffic.TrafficCounter(ModuleTracker())
    with counter:
        work()
    return counter.traffic.by(1)


def test_the_committed_count_is_that_of_the_code() -> None:
    """2.0 at tp 8, counted again: whoever moves more bytes has to say so here."""
    document = json.loads((ROOT / "benchmarks" / "traffic.json").read_text(encoding="utf-8"))
    micro_batch, update = traffic.counted(traffic.CASES["argonne-2.0, tp 8"])
    assert document["elementwise_bytes"] == micro_batch.total <= traffic.MOST_BYTES
    assert document["data"]["argonne-2.0, tp 8"]["update_bytes"] == update.total


@pytest.mark.slow
@pytest.mark.parametrize("name", traffic.CASES)
def test_every_committed_case_is_that_of_the_code(name: str) -> None:
    document = json.loads((ROOT / "benchmarks" / "traffic.json").read_text(encoding="utf-8"))
    micro_batch, update = traffic.counted(traffic.CASES[name])
    case = document["data"][name]
    assert (case["elementwise_bytes"], case["update_bytes"]) == (micro_batch.total, update.total)
    assert case["by_module"] == micro_batch.by(0) and case["by_op"] == micro_batch.by(1)


def test_two_depths_give_every_depth() -> None:
    case = traffic.Case(vocab_size=1000, batch_size=1, block_size=64)
    one, two, four = (traffic.count_step(case, layers) for layers in (1, 2, 4))
    for part in (0, 1):
        deeper = one[part].deeper(two[part], 4)
        assert deeper.bytes == four[part].bytes and deeper.calls == four[part].calls


def test_bytes_of_single_ops_by_hand() -> None:
    x, y = torch.zeros(3, 5), torch.zeros(3, 5, dtype=torch.bfloat16)
    assert moved(lambda: x + x) == {"add": (1 + 1) * 60}
    assert moved(lambda: x + y) == {"add": 60 + 30 + 60}
    assert moved(lambda: x + x[:, :1]) == {"add": 60 + 12 + 60}
    assert moved(lambda: x + x[:, :1].expand(3, 5)) == {"add": 60 + 12 + 60}
    assert moved(lambda: x.mul_(2.0)) == {"mul_": 60 + 60}
    assert moved(lambda: x.zero_()) == {"zero_": 60}
    assert moved(lambda: y.copy_(x)) == {"copy_": 60 + 30}
    assert moved(lambda: x.sum(dim=1)) == {"sum": 60 + 12}
    assert moved(lambda: torch.exp(x, out=y)) == {"exp": 60 + 30}
    assert moved(lambda: x.t() @ x) == {}
    assert moved(lambda: x.t()[1:].unsqueeze(0)) == {}
    rows = torch.tensor([0, 2])
    assert moved(lambda: torch.nn.functional.embedding(rows, x)) == {"embedding": 16 + 40 + 40}
    assert moved(lambda: x.scatter_(1, rows[:, None], x[:2, :1])) == {"scatter_": 16 + 8 + 8}


def test_the_update_reads_and_writes_what_adam_needs() -> None:
    """28 bytes a parameter for AdamW, 8 for clipping, 4 for the norm."""
    case = traffic.Case(vocab_size=1000, batch_size=1, block_size=64)
    _, update = traffic.count_step(case, 1)
    by_op = update.by(1)
    parameters = by_op["_foreach_norm"] // 4
    assert by_op["_foreach_mul_"] == pytest.approx(8 * parameters, rel=1e-4)
    assert by_op["_fused_adamw_"] == pytest.approx(28 * parameters, rel=1e-4)
    assert update.total == pytest.approx(40 * parameters, rel=1e-3)


def test_the_least_is_less() -> None:
    for name, case in traffic.CASES.items():
        assert traffic.least_bytes(case) < 150e9, name
