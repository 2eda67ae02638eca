"""Flags of trackers, samples, profiles and spikes: what they take and refuse."""

import importlib.util

import pytest

from argonne.config.command_line import parse_recipe
from argonne.config.flags import step_window, window_of

TOKENIZER = ["--tokenizer-path", "tok"]


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        parse_recipe([*TOKENIZER, *flags])
    assert leaving.value.code == 2
    return capsys.readouterr().err


def test_a_missing_package_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else object())
    err = refused(capsys, "--tracker", "trackio", "wandb", "wandb")
    assert err == (
        "error: --tracker trackio wandb wandb needs wandb, not installed here: pip install wandb, "
        "or leave the flag out\n"
    )
    config = parse_recipe([*TOKENIZER, "--tracker", "trackio", "--tracker", "tensorboard"]).config
    assert config.output.tracker == ("trackio", "tensorboard")


def test_an_unknown_tracker_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--tracker mlflow: choose tensorboard, wandb or trackio" in refused(capsys, "--tracker", "mlflow")


@pytest.mark.parametrize("text", ["5", "0:3", "3:0", "-1:2", "a:b", "1:2:3", ":", "1.5:2"])
def test_a_profile_needs_two_numbers(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=text):
        step_window(text)
    assert f"--profile {text}: give START:STEPS" in refused(capsys, f"--profile={text}")


def test_a_profile_is_read() -> None:
    config = parse_recipe([*TOKENIZER, "--profile", "100:5"]).config
    assert config.output.profile == "100:5" and window_of("100:5") == (100, 5)
