"""The pickle inside a checkpoint: tensors as references to stored bytes, plain containers, nothing else.

Reading never builds a tensor and never runs anything: the opcodes are checked before the unpickler sees
them, and the only names it resolves are the few that describe a tensor. Writing emits what ``torch.load``
with ``weights_only=True`` reads.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from argonne.errors import CheckpointError, one_line

MAX_PICKLE_BYTES = 256 << 20
MAX_DIMENSIONS = 8
_MAX_NODES = 300_000
_MAX_DEPTH = 64

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_STORAGE_NAMES = {dtype: name for name, dtype in _STORAGE_DTYPES.items()}
_DTYPE_NAMES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)

_PICKLE_ERRORS = (
    pickle.UnpicklingError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    AttributeError,
)
_PLAIN_OPCODES = frozenset(
    "PROTO STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE "
    "EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM SETITEMS APPEND APPENDS "
    "BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL REDUCE BUILD BINPERSID".split()
)


@dataclass(frozen=True)
class StorageRef:
    """A run of stored elements: ``key`` names its record, ``numel`` counts elements of ``dtype``."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a file: the elements of a storage that its offset, size and stride (elements) select."""

    storage: StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, (self.storage, self.offset, self.size, self.stride, False, OrderedDict())


def contiguous_ref(key: str, dtype: torch.dtype, size: tuple[int, ...]) -> TensorRef:
    """The reference of a contiguous tensor that fills its storage."""
    stride = tuple(math.prod(size[dimension + 1 :]) for dimension in range(len(size)))
    return TensorRef(StorageRef(key, dtype, math.prod(size)), 0, size, stride)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        if not isinstance(value, StorageRef):
            return None
        storage_type = getattr(torch, _STORAGE_NAMES[value.dtype])
        return ("storage", storage_type, value.key, "cpu", value.numel)


def dump_tree(tree: Any) -> bytes:
    """Pickle a tree of plain containers whose tensors are :class:`TensorRef`, as ``torch.save`` would."""
    plain_tree(tree, "checkpoint")
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(tree)
    return buffer.getvalue()


class _Refused:
    """Stands for a storage type; anything that tries to call or change it fails."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_ignored: Any) -> TensorRef:
    return TensorRef(storage, offset, tuple(size), tuple(stride))


def _rebuild_parameter(data: Any, *_ignored: Any) -> Any:
    return data


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    **{("torch", name): _Refused(dtype) for name, dtype in _STORAGE_DTYPES.items()},
    **{("torch", name): getattr(torch, name) for name in _DTYPE_NAMES},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _GLOBALS.get((module, name))
        if found is None:
            hint = "; save plain int or float instead of numpy values" if module.startswith("numpy") else ""
            raise CheckpointError(f"refers to {module}.{name}: only tensors and plain containers load{hint}")
        return found

    def persistent_load(self, identifier: Any) -> StorageRef:
        if not isinstance(identifier, tuple) or len(identifier) not in (5, 6) or identifier[0] != "storage":
            raise CheckpointError("refers to something that is not a tensor storage")
        _, storage_type, key, _location, numel = identifier[:5]
        if len(identifier) == 6 and identifier[5] is not None:
            raise CheckpointError("holds storage views of an old torch version; load and save it again")
        if not isinstance(storage_type, _Refused):
            raise CheckpointError("holds a storage of an unknown type")
        if not (isinstance(key, str) and key.isascii() and key.replace("_", "").isalnum()):
            raise CheckpointError(f"holds a storage with the impossible name {key!r}"[:200])
        if type(numel) is not int or numel < 0:
            raise CheckpointError(f"holds a storage of {numel!r} elements"[:200])
        return StorageRef(key, storage_type.dtype, numel)


def _check_opcodes(data: bytes) -> int:
    """Refuse opcodes that plain containers do not need; return the length of the pickle."""
    for opcode, argument, position in pickletools.genops(data):
        if opcode.name not in _PLAIN_OPCODES:
            raise CheckpointError(f"its pickle uses {opcode.name}: only tensors and plain containers load")
        if opcode.name == "LONG_BINPUT" and isinstance(argument, int) and argument > len(data):
            raise CheckpointError("its pickle numbers more objects than it has bytes")
        if opcode.name == "STOP":
            return int(position or 0) + 1
    raise CheckpointError("its pickle has no end")


def load_tree(data: bytes) -> tuple[Any, int]:
    """Unpickle the first pickle in ``data`` into plain containers with :class:`TensorRef` leaves.

    Returns the tree and the length of the pickle in bytes. Raises CheckpointError for anything beyond
    tensors and plain containers and for a damaged pickle; nothing is run and no tensor is allocated.
    """
    try:
        length = _check_opcodes(data)
        tree = _Unpickler(io.BytesIO(data[:length])).load()
    except _PICKLE_ERRORS as error:
        raise CheckpointError(f"its pickle is damaged ({one_line(error)[:120]})") from error
    except (MemoryError, OverflowError, RecursionError) as error:
        raise CheckpointError("its pickle is damaged or malicious") from error
    return plain_tree(tree, "it"), length


def plain_tree(tree: Any, what: str) -> Any:
    """A copy of the tree as dict, list, tuple and leaves; CheckpointError names any other type."""
    remaining = [_MAX_NODES]

    def copy(node: Any, depth: int) -> Any:
        remaining[0] -= 1
        if depth > _MAX_DEPTH or remaining[0] < 0:
            raise CheckpointError(f"{what} nests too deeply or repeats too often to be a checkpoint")
        if node is None or isinstance(node, bool | int | float | str | torch.dtype | TensorRef):
            if type(node) not in _LEAVES:
                raise _foreign(node, what)
            return node
        if isinstance(node, dict):
            return {_plain_key(key, what): copy(value, depth + 1) for key, value in node.items()}
        if isinstance(node, list | tuple):
            items = [copy(item, depth + 1) for item in node]
            return items if isinstance(node, list) else tuple(items)
        raise _foreign(node, what)

    return copy(tree, 0)


def _foreign(node: Any, what: str) -> CheckpointError:
    return CheckpointError(f"{what} holds a {type(node).__module__}.{type(node).__name__}: {_REMEDY}")


_LEAVES = (type(None), bool, int, float, str, torch.dtype, TensorRef)
_REMEDY = "only tensors, numbers, strings and plain containers are kept in a checkpoint"


def _plain_key(key: Any, what: str) -> Any:
    if type(key) not in (str, int):
        raise CheckpointError(f"{what} has a key of type {type(key).__name__}: {_REMEDY}")
    return key


def check_tensor(name: str, ref: TensorRef) -> None:
    """Refuse a reference whose numbers cannot be those of a tensor inside its storage."""
    numbers = (ref.offset, *ref.size, *ref.stride)
    if not isinstance(ref.storage, StorageRef) or any(type(number) is not int for number in numbers):
        raise CheckpointError(f"tensor {name} is not described by integers")
    if len(ref.size) != len(ref.stride) or len(ref.size) > MAX_DIMENSIONS or min(numbers) < 0:
        raise CheckpointError(
            f"tensor {name} has the impossible shape {ref.size} with strides {ref.stride}"[:300]
        )
    if ref.numel == 0:
        return
    reach = 1
    for stride, size in sorted(zip(ref.stride, ref.size, strict=True)):
        if size > 1 and stride < reach:
            raise CheckpointError(
                f"tensor {name} overlaps itself (shape {ref.size}, strides {ref.stride})"[:300]
            )
        if size > 1:
            reach = stride * (size - 1) + reach
    if ref.offset + reach > ref.storage.numel:
        raise CheckpointError(
            f"tensor {name} of shape {ref.size} needs {ref.offset + reach} elements, its storage has "
            f"{ref.storage.numel}"[:300]
        )


def map_tensors(tree: Any, visit: Callable[[str, TensorRef], None], path: str = "") -> None:
    """Call ``visit(path, reference)`` for every tensor of a plain tree."""
    if isinstance(tree, TensorRef):
        visit(path, tree)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            map_tensors(value, visit, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            map_tensors(value, visit, f"{path}[{index}]")
