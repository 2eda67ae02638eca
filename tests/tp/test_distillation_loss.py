"""The distillation loss on vocabulary slices, beside torch's own softmaxes: loss and every gradient."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from argonne.testing.models import random_tokens, relative_error, small_model
from argonne.tp.distillation_loss import DistillationRule, TeacherLogits, vocabulary_slice
from argonne.tp.group import SimulatedTPGroup
from argonne.verification.simulate import simulate
from model import ArgonneModel
from tp_shard import gather_state_dict, shard_tensor_parallel

VOCAB, PADDED = 131, 140
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"tie_word_embeddings": False, "z_loss_weight": 0.05},
    {"logit_softcap": 2.0, "qk_norm": True},
)
RULES = (
    DistillationRule(),
    DistillationRule(alpha=0.3, temperature=2.5),
    DistillationRule(alpha=0.3, temperature=2.5, reverse=True),
    DistillationRule(alpha=0.0, temperature=0.7),
    DistillationRule(alpha=1.0, reverse=True),
)


def a_teacher(cap: float) -> tuple[ArgonneModel, Tensor, Tensor]:
    """A wider model of a padded vocabulary, what its head is given, and its logits, cut to the student's."""
    teacher = small_model(seed=5, vocab_size=PADDED, hidden_size=60, logit_softcap=cap).eval()
    seen: list[Tensor] = []
    teacher.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = random_tokens()[:, :-1]
    with torch.no_grad():
        logits = teacher(input_ids=ids).logits
    return teacher, seen[0].reshape(-1, 60), logits[..., :VOCAB]


def plain_loss(
    student: ArgonneModel, teacher_logits: Tensor, rule: DistillationRule, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, cross entropy and T^2 x KL by torch's own functions."""
    logits = student(input_ids=random_tokens()[:, :-1]).logits.flatten(0, 1)
    kept = targets.flatten() != -100
    cross_entropy = F.cross_entropy(logits, targets.flatten())
    student_log = F.log_softmax(logits / rule.temperature, dim=-1)
    teacher_log = F.log_softmax(teacher_logits.flatten(0, 1) / rule.temperature, dim=-1)
    first, second = (teacher_log, student_log) if rule.reverse else (student_log, teacher_log)
    each = F.kl_div(first, second, reduction="none", log_target=True).sum(dim=-1)
    divergence = each[kept].mean() * rule.temperature**2
    z_loss = student.config.z_loss_weight * logits.logsumexp(dim=-1).square()[kept].mean()
    return rule.alpha * cross_entropy + (1 - rule.alpha) * divergence + z_loss, cross_entropy, divergence


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        pytest.param(rule, changes, marks=() if i % len(VARIANTS) == j else pytest.mark.slow)
        for i, rule in enumerate(RULES)
        for j, changes in enumerate(VARIANTS)
    ],
)
@pytest.mark.parametrize(
    ("size", "sequence_parallel", "chunk"), [(1, False, 7), (2, True, 5), (4, False, None)]
)
def test_loss_and_every_gradient_are_those_of_the_formula(
    size: int, sequence_parallel: bool, chunk: int | None, rule: DistillationRule, changes: dict[str, Any]
) -> None:
    teacher, hidden, teacher_logits = a_teacher(cap=3.0 if "logit_softcap" in changes else 0.0)
    plain = small_model(**changes)
    targets = random_tokens()[:, 1:].clone()
    targets[0, :3] = -100
    reference = copy.deepcopy(plain)
    expected = plain_loss(reference, teacher_logits, rule, targets)
    expected[0].backward()
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}

    def work(group: SimulatedTPGroup) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Any]]:
        model: Any = shard_tensor_parallel(
            copy.deepcopy(plain), group, sequence_parallel=sequence_parallel, loss_chunk_tokens=chunk
        )
        own = vocabulary_slice(model)
        matrix = teacher.lm_head.weight.detach()[own.start : own.stop]
        model.soft_targets = TeacherLogits(
            rule=rule, hidden=hidden, matrix=matrix, cap=teacher.config.logit_softcap
        )
        group.counters.reset()
        output = model(input_ids=random_tokens()[:, :-1], shift_labels=targets)
        calls = dict(group.counters.calls)
        output.loss.backward()
        model.tensor_parallel.sum_partial_gradients(
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        )
        return output.loss.detach(), model.loss_parts, gather_state_dict(model, gradients=True), calls

    for loss, parts, found, calls in simulate(SimulatedTPGroup.create(size), work):
        assert loss.item() == pytest.approx(expected[0].item(), rel=1e-10)
        assert parts.tolist() == pytest.approx([part.item() for part in expected[1:]], rel=1e-9, abs=1e-12)
        for name, gradient in gradients.items():
            assert relative_error(found[name], gradient) < 1e-9, name
        if size > 1 and not sequence_parallel:
            assert calls["all_reduce"] == 2 * 2 + 1 + 2  # two for the loss


def test_a_call_without_a_teacher_is_plain_again() -> None:
    model: Any = shard_tensor_parallel(small_model(), SimulatedTPGroup.create(1)[0], loss_chunk_tokens=None)
    ids = random_tokens()
    plain = model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:]).loss
    teacher, hidden, _ = a_teacher(0.0)
    model.soft_targets = TeacherLogits(
        rule=RULES[0], hidden=hidden, matrix=teacher.lm_head.weight.detach()[:VOCAB]
    )
    assert not torch.equal(model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:]).loss, plain)
    model.soft_targets = None
    assert torch.equal(model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:]).loss, plain)
