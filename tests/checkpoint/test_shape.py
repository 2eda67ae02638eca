"""The shape of a model, read from the tensors of its checkpoint."""

from pathlib import Path

import pytest
import torch

from argonne.checkpoint.parts import open_any
from argonne.checkpoint.reader import open_checkpoint
from argonne.checkpoint.shape import check_model_config, infer_model_config
from argonne.errors import CheckpointError
from argonne.testing.checkpoint_samples import MODEL_CONFIG
from model import ArgonneConfig, ArgonneModel
from tests import FIXTURES
from tests.checkpoint.pipeline_samples import (
    fixture_config,
    pipeline_checkpoint,
)


@pytest.mark.parametrize("step", [25, 40])
def test_shape_is_read_from_a_pipeline_checkpoints_tensors(step: int) -> None:
    config = fixture_config(step)
    reader = open_checkpoint(FIXTURES / f"streaming_checkpoint_step_{step}.pth")
    heads = {key: config[key] for key in ("num_attention_heads", "num_key_value_heads", "rope_theta")}
    inferred = infer_model_config(reader, {**heads, "max_position_embeddings": 32})
    assert inferred == config
    check_model_config(inferred, config, reader.path)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is . in the checkpoint and 9 in"):
        check_model_config(inferred, {**config, "num_hidden_layers": 9, "rms_norm_eps": None}, reader.path)
    with pytest.raises(CheckpointError, match="7 query and 7 key/value heads"):
        infer_model_config(reader, {"num_attention_heads": 7, "num_key_value_heads": 7})
    with pytest.raises(CheckpointError, match="does not say how many heads"):
        infer_model_config(reader, {})


def test_an_early_checkpoint_whose_query_is_not_square(tmp_path: Path) -> None:
    """Hidden 4096 over 24 heads gives 170 a head and 4080 rows; here 50 over 8 gives 6 and 48."""
    config = ArgonneConfig(**{**MODEL_CONFIG, "hidden_size": 50, "num_attention_heads": 8, "head_dim": None},
                           tie_word_embeddings=False)  # fmt: skip
    model = ArgonneModel(config)
    path = tmp_path / "streaming_checkpoint_step_1.pth"
    torch.save({"model_state_dict": model.state_dict(), "global_step": 1}, path)
    inferred = infer_model_config(
        open_checkpoint(path), {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 4080}
    )
    assert (inferred["hidden_size"], inferred["head_dim"], inferred["tie_word_embeddings"]) == (50, 6, False)


def test_missing_layers_and_tensors_are_named(tmp_path: Path) -> None:
    checkpoint = pipeline_checkpoint()
    checkpoint.pop("optimizer_state_dict")
    weights = checkpoint["model_state_dict"]
    checkpoint["model_state_dict"] = {name.replace("blocks.1", "blocks.4"): w for name, w in weights.items()}
    torch.save(checkpoint, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="layers 1-3 of 5 are not in it"):
        infer_model_config(open_any(tmp_path / "a.pth"), MODEL_CONFIG)
    torch.save({"global_step": 3}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="no model_state_dict: not a training checkpoint"):
        open_any(tmp_path / "b.pth")
