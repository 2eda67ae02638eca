"""Stored targets on the disk: what is read is what was written, anywhere; whatever is wrong is one line."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from argonne.data.position import DataPosition
from argonne.data.target_file import Targets, TargetsFolder, TargetsForm, TargetsHeader, TargetsReader
from argonne.errors import ConfigError, DataError
from argonne.tools.target_writer import SamplePlace, TargetsWriter, refuse_others, require_room

FORM = TargetsForm(
    block_size=5, vocab_size=70_000, top_k=3, temperature=2.0, dtype="float16",
    document_attention=False, tokenizer="t", teacher="u",
)  # fmt: skip
FIRST, COUNT = 100, 6
NAMES = {"web": ["a.parquet", "b.parquet"], "code": ["c.parquet"]}


def header(form: TargetsForm = FORM, samples: int = 0) -> TargetsHeader:
    return TargetsHeader(form=form, first_sample=FIRST, samples=samples, teacher_path="teacher", files=NAMES)


def tokens() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 70_000, (COUNT, 6), dtype=np.int32)


def some(number: int, form: TargetsForm = FORM) -> Targets:
    generator = np.random.default_rng(number)
    shape = (form.block_size, form.top_k)
    return Targets(
        generator.integers(0, form.vocab_size, shape, dtype=np.int32),
        -generator.random(shape).astype(form.dtype),
        np.array([-np.inf, *-generator.random(form.block_size - 1)], np.float32),
    )


def place(number: int) -> SamplePlace:
    if number == FIRST + 5:
        return SamplePlace(1, DataPosition(epoch=2, sample=17))
    return SamplePlace(0, DataPosition(epoch=1, file_index=1, row=number, token_offset=40))


def write(root: Path, form: TargetsForm = FORM) -> TargetsFolder:
    folder = TargetsFolder(root)
    writer = TargetsWriter(folder, header(form), owner=True)
    crcs = [writer.write_record(FIRST + index, some(index, form)) for index in range(COUNT)]
    writer.write_entries(FIRST, tokens(), crcs, [place(FIRST + index) for index in range(COUNT)])
    writer.commit(header(form, COUNT))
    writer.close()
    return folder


@pytest.mark.parametrize("vocab_size", [300, 65_536, 65_537])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_read_is_what_was_written(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    form = dataclasses.replace(FORM, vocab_size=vocab_size, dtype=dtype)
    folder = write(tmp_path / "new" / "targets", form)
    id_bytes = 2 if vocab_size <= 65_536 else 4
    assert form.token_bytes == 3 * (id_bytes + np.dtype(dtype).itemsize) + 4
    assert folder.records.stat().st_size == COUNT * 5 * form.token_bytes
    assert folder.entries.stat().st_size == COUNT * 64
    reader = TargetsReader(folder)
    assert reader.header == header(form, COUNT)
    reader.check(FIRST + 2, tokens()[2:])
    reader.expect(FIRST, 100)
    for first, count in ((FIRST + 5, 1), (FIRST + 1, 3)):
        found = reader.read(first, count)
        wanted = [some(first - FIRST + index, form) for index in range(count)]
        for part, parts in zip(found, zip(*wanted, strict=True), strict=True):
            np.testing.assert_array_equal(part, np.concatenate(parts))
    reader.close()


def test_another_sample_is_named_with_its_place(tmp_path: Path) -> None:
    reader = TargetsReader(write(tmp_path))
    changed = tokens()
    changed[3, 0] ^= 1
    changed[5, 5] ^= 1
    with pytest.raises(DataError) as caught:
        reader.check(FIRST, changed)
    assert f"--teacher-targets {tmp_path}: sample 103 was of source 'web' b.parquet row 103 token 40" in str(
        caught.value
    )
    with pytest.raises(DataError, match="sample 105 was of source 'code' sample 17 of epoch 2"):
        reader.check(FIRST + 4, changed[4:])


def test_samples_that_are_not_stored_are_named(tmp_path: Path) -> None:
    reader = TargetsReader(write(tmp_path))
    for first, missing in ((FIRST - 1, 99), (FIRST + 5, 106), (900, 900)):
        with pytest.raises(
            DataError, match=f"has the samples 100 to 105, and the run needs sample {missing}:"
        ):
            reader.read(first, 2)


@pytest.mark.parametrize(
    ("name", "at", "said"),
    [
        ("samples.bin", 64 * 2 + 3, r"samples\.bin is damaged at sample 102"),
        ("samples.bin", 64 * 2 + 17, r"samples\.bin is damaged at sample 102"),
        ("targets.bin", 5 * FORM.token_bytes * 3 + 70, r"targets\.bin is damaged at sample 103"),
    ],
)
def test_a_flipped_bit_is_seen_when_it_is_read(tmp_path: Path, name: str, at: int, said: str) -> None:
    folder = write(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[at] ^= 4
    (tmp_path / name).write_bytes(data)
    reader = TargetsReader(folder)
    reader.read(FIRST, 2)
    with pytest.raises(DataError, match=said):
        reader.read(FIRST + 2, 2)


def test_files_that_are_gone_or_cut_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--teacher-targets \S+none is no folder: make it with scripts/tea"):
        TargetsReader(TargetsFolder(tmp_path / "none"))
    with pytest.raises(DataError, match=r"has no targets\.json"):
        TargetsReader(TargetsFolder(tmp_path))
    folder = write(tmp_path)
    reader = TargetsReader(folder)
    folder.records.write_bytes(folder.records.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"targets\.bin ends before sample 105"):
        reader.read(FIRST + 5, 1)
    with pytest.raises(DataError, match=r"targets\.bin has \d+ bytes, and targets\.json counts \d+"):
        TargetsReader(folder)
    folder.records.unlink()
    with pytest.raises(DataError, match=r"targets\.bin cannot be read \(No such file"):
        TargetsReader(folder)


def test_a_damaged_header_is_one_line(tmp_path: Path) -> None:
    folder = write(tmp_path)
    text = folder.header.read_text()
    for other in (text[:-9], text.replace('"samples": 6', '"samples": 7'), "[]", "{}"):
        folder.header.write_text(other)
        with pytest.raises(DataError, match=r"targets\.json is damaged \("):
            folder.read_header()
    folder.header.write_text(json.dumps({**json.loads(text), "version": 2}))
    with pytest.raises(DataError, match="of version 2, and this suite reads version 1"):
        folder.read_header()


def test_what_no_header_vouches_for_is_written_again(tmp_path: Path) -> None:
    """A writer that dies after some records leaves the folder as its last header says."""
    folder = write(tmp_path)
    before = folder.records.read_bytes()
    writer = TargetsWriter(folder, folder.read_header(), owner=True)
    writer.write_record(FIRST + COUNT, some(50))
    writer.close()
    assert len(folder.records.read_bytes()) > len(before)
    TargetsReader(folder).read(FIRST, COUNT)
    TargetsWriter(folder, folder.read_header(), owner=True).close()
    assert folder.records.read_bytes() == before


def test_two_writers_and_other_targets_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path)
    there = folder.read_header()
    writer = TargetsWriter(folder, there, owner=True)
    with pytest.raises(DataError, match=r"--targets \S+ is being written by another process"):
        TargetsWriter(folder, there, owner=True)
    writer.close()
    asked = header(dataclasses.replace(FORM, top_k=4))
    with pytest.raises(ConfigError, match="holds other targets: top k is 3 there, and 4 is asked for"):
        refuse_others(folder, there, asked)
    with pytest.raises(DataError, match=r"bytes more, and \S+ are free: lower --samples or --top-k"):
        require_room(tmp_path, 1 << 60)
    assert there.identity != asked.identity
    assert there.identity == dataclasses.replace(there, samples=99).identity
