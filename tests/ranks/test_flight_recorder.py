"""How far a rank has come in its process groups, read from torch's recorder of collectives."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from argonne.ranks.flight_recorder import group_progress
from argonne.run.stalls import GroupWork
from tests import ROOT

LATE_RANK = """
import json, os, sys, threading, time
from pathlib import Path
from argonne.run.processes import leave
from argonne.run.traces import enable_flight_recorder
enable_flight_recorder(Path("."), os.environ)
import torch, torch.distributed as dist
from argonne.ranks.flight_recorder import recorded_groups

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mesh = dist.new_group(group_desc="mesh_tp")
feed = dist.new_group(group_desc="feed")
never = dist.new_group(group_desc="save_later")
ones = torch.ones(4)
for _ in range(3):
    dist.all_reduce(ones, group=mesh)
dist.broadcast(ones, 0, group=feed)
there = folder / "told"

def told() -> None:
    if rank == 0:
        while recorded_groups(torch.device("cpu"))[mesh.group_name].entered < 4:
            time.sleep(0.01)
    groups = recorded_groups(torch.device("cpu"))
    (folder / f"rank{rank}").write_text(json.dumps({name: vars(work) for name, work in groups.items()}))

if rank == 1:
    while not (folder / "rank0").exists():
        time.sleep(0.01)
    told()  # late: it has not entered what rank 0 waits in
else:
    telling = threading.Thread(target=told)
    telling.start()
started = torch.ops._c10d_functional.all_reduce(ones, "sum", mesh.group_name)
torch.ops._c10d_functional.wait_tensor(started)
if rank == 0:
    telling.join()
dist.barrier()
dist.destroy_process_group()
leave(0)
"""


def test_a_rank_that_has_not_entered_a_collective_is_told_from_one_that_waits_in_it(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", LATE_RANK, str(rank), str(tmp_path)], cwd=ROOT)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    waits, late = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2))
    assert sorted(work["group"] for work in waits.values()) == ["all ranks", "mesh_tp", "save_later"]
    for groups, expected in ((waits, (4, 3)), (late, (3, 3))):
        (mesh,) = (work for work in groups.values() if work["group"] == "mesh_tp")
        assert (mesh["entered"], mesh["completed"]) == expected
    (mesh,) = (work for work in waits.values() if work["group"] == "mesh_tp")
    assert mesh["kind"] == "all_reduce"
    (unused,) = (work for work in waits.values() if work["group"] == "save_later")
    assert (unused["entered"], unused["completed"]) == (0, 0)


def entry(number: int, state: str, **changes: Any) -> dict[str, Any]:
    """As torch's recorder has it of a collective over NCCL."""
    return {
        "process_group": ["3", "mesh_tp"],
        "collective_seq_id": number,
        "profiling_name": "nccl:_all_gather_base",
        "state": state,
        "retired": state == "completed",
        "is_p2p": False,
        **changes,
    }


@pytest.mark.parametrize(
    ("states", "entered", "completed"),
    [
        (["completed", "completed"], 2, 2),
        (["completed", "started", "scheduled", "scheduled"], 2, 1),  # waits in the second
        (["completed", "scheduled", "scheduled"], 1, 1),  # issued two more, and computes before them
        (["scheduled"], 0, 0),
    ],
)
def test_what_nccl_has_issued_is_entered_once_the_device_has_begun_it(
    states: list[str], entered: int, completed: int
) -> None:
    entries = [entry(number, state) for number, state in enumerate(states, 1)]
    entries += [entry(9, "started", process_group=["4", "feed"]), entry(9, "started", is_p2p=True)]
    kind = "_all_gather_base" if completed < len(states) else ""
    expected = GroupWork(group="mesh_tp", entered=entered, completed=completed, kind=kind)
    assert group_progress(entries) == {"3": expected}
