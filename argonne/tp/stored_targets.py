"""Distillation from stored targets, on vocabulary slices: a teacher's k most likely tokens and their rest.

The divergence is that of two distributions over k + 1 buckets: the k tokens that a file has of the teacher's
distribution, and one bucket for all others, whose mass the file has too. Merging tokens can only lower a
divergence (the data-processing inequality; Cover & Thomas 2006, section 2.8), and with k the whole vocabulary
nothing is merged: it is then the loss beside the teacher (``argonne.tp.distillation_loss``). The student's
mass of the rest is the sum over the tokens of the rest, each slice's own, never one less the sum of the k. As
there, one max and one stacked sum over the group carry all that a token's loss needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from argonne.tp.distillation_loss import (
    DistillationRule,
    empty_sums,
    finish,
    hard_gradient,
    note_targets,
    soft_chunks,
    weighted,
    within_range,
)
from argonne.tp.loss import LossRule, Places, capped


@dataclass(eq=False, kw_only=True)
class StoredTargets:
    """What a file has of a teacher's distribution at the rule's temperature, for the tokens of a micro-batch.

    Equal on all ranks of a group; each takes what lies in its own slice.
    """

    rule: DistillationRule
    ids: Tensor
    """(tokens, k) integers, distinct within a token."""
    log_probs: Tensor
    """(tokens, k); rounding in the file is taken out by scaling each token's masses to the sum 1."""
    log_rest: Tensor
    """(tokens,): of all other tokens together; -inf where there are none."""

    def token_loss(self, places: Places, rule: LossRule) -> StoredTargetsLoss:
        return StoredTargetsLoss(places, rule, self)


@dataclass(frozen=True)
class _Word:
    """The targets of some tokens as a slice needs them."""

    place: Tensor
    """(rows, k): the index in this rank's slice, or one past its end."""
    mine: Tensor
    """(rows, k): whether it is in the slice."""
    log_probs: Tensor
    """(rows, k), summing up to 1 with the rest."""
    log_rest: Tensor
    """(rows,)"""
    merged: Tensor
    """(rows,): whether there is a rest."""


class StoredTargetsLoss:
    """The loss of each token beside stored targets: (loss, cross entropy, T^2 x KL)."""

    def __init__(self, places: Places, rule: LossRule, targets: StoredTargets) -> None:
        self.places, self.rule, self._targets = places, rule, targets
        self._soft = targets.rule

    def _word(self, rows: slice) -> _Word:
        targets, dtype = self._targets, self.rule.dtype
        local = targets.ids[rows].long() - self.rule.start
        mine = (local >= 0) & (local < self.rule.valid)
        log_probs, log_rest = targets.log_probs[rows].to(dtype), targets.log_rest[rows].to(dtype)
        whole = torch.logaddexp(log_probs.logsumexp(dim=1), log_rest)
        return _Word(
            place=torch.where(mine, local, self.rule.valid),
            mine=mine,
            log_probs=log_probs - whole[:, None],
            log_rest=log_rest - whole,
            merged=log_rest > -torch.inf,
        )

    # Two maxima: of all logits, and of those of the rest. Rows of the stacked sum: exp(s - max), the target's
    # logit, of the rest exp((s - its max) / T), of the k exp((s - max) / T), and of the k what the divergence
    # is linear in: forward (s - max) / T, weighed by the teacher; reverse the difference of the logarithms,
    # weighed by the student.

    def slice_sums(self, rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        dtype, valid = self.rule.dtype, self.rule.valid
        largest, sums = empty_sums(self.rule, logits)
        if not valid:
            return largest, sums
        places, temperature = self.places.of(rows), self._soft.temperature
        for here, there in soft_chunks(rows, logits, dtype):
            word = self._word(there)
            # A column more, for what is stored of tokens in other slices.
            student = torch.full(
                (word.place.shape[0], valid + 1), -torch.inf, dtype=dtype, device=logits.device
            )
            student[:, :valid] = capped(logits[here, :valid], dtype, self.rule.cap)
            note_targets(student, places, here, largest, sums)
            base = within_range(largest[0, here, None])
            stored = student.gather(1, word.place).sub_(base)
            rest = student.scatter_(1, word.place, -torch.inf)
            largest[1, here] = rest.amax(dim=1)
            sums[0, here] = (rest - base).exp_().sum(dim=1) + stored.exp().sum(dim=1)
            rest.sub_(within_range(largest[1, here, None])).div_(temperature)
            sums[2, here] = rest.exp_().sum(dim=1)
            stored.div_(temperature)
            weights = stored.exp()
            sums[3, here] = weights.sum(dim=1)
            stored.masked_fill_(~word.mine, 0.0)
            if self._soft.reverse:
                stored.sub_(word.log_probs).mul_(weights)
            else:
                stored.mul_(word.log_probs.exp())
            sums[4, here] = stored.sum(dim=1)
        return largest, sums

    def combine(self, rows: slice, largest: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        group, places, temperature = self.rule.group, self.places.of(rows), self._soft.temperature
        word = self._word(rows)
        overall = group.all_reduce(largest, "max")
        rest_base = within_range(overall[1])
        if group.size > 1:
            self._shift(within_range(largest) - torch.stack([overall[0], rest_base]), word, sums)
        sums[1] = torch.where(places.mine, sums[1] - overall[0], 0.0)
        sums = group.all_reduce(sums, owned=True)
        # Logarithms of the student's masses, beside the overall maximum.
        all_log, rest, stored = sums[[0, 2, 3]].log()
        cross_entropy = all_log - sums[1]
        rest = rest + (rest_base - overall[0]) / temperature
        whole = torch.logaddexp(rest, stored)
        apart = torch.where(word.merged, rest - whole - word.log_rest, 0.0)
        if self._soft.reverse:
            divergence = (sums[4] - whole * sums[3]) * torch.exp(-whole) + (rest - whole).exp() * apart
        else:
            masses = word.log_probs.exp()
            divergence = (masses * word.log_probs).sum(dim=1) + masses.sum(dim=1) * whole - sums[4]
            divergence = divergence - word.log_rest.exp() * apart
        base = overall[0] / temperature
        rest = torch.where(word.merged, rest, 0.0)
        normalizers = torch.stack([overall[0] + all_log, base + whole, base + rest, divergence])
        return weighted(self._soft, self.rule, places, cross_entropy, divergence, normalizers[0]), normalizers

    def _shift(self, shift: Tensor, word: _Word, sums: Tensor) -> None:
        """From a slice's own maxima to those of the whole vocabulary."""
        scaled = within_range(shift / self._soft.temperature)  # times 0 in a slice that is all padding
        factors = scaled.exp()
        if self._soft.reverse:
            sums[4].add_(sums[3] * scaled[0]).mul_(factors[0])
        else:
            sums[4].add_(word.log_probs.exp().mul_(word.mine).sum(dim=1) * scaled[0])
        sums[0].mul_(shift[0].exp())
        sums[2].mul_(factors[1])
        sums[3].mul_(factors[0])

    def write_gradient(self, rows: slice, logits: Tensor, kept: Tensor) -> None:
        """With s the capped logits, p the softmax of s / T, q the teacher's, P and Q the masses of the rest:
        d T^2 KL / d s_j = T (p_j - q_j) for j among the k, T (p_j - Q p_j / P) for others, or for the reverse
        divergence K: T p_j (log p_j - log q_j - K) and T p_j (log P - log Q - K)."""
        valid, dtype, soft = self.rule.valid, self.rule.dtype, self._soft
        logits[:, valid:] = 0
        if not valid:
            return
        places = self.places.of(rows)
        for here, there in soft_chunks(rows, logits, dtype):
            word = self._word(there)
            student = capped(logits[here, :valid], dtype, self.rule.cap)
            part = hard_gradient(student, places, here, kept[0, here, None], soft, self.rule)
            part.add_(
                self._soft_gradient(student, word, kept[1:, here]),
                alpha=(1.0 - soft.alpha) * soft.temperature,
            )
            finish(part, student, places.ignored[here], logits[here, :valid], self.rule)

    def _soft_gradient(self, student: Tensor, word: _Word, kept: Tensor) -> Tensor:
        """d T KL / d s (rows, valid)."""
        whole, rest, divergence = kept[:, :, None]
        log_rest = word.log_rest[:, None]
        found = student.new_empty((student.shape[0], student.shape[1] + 1))  # a column more, as above
        log_student = torch.div(student, self._soft.temperature, out=found[:, :-1]).sub_(whole)
        stored = found.gather(1, torch.where(word.mine, word.place, 0))
        if self._soft.reverse:
            factor = torch.where(word.merged[:, None], rest - whole - log_rest, 0.0) - divergence
            log_student.exp_().mul_(factor)
            values = stored.exp() * (stored - word.log_probs - divergence)
        else:
            # p_j / P by its own exponential: P may be too small to divide by.
            within = (log_student + (whole - rest + log_rest)).exp_()
            log_student.exp_().sub_(within)
            values = stored.exp() - word.log_probs.exp()
        # Over what stands there, which for tokens outside the rest may be infinite.
        return found.scatter_(1, word.place, values)[:, :-1]
