"""Defaults of the options, and what is derived from them."""

import pytest

from argonne.config.command_line import (
    parse_command_line,
)
from argonne.config.derived import derive_accumulation
from argonne.config.options import TrainingOptions
from argonne.errors import ConfigError

NEEDED = ["--tokenizer-path", "tok"]


def test_defaults_are_the_guides() -> None:
    config = parse_command_line(NEEDED)
    assert config.data.tokenizer_path == "tok"
    assert config.data.data_glob == ("../data/CC-MAIN-2025-26/*.parquet",)
    assert (config.training.batch_size, config.training.block_size) == (4, 4096)
    assert (config.training.learning_rate, config.training.min_learning_rate) == (1e-4, 1e-5)
    assert (config.training.warmup_steps, config.training.total_steps) == (2000, 4_000_000)
    assert (config.training.weight_decay, config.training.grad_clip) == (0.1, 1.0)
    assert config.training.adam_betas == (0.9, 0.999)
    assert config.data.streaming and config.data.packing and config.data.num_proc == 8
    assert config.checkpoint.checkpoint_path is None and config.checkpoint.keep_checkpoints == 3
    assert config.checkpoint.checkpoint_interval == 300
    assert (config.output.log_interval, config.output.sample_interval, config.output.output_dir) == (
        50,
        1000,
        ".",
    )
    assert config.output.sample_prompt == "Long long time ago, "
    assert (config.output.tracker, config.output.profile) == ((), None)
    assert config.control.spike_action == "none"
    assert config.model.model_config is None and config.model.settings is None
    assert derive_accumulation(config.training, 3) == 1


def test_checkpoint_interval_depends_on_streaming() -> None:
    assert parse_command_line([*NEEDED, "--no-streaming"]).checkpoint.checkpoint_interval == 2000
    given = parse_command_line([*NEEDED, "--no-streaming", "--checkpoint-interval", "300"])
    assert given.checkpoint.checkpoint_interval == 300


@pytest.mark.parametrize(
    ("batch", "total", "dp_size", "accumulation"),
    [(4, 32, 2, 4), (1, 8, 8, 1), (2, None, 5, 1), (3, 36, 4, 3)],
)
def test_derived_accumulation(batch: int, total: int | None, dp_size: int, accumulation: int) -> None:
    assert (
        derive_accumulation(TrainingOptions(batch_size=batch, global_batch_size=total), dp_size)
        == accumulation
    )


def test_a_global_batch_that_cannot_be_split_is_refused_with_its_values() -> None:
    with pytest.raises(ConfigError, match=r"--global-batch-size 20 .* 4 x 2 model replicas = 8"):
        derive_accumulation(TrainingOptions(batch_size=4, global_batch_size=20), 2)
    with pytest.raises(ConfigError, match="leave it out"):
        derive_accumulation(TrainingOptions(global_batch_size=16, gradient_accumulation_steps=4), 2)
