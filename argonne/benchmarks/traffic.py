"""Bytes that a rank's step moves outside its products: counted, op by op, without a GPU and without memory.

The real build, split, forward and backward pass and AdamW run on fake tensors with a fake process group, on
the code path of CUDA (``argonne.benchmarks.fake_cuda``). Of each elementwise op, copy and reduction the bytes
of its inputs and outputs are counted: a tensor that an op overwrites once as input and once as output, what
one op reads twice once, of a look-up the rows looked up. Matrix products, attention, collectives, views and
the making of memory are left out.

A count at the full depth follows exactly from those of 1 and 2 layers.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

from argonne.benchmarks.common import Report, Row
from argonne.benchmarks.fake_cuda import cuda_code, nbytes
from argonne.config.options import ParallelOptions, TrainingOptions
from argonne.config.presets import PRESETS, REFERENCE
from argonne.ranks.world import World, build_parallel
from argonne.training.build import TrainedModel, build_model
from argonne.training.step import TrainingStep, Votes
from data_stream import StepBatch

UNCOUNTED = {
    "mm", "addmm", "bmm", "baddbmm", "linear", "empty", "empty_like", "empty_strided", "new_empty",
    "new_empty_strided", "_unsafe_view", "wait_tensor", "_local_scalar_dense",
}  # fmt: skip
"""Products, and what moves nothing; views and collectives are known by their kind."""
LOOKUPS = {"embedding", "gather", "index_select", "index"}
"""Ops that read of their first argument only as much as they return."""
PLACINGS = {"scatter_", "scatter_add_"}
"""Ops that touch of their first argument only as much as their index and values have."""
WRITE_ONLY = {"fill_", "zero_", "copy_", "normal_", "uniform_"}
"""Ops that overwrite their first argument unread."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One rank's share of a step."""

    preset: str = REFERENCE
    vocab_size: int | None = None
    """None: the preset's, or Argonne 2.0's tokenizer's."""
    tp_size: int = 8
    batch_size: int = 4
    block_size: int = 4096
    sequence_parallel: bool = False
    recomputation: str = "none"

    def settings(self, layers: int | None = None) -> dict[str, Any]:
        """Keyword arguments of ArgonneConfig."""
        settings = {"vocab_size": 151665, **PRESETS[self.preset]}
        if self.vocab_size is not None:
            settings["vocab_size"] = self.vocab_size
        return settings if layers is None else {**settings, "num_hidden_layers": layers}


CASES = {
    "argonne-2.0, tp 8": Case(),
    "argonne-2.0, tp 8, sequence parallel": Case(sequence_parallel=True),
    "argonne-4.0, tp 2": Case(preset="argonne-4.0", tp_size=2),
    "argonne-4.0, tp 2, sequence parallel": Case(preset="argonne-4.0", tp_size=2, sequence_parallel=True),
}
BEFORE = {"argonne-2.0, tp 8": 387e9, "argonne-2.0, tp 8, sequence parallel": 206e9}
"""Of a micro-batch, before norms were fused and the gathered sequence was put in order once."""

MOST_BYTES = 150e9
"""Of the first case's micro-batch: what the suite promises."""
REMARKS = (
    "Bytes read and written by elementwise ops, copies and reductions of one rank, bfloat16; products, "
    "attention and collectives left out. Counted on fake tensors along CUDA's code path, not measured.",
    "Least possible: every elementwise chain between two products as one kernel.",
    "benchmarks/traffic.json has them by module and by op; a test counts again and compares.",
)


@dataclass
class Traffic:
    """Bytes by place and op; a place is a module, the layers' numbers left out."""

    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, place: str, op: str, moved: int) -> None:
        """Count one op."""
        self.bytes[place, op] += moved
        self.calls[place, op] += 1

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def by(self, index: int) -> dict[str, int]:
        """Bytes by place (0) or by op (1), the largest first."""
        sums: Counter[str] = Counter()
        for key, moved in self.bytes.items():
            sums[key[index]] += moved
        return dict(sums.most_common())

    def deeper(self, more: Traffic, layers: int) -> Traffic:
        """From this of 1 layer and ``more`` of 2 layers: that of ``layers``."""
        keys = self.bytes.keys() | more.bytes.keys()
        result = Traffic()
        for key in keys:
            for sums, one, two in (
                (result.bytes, self.bytes, more.bytes),
                (result.calls, self.calls, more.calls),
            ):
                sums[key] = one[key] + (layers - 1) * (two[key] - one[key])
        return result


class TrafficCounter(TorchDispatchMode):
    """While it is on, counts what ops move, at the module of ``tracker`` in which they run."""

    def __init__(self, tracker: ModuleTracker) -> None:
        super().__init__()
        self.traffic = Traffic()
        self._tracker = tracker

    def note(self, op: str, moved: int) -> None:
        """Count an op that no dispatcher sees."""
        self.traffic.add(self.place(), op, moved)

    def place(self) -> str:
        """The innermost module, numbers of layers left out; of several by name, that counts be repeatable."""
        innermost = max(self._tracker.parents, key=lambda name: (name.count("."), name))
        parts = [part for part in innermost.split(".") if not part.isdigit()]
        return ".".join(parts[1:]) or "head, loss and optimizer"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if func.namespace == "aten" and not func.is_view and name not in UNCOUNTED:
            read = {key: value for key, value in kwargs.items() if key != "out"}
            self.note(name, moved_bytes(name, args, read, result))
        return result


def moved_bytes(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    """Bytes of the distinct inputs and outputs of one op."""
    if name in PLACINGS:
        index, values = args[2], args[3]
        return nbytes(index) + (3 if "add" in name else 2) * _touched(values)
    inputs = [*args]
    if name in WRITE_ONLY | LOOKUPS:
        inputs = inputs[1:]
    written = sum(map(_touched, _tensors(result)))
    if not written and args:  # ops on lists return nothing and overwrite their first argument
        written = sum(map(_touched, _tensors(args[0])))
        if name.startswith("_fused_adam"):
            written = sum(map(_touched, _tensors((args[0], args[2], args[3]))))
    distinct = {id(tensor): tensor for tensor in _tensors((inputs, kwargs))}
    looked_up = nbytes(*_tensors(result)) if name in LOOKUPS else 0
    return written + looked_up + sum(map(_touched, distinct.values()))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _touched(tensor: Tensor) -> int:
    """Bytes of the elements, those of an expanded dimension once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    elements = 1
    for size, stride in sizes:
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


def count_step(case: Case, layers: int) -> tuple[Traffic, Traffic]:
    """One micro-batch and the optimizer's part of a step of rank 0, with ``layers`` layers."""
    dist.init_process_group("fake", rank=0, world_size=case.tp_size, store=FakeStore())
    try:
        world = World(
            rank=0, world_size=case.tp_size, local_rank=0, local_world_size=case.tp_size,
            device=torch.device("cpu"), control_group=dist.group.WORLD, feed_group=None,
        )  # fmt: skip
        parallel = build_parallel(world, case.tp_size)
        tracker = ModuleTracker()
        counter = TrafficCounter(tracker)
        options = TrainingOptions(
            batch_size=case.batch_size, block_size=case.block_size, dtype="bf16", total_steps=10
        )
        choices = ParallelOptions(
            sequence_parallel=case.sequence_parallel,
            activation_checkpointing=case.recomputation,
            pad_widths="on",  # as on a GPU
        )
        with FakeTensorMode(), cuda_code(counter.note):
            trained = build_model(case.settings(layers), choices, options, parallel)
            return _counted(trained, options, case, tracker, counter)
    finally:
        dist.destroy_process_group()


def _counted(
    trained: TrainedModel,
    options: TrainingOptions,
    case: Case,
    tracker: ModuleTracker,
    counter: TrafficCounter,
) -> tuple[Traffic, Traffic]:
    step = TrainingStep(trained, options, accumulation=1)
    tokens = torch.zeros((case.batch_size, case.block_size + 1), dtype=torch.int32)
    batch = StepBatch(tokens=tokens, stream_hash="", progress=None, wait_seconds=0.0)
    with tracker, counter:
        loss, _ = step.accumulate(batch)
    micro_batch, counter.traffic = counter.traffic, Traffic()
    with counter:
        step.update(loss, None, 0, votes=Votes())
    return micro_batch, counter.traffic


def counted(case: Case) -> tuple[Traffic, Traffic]:
    """One micro-batch and the update at the case's full depth."""
    layers = case.settings()["num_hidden_layers"]
    one, two = count_step(case, 1), count_step(case, 2)
    return one[0].deeper(two[0], layers), one[1].deeper(two[1], layers)


def least_bytes(case: Case) -> int:
    """Of a micro-batch, were every elementwise chain between two products one kernel.

    A kernel then reads each of its inputs once and writes each of its outputs once. In tensors like the
    residual stream: a residual addition with its norm reads 2 and writes 2, and its backward reads 3 (the
    stream's gradient, the norm's, x) and writes 1, twice a layer. Rotation reads and writes q and k each way.
    The SwiGLU reads 2 and writes 1, its backward reads 3 and writes 3 (the product is made again for a weight
    gradient). The embedding's rows are written, and read back with the stream's gradient; the final norm
    reads and writes once each way. The logits are read three times (largest and sum, then their gradient) and
    written once. Weights are read in float32 and written in the compute dtype once.
    """
    settings, element = case.settings(), 2
    tokens = case.batch_size * case.block_size
    hidden, layers = settings["hidden_size"], settings["num_hidden_layers"]
    head_dim = settings.get("head_dim") or hidden // settings["num_attention_heads"]
    heads = settings["num_attention_heads"] + settings["num_key_value_heads"]
    norms = heads + settings["num_key_value_heads"] if settings["qk_norm"] else 0
    stream = tokens * hidden * element // (case.tp_size if case.sequence_parallel else 1)
    rotated = tokens * heads * head_dim * element // case.tp_size
    normed = tokens * norms * head_dim * element // case.tp_size
    inner = tokens * settings["intermediate_size"] * element // case.tp_size
    logits = tokens * -(-settings["vocab_size"] // case.tp_size) * element
    sandwich = 2 * 5 * stream if settings["sandwich_norm"] else 0
    layer = 2 * 8 * stream + 4 * rotated + 3 * normed + 9 * inner + sandwich
    weights = 3 * hidden * settings["intermediate_size"] + (
        2 * settings["num_attention_heads"] + 2 * settings["num_key_value_heads"]
    ) * (hidden * head_dim)
    casts = (4 + element) * (layers * weights + settings["vocab_size"] * hidden) // case.tp_size
    return layers * layer + 8 * stream + 4 * logits + casts


def run(rounds: int = 1) -> Report:
    """The table: nothing is timed, so that ``rounds`` means nothing."""
    rows, data = [], {}
    for name, case in CASES.items():
        micro_batch, update = counted(case)
        rows += [
            Row(
                name=f"elementwise bytes of a micro-batch, {name} / least possible",
                ours=micro_batch.total, peer=least_bytes(case), unit="B",
            ),
            Row(
                name=f"bytes of norm, clipping and AdamW, {name} / 28 a parameter",
                ours=update.total, peer=update.by(1)["_fused_adamw_"], unit="B",
            ),
        ]  # fmt: skip
        data[name] = {
            **dataclasses.asdict(case),
            "elementwise_bytes": micro_batch.total,
            "least_bytes": least_bytes(case),
            "update_bytes": update.total,
            "by_module": micro_batch.by(0),
            "by_op": micro_batch.by(1),
            "update_by_op": update.by(1),
        }
    reference = next(iter(CASES))
    rows.insert(0, Row(
        name=f"elementwise bytes of a micro-batch, {reference} / before this was counted",
        ours=data[reference]["elementwise_bytes"], peer=BEFORE[reference], unit="B",
        target=MOST_BYTES / BEFORE[reference],
    ))  # fmt: skip
    return Report(
        name="traffic",
        title="Bytes moved outside the products, counted",
        rows=tuple(rows),
        remarks=REMARKS,
        data=data,
        headline={"elementwise_bytes": data[reference]["elementwise_bytes"]},
    )
