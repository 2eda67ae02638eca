"""Head and loss in chunks: equal to the whole, with its collectives, and without its logits."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from argonne.ranks.recompute import recompute_blocks
from argonne.ranks.replicas import apply_ddp, apply_fsdp, forward_context, local_gradients
from argonne.testing.distributed import run_ranks
from argonne.testing.models import loss_of, random_tokens, relative_error, small_model
from argonne.tp.chunked_loss import CHUNK_BYTES, chunk_tokens
from argonne.tp.group import SimulatedTPGroup
from argonne.verification.simulate import simulate
from model import ArgonneModel
from tests.benchmarks.saved_activations import saved_bytes
from tests.verification.layouts import layout
from tp_shard import gather_state_dict, shard_tensor_parallel

VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"tie_word_embeddings": False},
    {"logit_softcap": 2.0},
    {"z_loss_weight": 0.05, "tie_word_embeddings": False},
    {"logit_softcap": 2.0, "z_loss_weight": 0.05, "qk_norm": True, "sandwich_norm": True},
)


def results(
    plain: ArgonneModel, size: int, chunk: int | None, *, sequence_parallel: bool = False, tokens: Tensor
) -> list[tuple[Tensor, dict[str, Tensor], dict[str, Any]]]:
    """Loss, unsharded gradients and collectives of each rank."""
    models = [copy.deepcopy(plain) for _ in range(size)]

    def work(group: SimulatedTPGroup) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
        model: Any = shard_tensor_parallel(
            models[group.rank], group, sequence_parallel=sequence_parallel, loss_chunk_tokens=chunk
        )
        group.counters.reset()
        output = model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:])
        assert (output.logits is None) == (chunk != 0)
        output.loss.backward()
        traffic = group.counters.totals()
        state = model.tensor_parallel
        state.sum_partial_gradients({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        return output.loss.detach(), gather_state_dict(model, gradients=True), traffic

    return simulate(SimulatedTPGroup.create(size), work)


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize(
    ("size", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, False), (4, True)]
)
def test_chunks_are_the_whole_to_rounding(
    size: int, sequence_parallel: bool, changes: dict[str, Any]
) -> None:
    batch = random_tokens(length=14)
    plain = small_model(**changes)
    for chunk in (1, 7, 26, None):
        expected = results(plain, size, 0, sequence_parallel=sequence_parallel, tokens=batch)
        actual = results(plain, size, chunk, sequence_parallel=sequence_parallel, tokens=batch)
        for (loss, gradients, _), (right, right_gradients, _) in zip(actual, expected, strict=True):
            assert abs(loss - right) <= 1e-12 * abs(right)
            assert gradients.keys() == right_gradients.keys()
            for name, gradient in gradients.items():
                assert relative_error(gradient, right_gradients[name]) <= 1e-11, (chunk, name)


@pytest.mark.parametrize("size", [1, 2])
def test_ignored_targets_and_no_target_at_all(size: int) -> None:
    plain = small_model()
    ids, targets = random_tokens(length=9), random_tokens(length=9, seed=4)
    targets[0, :7] = -100

    def work(group: SimulatedTPGroup, chunk: int, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        model: Any = shard_tensor_parallel(copy.deepcopy(plain), group, loss_chunk_tokens=chunk)
        loss = model(input_ids=ids, shift_labels=labels).loss
        loss.backward()
        return loss.detach(), gather_state_dict(model, gradients=True)

    groups = SimulatedTPGroup.create
    whole = simulate(groups(size), lambda group: work(group, 0, targets))
    parts = simulate(groups(size), lambda group: work(group, 4, targets))
    for (loss, gradients), (right, right_gradients) in zip(parts, whole, strict=True):
        assert loss == pytest.approx(right.item(), rel=1e-12)
        for name, gradient in gradients.items():
            assert relative_error(gradient, right_gradients[name]) <= 1e-11, name
    for loss, _ in simulate(groups(size), lambda group: work(group, 4, torch.full_like(targets, -100))):
        assert loss.isnan()  # as torch's mean over nothing


@pytest.mark.parametrize(("size", "sequence_parallel"), [(2, False), (4, False), (2, True), (4, True)])
def test_chunks_add_no_collective(size: int, sequence_parallel: bool) -> None:
    layers, hidden, batch, length = 2, 50, 2, 16
    activation = 4 * batch * length * hidden
    tokens = random_tokens(length=length + 1)
    plain = small_model(torch.float32)
    for _, _, traffic in results(plain, size, 3, sequence_parallel=sequence_parallel, tokens=tokens):
        loss = 3 * 4 * batch * length
        if not sequence_parallel:
            calls = 4 * layers + 2
            assert traffic == {"all_reduce": (calls + 2, calls * activation + loss)}
            continue
        # The head does not gather its input again: 2 re-gathers a layer are left.
        calls = 4 * layers + 2
        assert traffic == {
            "all_gather": (calls + 2 * layers, (calls + 2 * layers) * activation),
            "reduce_scatter": (calls, calls * activation),
            "all_reduce": (2, loss),
        }


def test_a_run_on_one_rank_has_the_loss_of_torch_to_the_last_bit() -> None:
    tokens, plain = random_tokens(length=30), small_model(torch.float32)
    ((whole, *_),) = results(plain, 1, 0, tokens=tokens)
    for chunk in (4, None):
        ((loss, *_),) = results(plain, 1, chunk, tokens=tokens)
        assert torch.equal(loss, whole)


def test_saved_bytes_are_two_gradients_whatever_the_tokens() -> None:
    """Kept of head and loss: the gradients of hidden states and weight. All at once keeps the logits too."""
    vocabulary, hidden = 1000, 50
    plain = small_model(torch.float32, vocab_size=vocabulary, num_hidden_layers=1, tie_word_embeddings=False)

    def kept(chunk: int, length: int) -> int:
        model = shard_tensor_parallel(
            copy.deepcopy(plain), SimulatedTPGroup.create(1)[0], loss_chunk_tokens=chunk
        )
        tokens = random_tokens(vocabulary, batch=2, length=length + 1)
        return saved_bytes(lambda: loss_of(model, tokens), [model])

    for length in (32, 64):
        tokens = 2 * length
        # All at once: the logits, the head's input, and per token a normaliser, an index and two flags.
        whole = 4 * tokens * vocabulary + 4 * tokens * hidden + tokens * (4 + 8 + 1 + 1)
        parts = 4 * tokens * hidden + 4 * vocabulary * hidden
        # The count of targets, by which the mean divides, is 8 bytes in both.
        assert kept(0, length) - kept(16, length) == whole - parts


class LargestRows(torch.utils._python_dispatch.TorchDispatchMode):
    """Most tokens of any tensor as wide as the vocabulary."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, Tensor) and result.dim() > 1 and result.shape[-1] == self.width:
                self.rows = max(self.rows, result.numel() // self.width)
        return results


def test_no_more_logits_than_a_chunk_are_ever_there() -> None:
    model = small_model(torch.float32)
    shard_tensor_parallel(model, SimulatedTPGroup.create(1)[0], loss_chunk_tokens=6)
    with LargestRows(131) as largest:
        loss_of(model, random_tokens(length=14)).backward()
    assert largest.rows == 50  # the weight's gradient, transposed: 26 tokens in chunks of 6 are fewer


def test_the_default_chunk_takes_256_mebibytes() -> None:
    tokens = chunk_tokens(None, 18_960, 2)
    assert tokens * 18_960 * 2 <= CHUNK_BYTES == 256 * 2**20 < (tokens + 1) * 18_960 * 2
    assert chunk_tokens(None, 10**9, 4) == 1
    assert chunk_tokens(100, 18_960, 2) == 100


def test_float16_gradients_do_not_vanish() -> None:
    """Divided by the tokens before the products, a small probability would be 0 in float16."""
    tokens = random_tokens(length=33, batch=4)
    exact = small_model(torch.float32)
    loss_of(exact, tokens).backward()
    model = small_model(torch.float32)
    shard_tensor_parallel(model, SimulatedTPGroup.create(1)[0], loss_chunk_tokens=10)
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(model, tokens)
    (loss * 4096).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = exact.get_parameter(name).grad
        assert expected is not None
        assert relative_error(parameter.grad / 4096, expected) < 0.05, name


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    model: Any = small_model()
    shard_tensor_parallel(model, SimulatedTPGroup.create(1)[0], loss_chunk_tokens=5)
    tokens = random_tokens()
    expected = loss_of(model, tokens)
    with torch.no_grad():
        assert loss_of(model.eval(), tokens) == expected
    expected.backward()
    with pytest.raises(RuntimeError, match="backward"):
        expected.backward()
    model.lm_head.weight.requires_grad_(False)
    loss_of(model.train(), tokens)  # nothing left that wants the weight's


def trained_rank(rank: int, world_size: int, kind: str, dtype: torch.dtype, chunk: int) -> dict[str, Tensor]:
    parallel = layout(rank, world_size, 2)
    model = small_model(torch.float32, logit_softcap=5.0)
    shard_tensor_parallel(model, parallel.mesh, sequence_parallel=True, loss_chunk_tokens=chunk)
    recompute_blocks(model.blocks, "full")
    wrapped: Any = model
    if kind == "fsdp":
        apply_fsdp(model, model.blocks, parallel, dtype)
    else:
        wrapped = apply_ddp(model, parallel)
    context = forward_context(parallel, dtype, sharded=kind == "fsdp")
    for micro in range(2):
        tokens = random_tokens(seed=5 + micro + 10 * parallel.dp_rank)
        with context():
            loss = loss_of(wrapped, tokens)
        loss.backward()
    return {"loss": loss.detach(), **local_gradients(model)}


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_data_parallelism(kind: str, dtype: torch.dtype) -> None:
    whole = run_ranks(trained_rank, 4, kind, dtype, 0)
    parts = run_ranks(trained_rank, 4, kind, dtype, 5)
    tolerance = 1e-5 if dtype is torch.float32 else 0.03
    for right, actual in zip(whole, parts, strict=True):
        assert actual.keys() == right.keys()
        for name in right:
            assert relative_error(actual[name], right[name]) < tolerance, name


def test_compiled_blocks() -> None:
    model: Any = small_model(torch.float32)
    tokens = random_tokens()
    shard_tensor_parallel(model, SimulatedTPGroup.create(1)[0], loss_chunk_tokens=5)
    expected = loss_of(model, tokens)
    for block in model.blocks:
        block.compile(dynamic=False, backend="aot_eager")
    loss = loss_of(model, tokens)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
