"""Nothing but tensors and plain containers is unpickled, and nothing is run."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from argonne.checkpoint.safe_pickle import StorageRef, TensorRef, check_tensor
from argonne.checkpoint.verifier import verify_checkpoint
from argonne.errors import CheckpointError
from tests.checkpoint.odd_files import zip_around


class Canary:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(
    tmp_path: Path, zipped: bool, protocol: int
) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    tree = {"model_state_dict": {"embed_tokens.weight": torch.zeros(2, 2)}, "extra": Canary(canary)}
    torch.save(tree, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    with pytest.raises(
        CheckpointError, match=r"only tensors and plain containers load|torch.save did not write"
    ):
        verify_checkpoint(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # text opcodes
        b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",  # a state for our own function
        b"\x80\x02ctorch\nFloatStorage\n)R.",  # a storage type is not callable
        b"\x80\x02ctorch\nFloatStorage\n}X\x05\x00\x00\x00dtypeK\x01sb.",  # nor changeable
        b"\x80\x02}r\xff\xff\xff\xff.",  # memo entry four thousand million
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # a string longer than the file
        b"\x80\x02" + b"(" * 1000 + b".",
        b"\x80\x02" + b"]" + b"\x85" * 5000 + b".",  # nested 5000 deep
        b"\x80\x02]" + b"q\x000h\x00h\x00\x86" * 60 + b".",  # doubles with every level
        b"\x80\x02}X\x01\x00\x00\x00a",  # no end
        b"",
    ],
)
def test_damaged_and_malicious_pickles_are_refused(tmp_path: Path, pickled: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"evil\.pth: "):
        verify_checkpoint(zip_around(tmp_path / "evil.pth", pickled))


def test_numpy_values_are_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "numpy.pth"
    torch.save({"model_state_dict": {"a": torch.zeros(1)}, "loss": np.float64(1.5)}, path)
    with pytest.raises(CheckpointError, match="save plain int or float instead of numpy"):
        verify_checkpoint(path)


@pytest.mark.parametrize(
    ("offset", "size", "stride", "message"),
    [
        (0, (1 << 60, 4), (4, 1), r"needs .* elements, its storage has 16"),
        (0, (1 << 62, 1 << 62), (0, 0), "overlaps itself"),
        (0, (-1, 4), (4, 1), "impossible shape"),
        (0, (4, 4), (-4, 1), "impossible shape"),
        (-4, (2, 2), (2, 1), "impossible shape"),
        (13, (2, 2), (2, 1), "needs 17 elements"),
        (0, (4, 4), (1, 1), "overlaps itself"),
        (0, (2,), (1, 1), "impossible shape"),
        (0, (1,) * 9, (1,) * 9, "impossible shape"),
        (0, (2.0, 2), (2, 1), "not described by integers"),
        (True, (2, 2), (2, 1), "not described by integers"),
    ],
)
def test_absurd_shapes_are_refused_before_anything_is_allocated(
    offset: Any, size: Any, stride: Any, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_tensor("weight", TensorRef(StorageRef("0", torch.float32, 16), offset, size, stride))
