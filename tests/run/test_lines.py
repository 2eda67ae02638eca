"""Lines of the console: the header, the places in the data, the pace and the clock."""

from typing import Any

import pytest

from argonne.run import lines
from argonne.run.lines import Pace, RunFacts, bar_text, clock_text, header_lines, place_lines, shard_line

FACTS: dict[str, Any] = {
    "model": "tiny",
    "parameters": 1_234_567,
    "tp_size": 2,
    "dp_size": 3,
    "device": "cpu",
    "precision": "fp32",
    "batch_size": 4,
    "accumulation": 5,
    "block_size": 100,
    "data": "3 shards",
    "checkpoint": "from scratch",
    "output_dir": "out",
}
PLACE = {"file_name": "folder/a.parquet", "current_file_idx": 2, "position_in_file": 7, "chunk_offset": 1}


def test_the_header_multiplies_the_batch_out() -> None:
    found = header_lines(RunFacts(**FACTS))
    assert found == [
        "Model: tiny, 1,234,567 parameters",
        "Layout: tensor parallel 2 x data parallel 3 on cpu, fp32",
        "Batch: 60 sequences of 100 tokens = 6,000 tokens a step (4 x 5 accumulated x 3 replicas)",
        "Data: 3 shards",
        "Start: from scratch",
        "Output: out",
    ]


def test_of_a_save_is_said_what_is_known_and_extra_lines_follow() -> None:
    def last(**more: Any) -> list[str]:
        return header_lines(RunFacts(**FACTS, **more))[6:]

    assert last(save_bytes=2_340_000_000) == ["Save: 2.34 GB a checkpoint"]
    assert last(save_bytes=10**9, save_seconds=41.6, extra={"Loss": "chunked"}) == [
        "Save: 1.00 GB a checkpoint, about 42 s",
        "Loss: chunked",
    ]
    full = last(save_bytes=10**9, save_seconds=41.6, save_share=0.0123)
    assert full == ["Save: 1.00 GB a checkpoint, about 42 s, 1.2% of the time"]
    assert last(save_seconds=41.6) == []


def test_the_place_in_a_shard() -> None:
    assert shard_line(PLACE) == "Shard: a.parquet | File index: 2 | Position: 7 | Chunk: 1"
    assert shard_line({}) == "Shard: none | File index: 0 | Position: 0 | Chunk: 0"
    assert "| Position: 9 |" in shard_line({"row": 9})
    assert place_lines(PLACE, {}, {}) == [shard_line(PLACE)]


def test_of_a_mixture_each_source_has_a_line() -> None:
    position = {"sources": {"web": {**PLACE, "epoch": 1}, "code": {"epoch": 0}}}
    web, code = place_lines(position, {"web": 2.5}, {"web": 12_000})
    assert web == f"Source: web | Loss: 2.5000 | Samples: 12,000 | Epoch: 1 | {shard_line(PLACE)}"
    assert code == f"Source: code | Loss: none yet | Samples: 0 | Epoch: 0 | {shard_line({})}"


def test_the_pace_is_from_end_to_end_of_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(lines.time, "monotonic", lambda: clock[0])
    pace = Pace()
    assert pace.after(3.0) == 3.0  # nothing to compare with yet
    clock[0] += 5.0
    assert pace.after(3.0) == 5.0  # with what lay between the steps
    clock[0] += 7.0
    assert pace.after(3.0) == 6.0
    for _ in range(Pace.STEPS):
        clock[0] += 2.0
        found = pace.after(1.0)
    assert found == 2.0  # the slow ones are forgotten


def test_behind_the_bar() -> None:
    line = {"loss": 2.34567, "tokens_per_second": 12345.6}
    assert bar_text(line, stage="", seconds_left=61) == "loss 2.3457, 12,346 tokens/s, ETA 0:01:01"
    with_more = bar_text({**line, "mfu": 0.4567}, stage="anneal", seconds_left=3600)
    assert with_more == "loss 2.3457, 12,346 tokens/s, MFU 45.7%, anneal ETA 1:00:00"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00"),
        (59.4, "0:00:59"),
        (59.6, "0:01:00"),
        (3599.6, "1:00:00"),
        (86_399, "23:59:59"),
        (86_400, "1d 0:00:00"),
        (200_000, "2d 7:33:20"),
    ],
)
def test_the_clock(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text
