"""Folders of weights: what transformers wrote is read, mapped, checked, and given to the ranks by slices."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from argonne.checkpoint.pretrained_folder import INDEX
from argonne.checkpoint.shape import expected_shapes
from argonne.config.families import FAMILY_DEFAULTS, read_folder_config, with_family_defaults
from argonne.config.presets import PRESETS, settings_of_document
from argonne.errors import CheckpointError, ConfigError
from argonne.testing.checkpoint_samples import save_sample, unsharded
from argonne.testing.distributed import run_ranks
from argonne.tp.slices import SliceMap
from checkpointing import CheckpointReader, InitialWeights, choose_checkpoint, load_slices, open_chosen
from model import ArgonneConfig, ArgonneModel
from tests import FIXTURES
from tests.checkpoint.weights_folders import FAMILIES, foreign_model, save_folder, tokens


def opened(folder: Path) -> CheckpointReader:
    choice = choose_checkpoint(
        None, folder / "none", initial=InitialWeights(path=str(folder), folder_config=read_folder_config)
    )
    assert choice.reader is not None and "step 0" in choice.reason
    return choice.reader


def argonne_of(reader: CheckpointReader) -> ArgonneModel:
    """The model that a folder's weights make here."""
    config = {k: v for k, v in reader.metadata["model_config"].items() if v is not None}
    model = ArgonneModel(ArgonneConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read(name, (0,) * parameter.ndim, tuple(parameter.shape)))
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_those_of_transformers(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    foreign = foreign_model(family)
    how: dict[str, Any] = {"max_shard_size": 60_000} if dtype is torch.bfloat16 else {}
    reader = opened(save_folder(foreign, tmp_path / "folder", dtype, **how))
    assert bool((tmp_path / "folder" / INDEX).exists()) == bool(how)
    model = argonne_of(reader)
    with torch.no_grad():
        actual, expected = model(input_ids=tokens()).logits, foreign(input_ids=tokens()).logits
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)
    assert [name for name, _ in model.named_parameters()] == list(reader.names)
    zeros = [name for name in reader.names if name.endswith("o_proj.bias")]
    assert bool(zeros) == (family == "qwen2")
    assert bool(reader.warnings) == bool(zeros) and all("begin at zero" in note for note in reader.warnings)


def test_the_familys_released_folder(tmp_path: Path) -> None:
    folder = FIXTURES / "family_checkpoint_step_20_hf"
    told = json.loads((FIXTURES / "family_checkpoint_step_20.json").read_text())
    model = argonne_of(opened(folder))
    probe = torch.tensor(told["folder_probe"])
    with torch.no_grad():
        output = model(input_ids=probe[:, :-1], shift_labels=probe[:, 1:])
    assert abs(output.loss.item() - told["folder_probe_loss"]) <= 3e-5


def test_expected_shapes_are_the_models() -> None:
    for changes in (
        {},
        {"qk_norm": True, "v_norm": True, "sandwich_norm": True},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ):
        config = {**PRESETS["argonne-tiny"], "vocab_size": 131, **changes}
        with torch.device("meta"):
            model = ArgonneModel(ArgonneConfig(**config))
        assert expected_shapes(config) == {n: tuple(p.shape) for n, p in model.named_parameters()}
        assert list(expected_shapes(config)) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_mean_what_they_mean_in_their_own_family(family: str) -> None:
    config = FAMILIES[family][0]()
    document = with_family_defaults({"model_type": family})
    for key, value in document.items():
        if key in ("model_type", "rope_theta"):
            continue
        assert value == getattr(config, key, value), key
    assert document["rope_theta"] == config.rope_parameters["rope_theta"]
    assert document["num_key_value_heads"] == config.num_key_value_heads
    if family == "mistral":
        with pytest.raises(ConfigError, match="sliding_window 4096"):
            settings_of_document(document, "x")
        document["sliding_window"] = None
    settings = settings_of_document(document, "x")
    assert settings["attention_bias"] == (family == "qwen2") and not settings["tie_word_embeddings"]
    assert set(FAMILY_DEFAULTS) == set(FAMILIES)
    theta = with_family_defaults({"model_type": family, "rope_parameters": {"rope_theta": 5e5}})
    assert settings_of_document({**theta, "sliding_window": None}, "x")["rope_theta"] == 5e5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama in several files; not to be changed."""
    target = tmp_path_factory.mktemp("weights") / "llama"
    return save_folder(foreign_model("llama"), target, max_shard_size=60_000)


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        opened(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def first_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def change_index(folder: Path, change: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_missing_and_surplus_tensors_are_named(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path)
    whole = {name: t for path in copy.glob("*.safetensors") for name, t in load_file(path).items()}
    for path in [*copy.glob("*.safetensors"), copy / INDEX]:
        path.unlink()
    single = copy / "model.safetensors"
    missing = "model.layers.1.mlp.up_proj.weight"
    save_file({name: t for name, t in whole.items() if name != missing}, single)
    refused(copy, r"1 weights are missing, such as model\.layers\.1\.mlp\.up_proj\.weight")
    save_file({**whole, "model.layers.0.self_attn.q_norm.weight": torch.ones(6)}, single)
    refused(copy, r"1 have no place in the model, such as model\.layers\.0\.self_attn\.q_norm\.weight")
    save_file({**whole, missing: torch.ones(91, 48)}, single)
    refused(copy, r"up_proj.weight is \(91, 48\), and config.json asks for \(90, 48\)")
    save_file({**whole, missing: torch.ones(90, 48, dtype=torch.int32)}, single)
    refused(copy, r"up_proj.weight holds 'I32'")
    save_file({**whole, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}, single)
    assert len(opened(copy).names) == len(whole)
    save_file({**whole, missing: torch.full((90, 48), torch.nan)}, single)
    slice_map = SliceMap(
        {n: (s, None) for n, s in expected_shapes(opened(copy).metadata["model_config"]).items()}, tp_size=1
    )
    parameters = {name: torch.zeros(slice_map.shape(name)) for name in slice_map.names}
    view, _, _ = open_chosen(
        None, tmp_path / "none", force_from_scratch=False, rank=0, control_group=None,
        initial=InitialWeights(path=str(copy), folder_config=read_folder_config),
    )  # fmt: skip
    assert view is not None and view.weights_only
    with pytest.raises(CheckpointError, match=r"blocks.1.mlp.up_proj.weight holds NaN"):
        load_slices(view, slice_map=slice_map, rank=0, parameters=parameters, adam={}, control_group=None)


def test_a_wrong_index_is_named(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path)
    names = sorted(path.name for path in copy.glob("*.safetensors"))
    weight = "model.norm.weight"

    def put(where: Any) -> None:
        shutil.copy(folder / INDEX, copy / INDEX)
        change_index(copy, lambda index: index["weight_map"].update({weight: where}))

    for outside in ("../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7):
        put(outside)
        refused(copy, rf"{INDEX} puts {weight} outside the folder")
    put("model-00009-of-00009.safetensors")
    refused(copy, "model-00009-of-00009.safetensors: no such file")
    placed = json.loads((folder / INDEX).read_text())["weight_map"]
    put(next(name for name in names if name != placed[weight]))
    refused(copy, weight)
    shutil.copy(folder / INDEX, copy / INDEX)
    change_index(copy, lambda index: index["weight_map"].pop(weight))
    refused(copy, f"holds {weight}, which {INDEX} puts nowhere")
    change_index(copy, lambda index: index["weight_map"].update({weight: placed[weight], "more": names[0]}))
    refused(copy, f"puts more in {names[0]}, which lacks it")
    for content in ("{", "[]", '{"weight_map": {}}', '{"weight_map": 3}'):
        (copy / INDEX).write_text(content)
        refused(copy, INDEX)
    (copy / INDEX).unlink()
    refused(copy, f"safetensors files and no {INDEX}")
    (copy / INDEX).write_bytes(b"\xff\xfe\x00")
    refused(copy, INDEX)


def test_every_truncation_and_damaged_header_is_one_line(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path)
    path = first_file(copy)
    content = path.read_bytes()
    for size in [*range(0, 300, 7), len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:size])
        refused(copy, path.name)
    path.write_bytes(content + b"x")
    refused(copy, "cut or damaged")
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")

    def written(entry: Any) -> None:
        encoded = json.dumps({**header, name: entry}).encode()
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])

    good = header[name]
    for entry in (
        3,
        {},
        {**good, "dtype": "F64"},
        {**good, "dtype": ["F32"]},
        {**good, "shape": [-1, 4]},
        {**good, "shape": [2**62, 2**62]},
        {**good, "shape": "x"},
        {**good, "shape": [True]},
        {**good, "data_offsets": [0]},
        {**good, "data_offsets": [4, 0]},
        {**good, "data_offsets": [good["data_offsets"][0] + 4, good["data_offsets"][1] + 4]},
    ):
        written(entry)
        refused(copy, name)
    twice = json.dumps({name: good})[:-1] + "," + json.dumps({name: good})[1:]
    path.write_bytes(len(twice).to_bytes(8, "little") + twice.encode() + content[8 + length :])
    refused(copy, "a name is there twice")
    nested = b"[" * 100_000
    path.write_bytes(len(nested).to_bytes(8, "little") + nested)
    refused(copy, "its header is damaged")


def test_a_tied_head_may_be_there_and_must_be_the_embedding(tmp_path: Path) -> None:
    copy = save_folder(foreign_model("qwen2"), tmp_path / "qwen2")
    path = copy / "model.safetensors"
    whole = load_file(path)
    assert "lm_head.weight" not in whole
    save_file({**whole, "lm_head.weight": whole["model.embed_tokens.weight"].clone()}, path)
    assert opened(copy).tied
    save_file({**whole, "lm_head.weight": whole["model.embed_tokens.weight"] + 1}, path)
    refused(copy, "lm_head.weight differs from model.embed_tokens.weight")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gemma2"}, "gemma2"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"sliding_window": 512}, "sliding_window 512"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_attention_heads": "8"}, "num_attention_heads"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_its_key(
    folder: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    copy = copy_of(folder, tmp_path)
    document = {**json.loads((copy / "config.json").read_text()), **change}
    (copy / "config.json").write_text(json.dumps(document))
    refused(copy, named)


def test_a_hubs_cache_of_links_is_opened(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(folder, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
    assert opened(snapshot).identity == opened(folder).identity
    with pytest.raises(CheckpointError, match=r"holds weights only \(safetensors\).*--init-from"):
        choose_checkpoint(str(snapshot), tmp_path / "run")


def test_a_checkpoint_gives_its_weights_only(tmp_path: Path) -> None:
    path, _ = save_sample(tmp_path / "before")
    for given in (path, tmp_path / "before"):
        initial = InitialWeights(path=str(given), folder_config=read_folder_config)
        choice = choose_checkpoint(None, tmp_path / "run", initial=initial)
        reader = choice.reader
        assert reader is not None and reader.step == 0 and not reader.adam and not reader.warnings
        assert set(reader.metadata) == {"model_config"} and "(its step 7)" in choice.reason
        assert torch.equal(reader.read("norm.weight", (0,), (24,)), unsharded("norm.weight", "param"))
    save_sample(tmp_path / "run" / "pretrained", 3)
    initial = InitialWeights(path=str(tmp_path / "gone"), folder_config=read_folder_config)
    choice = choose_checkpoint(None, tmp_path / "run", initial=initial)
    assert choice.reader is not None and choice.reader.step == 3
    assert "was used before" in choice.reason and "gone" in choice.reason
    for missing in (tmp_path / "gone", tmp_path):
        initial = InitialWeights(path=str(missing), folder_config=read_folder_config)
        with pytest.raises(CheckpointError, match=f"--init-from {missing}"):
            choose_checkpoint(None, tmp_path / "fresh", initial=initial)


def loaded_by(rank: int, world_size: int, folder: str, blind: bool) -> bool:
    """Load this rank's share of rows; where ``blind``, the other ranks cannot open the folder."""
    here = Path.cwd()
    os.chdir("/" if blind and rank else Path(folder).parent)
    try:
        view, _, _ = open_chosen(
            None, Path(folder) / "none", force_from_scratch=False, rank=rank, control_group=None,
            initial=InitialWeights(path=Path(folder).name, folder_config=read_folder_config),
        )  # fmt: skip
        assert view is not None and view.weights_only
        assert view.blind_ranks == (tuple(range(1, world_size)) if blind else ())
        from argonne.tp.slices import even_cut

        shapes = expected_shapes(view.metadata["model_config"])
        cuts = {n: (s, even_cut(s[0], world_size, 0)) for n, s in shapes.items()}
        slice_map = SliceMap(cuts, tp_size=world_size)
        parameters = {name: torch.zeros(slice_map.local_shape(name, rank)) for name in slice_map.names}
        load_slices(view, slice_map=slice_map, rank=rank, parameters=parameters, adam={}, control_group=None)
    finally:
        os.chdir(here)
    whole = argonne_of(opened(Path(folder))).state_dict()
    return all(
        torch.equal(parameters[name][box.local_index], whole[name][box.unsharded_index])
        for name in slice_map.names
        for box in slice_map.rectangles(name, rank)
    )


@pytest.mark.parametrize("blind", [False, True])
def test_ranks_take_their_slices_and_those_without_the_folder_are_served(folder: Path, blind: bool) -> None:
    assert run_ranks(loaded_by, 2, str(folder), blind) == [True, True]
