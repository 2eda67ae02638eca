"""The plan of replicas: what hsdp sends where, and gathered weights that stay where there is room."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import resume_pretrain_tensor
from argonne.config.command_line import parse_command_line
from argonne.config.options import ParallelOptions
from argonne.config.presets import PRESETS
from argonne.training import fit
from argonne.training.fit import settled_options
from tests.verification.layouts import single_process

LAYERS, LOCAL = 24, 2_459_036_400
"""Blocks of Argonne 2.0, and weights of a rank at degree 2."""


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert resume_pretrain_tensor.main(["--plan=json", *flags]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@pytest.mark.parametrize(("asked", "gathers"), [("on", 2 * LAYERS + 1), ("off", LAYERS + 1)])
def test_hsdp_gathers_within_a_node_and_reduces_across(
    asked: str, gathers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--plan-world-size", "16", "--tensor-parallel-size", "2", "--data-parallel", "hsdp"]
    document = planned(capsys, *flags, "--reshard-after-forward", asked)
    assert document["parameters_per_rank"] == pytest.approx(LOCAL / 4, rel=1e-3)
    kinds = {kind: counts for kind, counts in document["collectives"].items() if "replicas" in kind}
    assert {kind: counts["calls"] for kind, counts in kinds.items()} == {
        "all_gather over replicas of a node": gathers,
        "reduce_scatter over replicas of a node": LAYERS + 1,
        "all_reduce over replicas": LAYERS + 1,
    }
    assert kinds["reduce_scatter over replicas of a node"]["bytes"] == pytest.approx(4 * LOCAL, rel=1e-3)
    assert kinds["all_reduce over replicas"]["bytes"] == pytest.approx(4 * LOCAL / 4, rel=1e-3)


def test_on_one_node_hsdp_is_fsdp(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--plan-world-size", "8", "--tensor-parallel-size", "2", "--data-parallel"]
    assert planned(capsys, *flags, "hsdp") == planned(capsys, *flags, "fsdp")


def test_hsdp_over_whole_nodes_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert resume_pretrain_tensor.main(["--plan", "--data-parallel", "hsdp", "--plan-world-size", "16"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: --data-parallel hsdp shares weights and state among the replicas of a node"
    )
    assert "use a --tensor-parallel-size" in error and error.count("\n") == 1


def test_gathered_weights_stay_where_the_plan_finds_room(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tensor-parallel-size", "4"]
    kept, let_go = (
        planned(capsys, *flags, "--reshard-after-forward", asked)["bytes_per_rank"]["total"]
        for asked in ("off", "on")
    )
    # All 24 blocks in bf16 instead of two of them, at the fullest moment.
    assert kept - let_go == pytest.approx(23 * 2 * 44_742_000, rel=0.2)
    for memory, expected in ((80_000_000_000, kept), (int(let_go + 3e9), let_go)):
        total = planned(capsys, *flags, "--plan-device", str(memory))["bytes_per_rank"]["total"]
        assert total == expected


@pytest.mark.parametrize(
    ("device", "memory", "decided"),
    [("cpu", 10**12, "on"), ("cuda", 80 * 10**9, "off"), ("cuda", 34 * 10**9, "on"), ("cuda", None, "on")],
)
def test_a_run_decides_by_its_own_devices(
    device: str, memory: int | None, decided: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_command_line(["--tokenizer-path", "x", "--tensor-parallel-size", "4"])
    parallel: Any = SimpleNamespace(
        **{**vars(single_process()), "world_size": 8, "local_world_size": 8, "tp_size": 4, "dp_size": 2}
    )
    parallel.device = torch.device(device)
    monkeypatch.setattr(fit, "memory_of_a_rank", lambda parallel: memory)
    settings = {**PRESETS["argonne-2.0"], "vocab_size": 151_665}
    options: ParallelOptions = settled_options(config, settings, parallel)
    assert options == replace(config.parallel, reshard_after_forward=decided)
    asked = parse_command_line(["--tokenizer-path", "x", "--reshard-after-forward", "off"])
    assert settled_options(asked, settings, parallel) is asked.parallel
