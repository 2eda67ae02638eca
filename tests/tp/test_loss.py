"""Cross entropy on vocabulary slices is torch's cross entropy, on simulated ranks and over gloo."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import argonne.tp.loss as loss_module
from argonne.testing.distributed import run_ranks
from argonne.tp.group import ProcessTPGroup, SimulatedTPGroup, TPGroup
from argonne.tp.loss import vocab_parallel_cross_entropy
from argonne.tp.slices import padded_slice_size
from argonne.verification.simulate import simulate

Outcome = tuple[Tensor, Tensor, dict[str, int], dict[str, int]]


def local_logits(logits: Tensor, rank: int, size: int, padding: float = 7.0) -> Tensor:
    """This rank's slice of (..., vocab); what lies beyond the vocabulary is ``padding``, a wrong value."""
    local = padded_slice_size(logits.shape[-1], size)
    padded = F.pad(logits, (0, local * size - logits.shape[-1]), value=padding)
    return padded[..., rank * local : (rank + 1) * local].clone().requires_grad_()


def one_rank(group: TPGroup, logits: Tensor, targets: Tensor, **options: Any) -> Outcome:
    part = local_logits(logits, group.rank, group.size)
    group.counters.reset()
    loss = vocab_parallel_cross_entropy(part, targets, group, vocab_size=logits.shape[-1], **options)
    # Unequal weights, so that a loss which lands on the wrong token is seen.
    weights = torch.arange(1, 1 + loss.numel(), dtype=loss.dtype).view(loss.shape)
    (loss * weights).sum().backward()
    assert part.grad is not None
    calls, payload = dict(group.counters.calls), dict(group.counters.bytes)
    return loss.detach(), part.grad, calls, payload


def on_ranks(size: int, logits: Tensor, targets: Tensor, **options: Any) -> list[Outcome]:
    return simulate(SimulatedTPGroup.create(size), lambda group: one_rank(group, logits, targets, **options))


def expected_of(logits: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """torch's loss and gradient (of the same weighted sum) in at least float32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).detach().requires_grad_()
    loss = F.cross_entropy(wide.flatten(0, -2), targets.flatten(), **options)
    weights = torch.arange(1, 1 + loss.numel(), dtype=loss.dtype).view(loss.shape)
    (loss * weights).sum().backward()
    assert wide.grad is not None
    return (loss.view(targets.shape) if loss.dim() else loss).detach(), wide.grad


def gathered(outcomes: list[Outcome], vocab_size: int) -> Tensor:
    return torch.cat([grad for _, grad, _, _ in outcomes], dim=-1)[..., :vocab_size]


def batch(
    vocab_size: int, *, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (3, 5), seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(*shape, vocab_size, generator=generator, dtype=torch.float64)).to(dtype)
    return logits, torch.randint(0, vocab_size, shape, generator=generator)


TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
"""Of a gradient that is rounded to the logits' dtype at the end; the loss is never rounded to 16 bits."""


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_equals_torch(size: int, dtype: torch.dtype, reduction: str) -> None:
    logits, targets = batch(131, dtype=dtype)
    targets[0, 1] = targets[2, 4] = -100
    loss, grad = expected_of(logits, targets, reduction=reduction)
    outcomes = on_ranks(size, logits, targets, reduction=reduction)
    for rank_loss, rank_grad, _, _ in outcomes:
        assert rank_loss.shape == loss.shape
        assert rank_loss.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        assert torch.equal(rank_loss, outcomes[0][0]), "the loss is the same on all ranks, to the bit"
        torch.testing.assert_close(rank_loss, loss, rtol=min(TOLERANCES[dtype], 2e-6), atol=1e-12)
        assert rank_grad.dtype == dtype
    whole = gathered(outcomes, 131)
    assert float((whole.double() - grad.double()).norm() / grad.double().norm()) < TOLERANCES[dtype]
    assert torch.count_nonzero(whole[0, 1]) == torch.count_nonzero(whole[2, 4]) == 0
    for _, rank_grad, _, _ in outcomes:
        assert torch.isfinite(rank_grad).all()
    padded = torch.cat([rank_grad for _, rank_grad, _, _ in outcomes], dim=-1)[..., 131:]
    assert torch.count_nonzero(padded) == 0, "padding gets no gradient"


@pytest.mark.parametrize("ignore_index", [-100, 0, 7, 130])
def test_other_values_can_be_ignored(ignore_index: int) -> None:
    logits, targets = batch(131)
    targets.view(-1)[::4] = ignore_index
    loss, grad = expected_of(logits, targets, ignore_index=ignore_index)
    outcomes = on_ranks(4, logits, targets, ignore_index=ignore_index)
    torch.testing.assert_close(outcomes[0][0], loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(gathered(outcomes, 131), grad.view(logits.shape), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_batch_of_ignored_targets(reduction: str) -> None:
    logits, targets = batch(131)
    targets.fill_(-100)
    loss, grad = expected_of(logits, targets, reduction=reduction)
    outcomes = on_ranks(2, logits, targets, reduction=reduction)
    torch.testing.assert_close(outcomes[0][0], loss, equal_nan=True)
    assert outcomes[0][0].isnan().all() == (reduction == "mean")
    assert torch.count_nonzero(gathered(outcomes, 131)) == 0 == torch.count_nonzero(grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_extremes(shift: float, dtype: torch.dtype) -> None:
    """Large logits of either sign: nothing overflows and only differences count."""
    logits, targets = batch(31, dtype=torch.float32)
    logits = (logits * 1000 + shift).to(dtype)
    logits[0, 0] = -1e4
    logits[0, 0, int(targets[0, 0])] = 1e4
    loss, grad = expected_of(logits, targets, reduction="none")
    outcomes = on_ranks(4, logits, targets, reduction="none")
    torch.testing.assert_close(outcomes[0][0], loss, rtol=1e-5, atol=1e-3)
    assert outcomes[0][0][0, 0] == 0
    torch.testing.assert_close(
        gathered(outcomes, 31).float(),
        grad.view(logits.shape),
        rtol=1e-2,
        atol=1e-5 * grad.abs().max().item(),
    )


def test_minus_infinity_forbids_a_token() -> None:
    """Masked logits: a whole slice of -inf, single ones, and the target itself (the loss is then inf)."""
    logits, targets = batch(32)
    logits[..., 8:16] = -torch.inf
    logits[..., 3] = -torch.inf
    targets.fill_(20)
    loss, grad = expected_of(logits, targets, reduction="none")
    outcomes = on_ranks(4, logits, targets, reduction="none")
    torch.testing.assert_close(outcomes[0][0], loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(gathered(outcomes, 32), grad.view(logits.shape), rtol=1e-10, atol=1e-14)
    targets[1, 1] = 3
    loss, grad = expected_of(logits, targets, reduction="none")
    outcomes = on_ranks(4, logits, targets, reduction="none")
    assert outcomes[0][0][1, 1] == torch.inf
    torch.testing.assert_close(outcomes[0][0], loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(gathered(outcomes, 32), grad.view(logits.shape), rtol=1e-10, atol=1e-14)


def test_what_is_not_finite_is_seen_by_all_ranks() -> None:
    for value in (torch.nan, torch.inf):
        logits, targets = batch(32)
        logits[1, 2, 30] = value
        for loss, *_ in on_ranks(4, logits, targets, reduction="none"):
            assert loss[1, 2].isnan() and loss.isnan().sum() == 1
        targets[1, 2] = -100
        outcomes = on_ranks(4, logits, targets, reduction="none")
        assert outcomes[0][0].isfinite().all(), "an ignored row's values do not matter"
        assert gathered(outcomes, 32).isfinite().all()


@pytest.mark.parametrize(("vocab_size", "size"), [(151_665, 8), (9, 8), (5, 8), (1, 2), (131, 4)])
def test_odd_vocabularies(vocab_size: int, size: int) -> None:
    """Also slices that hold nothing at all; ids next to each seam are targets."""
    local = padded_slice_size(vocab_size, size)
    seams = [s for rank in range(size) for s in (rank * local - 1, rank * local) if 0 <= s < vocab_size]
    targets = torch.tensor([*seams, vocab_size - 1])
    logits = torch.randn(len(targets), vocab_size, generator=torch.Generator().manual_seed(3)).double()
    loss, grad = expected_of(logits, targets, reduction="none")
    outcomes = on_ranks(size, logits, targets, reduction="none")
    torch.testing.assert_close(outcomes[0][0], loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gathered(outcomes, vocab_size), grad, rtol=1e-9, atol=1e-14)


def test_logits_that_are_a_view() -> None:
    """Strided logits and a gradient that arrives expanded (``sum``) give the same."""
    logits, targets = batch(32, shape=(4, 3))
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def work(group: SimulatedTPGroup) -> Tensor:
        part = local_logits(logits, group.rank, 2).detach().transpose(0, 1).contiguous().requires_grad_()
        loss = vocab_parallel_cross_entropy(part.transpose(0, 1), targets, group)
        loss.backward()
        assert part.grad is not None and part.grad.shape == part.shape
        return loss.detach()

    for loss in simulate(SimulatedTPGroup.create(2), work):
        torch.testing.assert_close(loss, expected)


# ---------------------------------------------------------------------------------------------------
# Communication and memory


@pytest.mark.parametrize(("dtype", "element"), [(torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 8)])
def test_two_collectives_of_twelve_bytes_a_token(dtype: torch.dtype, element: int) -> None:
    """One max and one stacked sum forward, nothing backward; in the loss's precision."""
    logits, targets = batch(131, dtype=dtype)
    for _, _, calls, payload in on_ranks(4, logits, targets):
        assert calls == {"all_reduce": 2}
        assert payload == {"all_reduce": 3 * element * targets.numel()}


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Largest result of any operation, in bytes, and the sum of what is alive at once is left to others."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                size = tensor.numel() * tensor.element_size()
                self.largest[tensor.dtype] = max(self.largest.get(tensor.dtype, 0), size)
        return result


def test_full_precision_copies_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 16-bit logits: no float32 copy of the slice, and nothing kept but the logits themselves."""
    for name in ("_CHUNK_ELEMENTS", "_CPU_CHUNK_ELEMENTS"):
        monkeypatch.setattr(loss_module, name, 4096, raising=False)
    group = TPGroup(0, 1)
    logits = torch.randn(256, 1000, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    targets = torch.arange(256)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with LargestTensor() as seen:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = vocab_parallel_cross_entropy(logits, targets, group)
        loss.backward()
    assert seen.largest[torch.bfloat16] == 256 * 1000 * 2
    assert seen.largest[torch.float32] <= 4096 * 4
    rows = 256 * (4 + 8 + 1 + 1)  # normalizer, local target, two masks
    assert sum(kept.values()) <= 256 * 1000 * 2 + rows + 64
    expected = F.cross_entropy(logits.detach().float(), targets)
    torch.testing.assert_close(loss.detach(), expected)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = batch(131, shape=(7, 5))
    whole = on_ranks(2, logits, targets)
    for name in ("_CHUNK_ELEMENTS", "_CPU_CHUNK_ELEMENTS"):
        monkeypatch.setattr(loss_module, name, 200, raising=False)
    parts = on_ranks(2, logits, targets)
    assert torch.equal(whole[0][0], parts[0][0])
    assert torch.equal(gathered(whole, 131), gathered(parts, 131))


# ---------------------------------------------------------------------------------------------------
# Misuse, and real processes


def test_misuse_is_named() -> None:
    group = TPGroup(0, 1)
    logits, targets = batch(10)
    with pytest.raises(ValueError, match="reduction is 'avg'; use 'none', 'sum' or 'mean'"):
        vocab_parallel_cross_entropy(logits, targets, group, reduction="avg")
    with pytest.raises(ValueError, match="do not match"):
        vocab_parallel_cross_entropy(logits, targets[:, 1:], group)
    for wrong in (10, -1):
        targets[0, 0] = wrong
        with pytest.raises(IndexError, match="outside the vocabulary of 10"):
            vocab_parallel_cross_entropy(logits, targets, group)


def test_an_id_in_the_padding_is_no_target() -> None:
    """The last slice's padding has room for ids that the vocabulary does not have."""
    logits, targets = batch(9)
    targets[0, 0] = 9
    with pytest.raises(IndexError, match="outside the vocabulary of 9"):
        on_ranks(2, logits, targets)


def gloo_rank(rank: int, world_size: int, logits: Tensor, targets: Tensor) -> Outcome:
    world = dist.group.WORLD
    assert world is not None
    return one_rank(ProcessTPGroup(world), logits, targets)


def test_over_gloo() -> None:
    logits, targets = batch(131)
    targets[1, 1] = -100
    loss, grad = expected_of(logits, targets)
    outcomes = run_ranks(gloo_rank, 2, logits, targets)
    for rank_loss, _, calls, _ in outcomes:
        torch.testing.assert_close(rank_loss, loss, rtol=1e-13, atol=0)
        assert calls == {"all_reduce": 2}
    torch.testing.assert_close(gathered(outcomes, 131), grad.view(logits.shape), rtol=1e-10, atol=1e-14)
