"""Transformers' Trainer on an export: the right loss, with accumulation and gradient checkpointing."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from argonne.checkpoint.export_hf import quiet_transformers
from argonne.testing.hf_reference import copy_weights, llama_like
from argonne.testing.models import small_model
from model import ArgonneModel

pytestmark = pytest.mark.libraries

LENGTHS = (5, 9, 3, 12, 7, 4, 11, 6)


def documents() -> list[dict[str, list[int]]]:
    """Sequences of different lengths, so that a mean of means is not the mean over all targets."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 131, (n,), generator=generator).tolist()} for n in LENGTHS]


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        ids[index, : len(row["input_ids"])] = labels[index, : len(row["input_ids"])] = torch.tensor(
            row["input_ids"]
        )
    return {"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()}


def mean_loss(model: PreTrainedModel) -> float:
    """Torch's own cross entropy over all targets of all documents."""
    total, count = 0.0, 0
    for row in documents():
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids).logits[0, :-1].detach()
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


def trained_loss(model: PreTrainedModel, folder: Path, **options: Any) -> float:
    arguments: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 1, "logging_steps": 1, "report_to": [], "save_strategy": "no",
        "use_cpu": True, "disable_tqdm": True, "learning_rate": 0.0, "seed": 0, **options,
    }  # fmt: skip
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=documents(),
        data_collator=padded,
    )
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def open_export(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    with quiet_transformers():
        small_model(torch.float32).save_pretrained(tmp_path / "export")
    return tmp_path / "export"


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4)])
def test_the_loss_is_the_mean_over_all_targets(
    exported: Path, tmp_path: Path, batch: int, accumulation: int
) -> None:
    """Accumulated or not: without num_items_in_batch, 2 documents at a time give another number."""
    model = open_export(exported)
    assert isinstance(model, ArgonneModel)
    expected = mean_loss(model)
    llama = llama_like(model.config)
    copy_weights(model, llama)
    steps = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    loss = trained_loss(model, tmp_path / "run", **steps)
    assert loss == pytest.approx(trained_loss(llama, tmp_path / "llama", **steps), rel=1e-5)
    # Earlier versions count the first label, too, which is no target, whatever the model.
    if "loss_type" in inspect.getsource(Trainer):
        assert loss == pytest.approx(expected, rel=1e-4)


def test_gradient_checkpointing_under_trainer(exported: Path, tmp_path: Path) -> None:
    """By the name of today's versions; the recomputed blocks give the same gradients."""
    known = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    gradients = []
    for on in (False, True):
        model = open_export(exported)
        seen: dict[str, Tensor] = {}
        for key, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda p, key=key, seen=seen: seen.update({key: p.grad.clone()})
            )
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            trained_loss(model, tmp_path / str(on), per_device_train_batch_size=8, **{name: on})
        assert isinstance(model, ArgonneModel) and model.gradient_checkpointing is on
        gradients.append(seen)
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for key, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], grad, rtol=1e-5, atol=1e-6)
