"""scripts/preflight.py: one table of checks, exit code 0 only where all held, nothing left behind."""

import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from preflight import main

from argonne.errors import DeviceError
from argonne.ranks.world import World
from argonne.testing.corpus import build_tokenizer, short_texts, write_shards
from argonne.testing.distributed import run_ranks
from argonne.testing.launch import ROOT, environment
from argonne.tools import preflight_machine
from tests.data.token_samples import write_flat, write_lists

CHECKS = [
    "endpoint", "flags", "devices", "clocks", "tokenizer", "shards", "model", "layout", "validation",
    "memory", "disk", "collectives", "two steps",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_shards(folder / "data", short_texts(40))
    build_tokenizer(folder / "tokenizer")
    return folder


def flags(corpus: Path, output: Path, *more: str) -> list[str]:
    return [
        "--model-config", "argonne-tiny", "--batch-size", "2", "--block-size", "64", "--total-steps", "6",
        "--warmup-steps", "1", "--tokenizer-path", str(corpus / "tokenizer"),
        "--data-glob", str(corpus / "data" / "*.parquet"), "--output-dir", str(output), *more,
    ]  # fmt: skip


def rows(text: str) -> dict[str, tuple[bool, str]]:
    """Check -> (ok, what was found)."""
    lines = re.findall(rf"^({'|'.join(CHECKS)}) +(ok|FAIL) +(.*)$", text, re.MULTILINE)
    return {name: (state == "ok", said) for name, state, said in lines}


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run it in this process: (exit code, its rows)."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*given: str) -> tuple[int, dict[str, tuple[bool, str]]]:
        code = main(given)
        return code, rows(capfd.readouterr().out)

    return run


def test_all_is_well_in_one_process(check: Any, corpus: Path, tmp_path: Path) -> None:
    held_out = f"web={corpus / 'data' / '000_00002.parquet'}"
    code, table = check(*flags(corpus, tmp_path / "out", "--eval-data", held_out, "--eval-samples", "4"))
    assert list(table) == CHECKS and all(ok for ok, _ in table.values()) and code == 0, table
    assert "512 ids" in table["tokenizer"][1] and "3 footers read: 40 rows" in table["shards"][1]
    assert "web" in table["validation"][1] and "loss 6." in table["two steps"][1]
    assert list(tmp_path.iterdir()) == []


def test_the_output_folder_is_as_it_was(check: Any, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "pretrained").mkdir(parents=True)
    (output / "note").write_text("mine")
    code, table = check(*flags(corpus, output, "--no-streaming"))
    assert code == 0 and "not from the token cache" in table["two steps"][1]
    assert sorted(path.name for path in output.rglob("*")) == ["note", "pretrained"]


def test_a_missing_tokenizer(check: Any, corpus: Path, tmp_path: Path) -> None:
    given = flags(corpus, tmp_path / "out")
    given[given.index("--tokenizer-path") + 1] = str(tmp_path / "nowhere")
    code, table = check(*given)
    assert code == 1 and not table["tokenizer"][0] and "nowhere" in table["tokenizer"][1]
    assert table["shards"][0] and table["devices"][0] and list(table) == CHECKS
    assert not table["two steps"][0] and "not checked" in table["two steps"][1]


def test_a_tokenizer_larger_than_the_vocabulary(check: Any, corpus: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        '{"model_type": "argonne2", "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, '
        '"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}'
    )
    given = flags(corpus, tmp_path / "out")
    given[given.index("--model-config") + 1] = str(config)
    code, table = check(*given)
    assert code == 1 and not table["model"][0]
    assert "512 tokens" in table["model"][1] and "300" in table["model"][1]


def test_bad_shards_are_all_named(check: Any, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus / "data", tmp_path / "data")
    for number in (0, 2):
        shard = tmp_path / "data" / f"000_0000{number}.parquet"
        shard.write_bytes(shard.read_bytes()[:-9])
    given = flags(corpus, tmp_path / "out")
    given[given.index("--data-glob") + 1] = str(tmp_path / "data" / "*.parquet")
    code, table = check(*given)
    assert code == 1 and not table["shards"][0]
    assert all(name in table["shards"][1] for name in ("000_00000", "000_00002", "2 of 3"))
    code, table = check(*given, "--skip-bad-shards")
    assert code == 0 and "2 bad ones skipped" in table["shards"][1]


def test_shards_of_token_ids(check: Any, corpus: Path, tmp_path: Path) -> None:
    """As the run reads them: by --token-column, beside text in a mixture, and flat files without a flag."""
    write_lists(tmp_path / "ids" / "a.parquet", [[5, 6, 7]] * 40, pa.list_(pa.int32()))
    write_flat(tmp_path / "flat" / "a.bin", np.arange(400) % 100)
    given = flags(corpus, tmp_path / "out")
    at = given.index("--data-glob")
    text, rest = given[at + 1], given[:at] + given[at + 2 :]
    for more, said in [
        (("--data-glob", f"{tmp_path}/ids/*.parquet", "--token-column", "ids"), "1 footers read: 40 rows"),
        (("--data-glob", f"{tmp_path}/flat/*.bin"), "1 footers read"),
        (
            ("--data-mix", f"a=0.5:{text}", f"b=0.5:{tmp_path}/ids/*.parquet", "--token-column", "ids"),
            "4 footers read",
        ),
    ]:
        code, table = check(*rest, *more)
        assert code == 0 and said in table["shards"][1], table


def test_a_bad_validation_set(check: Any, corpus: Path, tmp_path: Path) -> None:
    code, table = check(*flags(corpus, tmp_path / "out", "--eval-data", f"web={tmp_path}/none/*.parquet"))
    assert code == 1 and not table["validation"][0] and "--eval-data web" in table["validation"][1]


def test_too_little_disk(check: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    code, table = check(*flags(corpus, tmp_path / "out"))
    assert code == 1 and not table["disk"][0] and "make room" in table["disk"][1]
    assert table["two steps"][0]


def test_too_little_memory(check: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("argonne.tools.preflight_inputs.memory_of_a_rank", lambda _: 1_000_000)
    code, table = check(*flags(corpus, tmp_path / "out"))
    assert code == 1 and not table["memory"][0] and "a rank needs about" in table["memory"][1]
    assert "not checked" in table["two steps"][1]


def test_an_output_folder_that_cannot_be_one(check: Any, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    code, table = check(*flags(corpus, tmp_path / "out"))
    assert code == 1 and not table["disk"][0] and "--output-dir" in table["disk"][1]


def test_a_checkpoint_that_is_missing(check: Any, corpus: Path, tmp_path: Path) -> None:
    code, table = check(*flags(corpus, tmp_path / "out", "--checkpoint-path", str(tmp_path / "none.pth")))
    assert code == 1 and not table["model"][0] and "--checkpoint-path" in table["model"][1]


def test_wrong_flags_end_with_2_before_torch(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-X",
        "importtime",
        str(ROOT / "scripts" / "preflight.py"),
        "--batch-size",
        "0",
    ]
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment(), cwd=tmp_path
    )
    assert finished.returncode == 2
    assert any(line.startswith("error: ") for line in finished.stderr.splitlines())
    assert "| torch\n" not in finished.stderr


@pytest.mark.parametrize(
    "parallelism",
    [
        ("--sequence-parallel",),
        pytest.param(("--tensor-parallel-size", "1"), marks=pytest.mark.slow),
    ],
)
def test_two_gloo_ranks(corpus: Path, tmp_path: Path, parallelism: tuple[str, ...]) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        str(ROOT / "scripts" / "preflight.py"), *flags(corpus, tmp_path / "out", *parallelism),
    ]  # fmt: skip
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    table = rows(finished.stdout)
    assert finished.returncode == 0 and list(table) == CHECKS, finished.stdout + finished.stderr
    assert "2 ranks joined" in table["endpoint"][1] and "2 x CPU" in table["devices"][1]
    assert "all_gather of" in table["collectives"][1] and "reduce_scatter of" in table["collectives"][1]
    assert "over 2 ranks" in table["collectives"][1] and "of rank 0's" in table["clocks"][1]
    assert not os.path.exists(tmp_path / "out")


def clock_of(rank: int, world_size: int, ahead: float) -> str:
    """The clocks where rank 1's is ``ahead`` of the others'."""
    import time

    world = World(
        rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size,
        device=torch.device("cpu"), control_group=dist.group.WORLD, feed_group=None,
    )  # fmt: skip
    try:
        return preflight_machine.clocks(world, now=lambda: time.time() + ahead * (rank == 1))
    except DeviceError as error:
        return f"error: {error}"


def test_a_clock_that_is_wrong() -> None:
    assert run_ranks(clock_of, 2, 0.0)[0].startswith("1 host, within")
    said = run_ranks(clock_of, 2, -7200.0)[0]
    assert "(rank 1) differs" in said and "7200" in said and "NTP" in said


@pytest.mark.slow
def test_another_rank_s_trouble_is_in_the_table(corpus: Path, tmp_path: Path) -> None:
    """Ranks with other flags: every rank ends, rank 0 says which differ."""
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "from preflight import main\n"
        "if os.environ['RANK'] == '1':\n    sys.argv += ['--seed', '9']\n"
        "sys.exit(main())\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(wrapper),
    ]
    finished = subprocess.run(
        [*command, *flags(corpus, tmp_path / "out")], capture_output=True, text=True, timeout=300,
        env=environment(),
    )  # fmt: skip
    table = rows(finished.stdout)
    assert finished.returncode == 1 and not table["flags"][0] and "--seed differs" in table["flags"][1]
