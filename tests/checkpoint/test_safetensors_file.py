"""One safetensors file in place, against the library that wrote it, and every way its header can be wrong."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from argonne.checkpoint.safetensors_file import SafetensorsFile
from argonne.errors import CheckpointError


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with this header, well formed or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(first: int, last: int, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": [first, last],
    }


def test_tensors_that_the_library_wrote(tmp_path: Path) -> None:
    written = {
        "b.weight": torch.randn(3, 5),
        "a.weight": torch.randn(4, 2).to(torch.bfloat16),
        "c.weight": torch.randn(7).to(torch.float16),
        "empty": torch.empty(0, 4),
    }
    path = tmp_path / "model.safetensors"
    save_file(written, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert file.tensors.keys() == written.keys() and file.size == path.stat().st_size
    for name, tensor in written.items():
        view = file.view(file.tensors[name].ref)
        assert view.shape == tuple(tensor.shape) and view.dtype.itemsize == tensor.element_size()
        assert view.tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert file.tensors[name].ref.dtype == tensor.dtype
    with pytest.raises(ValueError, match="read-only"):
        file.view(file.tensors["b.weight"].ref)[0, 0] = 1


def test_the_identity_is_of_header_and_size(tmp_path: Path) -> None:
    data = np.zeros(2, "<f4").tobytes()
    one = SafetensorsFile(write(tmp_path / "1", {"a": entry(0, 8)}, data)).identity
    again = SafetensorsFile(write(tmp_path / "2", {"a": entry(0, 8)}, data)).identity
    other = SafetensorsFile(write(tmp_path / "3", {"b": entry(0, 8)}, data)).identity
    assert one == again != other and len(one) == 64


def test_order_in_the_header_means_nothing(tmp_path: Path) -> None:
    data = np.arange(4, dtype="<f4").tobytes()
    file = SafetensorsFile(write(tmp_path / "f", {"b": entry(8, 16), "a": entry(0, 8)}, data))
    assert file.view(file.tensors["b"].ref).view("<f4").tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"{", "its header is damaged"),
        (b"[]", "no JSON object"),
        (b'{"a": 1, "a": 2}', "a name is there twice"),
        (b"\xff\xfe", "its header is damaged"),
        (b"[" * 100_000, "its header is damaged"),
        ({"a": 5}, "tensor a has no description"),
        ({"a": entry(0, 8, dtype="I64")}, "tensor a holds 'I64', not one of F32, BF16, F16"),
        ({"a": entry(0, 8, dtype=None)}, "tensor a holds None"),
        ({"a": entry(0, 8, shape=[-2])}, "tensor a has shape"),
        ({"a": entry(0, 8, shape=[2.0])}, "tensor a has shape"),
        ({"a": entry(0, 8, shape=[True, 2])}, "tensor a has shape"),
        ({"a": entry(0, 8, shape="2")}, "tensor a has shape"),
        ({"a": entry(0, 8, shape=(3,))}, "tensor a of shape [3] lies in 8 bytes"),
        ({"a": entry(8, 16)}, "tensor a begins at byte 8, where 0 is due"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, "tensor b begins at byte 4, where 8 is due"),
        ({"a": entry(0, 8), "b": entry(8, 16)}, "bytes where its tensors need"),
        ({}, "bytes where its tensors need"),
    ],
)
def test_a_header_that_is_wrong(header: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(write(tmp_path / "f", header, bytes(8)))
    assert said in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 bytes: cut, or not safetensors"),
        (b"PK\3\4", "4 bytes: cut, or not safetensors"),
        (struct.pack("<Q", 1 << 60) + b"{}", "cut, or not safetensors"),
        (struct.pack("<Q", 3) + b"{}", "10 bytes and a header of 3"),
    ],
)
def test_a_file_that_is_cut_or_another(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        SafetensorsFile(tmp_path / "f")
    with pytest.raises(CheckpointError, match="no such file"):
        SafetensorsFile(tmp_path / "absent")
