"""Reading in place: the same values as torch.load, and nothing but tensors and plain containers."""

import io
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from argonne.checkpoint.archive import RecordSpan, read_archive_index
from argonne.checkpoint.reader import open_checkpoint
from argonne.checkpoint.safe_pickle import StorageRef, TensorRef, check_tensor, dump_tree
from argonne.checkpoint.tensor_file import TensorFile, read_rectangle
from argonne.checkpoint.verifier import verify_checkpoint
from argonne.errors import CheckpointError
from tests import FIXTURES

STEPS = (25, 40)


@pytest.mark.parametrize("step", STEPS)
def test_fixtures_hold_what_torch_loads(step: int) -> None:
    path = FIXTURES / f"streaming_checkpoint_step_{step}.pth"
    reader = open_checkpoint(path)
    loaded = torch.load(path, weights_only=True)
    assert reader.files[0].serialization == "legacy" and reader.kind == "pipeline"
    assert reader.tied == (step == 25)
    weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in loaded["model_state_dict"].items()}
    assert list(reader.model) == list(weights)
    for index, name in enumerate(reader.names):
        shape = tuple(weights[name].shape)
        origin = (0,) * len(shape)
        assert torch.equal(reader.read(name, origin, shape), weights[name].float())
        state = loaded["optimizer_state_dict"]["state"][index]
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(reader.read_optimizer(name, key, origin, shape), state[key].float())
        assert reader.adam_step(name) == state["step"].item() == step
    assert reader.metadata["data_position"] == loaded["data_position"]
    assert reader.metadata["tokens_processed"] == loaded["tokens_processed"]
    assert reader.param_groups[0]["lr"] == loaded["optimizer_state_dict"]["param_groups"][0]["lr"]


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


class Canary:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.path,))


def _zip_around(path: Path, data: bytes, records: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in (records or {}).items():
            archive.writestr(name, content)
    return path


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
        verify_checkpoint(_zip_around(tmp_path / "evil.pth", pickled))


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


def _tree(key: str = "0", numel: int = 4) -> bytes:
    ref = TensorRef(StorageRef(key, torch.float32, numel), 0, (numel,), (1,))
    return dump_tree({"model_state_dict": {"embed_tokens.weight": ref}})


def test_storages_must_be_what_their_records_hold(tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    with pytest.raises(CheckpointError, match=r"needs 4000000000000 bytes, its record has 16"):
        TensorFile(_zip_around(path, _tree(numel=10**12), {"archive/data/0": b"\0" * 16}))
    with pytest.raises(CheckpointError, match="record 0, which is not there"):
        TensorFile(_zip_around(path, _tree()))
    with pytest.raises(CheckpointError, match="impossible name"):
        TensorFile(_zip_around(path, _tree(key="../../etc/passwd")))


@pytest.mark.parametrize("name", ["/etc/passwd", "archive/../../x", "archive\\x", "c:/x", "other/data/0"])
def test_record_names_that_leave_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"leaves the archive|no single archive folder"):
        TensorFile(_zip_around(tmp_path / "odd.pth", _tree(), {name: b"\0" * 16}))


def test_compressed_and_overlapping_records_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", _tree() + b" " * 1000)
    with pytest.raises(CheckpointError, match="is compressed"):
        TensorFile(path)
    _zip_around(path, _tree(), {"archive/data/0": b"\0" * 16, "archive/data/1": b"\0" * 16})
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
        archive.writestr("archive/data.pkl", _tree())
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
