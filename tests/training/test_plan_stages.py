"""The plan of a recipe: every stage, sums and the largest, and its data by source."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import resume_pretrain_tensor
from argonne.config.command_line import parse_recipe
from argonne.errors import DeviceError
from argonne.training import fit
from argonne.training.plan_data import TEXT_BYTES_PER_TOKEN, readings
from argonne.training.plan_stages import common_layouts, largest, stage_plans, stages_document
from tests import ROOT
from tests.data.token_samples import write_flat
from tests.verification.layouts import single_process

RECIPE = str(ROOT / "recipes" / "argonne-4.0.toml")


def test_a_recipe_s_plan_has_all_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert resume_pretrain_tensor.main(["--plan=json", "--config", RECIPE]) == 0
    document = json.loads(capsys.readouterr().out)
    stages = document["stages"]
    assert [stage["block_size"] for stage in stages] == [1024, 1024, 13568, 65536]
    asked = [38.03e9, 18.07e9, 6.02e9, 3.00e9]
    for stage, tokens in zip(stages, asked, strict=True):
        a_step = stage["samples_per_step"] * stage["block_size"]
        assert stage["tokens"] == stage["steps"] * a_step and 0 <= stage["tokens"] - tokens < a_step
    assert document["steps"] == sum(stage["steps"] for stage in stages)
    assert document["tokens"] == sum(stage["tokens"] for stage in stages)
    work = sum(stage["tokens"] * stage["flops_per_token"] for stage in stages)
    assert document["flops_per_token"] == pytest.approx(work / document["tokens"])
    most = max(stages, key=lambda stage: stage["bytes_per_rank"]["total"])
    assert most["name"] == "context-65536" and document["bytes_per_rank"] == most["bytes_per_rank"]
    assert document["fits"] is True


def test_layouts_fit_in_every_stage() -> None:
    plans = stage_plans(parse_recipe(["--plan", "--config", RECIPE]))
    assert largest(plans).name == "context-65536"
    layouts = common_layouts(plans)
    assert layouts and all(layout.needed <= 80e9 for layout in layouts)
    assert [layout.factor for layout in layouts] == sorted((x.factor for x in layouts), reverse=True)
    own = largest(plans).plan.needed
    chosen = "--tensor-parallel-size 2 --sequence-parallel --activation-checkpointing full"
    (same,) = [layout for layout in layouts if layout.flags.startswith(chosen)]
    assert same.factor == pytest.approx(1.0) and same.needed == own
    # 12.5 GB without the gathered weights that FSDP2 keeps where there is room.
    for device, fits in ((13_000_000_000, True), (12_000_000_000, False)):
        small = stage_plans(parse_recipe(["--plan", "--plan-device", str(device), "--config", RECIPE]))
        assert [stage.plan.fits for stage in small] == [True, True, True, fits]
        assert stages_document(small)["fits"] is fits


def test_a_stage_that_would_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse_recipe(["--plan", "--config", RECIPE, "--tensor-parallel-size", "1"])
    config = recipe.stages[3].config
    settings = {**(config.model.settings or {}), "vocab_size": 1000}
    monkeypatch.setattr(fit, "available_bytes", lambda: 10**9)
    with pytest.raises(DeviceError, match=r"^stage context-65536: a rank needs about"):
        fit.require_memory(config, settings, single_process(), "context-65536")


def test_data_by_source(tmp_path: Path) -> None:
    """A text source, a mixture's shares over stages, flat tokens, a token column, a URL, and nothing."""
    for number in range(3):
        pq.write_table(
            pa.table({"text": [f"{number} {row}" * 100 for row in range(50)], "ids": [[1, 2, 3]] * 50}),
            tmp_path / f"{number}.parquet",
            compression="zstd",
        )
    write_flat(tmp_path / "a.bin", np.arange(5000) % 100)
    sizes = 0
    for path in tmp_path.glob("*.parquet"):
        sizes += pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size

    def options(*flags: str) -> tuple[object, int]:
        recipe = parse_recipe(["--tokenizer-path", "x", *flags])
        return recipe.config.data, 10_000

    parquet, flat = f"{tmp_path}/*.parquet", f"{tmp_path}/*.bin"
    (only,) = readings([options("--data-glob", parquet)])  # type: ignore[list-item]
    assert only.held is not None and only.held.guessed and only.held.shards == 3
    assert only.held.tokens == pytest.approx(sizes / TEXT_BYTES_PER_TOKEN)
    assert only.epochs == pytest.approx(10_000 * TEXT_BYTES_PER_TOKEN / sizes)
    mix = [f"t=0.7:{parquet}", f"f=0.2:{flat}", "u=0.1:https://example.org/a.parquet"]
    mixed = readings([options("--data-mix", *mix), options("--data-mix", mix[1])])  # type: ignore[list-item]
    assert [(one.name, one.tokens) for one in mixed] == [("t", 7000), ("f", 12_000), ("u", 1000)]
    assert mixed[1].held is not None and mixed[1].held.tokens == 5000 and not mixed[1].held.guessed
    assert mixed[1].epochs == pytest.approx(2.4) and mixed[2].held is None
    (ids,) = readings([options("--data-glob", parquet, "--token-column", "ids")])  # type: ignore[list-item]
    assert ids.held is not None and ids.held.tokens == 450
    (fewer,) = readings([options("--data-glob", flat, "--holdout", "10")])  # type: ignore[list-item]
    assert fewer.held is not None and fewer.held.tokens == pytest.approx(4500)
    (nothing,) = readings([options("--data-glob", f"{tmp_path}/*.arrow")])  # type: ignore[list-item]
    assert nothing.held is None and nothing.epochs is None
