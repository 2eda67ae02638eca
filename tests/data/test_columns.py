"""Text columns that are not plain strings, and columns beside them that stand in the way."""

import base64
import decimal
import resource
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
import pytest

from argonne.data.formats import open_shard, read_footer
from argonne.data.texts import ShardError
from tests.data.shard_samples import write_column

TEXTS = ["one", None, "", "zwei", "fünf"]


def rows(path: Path, column: str = "text") -> list[Any]:
    with open_shard(path, column) as reader:
        groups = range(len(reader.group_rows))
        return [text for group in groups for batch in reader.batches(group) for text in batch.texts]


def write(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as sink:
            sink.write_table(table)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view", "json", "dictionary of binary"])
def test_bytes_and_json_are_text(tmp_path: Path, kind: str, suffix: str) -> None:
    encoded = pa.array([None if text is None else text.encode() for text in TEXTS], pa.binary())
    array = {
        "binary": lambda: encoded,
        "large_binary": lambda: encoded.cast(pa.large_binary()),
        "binary_view": lambda: encoded.cast(pa.binary_view()),
        "json": lambda: pa.ExtensionArray.from_storage(pa.json_(), pa.array(TEXTS)),
        "dictionary of binary": encoded.dictionary_encode,
    }[kind]()
    path = write(tmp_path / f"a{suffix}", pa.table({"text": array}))
    assert rows(path) == TEXTS and sum(read_footer(path, "text").group_rows) == 5


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_null_column_is_a_column_of_nulls(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", pa.table({"text": pa.nulls(3)}))
    assert rows(path) == [None] * 3 and read_footer(path, "text").null_rows == 3


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_columns_beside_the_text(tmp_path: Path, suffix: str) -> None:
    wide = pa.array([decimal.Decimal(10) ** 70], pa.decimal256(76, 0))
    columns = {
        "meta": pa.array([{"text": "inner", "tags": [{"a": 1, "text": "x"}]}]),
        "wide": wide,
        "uint": pa.array([2**64 - 1], pa.uint64()),
        "meta.text": pa.array(["flat"]),
    }
    path = write(tmp_path / f"a{suffix}", pa.table(columns))
    assert rows(path, "meta.text") == ["flat"]
    table = pa.table([pa.array([1]), pa.array([2]), pa.array(["text"])], names=["id", "id", "text"])
    assert rows(write(tmp_path / f"b{suffix}", table)) == ["text"]
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pytest.raises(ShardError, match="2 columns are named 'text'"):
        read_footer(write(tmp_path / f"c{suffix}", twice), "text")


class _Keys(encryption.KmsClient):
    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
        return base64.b64encode(key_bytes)

    def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
        return base64.b64decode(wrapped_key)


@pytest.mark.parametrize(
    ("column", "plain_footer", "refused"), [("text", True, True), ("id", True, False), ("text", False, True)]
)
def test_encrypted_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str, plain_footer: bool, refused: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    factory = encryption.CryptoFactory(lambda _: _Keys())
    properties = factory.file_encryption_properties(
        encryption.KmsConnectionConfig(),
        encryption.EncryptionConfiguration(
            footer_key="k", column_keys={"k2": [column]}, plaintext_footer=plain_footer
        ),
    )
    path, table = tmp_path / "a.parquet", pa.table({"text": ["a"], "id": [1]})
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        if refused:
            with pytest.raises(ShardError, match="encrypted"):
                read_footer(path, "text")
        else:
            assert rows(path) == ["a"]
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    assert list(tmp_path.iterdir()) == [path], "the child that aborts left a core file"


def test_a_plain_shard_starts_no_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("argonne.data.parquet_reader.is_readable", None)
    assert rows(write_column(tmp_path / "a.parquet", ["a"])) == ["a"]
