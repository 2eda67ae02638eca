"""A run with padded widths: it trains as one without, and its checkpoints are those of one without."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from argonne.config.options import ParallelOptions
from argonne.config.presets import PRESETS
from argonne.ranks.recompute import compile_blocks, recompute_blocks
from argonne.ranks.world import Parallel
from argonne.testing.corpus import small_corpus
from argonne.testing.distributed import run_ranks
from argonne.testing.launch import SCHEDULE, SHAPE, checkpoint, launch, metrics
from argonne.testing.models import loss_of, random_tokens, relative_error, small_model
from argonne.training.build import TrainedModel, build_model, fill_weights
from argonne.training.header import padding_line
from argonne.training.step import TrainingStep, Votes
from argonne.training.teacher_weights import split_model
from argonne.verification.simulate import simulate
from checkpointing import HostCopy, open_chosen, save_checkpoint
from model import ArgonneModel
from tests.training.small_run import SEED, SETTINGS, batch_of, training_options
from tests.verification.layouts import layout, single_process
from tp_shard import SimulatedTPGroup, gather_state_dict, shard_tensor_parallel

SWITCHED: dict[str, Any] = {**SETTINGS, "qk_norm": True, "v_norm": True, "attention_bias": True}
STEPS = 5
Whole = dict[str, Tensor]


def built(
    parallel: Parallel, pad: str, settings: Mapping[str, Any], dtype: str = "fp32", **options: Any
) -> TrainedModel:
    choices = ParallelOptions(pad_widths=pad, **options)
    trained = build_model(settings, choices, training_options(weight_decay=0.5, dtype=dtype), parallel)
    fill_weights(trained, None, SEED)
    return trained


def train(trained: TrainedModel, first: int, last: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of steps ``first`` to ``last``; four samples a step, whatever the replicas."""
    options = training_options(batch_size=4 // trained.parallel.dp_size)
    one_step = TrainingStep(trained, options, 1)
    results = [one_step.run(batch_of(4, seed=n), n, votes=Votes()).totals for n in range(first, last)]
    return [(result.loss, result.grad_norm) for result in results]


def local_state(trained: TrainedModel) -> dict[str, dict[str, Tensor]]:
    """Weight and both moments by name."""
    weights, adam = trained.parameters(), trained.adam()
    keys = ("exp_avg", "exp_avg_sq")
    return {name: {"param": weights[name], **{k: adam[name][k] for k in keys}} for name in weights}


def assert_padding_is_zero(trained: TrainedModel) -> int:
    """In weights and moments; how many elements of padding there are."""
    count = 0
    for name, tensors in local_state(trained).items():
        for values in tensors.values():
            padding = torch.ones_like(values, dtype=torch.bool)
            for box in trained.slice_map.rectangles(name, trained.parallel.rank):
                padding[box.local_index] = False
            assert torch.count_nonzero(values[padding]) == 0, name
            count += int(padding.sum())
    return count


def owned(trained: TrainedModel) -> dict[str, Any]:
    weights, rank = trained.parameters(), trained.parallel.rank
    return {
        name: [
            (box.unsharded_index, weights[name][box.local_index])
            for box in trained.slice_map.owned(name, rank)
        ]
        for name in weights
    }


def trained_rank(rank: int, world_size: int, tp_size: int, options: dict[str, Any]) -> tuple[Any, Any, int]:
    trained = built(layout(rank, world_size, tp_size), "on", SWITCHED, **options)
    curve = train(trained, 0, STEPS)
    return curve, owned(trained), assert_padding_is_zero(trained)


def check_agreement(results: list[tuple[Any, Any, int]]) -> None:
    plain = built(single_process(), "off", SWITCHED)
    curve, weights = train(plain, 0, STEPS), plain.parameters()
    gathered = {name: torch.full_like(values, float("nan")) for name, values in weights.items()}
    assert all(padding > 0 for _, _, padding in results)
    for own_curve, boxes, _ in results:
        for (loss, norm), (own_loss, own_norm) in zip(curve, own_curve, strict=True):
            assert own_loss == pytest.approx(loss, rel=3e-5) and own_norm == pytest.approx(norm, rel=3e-4)
        for name, parts in boxes.items():
            for index, values in parts:
                gathered[name][index] = values
    for name, values in weights.items():
        assert relative_error(gathered[name], values) < 2e-3, name


@pytest.mark.parametrize(
    "recomputation",
    [pytest.param("none", marks=pytest.mark.slow), "full", pytest.param("selective", marks=pytest.mark.slow)],
)
def test_clipped_and_decayed_steps_on_one_rank(recomputation: str) -> None:
    trained = built(single_process(), "on", SWITCHED, activation_checkpointing=recomputation)
    curve = train(trained, 0, STEPS)
    check_agreement([(curve, owned(trained), assert_padding_is_zero(trained))])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_steps_in_sixteen_bits(dtype: str) -> None:
    padded, plain = (built(single_process(), pad, SWITCHED, dtype) for pad in ("on", "off"))
    for own, expected in zip(train(padded, 0, STEPS), train(plain, 0, STEPS), strict=True):
        assert own == pytest.approx(expected, rel=2e-2)
    assert assert_padding_is_zero(padded) > 0


def exact_rank(
    rank: int, world_size: int, mode: str, sequence_parallel: bool, compiled: bool
) -> tuple[float, dict[str, Tensor]]:
    torch._dynamo.reset()
    model: Any = small_model(qk_norm=True, attention_bias=True)
    group = layout(rank, world_size, world_size).tp_group
    shard_tensor_parallel(model, group, sequence_parallel=sequence_parallel, loss_chunk_tokens=7, pad_to=8)
    recompute_blocks(model.blocks, mode)
    if compiled:
        compile_blocks(model.blocks)
    loss = loss_of(model, random_tokens())
    loss.backward()
    model.tensor_parallel.sum_partial_gradients({n: p.grad for n, p in model.named_parameters()})
    return loss.item(), gather_state_dict(model, gradients=True)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize(("world", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, True)])
@pytest.mark.timeout(900)
def test_recomputed_and_compiled_gradients_in_float64(
    world: int, sequence_parallel: bool, mode: str, compiled: bool
) -> None:
    whole = small_model(qk_norm=True, attention_bias=True)
    expected = loss_of(whole, random_tokens())
    expected.backward()
    for loss, gradients in run_ranks(exact_rank, world, mode, sequence_parallel, compiled, timeout=800):
        assert abs(loss - expected.item()) <= 1e-10 * expected.item()
        for name, parameter in whole.named_parameters():
            assert parameter.grad is not None
            assert relative_error(gradients[name], parameter.grad) <= 1e-10, name


def test_compiled_blocks() -> None:
    torch._dynamo.reset()
    trained = built(single_process(), "on", SWITCHED)
    compile_blocks(trained.model.blocks, backend="eager")
    curve = train(trained, 0, STEPS)
    check_agreement([(curve, owned(trained), assert_padding_is_zero(trained))])


@pytest.mark.parametrize(
    ("world", "tp_size", "options"),
    [
        (2, 2, {"sequence_parallel": True}),
        pytest.param(
            4,
            2,
            {"sequence_parallel": True, "activation_checkpointing": "selective"},
            marks=pytest.mark.slow,
        ),
        pytest.param(2, 1, {}, marks=pytest.mark.slow),
        pytest.param(4, 2, {"data_parallel": "ddp"}, marks=pytest.mark.slow),
        pytest.param(3, 3, {"sequence_parallel": True}, marks=pytest.mark.slow),
        pytest.param(2, 2, {"compile": True}, marks=pytest.mark.slow),
        pytest.param(4, 4, {"compile": True, "sequence_parallel": True}, marks=pytest.mark.slow),
        pytest.param(8, 8, {"activation_checkpointing": "full"}, marks=pytest.mark.slow),
        pytest.param(6, 3, {}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(600)
def test_clipped_and_decayed_steps_on_many(world: int, tp_size: int, options: dict[str, Any]) -> None:
    check_agreement(run_ranks(trained_rank, world, tp_size, options, timeout=500))


# ---------------------------------------------------------------------------------------------------
# Checkpoints


def save(trained: TrainedModel, folder: Path, step: int, *, from_copies: bool = False) -> Path:
    path = folder / "pretrained" / f"tensor_parallel_checkpoint_step_{step}.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"model_type": "argonne2", **SWITCHED}
    common: dict[str, Any] = {
        "slice_map": trained.slice_map, "rank": trained.parallel.rank, "tied": trained.tied,
        "control_group": trained.parallel.control_group,
        "param_group": {**trained.adam_options(), "lr": 1e-3},
        "metadata": {"global_step": step, "model_config": settings, "model_dtype": "torch.float32"},
    }  # fmt: skip
    if from_copies:
        copy = HostCopy(trained.slice_map, trained.parallel.rank, torch.device("cpu"))
        copy.take(trained.parameters(), trained.adam())
        save_checkpoint(path, parameters=copy.parameters, adam=copy.adam, **common)
    else:
        save_checkpoint(path, parameters=trained.parameters(), adam=trained.adam(), **common)
    return path


def restore(trained: TrainedModel, folder: Path) -> TrainedModel:
    group = trained.parallel.control_group
    view, _, _ = open_chosen(
        None, folder, force_from_scratch=False, rank=trained.parallel.rank, control_group=group
    )
    fill_weights(trained, view, 0)
    return trained


@pytest.mark.slow
def test_a_checkpoint_is_byte_for_byte_one_without_padding(tmp_path: Path) -> None:
    """Of the same state: drawn, then trained with padding, restored without, and back."""
    one = single_process()
    files = [save(built(one, pad, SWITCHED), tmp_path / pad, 1).read_bytes() for pad in ("on", "off")]
    assert files[0] == files[1]
    padded = built(one, "on", SWITCHED)
    train(padded, 0, STEPS)
    first = save(padded, tmp_path / "first", 5)
    assert save(padded, tmp_path / "copies", 5, from_copies=True).read_bytes() == first.read_bytes()
    plain = restore(built(one, "off", SWITCHED), tmp_path / "first")
    second = save(plain, tmp_path / "second", 5)
    assert second.read_bytes() == first.read_bytes()
    again = restore(built(one, "on", SWITCHED), tmp_path / "second")
    for name, tensors in local_state(again).items():
        for key, values in tensors.items():
            assert torch.equal(values, local_state(padded)[name][key]), (name, key)
    assert train(again, 5, 8) == train(padded, 5, 8), "bit for bit, as if nothing had happened"
    for (loss, _), (own_loss, _) in zip(train(plain, 5, 8), train(restored(first), 5, 8), strict=True):
        assert own_loss == pytest.approx(loss, rel=3e-5)


def restored(path: Path) -> TrainedModel:
    return restore(built(single_process(), "on", SWITCHED), path.parents[1])


def saving_rank(rank: int, world_size: int, tp_size: int, source: Path, folder: Path) -> int:
    trained = restore(built(layout(rank, world_size, tp_size), "on", SWITCHED), source)
    save(trained, folder / "direct", 5)
    save(trained, folder / "copies", 5, from_copies=True)
    return assert_padding_is_zero(trained)


@pytest.mark.parametrize(
    ("world", "tp_size"),
    [(2, 2), pytest.param(4, 2, marks=pytest.mark.slow), pytest.param(3, 3, marks=pytest.mark.slow)],
)
def test_ranks_that_pad_load_and_save_what_one_that_does_not(
    world: int, tp_size: int, tmp_path: Path
) -> None:
    plain = built(single_process(), "off", SWITCHED)
    train(plain, 0, STEPS)
    expected = save(plain, tmp_path, 5).read_bytes()
    assert all(run_ranks(saving_rank, world, tp_size, tmp_path, tmp_path / "padded"))
    for how in ("direct", "copies"):
        name = "tensor_parallel_checkpoint_step_5.pth"
        assert (tmp_path / "padded" / how / "pretrained" / name).read_bytes() == expected, how


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_by_the_command_line(tmp_path: Path) -> None:
    """Verified, resumed both ways, sampled, exported: names, shapes and dtypes are those without padding."""
    glob, tokenizer, _ = small_corpus(tmp_path / "corpus", documents=90, length=600)
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps({**PRESETS["argonne-tiny"], "head_dim": 10, "qk_norm": True}))
    common = [*SHAPE, "--model-config", shape, *SCHEDULE, "--tokenizer-path", tokenizer, "--data-glob", glob]
    common += ["--total-steps", 6, "--checkpoint-interval", 3, "--sample-interval", 3, "--log-interval", 1]
    whole: dict[str, Any] = {}
    for pad, other in (("on", "off"), ("off", "on")):
        output = tmp_path / pad
        flags = [*common, "--output-dir", output]
        verified = ["--verify-sharding", "--pad-widths", pad, "--final-model-dir", tmp_path / f"export-{pad}"]
        finished = launch(2, *flags, *verified)
        assert finished.code == 0, finished.stderr
        assert ("heads of 10 stored as 16" in finished.stdout) == (pad == "on")
        assert "--- Generated text at step 3 ---" in finished.stdout
        whole[pad] = torch.load(checkpoint(output, 6), weights_only=True)
        resumed = tmp_path / f"{pad} then {other}"
        (resumed / "pretrained").mkdir(parents=True)
        shutil.copy(checkpoint(output, 3), resumed / "pretrained")
        again = launch(1, *common, "--output-dir", resumed, "--pad-widths", other)
        assert again.code == 0 and "Changed since" not in again.stdout, again.stderr
        losses = [line["loss"] for line in metrics(output)]
        assert [line["loss"] for line in metrics(resumed)] == pytest.approx(losses[3:], rel=1e-4)
    padded, plain = whole["on"], whole["off"]
    for name, values in plain["model_state_dict"].items():
        other_values = padded["model_state_dict"][name]
        assert (other_values.shape, other_values.dtype) == (values.shape, values.dtype)
        assert relative_error(other_values, values) < 2e-3, name
    states = [whole[pad]["optimizer_state_dict"]["state"] for pad in ("on", "off")]
    for index, moments in states[1].items():
        assert {k: v.shape for k, v in moments.items()} == {k: v.shape for k, v in states[0][index].items()}
    assert padded["model_config"] == plain["model_config"]
    exported: Any = ArgonneModel.from_pretrained(tmp_path / "export-on")
    for name, values in exported.state_dict().items():
        assert torch.equal(values.float(), padded["model_state_dict"][name].to(values.dtype).float()), name


def test_an_argonne_teacher_is_padded_as_its_student(tmp_path: Path) -> None:
    whole = small_model(torch.float32, qk_norm=True)
    whole.save_pretrained(tmp_path)
    tokens = batch_of(2).tokens.long()

    def work(group: SimulatedTPGroup) -> tuple[Tensor, Any]:
        teacher: Any = split_model(tmp_path, torch.float32, torch.device("cpu"), group, 8)
        with torch.no_grad():
            return teacher(input_ids=tokens).logits, teacher.blocks[1].attn.k_proj.weight.shape

    with torch.no_grad():
        expected = whole(input_ids=tokens).logits
    for logits, shape in simulate(SimulatedTPGroup.create(2), work):
        assert shape == (16, 50)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_auto_pads_on_gpus_only_and_the_header_says_what() -> None:
    assert padding_line(built(single_process(), "auto", SETTINGS)) == {}
    line = padding_line(built(single_process(), "on", SETTINGS))["Padded widths"]
    assert line.startswith("to a multiple of 8: heads of 6 stored as 8, ")
