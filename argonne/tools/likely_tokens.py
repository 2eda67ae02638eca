"""The most likely tokens of a teacher's distribution, from vocabulary slices, and the mass of all others."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from argonne.data.target_file import Targets
from argonne.errors import DataError
from tp_shard import TeacherLogits, TPGroup

WORK_BYTES = 256 << 20
"""Of one float32 copy of the logits of some tokens."""
LOWEST = -60000.0
"""Of a logarithm in a float16."""


def most_likely(
    logits: Tensor, k: int, temperature: float, rows: range, group: TPGroup
) -> tuple[Tensor, ...]:
    """The k most likely tokens of the softmax of logits / T over the whole vocabulary: (ids (tokens, k),
    their log-probabilities, the logarithm of the mass of all others (tokens,)), the same on all ranks.

    ``logits``: (tokens, len(rows)) of this rank's slice ``rows`` of the vocabulary.
    """
    held = logits.float().div_(temperature)
    values, places = held.topk(min(k, len(rows)), dim=1)
    ids = places + rows.start
    if group.size > 1:
        lacking = k - values.shape[1]
        values = F.pad(values, (0, lacking), value=-torch.inf)
        ids = F.pad(ids, (0, lacking), value=-1)
        values, ids = (_side_by_side(part, group) for part in (values, ids))
        values, chosen = values.topk(k, dim=1)
        ids = ids.gather(1, chosen)
    # A column more, for the ids of other slices.
    others = F.pad(held, (0, 1), value=-torch.inf)
    local = ids - rows.start
    mine = (local >= 0) & (local < len(rows))
    rest = others.scatter_(1, torch.where(mine, local, len(rows)), -torch.inf).logsumexp(dim=1)
    if group.size > 1:
        rest = _side_by_side(rest[:, None], group).logsumexp(dim=1)
    whole = torch.logaddexp(values.logsumexp(dim=1), rest)
    return ids, values - whole[:, None], rest - whole


def _side_by_side(part: Tensor, group: TPGroup) -> Tensor:
    """(tokens, n) of every rank as (tokens, size * n)."""
    return group.all_gather(part.contiguous()).view(group.size, *part.shape).transpose(0, 1).flatten(1)


def targets_of(teacher: TeacherLogits, k: int, rows: range, group: TPGroup) -> Targets:
    """What is stored of a micro-batch; a few tokens' logits at a time."""
    count = max(1, WORK_BYTES // (4 * max(1, len(rows))))
    parts = [
        most_likely(
            teacher.logits(slice(first, first + count), torch.float32),
            k,
            teacher.rule.temperature,
            rows,
            group,
        )
        for first in range(0, len(teacher.hidden), count)
    ]
    ids, log_probs, log_rest = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    if not np.isfinite(log_probs).all():
        raise DataError(
            "--teacher-path: the teacher's logits are not finite: give another --teacher-dtype, or mend the "
            "teacher"
        )
    return Targets(ids, np.maximum(log_probs, LOWEST), log_rest)
