"""Memory of one process that no file backs: sampled in the background, and of a load in its own process."""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SAMPLE_SECONDS = 0.001


def anonymous_bytes() -> int:
    """This process's resident memory that no file backs: anonymous (RssAnon) and shared (RssShmem).

    Shared memory of other processes counts as far as this one has touched it; mapped pages of a checkpoint
    are not in it.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    sizes = dict(line.split(":", 1) for line in lines)
    return sum(int(sizes[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem"))


def give_back_free_memory() -> None:
    """Return what was freed to the kernel: memory used a second time would not be seen."""
    with contextlib.suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """Largest anonymous memory while the ``with`` block runs, above what there was before it."""

    def __enter__(self) -> PeakMemory:
        give_back_free_memory()
        self.before = self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())

    @property
    def extra(self) -> int:
        return self.peak - self.before

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, anonymous_bytes())


def measure_load(path: Path, kind: str, settings: dict[str, int], tp_size: int) -> dict[str, int]:
    """{"extra": bytes above the bare runtime, "slices": bytes the rank needs} of a load in a new process.

    ``kind``: "ours" (this suite's slices of rank 0), or "torch.load" (whole, then the slices are copied).
    """
    command = [sys.executable, __file__, str(path), kind, json.dumps(settings), str(tp_size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def _main() -> None:
    sys.path.insert(0, str(ROOT))
    path, kind, settings, tp_size = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
    import torch

    from argonne.checkpoint.load import load_slices
    from argonne.checkpoint.parts import open_any
    from argonne.checkpoint.view import view_of
    from argonne.tp.architectures import plan_for
    from argonne.tp.plan import build_slice_map
    from model import ArgonneConfig, ArgonneModel
    from tp_shard import take_slice

    with torch.device("meta"):
        model = ArgonneModel(ArgonneConfig(**settings))
    slice_map = build_slice_map(model, plan_for(model), tp_size)
    shapes = {name: slice_map.local_shape(name, 0) for name in slice_map.names}
    slices = 3 * sum(torch.Size(shape).numel() for shape in shapes.values()) * 4
    with PeakMemory() as memory:
        parameters = {name: torch.zeros(shape) for name, shape in shapes.items()}
        adam = {
            name: {"step": torch.zeros(()), "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}
            for name, shape in shapes.items()
        }
        if kind == "ours":
            load_slices(
                view_of(open_any(Path(path))), slice_map=slice_map, rank=0, parameters=parameters, adam=adam,
                control_group=None,
            )  # fmt: skip
        else:
            document = torch.load(path, map_location="cpu", weights_only=True)
            state = document["optimizer_state_dict"]["state"]
            for index, name in enumerate(slice_map.names):
                parameters[name].copy_(take_slice(document["model_state_dict"][name], slice_map, name, 0))
                for key in ("exp_avg", "exp_avg_sq"):
                    adam[name][key].copy_(take_slice(state[index][key], slice_map, name, 0))
    print(json.dumps({"extra": memory.extra, "slices": slices}))


if __name__ == "__main__":
    _main()
