"""Memory that other processes of the node see, and no others."""

import os
import random

from argonne.checkpoint.shared_memory import Place, SharedMemory, open_place


def _changed(place: Place, **changes: object) -> Place:
    return Place(**{**vars(place), **changes})


def test_another_view_of_the_same_bytes() -> None:
    memory = SharedMemory(1 << 20)
    memory.take(4096)
    memory.memory[:5] = b"first"
    seen = open_place(memory.place)
    assert seen is not None and seen[:5] == b"first"
    seen[4095:4096] = b"x"
    memory.close()
    assert memory.memory[4095:4096] == b"x"
    assert open_place(memory.place) is None
    assert seen[:5] == b"first"  # it goes with the last that looks at it


def test_memory_of_another_process_is_out_of_reach() -> None:
    """The place of a memory in another container may be another process's file here."""
    memory, other = SharedMemory(4096), SharedMemory(4096)
    try:
        assert open_place(memory.place) is not None
        for wrong in (
            {"pid": 1 << 22},
            {"token": random.Random(1).randbytes(16)},
            {"size": 1 << 40},
            {"descriptor": other.place.descriptor},
            {"host": "b"},
        ):
            assert open_place(_changed(memory.place, **wrong)) is None, wrong
    finally:
        memory.close()
        other.close()


def test_memory_costs_nothing_until_it_is_taken() -> None:
    memory = SharedMemory(1 << 40)
    try:
        assert os.fstat(memory.place.descriptor).st_blocks * 512 <= 4096
        memory.take(1 << 20)
        assert 1 << 20 <= os.fstat(memory.place.descriptor).st_blocks * 512 <= (1 << 20) + 4096
    finally:
        memory.close()
