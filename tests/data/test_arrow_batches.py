"""Record batches found by their headers alone, against pyarrow's own reading of the same file."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from argonne.data.arrow_batches import batch_places, node_of
from argonne.data.texts import ShardError
from argonne.testing.corpus import build_tokenizer
from data_stream import load_tokenizer, open_stream
from tests.data.remote_server import serving
from tests.data.shard_samples import options_for

ROWS = [
    {
        "id": ([1, None], None, [])[n % 3],
        "more": {"a": n, "b": None},
        "text": None if n % 5 == 2 else f"text {n}",
    }
    for n in range(47)
]


def written(table: pa.Table, *, stream: bool, **options: Any) -> bytes:
    sink = io.BytesIO()
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=9)
    return sink.getvalue()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}, {"use_legacy_format": True}])
def test_the_batches_are_those_that_pyarrow_reads(stream: bool, options: dict[str, Any]) -> None:
    table = pa.Table.from_pylist(ROWS)
    content = written(table, stream=stream, **options)
    places = batch_places(io.BytesIO(content), len(content))  # type: ignore[arg-type]
    assert places is not None
    opened = (pa.ipc.open_stream if stream else pa.ipc.open_file)(content)
    batches = list(opened) if stream else [opened.get_batch(n) for n in range(opened.num_record_batches)]
    assert [place.rows for place in places] == [batch.num_rows for batch in batches]
    for place, batch in zip(places, batches, strict=True):
        alone = pa.ipc.read_record_batch(pa.ipc.read_message(content[place.start : place.end]), table.schema)
        assert alone.equals(batch)
        for column, name in enumerate(table.schema.names):
            assert place.null_counts[node_of(table.schema, column)] == batch.column(name).null_count


def test_a_file_with_dictionaries_is_not_cut_into_batches() -> None:
    table = pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()})
    content = written(table, stream=True)
    assert batch_places(io.BytesIO(content), len(content)) is None  # type: ignore[arg-type]


def test_what_is_cut_or_spoiled_is_an_error_and_nothing_else() -> None:
    content = written(pa.Table.from_pylist(ROWS), stream=True)
    cut = content[: len(content) * 2 // 3]
    with pytest.raises(ShardError, match="it was cut: its message at byte"):
        batch_places(io.BytesIO(cut), len(cut))  # type: ignore[arg-type]
    generator = np.random.default_rng(3)
    for _ in range(300):
        spoiled = bytearray(content)
        spoiled[generator.integers(len(content))] ^= 1 << int(generator.integers(8))
        try:
            batch_places(io.BytesIO(spoiled), len(spoiled))  # type: ignore[arg-type]
        except ShardError:
            pass


def test_of_a_remote_file_the_headers_travel_and_the_batches_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    tokenizer = load_tokenizer(str(build_tokenizer(tmp_path / "tokenizer")))
    generator = np.random.default_rng(0)
    texts = ["".join(chr(c) for c in generator.integers(33, 126, 40_000)) for _ in range(120)]
    for stream in (True, False):
        content = written(pa.table({"text": texts}), stream=stream)
        name = f"{'stream' if stream else 'file'}.arrow"
        (tmp_path / name).write_bytes(content)
        with serving(tmp_path) as (url, faults):
            options = options_for(tmp_path, data_glob=f"{url}/{name}", block_size=64)
            opened = open_stream(options, tokenizer)
            assert faults.served[name] < 300_000 < len(content) // 10
            opened.source.close()
            position = {"file_name": name, "row": 85, "token_offset": 0, "streaming": True}
            source = open_stream(options, tokenizer, saved_position=position, global_step=1).source
            alike = options_for(tmp_path, data_glob=str(tmp_path / name), block_size=64)
            local = open_stream(alike, tokenizer, saved_position=position, global_step=1).source
            assert (source.next_step().tokens == local.next_step().tokens).all()
            source.close()
            local.close()
            assert faults.served[name] < 2_500_000
