"""From options to a model on its ranks: settings, degree, dtype, weights, FLOPs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from argonne.config.options import ModelOptions
from argonne.config.presets import PRESETS
from argonne.errors import CheckpointError, ConfigError
from argonne.ranks.world import World
from argonne.testing.distributed import make_parallel, run_ranks
from argonne.training.build import choose_dtype, choose_tp_size, fill_weights, flops_per_token, model_settings
from checkpointing import CheckpointView, open_chosen, save_checkpoint
from model import ArgonneConfig
from tests.training.small_run import BLOCK, SEED, SETTINGS, batch_of, trained_model


def saved_model(folder: Path) -> CheckpointView:
    """A checkpoint of the small model, with its configuration."""
    (folder / "pretrained").mkdir(parents=True)
    trained = trained_model()
    for state in trained.adam().values():
        state["exp_avg"].fill_(0.25)
    save_checkpoint(
        folder / "pretrained" / "tensor_parallel_checkpoint_step_3.pth",
        slice_map=trained.slice_map,
        rank=0,
        parameters=trained.parameters(),
        adam=trained.adam(),
        param_group=trained.adam_options(),
        metadata={"global_step": 3, "model_config": {"model_type": "argonne2", **SETTINGS}},
        tied=trained.tied,
        control_group=None,
    )
    view, _, _ = open_chosen(None, folder, force_from_scratch=False, rank=0, control_group=None)
    assert view is not None
    return view


def test_without_a_checkpoint_the_shape_is_model_configs_and_the_vocabulary_the_tokenizers() -> None:
    options = ModelOptions(model_config="argonne-tiny", settings=PRESETS["argonne-tiny"])
    assert model_settings(options, None, 777)["vocab_size"] == 777
    assert model_settings(options, None, 777)["hidden_size"] == 128
    assert model_settings(ModelOptions(), None, 777)["hidden_size"] == 4080  # Argonne 2.0
    larger = ModelOptions(model_config="c.json", settings={**PRESETS["argonne-tiny"], "vocab_size": 1000})
    assert model_settings(larger, None, 777)["vocab_size"] == 1000
    with pytest.raises(ConfigError, match=r"1001 tokens and --model-config a vocabulary of 1000"):
        model_settings(larger, None, 1001)


def test_with_a_checkpoint_the_shape_is_its_own(tmp_path: Path) -> None:
    view = saved_model(tmp_path / "run")
    settings = model_settings(ModelOptions(), view, 131)
    assert ArgonneConfig(**settings).to_dict() == ArgonneConfig(**SETTINGS).to_dict()
    with pytest.raises(ConfigError, match=r"132 tokens and the checkpoint a vocabulary of 131"):
        model_settings(ModelOptions(), view, 132)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"hidden_size": 52}))
    other = ModelOptions(model_config=str(path), settings={**PRESETS["argonne-2.0"], "hidden_size": 52})
    with pytest.raises((ConfigError, CheckpointError), match=r"hidden_size.*5[02].*5[02]"):
        model_settings(other, view, 131)  # what the file does not state is not compared


@pytest.mark.parametrize(
    ("key", "value"),
    [("sliding_window", 64), ("mtp_horizon", 2), ("attn_temperature", 1.5), ("rope_scaling", {"type": "su"}),
     ("attention_dropout", 0.1), ("logit_softcap", -1.0), ("model_type", "gpt2")],
)  # fmt: skip
def test_a_checkpoint_of_another_model_is_refused_by_the_key(tmp_path: Path, key: str, value: Any) -> None:
    view = saved_model(tmp_path)
    view.metadata["model_config"][key] = value
    with pytest.raises(CheckpointError, match=f"step_3.pth has a model_config .*{key}"):
        model_settings(ModelOptions(), view, 131)


def test_neutral_keys_of_a_checkpoint_and_another_place_of_the_rotary_base(tmp_path: Path) -> None:
    view = saved_model(tmp_path)
    stored = view.metadata["model_config"]
    stored |= {"sliding_window": None, "hidden_act": "silu", "torch_dtype": "bfloat16", "mtp_horizon": 1}
    stored.pop("rope_theta", None)
    stored["rope_parameters"] = {"rope_type": "default", "rope_theta": 123.0}
    assert model_settings(ModelOptions(), view, 131)["rope_theta"] == 123.0


def test_loading_gives_what_was_saved(tmp_path: Path) -> None:
    view = saved_model(tmp_path)
    before, trained = trained_model(), trained_model()
    fill_weights(trained, None, seed=SEED + 1)
    name = "embed_tokens.weight"
    assert not torch.equal(trained.parameters()[name], before.parameters()[name])
    report = fill_weights(trained, view, seed=0)
    assert report is not None
    for name, weight in before.parameters().items():
        assert torch.equal(trained.parameters()[name], weight), name
        assert bool((trained.adam()[name]["exp_avg"] == 0.25).all()), name


def drawn_rank(rank: int, world_size: int) -> dict[str, Any]:
    trained = trained_model(rank, world_size)
    weights = trained.parameters()
    return {
        name: [
            (box.unsharded_index, weights[name][box.local_index].clone())
            for box in trained.slice_map.owned(name, rank)
        ]
        for name in trained.slice_map.names
    }


def test_every_degree_starts_from_the_same_weights() -> None:
    whole = trained_model().parameters()
    gathered = {name: torch.full_like(weight, float("nan")) for name, weight in whole.items()}
    for owned in run_ranks(drawn_rank, 2):
        for name, boxes in owned.items():
            for index, values in boxes:
                gathered[name][index] = values
    assert all(torch.equal(gathered[name], weight) for name, weight in whole.items())


def test_the_degree_fits_heads_and_processes() -> None:
    world = World(
        rank=0, world_size=8, local_rank=0, local_world_size=4,
        device=torch.device("cpu"), control_group=None, feed_group=None,
    )  # fmt: skip
    settings = {"num_attention_heads": 24, "num_key_value_heads": 8}
    assert choose_tp_size(settings, None, world) == 4  # a node's ranks
    assert choose_tp_size(settings, 8, world) == 8
    with pytest.raises(ConfigError, match="--tensor-parallel-size 5 does not divide the 8 processes"):
        choose_tp_size(settings, 5, world)


def test_the_dtype_follows_the_device() -> None:
    assert choose_dtype(None, torch.device("cpu")) is torch.float32
    assert choose_dtype(None, torch.device("cuda", 0)) is torch.bfloat16
    assert choose_dtype("fp16", torch.device("cpu")) is torch.float16


def test_parameters_are_the_unsharded_models_and_tied() -> None:
    trained = trained_model()
    assert make_parallel(0, 1, 1).mesh is None and trained.wrapped is trained.model and trained.tied
    assert list(trained.parameters()) == [name for name, _ in trained.model.named_parameters()]
    assert trained.adam_options()["lr"] == 1e-2 and "params" not in trained.adam_options()


def test_flops_are_those_that_torch_counts() -> None:
    """But for causal attention, which torch counts whole and we at half, and the norms' few weights."""
    trained = trained_model()
    inputs, targets = batch_of(2).micro_batch(0, batch_size=2, dp_rank=0, dp_size=1, device="cpu")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trained.wrapped(input_ids=inputs, shift_labels=targets).loss.backward()
    config = trained.model.config
    half = 6.0 * config.num_hidden_layers * BLOCK * config.num_attention_heads * config.head_dim
    counted = counter.get_total_flops() / inputs.numel()
    assert flops_per_token(trained, BLOCK) + half == pytest.approx(counted, rel=0.02)
