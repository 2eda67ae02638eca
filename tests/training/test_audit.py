"""Audits of a run: whose turn it is, what is recorded, what a fault does, and that training is the same."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from argonne.config.run_options import ControlOptions
from argonne.errors import AuditError
from argonne.files import OutputFolder
from argonne.ranks.recompute import compile_blocks
from argonne.run.ending import is_final
from argonne.run.report import RunReport
from argonne.testing.corpus import small_corpus
from argonne.testing.launch import SCHEDULE, SHAPE, checkpoint, launch, metrics
from argonne.training.audit import SelfAudit, Turn
from argonne.training.build import TrainedModel
from argonne.training.step import TrainingStep, Votes
from tests.training.small_run import batch_of, run_config, trained_model, training_options

LAYERS = 2


def test_layers_and_oracles_take_turns() -> None:
    """Each layer meets each rank within as many laps as there are ranks."""
    for layers, ranks in ((24, 8), (24, 7), (3, 4), (1, 2), (5, 1)):
        turns = [Turn.of(number, layers, ranks) for number in range(layers * ranks)]
        assert [turn.layer for turn in turns] == list(range(layers)) * ranks
        assert {(turn.layer, turn.oracle) for turn in turns} == {
            (layer, rank) for layer in range(layers) for rank in range(ranks)
        }


class AuditedRun:
    """A small run of one process that is audited between its steps, as the loop does it."""

    def __init__(self, output: Path, trained: TrainedModel, interval: int, action: str = "warn") -> None:
        self.report = RunReport(output, rank=0)
        (output / "stats").mkdir(parents=True, exist_ok=True)
        self.waited: list[str] = []
        control = ControlOptions(audit_interval=interval, audit_action=action)
        self.run: Any = SimpleNamespace(
            step=0,
            trained=trained,
            config=run_config(output, control=control),
            control=SimpleNamespace(phase=lambda name: contextlib.nullcontext()),
            report=self.report,
            stages=SimpleNamespace(label=dict),
            keeper=SimpleNamespace(wait=lambda: self.waited.append("waited")),
        )
        self.audit = SelfAudit()
        self.step = TrainingStep(trained, training_options(), 2)
        self.output = OutputFolder(output)

    def take(self, steps: int) -> list[float]:
        """The steps' losses."""
        losses = []
        for _ in range(steps):
            self.audit.begin_step(self.run)
            result = self.step.run(batch_of(4, seed=self.run.step), self.run.step, votes=Votes())
            self.run.step += 1
            losses.append(result.totals.loss)
            self.audit.end_step(self.run)
        return losses

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.audits.read_text().splitlines()]


def weights(trained: TrainedModel) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in trained.parameters().items()}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_is_the_same_to_the_last_bit_and_compiles_no_more(tmp_path: Path, compiled: bool) -> None:
    outcomes, graphs = [], []
    for interval in (0, 1) if compiled else (0, 1, 2):
        torch._dynamo.reset()
        counters.clear()
        trained = trained_model()
        if compiled:
            compile_blocks(trained.model.blocks, backend="eager")
        run = AuditedRun(tmp_path / str(interval), trained, interval)
        outcomes.append((run.take(5), weights(trained)))
        graphs.append(int(counters["stats"]["unique_graphs"]))
        if interval:
            assert [(line["step"], line["layer"], line["ok"]) for line in run.records()] == [
                (step, (step // interval - 1) % LAYERS, True) for step in range(interval, 6, interval)
            ]
    assert len(set(graphs)) == 1 and (graphs[0] > 0) == compiled
    for losses, parameters in outcomes[1:]:
        assert losses == outcomes[0][0]
        assert all(torch.equal(parameters[name], same) for name, same in outcomes[0][1].items())
    block = vars(trained.model.blocks[0])
    assert ("_compiled_call_impl" in block) == compiled


def halve_a_row(run: AuditedRun) -> Any:
    """A block of which a row of one weight's gradient comes out wrong."""
    weight = dict(run.run.trained.model.named_parameters())["blocks.1.mlp.down_proj.weight"]
    scale = torch.ones(len(weight), 1)
    scale[3] = 0.5
    return weight.register_hook(lambda gradient: gradient * scale)


def test_a_fault_is_warned_of_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = AuditedRun(tmp_path, trained_model(), 1)
    halve_a_row(run)
    run.take(4)
    assert [(line["step"], line["ok"]) for line in run.records()] == [
        (1, True),
        (2, False),
        (3, True),
        (4, False),
    ]
    fault = run.records()[1]
    assert fault["tensor"] == "gradient of blocks.1.mlp.down_proj.weight" and fault["ranks"] == [0]
    assert fault["error"] > 100 * fault["limit"] and fault["off"] == 1 and fault["oracle_rank"] == 0
    assert fault["seconds"] > 0
    held = run.records()[0]
    assert held["off"] == 0 and held["error"] < held["limit"]
    warning = (
        "warning: audit at step 2: layer 1: gradient of blocks.1.mlp.down_proj.weight on rank 0 is off by"
    )
    assert warning in capsys.readouterr().err


def test_a_fault_stops_the_run_and_names_the_way_back(tmp_path: Path) -> None:
    run = AuditedRun(tmp_path, trained_model(), 1, "stop")
    run.output.pretrained.mkdir()
    hook = halve_a_row(run)
    with pytest.raises(AuditError, match="the last audit that held was at step 1: no checkpoint is that old"):
        run.take(2)
    assert is_final(AuditError("it"))  # a launcher's restart does not go on by itself
    assert run.waited == ["waited"]  # for the checkpoint that is being written
    hook.remove()
    run.take(1)
    assert run.audit.last_held == 3


def test_a_step_that_is_not_finite_is_not_judged(tmp_path: Path) -> None:
    trained = trained_model()
    run = AuditedRun(tmp_path, trained, 2)
    run.take(1)
    trained.parameters()["embed_tokens.weight"][:] = float("nan")
    run.take(1)
    (record,) = run.records()
    assert record["skipped"] == "not finite" and record["ok"] is None
    assert run.audit.last_held is None


def test_a_step_that_came_to_nothing_leaves_no_tap(tmp_path: Path) -> None:
    """After a way back to a checkpoint the loop begins another step."""
    trained = trained_model()
    run = AuditedRun(tmp_path, trained, 1)
    run.audit.begin_step(run.run)
    assert "_compiled_call_impl" in vars(trained.model.blocks[0])
    run.run.step = 1
    run.audit.begin_step(run.run)
    assert "_compiled_call_impl" not in vars(trained.model.blocks[0])
    run.audit.close()
    assert "_compiled_call_impl" not in vars(trained.model.blocks[1])
    assert not trained.model._forward_pre_hooks or len(trained.model._forward_pre_hooks) == 1


# ----------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    glob, tokenizer, _ = small_corpus(tmp_path_factory.mktemp("corpus"), documents=60, length=600)
    flags = ["--tokenizer-path", str(tokenizer), "--data-glob", glob, "--total-steps", "6"]
    return [*flags, *SHAPE, *SCHEDULE, "--checkpoint-interval", "2", "--log-interval", "1"]


@pytest.mark.slow
def test_a_wrong_kernel_ends_the_run_without_a_save(tmp_path: Path, data: list[str]) -> None:
    """From step 4 on attention is wrong on rank 1: code 1, one line, the checkpoints of before."""
    fault = {"kind": "kernel", "rank": 1, "step": 4}
    flags = [*data, "--output-dir", tmp_path, "--audit-interval", "1", "--audit-action", "stop"]
    finished = launch(2, *flags, fault=fault)
    assert finished.code == 1
    (line,) = finished.errors()
    assert line.startswith("error: audit at step 4: layer ") and "on rank 1 is off" in line
    assert (
        f"the last audit that held was at step 3: resume with --checkpoint-path {checkpoint(tmp_path, 2)}"
        in line
    )
    assert checkpoint(tmp_path, 2).exists() and not checkpoint(tmp_path, 4).exists()
    records = [json.loads(text) for text in OutputFolder(tmp_path).audits.read_text().splitlines()]
    assert [(one["step"], one["ok"]) for one in records] == [(1, True), (2, True), (3, True), (4, False)]
    assert [one["oracle_rank"] for one in records[:3]] == [0, 1, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [["--sequence-parallel"], ["--tensor-parallel-size", "1"], ["--compile"], ["--dtype", "bf16"]],
    ids=lambda layout: layout[0],
)
def test_losses_with_audits_are_those_without(tmp_path: Path, data: list[str], layout: list[str]) -> None:
    losses = []
    for interval in (1, 0):
        output = tmp_path / str(interval)
        finished = launch(2, *data, *layout, "--output-dir", output, "--audit-interval", interval)
        assert finished.code == 0, finished.stderr
        losses.append([(line["loss"], line["grad_norm"]) for line in metrics(output)])
        assert OutputFolder(output).audits.exists() == bool(interval)
    assert losses[0] == losses[1] and len(losses[0]) == 6
    records = [json.loads(line) for line in OutputFolder(tmp_path / "1").audits.read_text().splitlines()]
    assert len(records) == 6 and all(record["ok"] for record in records)


@pytest.mark.slow
def test_a_flipped_bit_of_a_resting_weight_is_warned_of(tmp_path: Path, data: list[str]) -> None:
    fault = {"kind": "perturb", "rank": 1, "step": 3, "name": "blocks.2.mlp.gate_proj.weight"}
    flags = [*data, "--output-dir", tmp_path, "--audit-interval", "1", "--tensor-parallel-size", "2"]
    finished = launch(2, *flags, fault=fault)
    assert finished.code == 0
    assert "blocks.2.mlp.gate_proj.weight on rank 1 changed between the step before" in finished.stderr
