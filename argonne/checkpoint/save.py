"""Saving: rank 0 streams the unsharded model and its Adam state into one file, the others send their slices.

Nothing is gathered whole. A parameter travels in chunks of rows: rank 0 receives the rectangles that each
rank owns of a chunk, assembles it, writes it and forgets it. Before each tensor rank 0 sends every rank a
word, go or stop; where it cannot go on (disk full, a value that is not finite) it receives the rest of the
tensor under way, says stop with the reason, and all ranks raise the same CheckpointError.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from argonne.checkpoint.archive import ArchiveWriter, tensor_bytes
from argonne.checkpoint.commit import commit, failure_reason, temporary_file
from argonne.checkpoint.reader import ADAM_KEYS, EMBEDDING, FORMAT_KEY, FORMAT_VERSION, HEAD
from argonne.checkpoint.safe_pickle import TensorRef, contiguous_ref, dump_tree
from argonne.errors import CheckpointError, PeerError
from argonne.tp.slices import Rectangle, SliceMap

CHUNK_BYTES = 32 << 20
_GO = 0
_RECORD_OVERHEAD = 512
_HEADER_BYTES = 1 << 20

Adam = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """What a save wrote (rank 0)."""

    path: Path
    size: int
    """Bytes of the file."""
    seconds: float
    """From the call to the durable rename."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the file: ``key`` is "param", "exp_avg" or "exp_avg_sq" of the parameter ``name``."""

    name: str
    key: str
    shape: tuple[int, ...]

    @property
    def label(self) -> str:
        """What a message calls it."""
        return self.name if self.key == "param" else f"{self.key} of {self.name}"


def estimate_checkpoint_bytes(slice_map: SliceMap, *, with_adam: bool = True) -> int:
    """Upper bound of a checkpoint file's bytes."""
    tensors = len(slice_map.names) * (4 if with_adam else 1) + 8
    return slice_map.numel() * 4 * (3 if with_adam else 1) + tensors * _RECORD_OVERHEAD + _HEADER_BYTES


def save_checkpoint(
    path: Path,
    *,
    slice_map: SliceMap,
    rank: int,
    parameters: Mapping[str, torch.Tensor],
    adam: Adam,
    param_group: Mapping[str, Any],
    metadata: Mapping[str, Any],
    tied: bool,
    control_group: dist.ProcessGroup | None,
    spare_bytes: int = 0,
) -> SaveReport | None:
    """Write one whole checkpoint; collective over ``control_group`` (gloo, all ranks).

    ``parameters`` are this rank's local tensors by unsharded name; ``adam[name]`` holds ``step``,
    ``exp_avg`` and ``exp_avg_sq``, or ``adam`` is empty on every rank before the first step.
    ``param_group`` gives the optimizer's options (lr, betas, eps, weight_decay; what is left out takes
    AdamW's default). ``metadata`` holds the other keys of the file, plain containers and numbers.
    ``spare_bytes`` must remain free on the disk beside the new file.

    Returns a report on rank 0 and None elsewhere. Raises the same CheckpointError on all ranks when the
    file could not be written whole (the temporary file is gone then and the folder as it was), PeerError
    where a rank left.
    """
    entries = tensor_entries({name: slice_map.shape(name) for name in slice_map.names}, with_adam=bool(adam))
    if rank != 0:
        _send_slices(entries, slice_map, rank, parameters, adam, control_group)
        return None
    peers = _Peers(range(1, slice_map.world_size), control_group)
    started = time.monotonic()
    need = estimate_checkpoint_bytes(slice_map, with_adam=bool(adam)) + spare_bytes
    try:
        tree = build_tree(entries, param_group, metadata, tied=tied)
        tree[FORMAT_KEY] = FORMAT_VERSION
        with temporary_file(path, need) as (descriptor, temporary):
            size = _stream(descriptor, tree, entries, slice_map, parameters, adam, peers)
            commit(descriptor, temporary, path, size)
    except OSError as error:
        message = f"checkpoint {path} could not be written: {failure_reason(error, path.parent, need)}"
        peers.stop(message)
        raise CheckpointError(message) from error
    except CheckpointError as error:
        message = f"checkpoint {path} was not written: {error}"
        peers.stop(message)
        raise CheckpointError(message) from error
    peers.go()
    return SaveReport(path=path, size=size, seconds=time.monotonic() - started)


def tensor_entries(shapes: Mapping[str, tuple[int, ...]], *, with_adam: bool) -> list[TensorEntry]:
    """The tensors of a checkpoint in the order in which they lie in the file."""
    weights = [TensorEntry(name, "param", shape) for name, shape in shapes.items()]
    keys = ADAM_KEYS if with_adam else ()
    return weights + [TensorEntry(name, key, shape) for name, shape in shapes.items() for key in keys]


def build_tree(
    entries: Sequence[TensorEntry],
    param_group: Mapping[str, Any],
    metadata: Mapping[str, Any],
    *,
    tied: bool,
    weight_dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The dictionary that ``torch.load`` will return, with references where the tensors will lie.

    Entry number i lies in record ``data/i``, the step count of parameter j in ``data/step_j``.
    """
    refs = {
        (entry.name, entry.key): contiguous_ref(
            str(index), weight_dtype if entry.key == "param" else torch.float32, entry.shape
        )
        for index, entry in enumerate(entries)
    }
    names = [entry.name for entry in entries if entry.key == "param"]
    weights = {name: refs[name, "param"] for name in names}
    if tied:
        weights[HEAD] = replace(weights[EMBEDDING])  # a second tensor on the same bytes
    state: dict[int, dict[str, TensorRef]] = {}
    for index, name in enumerate(names if len(refs) > len(names) else ()):
        step = contiguous_ref(f"step_{index}", torch.float32, ())
        state[index] = {"step": step, **{key: refs[name, key] for key in ADAM_KEYS}}
    tree = dict(metadata)
    tree.setdefault("scheduler_state_dict", {"step": int(metadata["global_step"]) - 1})
    tree["model_state_dict"] = weights
    tree["optimizer_state_dict"] = {"state": state, "param_groups": [_full_group(param_group, len(names))]}
    return tree


def _full_group(options: Mapping[str, Any], count: int) -> dict[str, Any]:
    """AdamW's parameter group with every key that this torch writes.

    Read off its signature: to build an optimizer would import torch's compiler, which takes seconds.
    """
    signature = inspect.signature(torch.optim.AdamW.__init__).parameters
    group = {name: signature[name].default for name in signature if name not in ("self", "params")}
    group["decoupled_weight_decay"] = True
    group.update({key: value for key, value in options.items() if key != "params"})
    group["params"] = list(range(count))
    return group


def _stream(
    descriptor: int,
    tree: dict[str, Any],
    entries: Sequence[TensorEntry],
    slice_map: SliceMap,
    parameters: Mapping[str, torch.Tensor],
    adam: Adam,
    peers: _Peers,
) -> int:
    """Write all records; return the size of the file."""
    writer = ArchiveWriter(descriptor)
    try:
        begin_archive(writer, tree)
        for index, entry in enumerate(entries):
            peers.go()
            local = parameters[entry.name] if entry.key == "param" else adam[entry.name][entry.key]
            chunks = _gather(entry, slice_map, local, peers)
            try:
                writer.begin(f"data/{index}", 4 * math.prod(entry.shape), values=entry.label)
                for chunk in chunks:
                    writer.write(tensor_bytes(chunk))
            except (OSError, CheckpointError):
                for _ in chunks:  # the ranks that already send this tensor must not be left waiting
                    pass
                raise
        for index, name in enumerate(adam):
            step = adam[name]["step"].detach().to("cpu", torch.float32)
            writer.add(f"data/step_{index}", bytes(tensor_bytes(step)))
        return finish_archive(writer)
    finally:
        writer.abandon()


def begin_archive(writer: ArchiveWriter, tree: dict[str, Any]) -> None:
    """Write the records that torch expects before the tensors."""
    writer.add("data.pkl", dump_tree(tree))
    writer.add(".format_version", b"1")
    writer.add(".storage_alignment", b"64")
    writer.add("byteorder", b"little")


def finish_archive(writer: ArchiveWriter) -> int:
    """Write the records that torch expects after the tensors, and the directory; return the file's bytes."""
    writer.add("version", b"3\n")
    writer.add(".data/serialization_id", b"0" * 40)
    return writer.close()


def check_finite(chunk: torch.Tensor, entry: TensorEntry) -> None:
    """CheckpointError where a value is NaN or infinite."""
    if chunk.numel() and not all(math.isfinite(float(bound)) for bound in torch.aminmax(chunk)):
        raise CheckpointError(f"{entry.label} holds NaN or infinite values, which are never saved")


def row_chunks(shape: Sequence[int], chunk_bytes: int | None = None) -> list[tuple[int, int]]:
    """First and last row of each chunk of a float32 tensor of this shape, about CHUNK_BYTES each."""
    rows = max(1, (chunk_bytes or CHUNK_BYTES) // max(1, math.prod(shape[1:]) * 4))
    return [(first, min(first + rows, shape[0])) for first in range(0, shape[0], rows)]


def clip_rows(rectangles: Sequence[Rectangle], first: int, last: int) -> list[tuple[Rectangle, int, int]]:
    """The rectangles that reach into rows ``first`` to ``last``, with the rows of each that do."""
    clipped = []
    for rectangle in rectangles:
        low = max(first, rectangle.start[0])
        high = min(last, rectangle.start[0] + rectangle.size[0])
        if low < high and rectangle.numel:
            clipped.append((rectangle, low, high))
    return clipped


def _local_part(local: torch.Tensor, rectangle: Rectangle, low: int, high: int) -> torch.Tensor:
    """The part of a local tensor that holds unsharded rows ``low`` to ``high`` of a rectangle."""
    shift = rectangle.local_start[0] - rectangle.start[0]
    return local.detach()[(slice(low + shift, high + shift), *rectangle.local_index[1:])]


def _gather(
    entry: TensorEntry, slice_map: SliceMap, local: torch.Tensor, peers: _Peers
) -> Iterator[torch.Tensor]:
    """The chunks of one tensor in order, float32 on the CPU, each received while its predecessor is used.

    A chunk is valid until the next is asked for: their memory is used again.
    """
    chunks = row_chunks(entry.shape)
    owned = {rank: slice_map.owned(entry.name, rank) for rank in (0, *peers.ranks)}
    pending = _receive(owned, chunks[0], peers) if chunks else []
    space = torch.empty(0)
    for index, (first, last) in enumerate(chunks):
        arriving = pending
        pending = _receive(owned, chunks[index + 1], peers) if index + 1 < len(chunks) else []
        whole = _own_rows(owned[0], local, entry.shape, first, last)
        if whole is not None:
            yield whole
            continue
        if not space.numel():
            space = torch.empty((last - first, *entry.shape[1:]), dtype=torch.float32)
        chunk = space[: last - first]
        for rectangle, low, high in clip_rows(owned[0], first, last):
            place = (slice(low - first, high - first), *rectangle.unsharded_index[1:])
            chunk[place].copy_(_local_part(local, rectangle, low, high))
        for rank, buffer, work in arriving:
            peers.wait(work, rank)
            for rectangle, low, high in clip_rows(owned[rank], first, last):
                place = (slice(low - first, high - first), *rectangle.unsharded_index[1:])
                target = chunk[place]
                target.copy_(buffer[: target.numel()].view(target.shape))
                buffer = buffer[target.numel() :]
        yield chunk


def _own_rows(
    owned: Sequence[Rectangle], local: torch.Tensor, shape: Sequence[int], first: int, last: int
) -> torch.Tensor | None:
    """Rank 0's own memory of rows ``first`` to ``last`` where it can be written as it is."""
    clipped = clip_rows(owned, first, last)
    if len(clipped) != 1 or local.device.type != "cpu" or local.dtype != torch.float32:
        return None
    part = _local_part(local, *clipped[0])
    return part if part.shape == (last - first, *shape[1:]) and part.is_contiguous() else None


def _receive(
    owned: Mapping[int, Sequence[Rectangle]], rows: tuple[int, int], peers: _Peers
) -> list[tuple[int, torch.Tensor, dist.Work]]:
    """Start receiving what each peer owns of these rows."""
    arriving = []
    for rank in peers.ranks:
        count = _message_numel(owned[rank], rows)
        if count:
            buffer = torch.empty(count, dtype=torch.float32)
            arriving.append((rank, buffer, peers.receive(buffer, rank)))
    return arriving


def _message_numel(rectangles: Sequence[Rectangle], rows: tuple[int, int]) -> int:
    return sum((high - low) * math.prod(box.size[1:]) for box, low, high in clip_rows(rectangles, *rows))


def _send_slices(
    entries: Sequence[TensorEntry],
    slice_map: SliceMap,
    rank: int,
    parameters: Mapping[str, torch.Tensor],
    adam: Adam,
    control_group: dist.ProcessGroup | None,
) -> None:
    """The part of a rank other than 0: send what it owns of each tensor that rank 0 asks for."""
    peers = _Peers((), control_group)
    for entry in entries:
        peers.await_word()
        local = parameters[entry.name] if entry.key == "param" else adam[entry.name][entry.key]
        owned = slice_map.owned(entry.name, rank)
        sending: list[tuple[torch.Tensor, dist.Work]] = []
        for first, last in row_chunks(entry.shape):
            parts = [_local_part(local, *clipped).reshape(-1) for clipped in clip_rows(owned, first, last)]
            if not parts:
                continue
            message = torch.cat(parts).to("cpu", torch.float32)
            if sending:
                peers.wait(sending.pop()[1], 0)
            sending.append((message, peers.send(message, 0)))
        for _, work in sending:
            peers.wait(work, 0)
    peers.await_word()


class _Peers:
    """Words and slices between rank 0 and the others; a lost rank becomes a PeerError that names it."""

    def __init__(self, ranks: Sequence[int], group: dist.ProcessGroup | None) -> None:
        self.ranks = tuple(ranks)
        self._group = group

    def go(self) -> None:
        """Tell every rank to go on."""
        for rank in self.ranks:
            self.wait(self.send(torch.tensor([_GO]), rank), rank)

    def stop(self, message: str) -> None:
        """Tell every rank to stop, and why."""
        text = torch.tensor(list(message.encode()), dtype=torch.uint8)
        for rank in self.ranks:
            self.wait(self.send(torch.tensor([len(text)]), rank), rank)
            self.wait(self.send(text, rank), rank)

    def await_word(self) -> None:
        """Wait for rank 0's word; raise its CheckpointError when it says stop."""
        word = torch.zeros(1, dtype=torch.int64)
        self.wait(self.receive(word, 0), 0)
        if int(word) != _GO:
            text = torch.zeros(int(word), dtype=torch.uint8)
            self.wait(self.receive(text, 0), 0)
            raise CheckpointError(bytes(text.tolist()).decode())

    def send(self, tensor: torch.Tensor, rank: int) -> dist.Work:
        try:
            work = dist.isend(tensor, rank, group=self._group)
        except RuntimeError as error:
            raise _lost(rank, error) from error
        assert work is not None
        return work

    def receive(self, tensor: torch.Tensor, rank: int) -> dist.Work:
        try:
            work = dist.irecv(tensor, rank, group=self._group)
        except RuntimeError as error:
            raise _lost(rank, error) from error
        assert work is not None
        return work

    def wait(self, work: dist.Work, rank: int) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise _lost(rank, error) from error


def _lost(rank: int, error: RuntimeError) -> PeerError:
    return PeerError(f"rank {rank} left while a checkpoint was saved ({str(error)[:80]}): see its output")
