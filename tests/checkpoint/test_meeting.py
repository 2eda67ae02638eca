"""The ranks of a save hear each other, and who has left."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from argonne.checkpoint import rows
from argonne.checkpoint.meeting import Meeting
from argonne.checkpoint.transfer import SlicePeers
from argonne.checkpoint.verifier import verify_checkpoint
from argonne.errors import CheckpointError, PeerError
from argonne.testing.checkpoint_samples import save_sample
from argonne.testing.distributed import run_ranks
from tests.checkpoint.loading import outcome


def _rank_dies(rank: int, folder: str) -> None:
    """Rank 1 disappears at its sixth gathering; rank 0 writes down what it raised."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows.CHUNK_BYTES = 1000
    gather, gatherings = Meeting.gather, [0]

    def dying(self: Meeting, value: Any) -> Any:
        gatherings[0] += 1
        if rank == 1 and gatherings[0] == 6:
            os._exit(0)
        return gather(self, value)

    Meeting.gather = dying  # type: ignore[method-assign]
    try:
        save_sample(Path(folder), rank=rank, tp_size=2)
    except PeerError as error:
        Path(folder, "told").write_text(str(error))
    os._exit(0)


def test_a_rank_that_dies_is_named_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    path, _ = save_sample(tmp_path, step=5)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank_dies, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "told").read_text().startswith("rank 1 left while a checkpoint was saved")
    assert sorted(child.name for child in tmp_path.glob("*[!.]*") if "checkpoint" in child.name) == [
        path.name
    ]
    verify_checkpoint(path)


def _meetings(rank: int, world_size: int) -> list[Any]:
    """What this rank hears: nothing, values, a stop of one rank, of two, and what follows."""
    pulses = [0]

    def pulse() -> None:
        pulses[0] += 1

    meeting = Meeting(SlicePeers(None), rank, world_size, pulse)
    heard: list[Any] = [meeting.gather(None), meeting.gather({"rank": rank} if rank else None)]
    for stopping in ((2,), (1, 2)):
        meeting = Meeting(SlicePeers(None), rank, world_size, pulse)
        if rank in stopping:
            heard.append(str(meeting.stop(f"of rank {rank}")))
        else:
            heard.append(outcome(lambda meeting=meeting: meeting.gather(None)))
            heard[-1] = (heard[-1], str(meeting.stop("never said")))
            assert heard[-1][0] == heard[-1][1]
            heard[-1] = heard[-1][0]
    return [*heard, Meeting(SlicePeers(None), rank, world_size).gather(rank), pulses[0]]


def test_all_hear_all_and_the_first_stop() -> None:
    heard = run_ranks(_meetings, 3)
    expected = [[None] * 3, [None, {"rank": 1}, {"rank": 2}], "of rank 2", "of rank 1", [0, 1, 2], 4]
    assert heard == [expected] * 3


def test_a_single_rank_meets_itself() -> None:
    meeting = Meeting(SlicePeers(None), 0, 1)
    assert meeting.gather("x") == ["x"] and meeting.gather(None) == [None]
    assert str(meeting.stop("why")) == "why" == str(meeting.stop("again"))
    assert isinstance(meeting.stop(""), CheckpointError)
