"""Tensors read in place: any rectangle, and every damaged or odd file refused."""

import io
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from argonne.checkpoint.archive import RecordSpan, read_archive_index
from argonne.checkpoint.tensor_file import TensorFile, read_rectangle
from argonne.checkpoint.verifier import verify_checkpoint
from argonne.errors import CheckpointError
from tests import FIXTURES
from tests.checkpoint.odd_files import sample_tree, zip_around


@pytest.mark.parametrize("zipped", [True, False])
def test_any_rectangle_of_any_layout_of_memory(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(7 * 5 * 4, dtype=torch.float32).reshape(7, 5, 4)
    tensors = {
        "plain": base,
        "transposed": base.transpose(0, 2),
        "slice": base[2:6, 1:4],
        "strided": base[::2, :, ::3],
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "double": base.double(),
        "integers": base.long(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base[0].clone()),
    }
    path = tmp_path / "any.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    file = TensorFile(path)
    rng = random.Random(3)
    for name, tensor in tensors.items():
        source = file.source(file.tree[name])
        for _ in range(10):
            start = tuple(rng.randint(0, extent) for extent in tensor.shape)
            size = tuple(rng.randint(0, extent - at) for at, extent in zip(start, tensor.shape, strict=True))
            expected = tensor.detach()[
                tuple(slice(at, at + extent) for at, extent in zip(start, size, strict=True))
            ]
            assert torch.equal(read_rectangle(source, start, size), expected.float()), name
            assert torch.equal(read_rectangle(source, start, size, tensor.dtype), expected), name
    with pytest.raises(CheckpointError, match="does not lie in a tensor"):
        read_rectangle(file.source(file.tree["plain"]), (6, 0, 0), (2, 5, 4))


def test_storages_must_be_what_their_records_hold(tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    with pytest.raises(CheckpointError, match=r"needs 4000000000000 bytes, its record has 16"):
        TensorFile(zip_around(path, sample_tree(numel=10**12), {"archive/data/0": b"\0" * 16}))
    with pytest.raises(CheckpointError, match="record 0, which is not there"):
        TensorFile(zip_around(path, sample_tree()))
    with pytest.raises(CheckpointError, match="impossible name"):
        TensorFile(zip_around(path, sample_tree(key="../../etc/passwd")))


@pytest.mark.parametrize("name", ["/etc/passwd", "archive/../../x", "archive\\x", "c:/x", "other/data/0"])
def test_record_names_that_leave_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"leaves the archive|no single archive folder"):
        TensorFile(zip_around(tmp_path / "odd.pth", sample_tree(), {name: b"\0" * 16}))


def test_compressed_and_overlapping_records_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", sample_tree() + b" " * 1000)
    with pytest.raises(CheckpointError, match="is compressed"):
        TensorFile(path)
    zip_around(path, sample_tree(), {"archive/data/0": b"\0" * 16, "archive/data/1": b"\0" * 16})
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        first, second = archive.getinfo("archive/data/0"), archive.getinfo("archive/data/1")
    entry = data.rindex(b"archive/data/1") - 4
    assert struct.unpack("<L", data[entry : entry + 4])[0] == second.header_offset
    path.write_bytes(data[:entry] + struct.pack("<L", first.header_offset) + data[entry + 4 :])
    with pytest.raises(CheckpointError, match="overlap"):
        TensorFile(path)


def test_a_link_as_record_is_bytes_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "link.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", sample_tree())
        link = zipfile.ZipInfo("archive/data/0")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd\0\0\0\0\0")
    file = TensorFile(path)
    values = read_rectangle(file.source(file.tree["model_state_dict"]["embed_tokens.weight"]), (0,), (4,))
    assert values.numpy().tobytes() == b"/etc/passwd\0\0\0\0\0"


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    for content, message in (
        (b"hello", "5 bytes that torch.save did not write"),
        (pickle.dumps({"a": 1}), "torch.save did not write"),
        (b"PK\x03\x04" + b"\0" * 50, "cut or damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            TensorFile(path)
    with pytest.raises(CheckpointError, match="no such file"):
        TensorFile(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        TensorFile(tmp_path)


def test_a_legacy_file_is_refused_when_cut_anywhere(tmp_path: Path) -> None:
    data = (FIXTURES / "streaming_checkpoint_step_25.pth").read_bytes()
    rng = random.Random(4)
    path = tmp_path / "cut.pth"
    for length in [0, 1, 10, 300, len(data) - 1] + [rng.randrange(len(data)) for _ in range(200)]:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pth"):
            verify_checkpoint(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match="where its tensors need"):
        verify_checkpoint(path)


def test_flips_in_a_torch_zip_files_tensors_are_found(tmp_path: Path) -> None:
    path = tmp_path / "streaming_checkpoint_step_3.pth"
    weights = OrderedDict({"embed_tokens.weight": torch.randn(40, 30), "norm.weight": torch.ones(30)})
    torch.save({"model_state_dict": weights, "global_step": 3}, path)
    data = path.read_bytes()
    buffer = io.BytesIO(data)
    with zipfile.ZipFile(buffer) as archive:
        info = archive.getinfo("streaming_checkpoint_step_3/data/0")
    begin = data.index(weights["embed_tokens.weight"].numpy().tobytes()[:64])
    rng = random.Random(8)
    for _ in range(60):
        position = begin + rng.randrange(info.file_size)
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(CheckpointError, match="does not match its checksum"):
            verify_checkpoint(path)


def _read_all(path: Path) -> None:
    reader = verify_checkpoint(path)
    for name in reader.names:
        shape = reader.shape(name)
        reader.read(name, (0,) * len(shape), shape)
        for key in ("exp_avg", "exp_avg_sq") if reader.adam else ():
            reader.read_optimizer(name, key, (0,) * len(shape), shape)


def _records(path: Path) -> list[RecordSpan]:
    return list(read_archive_index(path).records.values())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("step", "flips"),
    [(25, 30), pytest.param(25, 200, marks=pytest.mark.slow), pytest.param(40, 200, marks=pytest.mark.slow)],
)
def test_a_flipped_bit_of_a_pipeline_file_is_an_error_or_one_wrong_number(
    tmp_path: Path, step: int, flips: int, zipped: bool
) -> None:
    """A legacy file carries no checksums: there a flip may pass, but never as another kind of failure."""
    source = FIXTURES / f"streaming_checkpoint_step_{step}.pth"
    path = tmp_path / source.name
    torch.save(torch.load(source, weights_only=True), path, _use_new_zipfile_serialization=zipped)
    seed = 11 if flips < 200 else int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    data, rng = path.read_bytes(), random.Random(seed)
    header = len(data) - sum(span.size for span in _records(path)) if zipped else 30_000
    passed = 0
    for number in range(flips):
        position = rng.randrange(len(data)) if zipped or number % 2 else rng.randrange(header)
        bit = 1 << rng.randrange(8)
        path.write_bytes(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])
        try:
            _read_all(path)
        except CheckpointError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            passed += 1
    if zipped:  # what may pass lies outside the records: times, padding, names of what no tensor needs
        assert passed <= flips * 2 * header / len(data) + 10, passed
