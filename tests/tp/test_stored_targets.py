"""The loss beside stored targets: a plain formula's, gradients too; with all ids the teacher's own."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from argonne.testing.models import random_tokens, relative_error, small_model
from argonne.tp.distillation_loss import DistillationRule, TeacherLogits, vocabulary_slice
from argonne.tp.group import SimulatedTPGroup
from argonne.tp.loss import LossRule, places_of
from argonne.tp.stored_targets import StoredTargets
from argonne.verification.simulate import simulate
from model import ArgonneModel
from tests.tp.test_distillation_loss import RULES, VARIANTS, VOCAB, a_teacher
from tp_shard import gather_state_dict, shard_tensor_parallel

K = 9


def stored(teacher_logits: Tensor, rule: DistillationRule, k: int) -> StoredTargets:
    """The k most likely of (tokens, vocabulary) logits at the rule's temperature, in any order."""
    log_probs = F.log_softmax(teacher_logits.flatten(0, 1) / rule.temperature, dim=-1)
    values, ids = log_probs.topk(k, dim=-1, sorted=False)
    rest = log_probs.scatter(1, ids, -torch.inf).logsumexp(dim=-1)
    return StoredTargets(rule=rule, ids=ids.to(torch.int32), log_probs=values, log_rest=rest)


def plain_loss(
    student: ArgonneModel, targets: StoredTargets, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, cross entropy and T^2 x KL over k + 1 buckets, as one writes them on whole logits."""
    rule, ids = targets.rule, targets.ids.long()
    logits = student(input_ids=random_tokens()[:, :-1]).logits.flatten(0, 1)
    kept = labels.flatten() != -100
    cross_entropy = F.cross_entropy(logits, labels.flatten())
    masses = (logits / rule.temperature).softmax(dim=-1)
    others = torch.ones_like(masses).scatter(1, ids, 0.0)
    p = torch.cat([masses.gather(1, ids), (masses * others).sum(dim=1, keepdim=True)], dim=1)
    q = torch.cat([targets.log_probs, targets.log_rest[:, None]], dim=1).exp()
    q = q / q.sum(dim=1, keepdim=True)
    first, second = (p, q) if rule.reverse else (q, p)
    there = (q > 0).double()
    each = (first * ((first + 1 - there).log() - (second + 1 - there).log()) * there).sum(dim=1)
    divergence = each[kept].mean() * rule.temperature**2
    z_loss = student.config.z_loss_weight * logits.logsumexp(dim=-1).square()[kept].mean()
    return rule.alpha * cross_entropy + (1 - rule.alpha) * divergence + z_loss, cross_entropy, divergence


def labels_of() -> Tensor:
    labels = random_tokens()[:, 1:].clone()
    labels[0, :3] = -100
    return labels


Found = tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Any]]


def trained(
    plain: ArgonneModel, make: Any, size: int, *, sequence_parallel: bool, chunk: int | None
) -> list[Found]:
    """(loss, its parts, gradients, collectives) of each rank; ``make``: of a model, its soft targets."""

    def work(group: SimulatedTPGroup) -> Found:
        model: Any = shard_tensor_parallel(
            copy.deepcopy(plain), group, sequence_parallel=sequence_parallel, loss_chunk_tokens=chunk
        )
        model.soft_targets = make(model)
        group.counters.reset()
        output = model(input_ids=random_tokens()[:, :-1], shift_labels=labels_of())
        calls = dict(group.counters.calls)
        output.loss.backward()
        model.tensor_parallel.sum_partial_gradients(
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        )
        return output.loss.detach(), model.loss_parts, gather_state_dict(model, gradients=True), calls

    return simulate(SimulatedTPGroup.create(size), work)


LAYOUTS = [(1, False, 7), (2, True, 5), (4, False, None)]


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        pytest.param(rule, changes, marks=() if i % len(VARIANTS) == j else pytest.mark.slow)
        for i, rule in enumerate(RULES)
        for j, changes in enumerate(VARIANTS)
    ],
)
@pytest.mark.parametrize(("size", "sequence_parallel", "chunk"), LAYOUTS)
def test_loss_and_every_gradient_are_those_of_the_formula(
    size: int, sequence_parallel: bool, chunk: int | None, rule: DistillationRule, changes: dict[str, Any]
) -> None:
    _, _, teacher_logits = a_teacher(cap=3.0 if "logit_softcap" in changes else 0.0)
    targets = stored(teacher_logits, rule, K)
    plain = small_model(**changes)
    reference = copy.deepcopy(plain)
    expected = plain_loss(reference, targets, labels_of())
    expected[0].backward()
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    found = trained(plain, lambda _: targets, size, sequence_parallel=sequence_parallel, chunk=chunk)
    for loss, parts, of_all, calls in found:
        assert loss.item() == pytest.approx(expected[0].item(), rel=1e-10)
        assert parts.tolist() == pytest.approx([part.item() for part in expected[1:]], rel=1e-9, abs=1e-12)
        for name, gradient in gradients.items():
            assert relative_error(of_all[name], gradient) < 1e-9, name
        if size > 1 and not sequence_parallel:
            assert calls["all_reduce"] == 2 * 2 + 1 + 2  # two for the loss, as beside the teacher


@pytest.mark.parametrize(
    ("size", "sequence_parallel", "chunk", "rule"),
    [
        pytest.param(*layout, rule, marks=() if i % len(LAYOUTS) == j else pytest.mark.slow)
        for i, rule in enumerate(RULES)
        for j, layout in enumerate(LAYOUTS)
    ],
)
def test_with_the_whole_vocabulary_it_is_the_teachers_loss(
    size: int, sequence_parallel: bool, chunk: int | None, rule: DistillationRule
) -> None:
    teacher, hidden, teacher_logits = a_teacher(cap=3.0)
    targets = stored(teacher_logits, rule, VOCAB)
    assert bool(targets.log_rest.isneginf().all())

    def beside_it(model: Any) -> TeacherLogits:
        own = vocabulary_slice(model)
        matrix = teacher.lm_head.weight.detach()[own.start : own.stop]
        return TeacherLogits(rule=rule, hidden=hidden, matrix=matrix, cap=3.0)

    plain = small_model(logit_softcap=2.0, z_loss_weight=0.02)
    layout = {"sequence_parallel": sequence_parallel, "chunk": chunk}
    live = trained(plain, beside_it, size, **layout)  # type: ignore[arg-type]
    offline = trained(plain, lambda _: targets, size, **layout)  # type: ignore[arg-type]
    for one, other in zip(live, offline, strict=True):
        assert other[0].item() == pytest.approx(one[0].item(), rel=1e-10)
        assert other[1].tolist() == pytest.approx(one[1].tolist(), rel=1e-9, abs=1e-12)
        for name, gradient in one[2].items():
            assert relative_error(other[2][name], gradient) < 1e-9, name
        assert other[3] == one[3]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_student_that_is_sure_of_a_stored_token_has_finite_gradients_in_float32(reverse: bool) -> None:
    """Its mass of the rest is below what float32 holds; the formula is evaluated in float64."""
    torch.manual_seed(0)
    logits = torch.randn(3, 12) * 2
    logits[:, 4] += 150.0
    ids = torch.tensor([[4, 0, 7]] * 3)
    log_probs, log_rest = torch.log(torch.tensor([[0.5, 0.2, 0.1]] * 3)), torch.log(torch.full((3,), 0.2))
    rule = DistillationRule(alpha=0.0, temperature=0.8, reverse=reverse)
    targets = StoredTargets(rule=rule, ids=ids, log_probs=log_probs, log_rest=log_rest)
    wide = logits.double().requires_grad_()
    log_p = F.log_softmax(wide / rule.temperature, dim=-1)
    others = torch.ones(3, 12).scatter(1, ids, 0.0).bool()
    rest = log_p.masked_fill(~others, -torch.inf).logsumexp(dim=-1, keepdim=True)
    p, q = torch.cat([log_p.gather(1, ids), rest], 1), torch.cat([log_probs, log_rest[:, None]], 1).double()
    one, other = (p, q) if reverse else (q, p)
    expected = (one.exp() * (one - other)).sum(dim=1) * rule.temperature**2
    expected.sum().backward()
    for size in (1, 2):

        def work(group: SimulatedTPGroup) -> tuple[Tensor, Tensor]:
            local = logits.chunk(group.size, dim=1)[group.rank].clone()
            loss_rule = LossRule.on(group, local.shape[1], 12, local.dtype)
            loss = targets.token_loss(places_of(torch.zeros(3, dtype=torch.long), loss_rule), loss_rule)
            losses, kept = loss.combine(slice(None), *loss.slice_sums(slice(None), local))
            loss.write_gradient(slice(None), local, kept)
            return losses, local

        parts = simulate(SimulatedTPGroup.create(size), work)
        torch.testing.assert_close(parts[0][0][0].double(), expected.detach(), rtol=1e-5, atol=1e-6)
        gradient = torch.cat([part[1] for part in parts], dim=1).double()
        torch.testing.assert_close(gradient, wide.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_what_is_left_out_is_the_divergence_within_the_rest(reverse: bool) -> None:
    """The chain rule: the whole divergence is that over buckets, and the rest's mass x that within it."""
    torch.manual_seed(1)
    student, teacher = torch.randn(5, 20, dtype=torch.float64), torch.randn(1, 5, 20, dtype=torch.float64) * 2
    rule = DistillationRule(alpha=0.0, temperature=1.0, reverse=reverse)
    targets = stored(teacher, rule, 6)
    group = SimulatedTPGroup.create(1)[0]
    loss_rule = LossRule.on(group, 20, 20, torch.float64)
    loss = targets.token_loss(places_of(torch.zeros(5, dtype=torch.long), loss_rule), loss_rule)
    merged = loss.combine(slice(None), *loss.slice_sums(slice(None), student))[0][2]
    q, p = F.log_softmax(teacher[0], dim=-1), F.log_softmax(student, dim=-1)
    one, other = (p, q) if reverse else (q, p)
    whole = (one.exp() * (one - other)).sum(dim=-1)
    others = torch.ones(5, 20).scatter(1, targets.ids.long(), 0.0).bool()
    one, other = (log.masked_select(others).view(5, 14) for log in (one, other))
    within = F.kl_div(F.log_softmax(other, -1), F.log_softmax(one, -1), reduction="none", log_target=True)
    left_out = one.exp().sum(dim=-1) * within.sum(dim=-1)
    torch.testing.assert_close(merged + left_out, whole, rtol=1e-10, atol=1e-12)


def test_rounding_in_the_file_is_taken_out() -> None:
    """Masses that do not add up to 1 are scaled: of a student equal to the teacher the loss is 0."""
    _, _, teacher_logits = a_teacher(cap=0.0)
    rule = DistillationRule(alpha=0.0)
    exact = stored(teacher_logits, rule, K)
    moved = StoredTargets(
        rule=rule, ids=exact.ids, log_probs=exact.log_probs + 0.01, log_rest=exact.log_rest + 0.01
    )
    plain = small_model()
    losses = [
        trained(plain, lambda _, t=t: t, 1, sequence_parallel=False, chunk=None)[0][0] for t in (exact, moved)
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-9)
