"""What the tensors and keys of a checkpoint mean: names, optimizer order, tied head, model shape.

A :class:`CheckpointReader` shows any checkpoint (ours, a pipeline script's, several files joined) as an
unsharded model with its Adam state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from argonne.checkpoint.adam import adam_of
from argonne.checkpoint.safe_pickle import TensorRef
from argonne.checkpoint.shape import CONFIG_KINDS, EMBEDDING
from argonne.checkpoint.tensor_file import FileTensor, Shape, TensorFile, TensorSource, read_rectangle
from argonne.errors import CheckpointError

FORMAT_KEY = "checkpoint_format"
FORMAT_VERSION = 1
KIND_OURS = "tensor_parallel"
KIND_PIPELINE = "pipeline"
KIND_FAMILY = "family"
KIND_WEIGHTS = "weights"

HEAD = "lm_head.weight"
_DICTIONARIES = (
    "data_state",
    "scheduler_state_dict",
    "model_config",
    "loss_scaler",
    "run_settings",
)
_PIPELINE_POSITION = frozenset(
    ("streaming", "current_file_idx", "position_in_file", "chunk_offset", "current_position")
)
_WRAPPERS = ("module.", "base_model.")
_COMPARE_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class CheckpointReader:
    """An unsharded model in one or more checkpoint files."""

    path: Path
    kind: str
    """``tensor_parallel`` (written by this suite), ``pipeline``, ``family`` (the family's own trainer),
    ``weights`` (nothing else is used of it), or how several files were joined."""
    metadata: dict[str, Any]
    """Everything in the file but tensors, weights and optimizer state."""
    tied: bool
    """Whether head and embedding are one parameter."""
    model: Mapping[str, TensorSource]
    """Weights by unsharded name, in the file's order, the head included."""
    adam: Mapping[str, Mapping[str, TensorSource]]
    """Per parameter ``exp_avg``, ``exp_avg_sq`` and ``step``; empty when the file has no optimizer state."""
    adam_note: str = ""
    """Why there is no optimizer state."""
    param_groups: Sequence[dict[str, Any]] = ()
    files: tuple[TensorFile, ...] = ()
    size: int = 0
    """Bytes of all files."""
    identity: str = ""
    """Digest of headers and sizes: equal on every rank that sees the same files."""
    warnings: tuple[str, ...] = field(default=())

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names in optimizer order; a tied head is not among them."""
        return parameter_names(self.model, self.tied)

    @property
    def step(self) -> int:
        """Optimizer steps done (``global_step``)."""
        return int(self.metadata.get("global_step", 0))

    def shape(self, name: str) -> Shape:
        return self.model[name].shape

    def read(self, name: str, start: Shape, size: Shape, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A rectangle of a weight as a fresh CPU tensor."""
        return read_rectangle(self.model[name], start, size, dtype)

    def read_optimizer(self, name: str, key: str, start: Shape, size: Shape) -> torch.Tensor:
        """A rectangle of ``exp_avg`` or ``exp_avg_sq`` as a fresh float32 CPU tensor."""
        return read_rectangle(self.adam[name][key], start, size)

    def adam_step(self, name: str) -> float:
        """The optimizer's own step count of a parameter."""
        source = self.adam[name]["step"]
        return float(
            read_rectangle(source, (0,) * len(source.shape), source.shape, torch.float64).reshape(())
        )

    def source(self, name: str, key: str) -> TensorSource:
        """The weight (``key`` "param") or the Adam state of a parameter."""
        return self.model[name] if key == "param" else self.adam[name][key]


def weights_only(reader: CheckpointReader) -> CheckpointReader:
    """The model of a checkpoint, without optimizer state, step and data position."""
    config = reader.metadata.get("model_config")
    return replace(
        reader,
        kind=KIND_WEIGHTS,
        metadata={"model_config": config} if isinstance(config, dict) else {},
        adam={},
        adam_note="",
        param_groups=(),
    )


def parameter_names(names: Mapping[str, object] | Sequence[str], tied: bool) -> tuple[str, ...]:
    """Names in optimizer order: a tied head counts once, as the embedding."""
    return tuple(name for name in names if not (tied and name == HEAD))


def strip_wrappers(name: str) -> str:
    """The name without what torch.compile, DDP and the public tensor-parallel script's wrapper add to it."""
    name = name.replace("_orig_mod.", "")
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def open_checkpoint(path: Path) -> CheckpointReader:
    """Open one whole checkpoint file of this suite or of a pipeline script.

    Reads the directory and the header only. Raises CheckpointError naming the file and what is wrong:
    missing, cut, of a newer format, not a checkpoint, or one rank's or one stage's part of a model.
    """
    file = TensorFile(Path(path))
    try:
        return reader_of_file(file)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error


def reader_of_file(file: TensorFile) -> CheckpointReader:
    """Interpret an open file as a whole model; CheckpointError (without the path) where it is not one."""
    tree = file.tree
    weights = model_tensors(file)
    kind = _kind(file, tree)
    model: dict[str, TensorSource] = dict(weights)
    tied = _is_tied(tree, weights)
    if HEAD not in model:
        if not tied:
            raise CheckpointError(f"it has no {HEAD} and its model_config says the head is not tied")
        model[HEAD] = model[EMBEDDING]
    names = parameter_names(model, tied)
    shapes = [model[name].shape for name in names]
    adam, note, groups = adam_of(file, tree.get("optimizer_state_dict"), names, shapes)
    metadata = plain_metadata(tree)
    check_metadata(metadata)
    return CheckpointReader(
        path=file.path,
        kind=kind,
        metadata=metadata,
        tied=tied,
        model=model,
        adam=adam,
        adam_note=note,
        param_groups=groups,
        files=(file,),
        size=file.size,
        identity=file.identity,
    )


def model_tensors(file: TensorFile) -> dict[str, FileTensor]:
    """The weights of a file by unwrapped name. CheckpointError where there are none."""
    tree = file.tree
    state = tree.get("model_state_dict") if isinstance(tree, dict) else None
    if not isinstance(state, dict) or not state:
        raise CheckpointError("it has no model_state_dict: not a training checkpoint")
    weights: dict[str, FileTensor] = {}
    for raw_name, ref in state.items():
        name = strip_wrappers(str(raw_name))
        if not isinstance(ref, TensorRef):
            raise CheckpointError(f"{name} in model_state_dict is not a tensor")
        if not ref.dtype.is_floating_point:
            raise CheckpointError(f"{name} holds {ref.dtype} values, not weights")
        if name in weights:
            raise CheckpointError(f"{name} is there twice, with and without a prefix")
        weights[name] = file.source(ref)
    return weights


def plain_metadata(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The keys beside weights and optimizer state; tensors among them become None."""

    def strip(node: Any) -> Any:
        if isinstance(node, TensorRef):
            return None
        if isinstance(node, dict):
            return {key: strip(value) for key, value in node.items()}
        if isinstance(node, list | tuple):
            items = [strip(value) for value in node]
            return items if isinstance(node, list) else tuple(items)
        return node

    return {
        key: strip(value)
        for key, value in tree.items()
        if key not in ("model_state_dict", "optimizer_state_dict")
    }


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """CheckpointError where a value cannot be what its key says."""
    for key in ("global_step", "tokens_processed"):
        value = metadata.get(key, 0)
        if type(value) is not int or not 0 <= value < 2**63:
            raise CheckpointError(f"its {key} is {value!r}, not a count"[:200])
    if not isinstance(metadata.get("loss") or 0.0, int | float):
        raise CheckpointError(f"its loss is {metadata['loss']!r}, not a number"[:200])
    if type(position := metadata.get("data_position") or {}) not in (dict, int):
        raise CheckpointError(f"its data_position is {position!r}, not a dictionary or a number"[:200])
    for key in _DICTIONARIES:
        if not isinstance(metadata.get(key) or {}, dict):
            raise CheckpointError(f"its {key} is {metadata[key]!r}, not a dictionary"[:200])
    for key, value in (metadata.get("model_config") or {}).items():
        kind = CONFIG_KINDS.get(key)
        if kind is not None and value is not None and not (type(value) in kind and 0 <= value < 2**40):
            raise CheckpointError(f"{key} of its model_config is {value!r}"[:200])


def _kind(file: TensorFile, tree: Mapping[str, Any]) -> str:
    version = tree.get(FORMAT_KEY)
    if version is None:
        return KIND_FAMILY if _of_family(tree) else KIND_PIPELINE
    if type(version) is not int or version > FORMAT_VERSION:
        raise CheckpointError(
            f"it has checkpoint format {version!r}, this program reads up to {FORMAT_VERSION}: upgrade it"
        )
    if not file.sealed:
        raise CheckpointError(
            f"the digest at its end is missing: damaged, or saved again by another program (which then "
            f"should drop the key {FORMAT_KEY})"
        )
    return KIND_OURS


def _of_family(tree: Mapping[str, Any]) -> bool:
    """Whether the family's own trainer wrote the file: another scheduler, another reader's data position."""
    scheduler, position = tree.get("scheduler_state_dict"), tree.get("data_position")
    if isinstance(scheduler, dict) and "last_epoch" in scheduler:
        return True
    if isinstance(position, dict):
        return bool(position) and not position.keys() & _PIPELINE_POSITION
    return type(position) is int


def saved_position(kind: str, metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """The data position where the data can go on from it; None: there is none, or it is another reader's."""
    position = metadata.get("data_position")
    return position if isinstance(position, dict) and position and kind != KIND_FAMILY else None


def _is_tied(tree: Mapping[str, Any], weights: Mapping[str, FileTensor]) -> bool:
    config = tree.get("model_config")
    if isinstance(config, dict) and isinstance(config.get("tie_word_embeddings"), bool):
        return config["tie_word_embeddings"]
    if EMBEDDING not in weights:
        raise CheckpointError(f"it has no {EMBEDDING}: not an Argonne model, or a part of one")
    if HEAD not in weights:
        return True
    head, embedding = weights[HEAD].ref, weights[EMBEDDING].ref
    if head == embedding:
        return True
    return same_bytes(weights[HEAD], weights[EMBEDDING])


def same_bytes(first: FileTensor, second: FileTensor) -> bool:
    """Whether two tensors have the same shape, type and bits; read in place."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    a, b = first.file.view(first.ref), second.file.view(second.ref)
    return all(
        bool((a[row : row + _COMPARE_ROWS] == b[row : row + _COMPARE_ROWS]).all())
        for row in range(0, a.shape[0], _COMPARE_ROWS)
    )
