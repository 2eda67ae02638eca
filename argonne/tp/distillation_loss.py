"""Distillation on vocabulary slices: cross entropy, and the divergence from a teacher's distribution.

A token's loss is alpha x cross entropy + (1 - alpha) x T^2 x KL of the softmaxes of student's and teacher's
logits over T (Hinton et al. 2015, section 2); the z-loss, where the student has one, is added as it is. The
teacher's logits are made here, a chunk of tokens and this rank's slice of the student's vocabulary at a time,
from what its head is given; or they are not there, and a file tells its most likely tokens
(``argonne.tp.stored_targets``). Nothing is gathered: one max and one stacked sum over the group carry all
that a token's loss needs, as many collectives as cross entropy takes alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from argonne.tp.chunked_loss import CHUNK_BYTES
from argonne.tp.group import TPGroup
from argonne.tp.loss import LossRule, Places, capped, row_chunks


def vocabulary_slice(model: nn.Module) -> range:
    """The ids whose logits a rank of a split ArgonneModel makes, padding left out."""
    group: TPGroup = model.tensor_parallel.group  # type: ignore[assignment, union-attr]
    local, total = model.lm_head.weight.shape[0], model.config.vocab_size  # type: ignore[union-attr, index]
    first = min(group.rank * int(local), int(total))  # type: ignore[arg-type]
    return range(first, min(first + int(local), int(total)))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class DistillationRule:
    """How a teacher's word and the next token are weighed."""

    alpha: float = 0.5
    """Share of the cross entropy."""
    temperature: float = 1.0
    reverse: bool = False
    """KL(student || teacher) in place of KL(teacher || student)."""


@dataclass(eq=False, kw_only=True)
class TeacherLogits:
    """The logits of a whole teacher on a micro-batch, of which this rank makes those of its own slice."""

    rule: DistillationRule
    hidden: Tensor
    """(tokens, teacher_hidden_size), what the teacher's head is given; equal on all ranks."""
    matrix: Tensor
    """(valid, teacher_hidden_size): the rows of its head that are this rank's slice of the student's."""
    bias: Tensor | None = None
    """(valid,)"""
    scale: float = 1.0
    """What its logits are multiplied by."""
    cap: float = 0.0
    """Its soft cap, applied after the scale; 0: none."""

    def logits(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """(rows, valid), scaled and capped, in ``dtype``."""
        made = F.linear(self.hidden[rows], self.matrix, self.bias)
        logits = made.to(dtype)
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        return logits.div_(self.cap).tanh_().mul_(self.cap) if self.cap else logits

    def token_loss(self, places: Places, rule: LossRule) -> TeacherLoss:
        return TeacherLoss(places, rule, self)


def soft_chunks(rows: slice, logits: Tensor, wide: torch.dtype) -> list[tuple[slice, slice]]:
    """(rows within ``logits``, the same within the micro-batch), as many as ``wide`` has room for."""
    start = rows.start or 0
    most = max(1, CHUNK_BYTES // 2 // max(1, logits.shape[1] * wide.itemsize))
    parts = [
        slice(first, min(first + most, part.stop, len(logits)))
        for part in row_chunks(logits)
        for first in range(part.start, min(part.stop, len(logits)), most)
    ]
    return [(part, slice(start + part.start, start + part.stop)) for part in parts]


class TeacherLoss:
    """The loss of each token beside a teacher's logits: (loss, cross entropy, T^2 x KL)."""

    def __init__(self, places: Places, rule: LossRule, teacher: TeacherLogits) -> None:
        self.places, self.rule, self._teacher = places, rule, teacher
        self._soft = teacher.rule

    # Rows of the stacked sum: exp(s - max), the target's logit, exp((s - max) / T), exp((t - max) / T), and
    # the difference of the logits weighed by the distribution that the divergence is the mean over.

    def slice_sums(self, rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        dtype, valid = self.rule.dtype, self.rule.valid
        largest, sums = empty_sums(self.rule, logits)
        if not valid:
            return largest, sums
        places, temperature = self.places.of(rows), self._soft.temperature
        for here, there in soft_chunks(rows, logits, dtype):
            student = capped(logits[here, :valid], dtype, self.rule.cap)
            teacher = self._teacher.logits(there, dtype)
            note_targets(student, places, here, largest, sums)
            largest[1, here] = teacher.amax(dim=1)
            student.sub_(within_range(largest[0, here, None]))
            teacher.sub_(within_range(largest[1, here, None]))
            sums[0, here] = student.exp().sum(dim=1)
            apart = teacher - student
            if self._soft.reverse:
                apart.neg_()
            weights = student.div_(temperature).exp_()
            sums[2, here] = weights.sum(dim=1)
            others = teacher.div_(temperature).exp_()
            sums[3, here] = others.sum(dim=1)
            sums[4, here] = apart.mul_(weights if self._soft.reverse else others).sum(dim=1)
        return largest, sums

    def combine(self, rows: slice, largest: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        group, places, temperature = self.rule.group, self.places.of(rows), self._soft.temperature
        overall = group.all_reduce(largest, "max")
        if group.size > 1:
            self._shift(within_range(largest) - overall, sums)
        sums[1] = torch.where(places.mine, sums[1] - overall[0], 0.0)
        sums = group.all_reduce(sums, owned=True)
        log_sums = sums[[0, 2, 3]].log()
        cross_entropy = log_sums[0] - sums[1]
        if self._soft.reverse:
            divergence = sums[4] / sums[2] / temperature - log_sums[1] + log_sums[2]
        else:
            divergence = sums[4] / sums[3] / temperature - log_sums[2] + log_sums[1]
        normalizers = torch.stack(
            [
                overall[0] + log_sums[0],
                overall[0] / temperature + log_sums[1],
                overall[1] / temperature + log_sums[2],
                divergence,
            ]
        )
        return weighted(self._soft, self.rule, places, cross_entropy, divergence, normalizers[0]), normalizers

    def _shift(self, shift: Tensor, sums: Tensor) -> None:
        """From a slice's own maxima to those of the whole vocabulary."""
        temperature = self._soft.temperature
        student, teacher = shift[0].div(temperature).exp_(), shift[1].div(temperature).exp_()
        apart = shift[1] - shift[0]
        if self._soft.reverse:
            sums[4].sub_(sums[2] * apart).mul_(student)
        else:
            sums[4].add_(sums[3] * apart).mul_(teacher)
        sums[0].mul_(shift[0].exp())
        sums[2].mul_(student)
        sums[3].mul_(teacher)

    def write_gradient(self, rows: slice, logits: Tensor, kept: Tensor) -> None:
        """With s the capped logits, p and q the softmaxes of s / T and of the teacher's over T, y the target:
        d loss / d s_j = alpha (softmax(s)_j - [j = y]) + (1 - alpha) T (p_j - q_j), or for the reverse
        divergence K in place of the bracket p_j (log p_j - log q_j - K)."""
        valid, dtype, soft = self.rule.valid, self.rule.dtype, self._soft
        logits[:, valid:] = 0
        if not valid:
            return
        places, temperature = self.places.of(rows), soft.temperature
        factor = (1.0 - soft.alpha) * temperature
        for here, there in soft_chunks(rows, logits, dtype):
            whole, student_log, teacher_log, divergence = kept[:, here, None]
            student = capped(logits[here, :valid], dtype, self.rule.cap)
            teacher = self._teacher.logits(there, dtype).div_(temperature).sub_(teacher_log)
            part = hard_gradient(student, places, here, whole, soft, self.rule)
            log_student = (student / temperature).sub_(student_log)
            if soft.reverse:
                apart = (log_student - teacher).sub_(divergence)
                part.addcmul_(log_student.exp_(), apart, value=factor)
            else:
                part.add_(log_student.exp_().sub_(teacher.exp_()), alpha=factor)
            finish(part, student, places.ignored[here], logits[here, :valid], self.rule)


def empty_sums(rule: LossRule, logits: Tensor) -> tuple[Tensor, Tensor]:
    """(2, rows) maxima and (5, rows) sums for `slice_sums` to fill, which a slice of padding leaves alone."""
    largest = torch.full((2, len(logits)), -torch.inf, dtype=rule.dtype, device=logits.device)
    return largest, torch.zeros((5, len(logits)), dtype=rule.dtype, device=logits.device)


def note_targets(student: Tensor, places: Places, rows: slice, largest: Tensor, sums: Tensor) -> None:
    """Fill the first maximum and the second sum of some rows: the largest of their capped logits, and the
    target's where it is in the slice."""
    largest[0, rows] = student.amax(dim=1)
    picked = student.gather(1, places.local[rows, None]).squeeze(1)
    sums[1, rows] = torch.where(places.mine[rows], picked, 0.0)


def within_range(largest: Tensor) -> Tensor:
    """Maxima to take differences of: a slice that is all padding has -inf."""
    return largest.clamp_min(torch.finfo(largest.dtype).min)


def weighted(
    soft: DistillationRule,
    rule: LossRule,
    places: Places,
    cross_entropy: Tensor,
    divergence: Tensor,
    log_normalizer: Tensor,
) -> Tensor:
    """(3, rows): loss, cross entropy and T^2 x KL of each token, 0 where it is ignored."""
    distilled = divergence * soft.temperature**2
    loss = soft.alpha * cross_entropy + (1.0 - soft.alpha) * distilled
    if rule.z_loss_weight:
        loss = loss + rule.z_loss_weight * log_normalizer.square()
    return torch.stack([loss, cross_entropy, distilled]).masked_fill_(places.ignored, 0.0)


def hard_gradient(
    student: Tensor, places: Places, rows: slice, normalizer: Tensor, soft: DistillationRule, rule: LossRule
) -> Tensor:
    """The gradient of alpha x cross entropy and of the z-loss with respect to capped logits (rows, valid)."""
    part = (student - normalizer).exp_()
    part.mul_(soft.alpha + 2.0 * rule.z_loss_weight * normalizer if rule.z_loss_weight else soft.alpha)
    mine = places.mine[rows, None].to(part.dtype)
    return part.scatter_add_(1, places.local[rows, None], -soft.alpha * mine)


def finish(part: Tensor, student: Tensor, ignored: Tensor, into: Tensor, rule: LossRule) -> None:
    """Through the soft cap to the raw logits, nothing where the target is ignored."""
    if rule.cap:
        part.mul_((student / rule.cap).square_().neg_().add_(1.0))
    into.copy_(part.masked_fill_(ignored[:, None], 0.0))
