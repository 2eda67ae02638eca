"""What the plan chooses for --tensor-parallel-size auto and --reshard-after-forward auto."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from argonne.config.command_line import parse_command_line, parse_recipe
from argonne.config.presets import PRESETS
from argonne.config.recipe import Recipe
from argonne.errors import ConfigError, DeviceError
from argonne.ranks.world import World, replicas_of_a_node
from argonne.training.auto_layout import Choice, batch_change, chosen_by_plan, resolve_layout
from argonne.training.layouts import asked_plan, fastest_of_kinds, samples_of, settled
from argonne.training.plan import chosen_layout, subject, subject_of
from argonne.training.stages import plan_stages
from tests import ROOT

SETTINGS: dict[str, Any] = {**PRESETS["argonne-2.0"], "vocab_size": 151_665}
AUTO = ["--tokenizer-path", "x", "--tensor-parallel-size", "auto"]


def chosen(recipe: Recipe, *, memory: float = 80e9, world_size: int = 8, node_size: int = 8) -> Choice:
    subjects = [
        subject(stage.config, SETTINGS, world_size=world_size, device_memory=int(memory), node_size=node_size)
        for stage in recipe.stages
    ]
    return chosen_by_plan(recipe, subjects)


@pytest.mark.parametrize("memory", [80e9, 40e9, 25e9])
@pytest.mark.parametrize("more", [[], ["--global-batch-size", "16"], ["--gradient-accumulation-steps", "2"]])
def test_a_step_holds_the_same_whatever_is_chosen(memory: float, more: list[str]) -> None:
    recipe = parse_recipe([*AUTO, *more])
    choice = chosen(recipe, memory=memory)
    config = choice.recipe.config
    degree = config.parallel.tensor_parallel_size
    assert isinstance(degree, int)
    stage = plan_stages(choice.recipe, 8 // degree)[0]
    expected = {"--global-batch-size": 16, "--gradient-accumulation-steps": 64}.get(
        more[0] if more else "", 32
    )
    assert stage.samples_per_step == expected == samples_of(recipe.config.training, 8)
    assert config.training.batch_size <= 4 * degree
    assert f"--tensor-parallel-size {degree}" in choice.text and "nothing here measured" in choice.text
    what = subject(config, SETTINGS, world_size=8, device_memory=int(memory))
    assert settled(what, chosen_layout(what)).needed <= memory


def test_the_fastest_that_fits() -> None:
    recipe = parse_recipe([*AUTO, "--global-batch-size", "16"])
    what = subject(recipe.config, SETTINGS, world_size=8, device_memory=80_000_000_000)
    plans = fastest_of_kinds(what)
    best = asked_plan(what)
    assert best.seconds == min(plan.seconds for plan in plans.values()) and best.layout.tp_size < 8
    degree = chosen(recipe).recipe.config.parallel.tensor_parallel_size
    assert degree == best.layout.tp_size
    assert chosen(recipe) == chosen(recipe)  # the same inputs, the same choice
    narrow = chosen(recipe, memory=16e9).recipe.config.parallel
    assert narrow.sequence_parallel or narrow.activation_checkpointing != "none"


def test_what_is_asked_for_is_kept() -> None:
    flags = ["--sequence-parallel", "--activation-checkpointing", "full", "--reshard-after-forward", "on"]
    parallel = chosen(parse_recipe([*AUTO, *flags])).recipe.config.parallel
    assert parallel.activation_checkpointing == "full" and parallel.reshard_after_forward == "on"
    assert parallel.sequence_parallel or parallel.tensor_parallel_size == 1


def test_one_kind_for_all_stages(tmp_path: Any) -> None:
    """A long stage makes a layout that a short one alone would not take."""
    path = tmp_path / "recipe.toml"
    path.write_text(
        'tensor-parallel-size = "auto"\ntokenizer-path = "x"\nglobal-batch-size = 8\n'
        '[[stage]]\nname = "short"\nblock-size = 4096\ntotal-steps = 10\nwarmup-steps = 1\n'
        '[[stage]]\nname = "long"\nblock-size = 32768\ntotal-steps = 10\nwarmup-steps = 1\n'
    )
    recipe = parse_recipe(["--config", str(path)])
    stages = chosen(recipe).recipe.stages
    kinds = {
        (s.config.parallel.tensor_parallel_size, s.config.parallel.sequence_parallel)
        for s in stages
    }  # fmt: skip
    assert len(kinds) == 1
    degree = stages[0].config.parallel.tensor_parallel_size
    assert isinstance(degree, int)
    planned = plan_stages(chosen(recipe).recipe, 8 // degree)
    assert [stage.samples_per_step for stage in planned] == [8, 8]


def test_nothing_fits_or_nothing_divides() -> None:
    with pytest.raises(DeviceError, match=r"auto: no layout of 32 sequences .* --ignore-plan goes on"):
        chosen(parse_recipe(AUTO), memory=5e9)
    assert chosen(parse_recipe([*AUTO, "--ignore-plan"]), memory=5e9).flags
    with pytest.raises(ConfigError, match="--global-batch-size 3 cannot be shared"):
        chosen(parse_recipe([*AUTO, "--global-batch-size", "3", "--data-parallel", "hsdp"]), world_size=16)


def test_a_resume_on_other_ranks_says_what_a_step_holds() -> None:
    config = parse_command_line(AUTO)
    saved = {"data_state": {"samples_per_step": 32}}
    assert batch_change(config, saved, 8) is None and batch_change(config, {}, 4) is None
    assert "had 32 sequences at the checkpoint and has 16" in (batch_change(config, saved, 4) or "")
    fixed = parse_command_line([*AUTO, "--global-batch-size", "64"])
    assert batch_change(fixed, saved, 4) is None


def test_a_cpu_takes_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(
        rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"),
        control_group=None, feed_group=None,
    )  # fmt: skip
    recipe = parse_recipe([*AUTO, "--model-config", "argonne-tiny", "--block-size", "64"])
    tiny = {**PRESETS["argonne-tiny"], "vocab_size": 1003}
    parallel = resolve_layout(recipe, tiny, world).recipe.config.parallel
    assert (parallel.tensor_parallel_size, parallel.reshard_after_forward) == (1, "on")
    monkeypatch.setattr("argonne.training.fit.available_bytes", lambda: 401_000_000)
    with pytest.raises(DeviceError, match="auto: no layout"):
        resolve_layout(recipe, tiny, world)
    plain = parse_recipe(["--tokenizer-path", "x"])
    assert resolve_layout(plain, tiny, world).recipe is plain  # nothing to decide


def test_gathered_weights_stay_where_there_is_room() -> None:
    flags = ["--plan", "--tensor-parallel-size", "2", "--batch-size", "1"]
    for memory, kept in ((80e9, True), (23e9, False)):
        what = subject_of(parse_command_line([*flags, "--plan-device", str(int(memory))]))
        plan = settled(what, chosen_layout(what))
        assert plan.layout.keeps_gathered is kept and plan.fits
        calls, size = plan.traffic["all_gather over replicas"]
        assert calls == (25 if kept else 49)
        local, blocks = 2_459_327_520, 24 * 89_580_480
        assert size == pytest.approx(2 * (local + (0 if kept else blocks)), rel=0.01)
    forced = subject_of(parse_command_line([*flags, "--reshard-after-forward", "on"]))
    assert not settled(forced, chosen_layout(forced)).layout.keeps_gathered


def test_hsdp_shares_within_a_node() -> None:
    assert replicas_of_a_node(2, world_size=16, node_size=8) == 4
    assert replicas_of_a_node(2, world_size=8, node_size=8) is None  # one node: all share
    for tp_size in (8, 16, 3):
        with pytest.raises(ConfigError, match=r"--data-parallel hsdp .* --data-parallel fsdp"):
            replicas_of_a_node(tp_size, world_size=48, node_size=8)
    flags = ["--plan", "--plan-world-size", "16", "--tensor-parallel-size", "2"]
    plans = {}
    for kind in ("fsdp", "hsdp", "ddp"):
        what = subject_of(parse_command_line([*flags, "--data-parallel", kind]))
        plans[kind] = settled(what, chosen_layout(what))
    held = {kind: plan.memory.weights for kind, plan in plans.items()}
    assert held["hsdp"] == pytest.approx(2 * held["fsdp"], rel=1e-3)
    assert held["ddp"] == pytest.approx(4 * held["hsdp"], rel=1e-3)
    assert plans["hsdp"].traffic["all_reduce over replicas"] == (25, held["hsdp"])


def test_wrong_values_end_before_torch_is_imported() -> None:
    script = (
        "import sys, resume_pretrain_tensor as entry\n"
        "try:\n    entry.main(sys.argv[1:])\nexcept SystemExit as leaving:\n"
        "    assert leaving.code == 2 and 'torch' not in sys.modules\n"
    )
    for flags, message in (
        (
            ["--tensor-parallel-size", "automatic"],
            "--tensor-parallel-size automatic: give a whole number, or",
        ),
        (["--reshard-after-forward", "yes"], "--reshard-after-forward yes: choose auto, on or off"),
        (["--data-parallel", "zero"], "--data-parallel zero: choose fsdp, hsdp or ddp"),
        (
            [*AUTO, "--global-batch-size", "8", "--gradient-accumulation-steps", "2"],
            "--gradient-accumulation-steps contradicts --global-batch-size under",
        ),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, "--tokenizer-path", "x", *flags], cwd=ROOT, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and done.stderr.startswith(f"error: {message}"), done.stderr
