"""What a stalled run leaves behind in ``stats/``: the stacks of its threads, the last collectives."""

import contextlib
import faulthandler
from collections.abc import MutableMapping
from pathlib import Path

from argonne.files import OutputFolder


def enable_flight_recorder(output_dir: Path, environ: MutableMapping[str, str]) -> None:
    """Ask PyTorch to keep its last collectives and write them to ``stats/`` when one times out.

    To be called before the process groups are made; what the user has set stays.
    """
    environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    # An event at each collective's start shows whether this rank's GPU has come to it.
    environ.setdefault("TORCH_NCCL_ENABLE_TIMING", "1")
    environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(OutputFolder(output_dir).flight_recorder_prefix))


def dump_stacks(output_dir: Path, rank: int) -> None:
    """Write the stacks of all threads to ``stats/``; a disk that refuses costs the file only."""
    with contextlib.suppress(OSError):
        with OutputFolder(output_dir).stack(rank).open("w") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
