"""Small whole runs of the tests of this room, and how two of them are compared."""

from pathlib import Path

import torch

from argonne.testing.launch import Finished, checkpoint, metrics

STEPS, INTERVAL = 12, 4
RESTARTS = ("--standalone", "--max-restarts=1")


def assert_same_end(output: Path, unbroken: Path) -> None:
    """The last checkpoint and the metrics are those of the unbroken run, bit for bit."""
    ends = [
        torch.load(checkpoint(folder, STEPS), weights_only=True, mmap=True) for folder in (output, unbroken)
    ]
    for name, tensor in ends[1]["model_state_dict"].items():
        assert torch.equal(ends[0]["model_state_dict"][name], tensor), name
    for index, state in ends[1]["optimizer_state_dict"]["state"].items():
        for key, tensor in state.items():
            assert torch.equal(ends[0]["optimizer_state_dict"]["state"][index][key], tensor), (index, key)
    for key in ("step", "loss", "grad_norm", "stream_hash", "tokens_processed"):
        assert [line[key] for line in metrics(output)] == [line[key] for line in metrics(unbroken)]


def the_error(finished: Finished) -> str:
    (line,) = finished.errors()
    return line


def saved_steps(output: Path) -> list[int]:
    return [int(path.stem.rpartition("_")[2]) for path in (output / "pretrained").glob("*.pth")]
