"""The order of compiled blocks, read from the code that Inductor writes: what hides a collective.

The code is generated but not run: a fake process group stands in for the other rank, and the CPU kernels,
whose compilation takes most of the time, are left out.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.testing._internal.distributed.fake_pg import FakeStore

from argonne.errors import ConfigError
from argonne.ranks.recompute import OVERLAP, compile_blocks, enable_async_tp, recompute_blocks
from argonne.ranks.world import Parallel
from argonne.testing.distributed import run_ranks
from argonne.testing.models import loss_of, random_tokens, relative_error, small_model
from tp_shard import shard_tensor_parallel

pytestmark = pytest.mark.libraries


@pytest.fixture
def two_ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def written_code(
    sequence_parallel: bool, *, mode: str = "none", async_tp: bool = False, length: int = 15
) -> tuple[str, str]:
    """What a rank's only block runs in the forward and in the backward pass."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    model = small_model(torch.float32, num_hidden_layers=1)
    shard_tensor_parallel(model, sequence_parallel=sequence_parallel)
    recompute_blocks(model.blocks, mode)
    compile_blocks(model.blocks, async_tp=async_tp)

    def no_kernel(*_: Any, **__: Any) -> Callable[..., None]:
        return lambda *_: None

    with (
        mock.patch.object(AsyncCompile, "cpp_pybinding", no_kernel),
        torch._inductor.config.patch(fx_graph_cache=False),
    ):
        _, codes = run_and_get_code(lambda: loss_of(model, random_tokens(length=length)).backward())
    forward, backward = (_operations(code) for code in codes)
    return forward, backward


def _operations(code: str) -> str:
    lines = [line.strip() for line in code[code.index("def call(") :].splitlines()]
    return "\n".join(line for line in lines if not line.startswith(("#", "assert")))


def hidden_products(code: str, kind: str) -> list[int]:
    """Products between each collective of a kind and its wait, in the order of the code."""
    lines, found = code.splitlines(), []
    for start, line in enumerate(lines):
        if f"_c10d_functional.{kind}" not in line:
            continue
        buffer = re.search(r"\bbuf\d+\b", line)
        assert buffer is not None
        awaited = re.compile(rf"wait_tensor\.default\(.*\b{buffer[0]}\b")
        end = next(n for n in range(start, len(lines)) if awaited.search(lines[n]))
        found.append(sum("extern_kernels.mm(" in between for between in lines[start:end]))
    return found


@pytest.mark.parametrize(
    ("sequence_parallel", "mode"),
    [
        (False, "none"),
        (True, "none"),
        pytest.param(False, "full", marks=pytest.mark.slow),
        pytest.param(True, "full", marks=pytest.mark.slow),
        pytest.param(False, "selective", marks=pytest.mark.slow),
        pytest.param(True, "selective", marks=pytest.mark.slow),
    ],
)
def test_weight_gradients_hide_the_reduction_of_both_halves(
    two_ranks: None, sequence_parallel: bool, mode: str
) -> None:
    forward, backward = written_code(sequence_parallel, mode=mode)
    kind = "reduce_scatter" if sequence_parallel else "all_reduce"
    counts = hidden_products(backward, kind)
    mlp, attention = counts[-2:]  # a recomputed exit goes before
    # Without sequence parallelism selective recomputation makes the MLP's input in the kernel that follows
    # the wait: only down's weight gradient goes before, and gate's and up's hide the attention's reduction.
    assert mlp >= (1 if mode == "selective" else 2), "gate and up"
    assert attention >= 3, "q, k and v"
    if mode == "none":  # what the entrances gathered is kept, and not gathered once more
        gathers = [code.count("all_gather_into_tensor.default(") for code in (forward, backward)]
        assert gathers == ([2, 2] if sequence_parallel else [0, 0])


def test_inductor_knows_the_options() -> None:
    known = torch._inductor.list_options()
    assert {*OVERLAP, "_micro_pipeline_tp"} <= set(known)


# ---------------------------------------------------------------------------------------------------
# Asynchronous tensor parallelism: torch's pass is made for CUDA, and runs here as in torch's own tests.


def pretend_symmetric_memory() -> Any:
    """torch's test mode, in which the fused operations run by their plain definition, here on the CPU too."""
    for name in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"):
        key = torch._C.DispatchKey.CPU
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"symm_mem::{name}", key):
            torch.library.impl(f"symm_mem::{name}", "CPU")(getattr(symmetric_memory, f"_{name}_fallback"))
    return symmetric_memory._test_mode()


@pytest.mark.slow
def test_async_tp_fuses_entrances_and_exits(two_ranks: None) -> None:
    with pretend_symmetric_memory(), mock.patch.object(dist, "is_nccl_available", lambda: True):
        forward, backward = written_code(True, async_tp=True)
    assert forward.count("symm_mem.fused_all_gather_matmul.default(") == 2, "q, k, v; gate, up"
    assert forward.count("symm_mem.fused_matmul_reduce_scatter.default(") == 2, "both exits"
    assert "_c10d_functional" not in forward.replace("_c10d_functional_autograd", "")
    # torch leaves to plain overlap what products can hide, and fuses the gather that none can.
    assert backward.count("symm_mem.fused_all_gather_matmul.default(") == 1
    assert min(hidden_products(backward, "reduce_scatter")) >= 2


def async_rank(rank: int, world_size: int, fused: bool) -> tuple[float, float, int]:
    """Loss and worst gradient of fused blocks against eager ones, relative; fused operations in the code."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    found: list[tuple[float, dict[str, torch.Tensor]]] = []
    operations = 0
    for compiled in (False, True):
        model = shard_tensor_parallel(small_model(torch.float32), sequence_parallel=True)

        def step(model: Any = model) -> float:
            loss = loss_of(model, random_tokens(length=17))
            loss.backward()
            return loss.item()

        if not compiled:
            loss = step()
        else:
            compile_blocks(model.blocks, async_tp=True)  # type: ignore[arg-type]
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False))
                if fused:
                    stack.enter_context(pretend_symmetric_memory())
                    stack.enter_context(mock.patch.object(dist, "is_nccl_available", lambda: True))
                loss, codes = run_and_get_code(step)
            operations = sum(code.count("symm_mem.fused") for code in codes)
        found.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, eager), (fast_loss, fast) = found
    worst = max(relative_error(fast[name], gradient) for name, gradient in eager.items())
    return abs(fast_loss - loss) / loss, worst, operations


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
def test_async_tp_trains_alike(fused: bool) -> None:
    """With torch's fused operations, and as on the CPU, where the pass leaves collectives alone."""
    for loss, worst, operations in run_ranks(async_rank, 2, fused, timeout=400):
        assert loss < 1e-6
        assert worst < 1e-5
        assert (operations >= 5) if fused else (operations == 0)


def parallel(tp_size: int) -> Parallel:
    return Parallel(
        rank=0, world_size=tp_size, local_rank=0, local_world_size=tp_size, device=torch.device("cpu"),
        control_group=None, feed_group=None, tp_rank=0, tp_size=tp_size, dp_rank=0, dp_size=1, mesh=None,
    )  # fmt: skip


def test_async_tp_wants_an_even_division_of_the_sequence() -> None:
    with pytest.raises(ConfigError, match=r"--block-size 63 is not a multiple of .* degree 2"):
        enable_async_tp(parallel(2), 63)
    enable_async_tp(parallel(2), 64)
    enable_async_tp(parallel(1), 63)
