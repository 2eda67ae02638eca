"""Checkpoints in several files: pipeline stages with ranges of layers, slices of tensor-parallel ranks.

:mod:`argonne.checkpoint.part_names` says which part a file is; here the parts become one model.

- Stages: layers are numbered through the whole model, or from 0 in each stage where ``layer_range``
  (first, last + 1) says where they belong.
- Ranks: the public tensor-parallel script's cut, where rank K of N holds rows of q, k, v, gate and up,
  columns of o and down, and all the rest whole (rank 0's is taken).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from argonne.checkpoint.adam import ADAM_KEYS, adam_of
from argonne.checkpoint.part_names import PART_KEYS, Part, part_by_keys, part_name, part_of, siblings
from argonne.checkpoint.reader import (
    HEAD,
    CheckpointReader,
    check_metadata,
    model_tensors,
    parameter_names,
    plain_metadata,
    reader_of_file,
    same_bytes,
)
from argonne.checkpoint.shape import EMBEDDING, infer_shape
from argonne.checkpoint.tensor_file import FileTensor, JoinedTensor, Shape, TensorFile, TensorSource
from argonne.errors import CheckpointError

KIND_STAGES = "pipeline stages, joined"
KIND_RANKS = "tensor-parallel slices, joined"

_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_COLUMNS = ("o_proj.weight", "down_proj.weight")
_LAYER = re.compile(r"^blocks\.(\d+)\.")


def open_any(path: Path) -> CheckpointReader:
    """Open a checkpoint: a whole file, any one of its parts (the others lie beside it), or a folder of parts.

    Raises CheckpointError naming the stage, rank or layers that are missing, twice or contradictory.
    """
    path = Path(path)
    try:
        if path.is_dir():
            files = sorted(child for child in path.iterdir() if child.suffix == ".pth" and child.is_file())
            if not files:
                raise CheckpointError("the folder holds no .pth file")
            return _join(path, [part_of(TensorFile(child)) for child in files])
        named = part_name(path.name)
        if named is not None:
            return _join(path, [part_of(TensorFile(child)) for child in siblings(path, named)])
        file = TensorFile(path)
        part = part_by_keys(file)
        if part is not None and (part.count or 2) > 1:
            raise CheckpointError(
                f"it is {part.kind} {part.index} of {part.count or 'several'} only: put all parts into one "
                f"folder and name that, or name them ..._{part.kind}_K_of_N.pth"
            )
        return reader_of_file(file)
    except CheckpointError as error:
        if str(error).startswith("checkpoint "):
            raise
        raise CheckpointError(f"checkpoint {path}: {error}") from error


def _join(path: Path, parts: Sequence[Part]) -> CheckpointReader:
    parts = sorted(parts, key=lambda part: part.index)
    kinds = {part.kind for part in parts}
    if len(kinds) > 1:
        raise CheckpointError("it mixes pipeline stages and tensor-parallel ranks")
    kind = kinds.pop()
    counts = {part.count for part in parts if part.count is not None}
    if len(counts) > 1:
        raise CheckpointError(f"its parts speak of {' and '.join(map(str, sorted(counts)))} {kind}s")
    count = counts.pop() if counts else max(part.index for part in parts) + 1
    indices = [part.index for part in parts]
    for index in range(count):
        if indices.count(index) > 1:
            names = ", ".join(part.file.path.name for part in parts if part.index == index)
            raise CheckpointError(f"{kind} {index} is there twice ({names})")
    missing = sorted(set(range(count)) - set(indices))
    if missing or len(indices) > count:
        wrong = missing or [index for index in indices if index >= count]
        word = "missing" if missing else "one too many"
        raise CheckpointError(f"{kind} {', '.join(map(str, wrong))} of {count} is {word}")
    steps = {repr(part.file.tree.get("global_step")) for part in parts}
    if len(steps) > 1:
        told = ", ".join(f"{part.label} step {part.file.tree.get('global_step')}" for part in parts)
        raise CheckpointError(f"its parts are of different steps: {told}")
    return _join_stages(path, parts) if kind == "stage" else _join_ranks(path, parts)


def _reader(
    path: Path,
    kind: str,
    parts: Sequence[Part],
    model: Mapping[str, TensorSource],
    tied: bool,
    adam: Mapping[str, Mapping[str, TensorSource]],
    note: str,
    groups: Sequence[dict[str, Any]],
    warnings: Sequence[str],
) -> CheckpointReader:
    digest = hashlib.sha256("".join(part.file.identity for part in parts).encode())
    dropped = PART_KEYS | {"layer_range"}
    metadata = plain_metadata(parts[0].file.tree)
    check_metadata(metadata)
    return CheckpointReader(
        path=path,
        kind=kind,
        metadata={key: value for key, value in metadata.items() if key not in dropped},
        tied=tied,
        model=model,
        adam=adam if len(adam) == len(parameter_names(model, tied)) else {},
        adam_note=note,
        param_groups=groups,
        files=tuple(part.file for part in parts),
        size=sum(part.file.size for part in parts),
        identity=digest.hexdigest(),
        warnings=tuple(warnings),
    )


def _join_stages(path: Path, parts: Sequence[Part]) -> CheckpointReader:
    """One model from stages that hold ranges of layers."""
    model: dict[str, TensorSource] = {}
    origin: dict[str, Part] = {}
    adam: dict[str, Mapping[str, TensorSource]] = {}
    note = ""
    groups: list[dict[str, Any]] = []
    warnings: list[str] = []
    for part in parts:
        weights = _numbered(part, model_tensors(part.file))
        state, part_note, part_groups = adam_of(
            part.file,
            part.file.tree.get("optimizer_state_dict"),
            _own_names(part, weights),
            [weights[name].shape for name in _own_names(part, weights)],
        )
        note, groups = note or part_note, groups or part_groups
        for name, source in weights.items():
            if name in origin and name not in (EMBEDDING, HEAD):
                layer = _LAYER.match(name)
                what = f"layer {layer[1]}" if layer else name
                raise CheckpointError(f"{what} is in {origin[name].label} and in {part.label}")
            if name in origin:
                first = model[name]
                assert isinstance(first, FileTensor)
                if not same_bytes(first, source):
                    warnings.append(
                        f"{name} of {part.label} differs from {origin[name].label}; the first is taken"
                    )
                continue
            model[name], origin[name] = source, part
            if name in state:
                adam[name] = state[name]
    _check_layers(parts, model)
    tied = _tied(parts, model)
    if HEAD not in model:
        if not tied:
            raise CheckpointError(f"{HEAD} is in none of its {len(parts)} stages")
        model[HEAD] = model[EMBEDDING]
    ordered = {name: model[name] for name in sorted(model, key=_model_order)}
    names = parameter_names(ordered, tied)
    if not note and any(name not in adam for name in names):
        note = "the optimizer state of some stages is missing"
    state_all = {name: adam[name] for name in names if name in adam}
    return _reader(path, KIND_STAGES, parts, ordered, tied, state_all, note, groups, warnings)


def _own_names(part: Part, weights: Mapping[str, FileTensor]) -> list[str]:
    """The names of a stage's optimizer, in its order: without a head that shares the stage's embedding."""
    head, embedding = weights.get(HEAD), weights.get(EMBEDDING)
    shared = head is not None and embedding is not None and same_bytes(head, embedding)
    return [name for name in weights if not (shared and name == HEAD)]


def _numbered(part: Part, weights: Mapping[str, FileTensor]) -> dict[str, FileTensor]:
    """A stage's weights under their numbers in the whole model, checked against its ``layer_range``."""
    declared = part.file.tree.get("layer_range")
    layers = sorted({int(match[1]) for name in weights if (match := _LAYER.match(name))})
    if declared is None:
        return dict(weights)
    if not (
        isinstance(declared, list | tuple) and len(declared) == 2 and all(type(n) is int for n in declared)
    ):
        raise CheckpointError(f"layer_range of {part.label} is {declared!r}, not (first, last + 1)"[:200])
    first, last = declared
    if not 0 <= first < last <= first + len(layers):
        raise CheckpointError(f"{part.label} says layers {first}-{last - 1} and holds others: {layers[:8]}")
    if layers == list(range(first, last)):
        return dict(weights)
    if layers != list(range(last - first)):
        raise CheckpointError(f"{part.label} says layers {first}-{last - 1} and holds others: {layers[:8]}")

    def renumber(name: str) -> str:
        return _LAYER.sub(lambda match: f"blocks.{int(match[1]) + first}.", name)

    return {renumber(name): source for name, source in weights.items()}


def _model_order(name: str) -> tuple[int, int]:
    layer = _LAYER.match(name)
    if layer:
        return 1, int(layer[1])
    return {EMBEDDING: (0, 0), HEAD: (3, 0)}.get(name, (2, 0))


def _check_layers(parts: Sequence[Part], model: Mapping[str, TensorSource]) -> None:
    if EMBEDDING not in model:
        raise CheckpointError(
            f"{EMBEDDING} is in none of its {len(parts)} stages: the first stage is missing"
        )
    if "norm.weight" not in model:
        raise CheckpointError(f"norm.weight is in none of its {len(parts)} stages: the last stage is missing")
    infer_shape({name: source.shape for name, source in model.items()})


def _tied(parts: Sequence[Part], model: Mapping[str, TensorSource]) -> bool:
    for part in parts:
        config = part.file.tree.get("model_config")
        if isinstance(config, dict) and isinstance(config.get("tie_word_embeddings"), bool):
            return config["tie_word_embeddings"]
    head, embedding = model.get(HEAD), model[EMBEDDING]
    if head is None:
        return True
    if not isinstance(head, FileTensor) or not isinstance(embedding, FileTensor):
        return False
    return head.shape == embedding.shape and head.dtype == embedding.dtype and same_bytes(head, embedding)


def _join_ranks(path: Path, parts: Sequence[Part]) -> CheckpointReader:
    """One model from the slices of all ranks of the public tensor-parallel script."""
    readers = [reader_of_file(part.file) for part in parts]
    names = list(readers[0].model)
    for part, reader in zip(parts, readers, strict=True):
        if set(reader.model) != set(names):
            odd = sorted(set(reader.model) ^ set(names))[0]
            raise CheckpointError(f"{odd} is not in all ranks' files ({part.label})")
    model = {name: _joined([reader.model[name] for reader in readers], name) for name in names}
    tied = readers[0].tied
    adam: dict[str, dict[str, TensorSource]] = {}
    if all(reader.adam for reader in readers):
        for name in parameter_names(names, tied):
            adam[name] = {
                key: _joined([reader.adam[name][key] for reader in readers], name) for key in ADAM_KEYS
            }
            adam[name]["step"] = readers[0].adam[name]["step"]
    note = next((reader.adam_note for reader in readers if not reader.adam), "")
    warnings = _drift(parts, readers)
    return _reader(path, KIND_RANKS, parts, model, tied, adam, note, readers[0].param_groups, warnings)


def cut_dimension(name: str) -> int | None:
    """The dimension along which the public tensor-parallel script cuts a parameter; None: not at all."""
    if any(f".{part}." in name for part in _ROWS):
        return 0
    return 1 if name.endswith(_COLUMNS) else None


def _joined(pieces: Sequence[TensorSource], name: str) -> TensorSource:
    dimension = cut_dimension(name)
    shapes = [piece.shape for piece in pieces]
    if dimension is not None:
        shapes = [(*shape[:dimension], *shape[dimension + 1 :]) for shape in shapes]
    if len(set(shapes)) > 1:
        raise CheckpointError(f"{name} has contradictory shapes in its ranks' files: {_shapes(pieces)}")
    return pieces[0] if dimension is None else JoinedTensor(tuple(pieces), dimension)


def _shapes(pieces: Sequence[TensorSource]) -> str:
    seen: list[Shape] = []
    for piece in pieces:
        if piece.shape not in seen:
            seen.append(piece.shape)
    return ", ".join(map(str, seen))


def _drift(parts: Sequence[Part], readers: Sequence[CheckpointReader]) -> list[str]:
    """A warning when weights that every rank holds whole differ (that script lets its ranks drift apart)."""
    drifted = []
    for name, source in readers[0].model.items():
        others = [reader.model[name] for reader in readers[1:]]
        if cut_dimension(name) is not None or not isinstance(source, FileTensor):
            continue
        if not all(isinstance(other, FileTensor) and same_bytes(source, other) for other in others):
            drifted.append(name)
    if not drifted:
        return []
    return [
        f"{len(drifted)} weights that all {len(parts)} ranks share differ between them; rank 0's are taken"
    ]
