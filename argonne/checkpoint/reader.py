"""What the tensors and keys of a checkpoint mean: names, optimizer order, tied head, model shape.

A :class:`CheckpointReader` shows any checkpoint (ours, a pipeline script's, several files joined) as an
unsharded model with its Adam state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from argonne.checkpoint.safe_pickle import TensorRef
from argonne.checkpoint.tensor_file import FileTensor, Shape, TensorFile, TensorSource, read_rectangle
from argonne.errors import CheckpointError

FORMAT_KEY = "checkpoint_format"
FORMAT_VERSION = 1
KIND_OURS = "tensor_parallel"
KIND_PIPELINE = "pipeline"

EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"
ADAM_KEYS = ("exp_avg", "exp_avg_sq")
_WRAPPERS = ("module.", "base_model.")
_COMPARE_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class CheckpointReader:
    """An unsharded model in one or more checkpoint files."""

    path: Path
    kind: str
    """``tensor_parallel`` (written by this suite), ``pipeline``, or how several files were joined."""
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


@dataclass(frozen=True)
class Scalar:
    """A step count that a file holds as a number instead of a tensor."""

    value: float
    shape: Shape = ()
    dtype: torch.dtype = torch.float32

    def read_into(self, out: torch.Tensor, start: Shape) -> None:
        out.fill_(self.value)


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
    for key in ("data_position", "data_state", "scheduler_state_dict", "model_config", "loss_scaler"):
        if not isinstance(metadata.get(key) or {}, dict):
            raise CheckpointError(f"its {key} is {metadata[key]!r}, not a dictionary"[:200])
    for key, value in (metadata.get("model_config") or {}).items():
        kind = _CONFIG_KINDS.get(key)
        if kind is not None and value is not None and not (type(value) in kind and 0 <= value < 2**40):
            raise CheckpointError(f"{key} of its model_config is {value!r}"[:200])


def _kind(file: TensorFile, tree: Mapping[str, Any]) -> str:
    version = tree.get(FORMAT_KEY)
    if version is None:
        return KIND_PIPELINE
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


def adam_of(
    file: TensorFile, state_dict: Any, names: Sequence[str], shapes: Sequence[Shape]
) -> tuple[dict[str, dict[str, TensorSource]], str, list[dict[str, Any]]]:
    """Adam state by parameter name, why it is missing, and the parameter groups' options."""
    if not isinstance(state_dict, dict) or not isinstance(state_dict.get("state"), dict):
        return {}, "the checkpoint has no optimizer state", []
    listed = state_dict.get("param_groups", ())
    if not isinstance(listed, list | tuple):
        raise CheckpointError("its optimizer has no list of parameter groups")
    groups = [dict(group) for group in listed if isinstance(group, dict)]
    for group in groups:
        indices = group.get("params", [])
        if not isinstance(indices, list | tuple) or any(type(index) is not int for index in indices):
            raise CheckpointError("a parameter group of its optimizer does not list numbers")
    options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    state = state_dict["state"]
    if not state:
        return {}, "the checkpoint has no optimizer state", options
    order = optimizer_order([list(group.get("params", ())) for group in groups], state, names, shapes)
    adam: dict[str, dict[str, TensorSource]] = {}
    for name, shape, index in zip(names, shapes, order, strict=True):
        entry = state.get(index)
        if not isinstance(entry, dict) or any(key not in entry for key in ("step", *ADAM_KEYS)):
            return {}, f"the optimizer state of {name} is not in the checkpoint", options
        adam[name] = _adam_entry(file, name, shape, entry)
    return adam, "", options


def _adam_entry(
    file: TensorFile, name: str, shape: Shape, entry: Mapping[str, Any]
) -> dict[str, TensorSource]:
    sources: dict[str, TensorSource] = {}
    for key in ADAM_KEYS:
        ref = entry[key]
        if not isinstance(ref, TensorRef) or ref.size != shape:
            found = ref.size if isinstance(ref, TensorRef) else type(ref).__name__
            raise CheckpointError(f"optimizer state {key} of {name} is {found}, the weight {shape}")
        sources[key] = file.source(ref)
    step = entry["step"]
    if isinstance(step, TensorRef) and step.numel == 1:
        sources["step"] = file.source(step)
    elif isinstance(step, int | float):
        sources["step"] = Scalar(float(step))
    else:
        raise CheckpointError(f"optimizer state step of {name} is not a number")
    return sources


def optimizer_order(
    groups: Sequence[Sequence[int]], state: Mapping[int, Any], names: Sequence[str], shapes: Sequence[Shape]
) -> list[int]:
    """The optimizer's index of each parameter.

    One group lists the parameters in the model's order. Two groups are taken as the usual split into
    matrices (weight decay) and vectors (none), each in the model's order; the shapes must bear it out.
    """
    indices = [index for group in groups for index in group]
    if len(indices) != len(names) or len(set(indices)) != len(indices):
        raise CheckpointError(f"its optimizer counts {len(indices)} parameters, its model {len(names)}")
    if len(groups) == 1:
        return indices

    def matrices(index: int) -> bool:
        entry = state.get(index)
        ref = entry.get("exp_avg") if isinstance(entry, dict) else None
        return isinstance(ref, TensorRef) and len(ref.size) >= 2

    wide = iter([index for index in indices if matrices(index)])
    narrow = iter([index for index in indices if not matrices(index)])
    order = [next(wide if len(shape) >= 2 else narrow, -1) for shape in shapes]
    if -1 in order:
        raise CheckpointError("its optimizer has parameter groups that do not match the model")
    return order


_LAYER = re.compile(r"^blocks\.(\d+)\.(.+)$")


def infer_shape(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Sizes of the model that the weights themselves show (no head counts).

    Returns vocab_size, hidden_size, num_hidden_layers, intermediate_size, query_size and key_value_size
    (output rows of q_proj and k_proj), attention_bias and mlp_bias. Raises CheckpointError naming a weight
    that is missing or a layer that is not there.
    """
    for name, shape in shapes.items():
        if len(shape) != (1 if "norm" in name or name.endswith(".bias") else 2) or 0 in shape:
            raise CheckpointError(f"{name} has the impossible shape {shape}")
    layers = sorted({int(match.group(1)) for name in shapes if (match := _LAYER.match(name))})
    if not layers or EMBEDDING not in shapes:
        raise CheckpointError("its weights are not those of an Argonne model (embed_tokens, blocks.0 ...)")
    absent = sorted(set(range(layers[-1] + 1)) - set(layers))
    if absent:
        raise CheckpointError(f"layers {ranges(absent)} of {layers[-1] + 1} are not in it")
    required = ("blocks.0.attn.q_proj.weight", "blocks.0.attn.k_proj.weight", "blocks.0.mlp.gate_proj.weight")
    for name in (*required, "norm.weight"):
        if name not in shapes:
            raise CheckpointError(f"weight {name} is not in it")
    vocab_size, hidden_size = shapes[EMBEDDING]
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "intermediate_size": shapes["blocks.0.mlp.gate_proj.weight"][0],
        "query_size": shapes["blocks.0.attn.q_proj.weight"][0],
        "key_value_size": shapes["blocks.0.attn.k_proj.weight"][0],
        "attention_bias": "blocks.0.attn.q_proj.bias" in shapes,
        "mlp_bias": "blocks.0.mlp.gate_proj.bias" in shapes,
    }


def sliced_over(hidden_size: int, query_size: int, config: Mapping[str, Any]) -> int:
    """Over how many ranks a query projection of ``query_size`` rows was cut; 1 for a whole one.

    Told by the head count, ``head_dim`` being hidden_size // heads where the configuration does not name it.
    """
    heads = config.get("num_attention_heads") or 1
    whole = heads * (config.get("head_dim") or hidden_size // heads)
    return whole // query_size if query_size and whole % query_size == 0 else 1


def ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def infer_model_config(reader: CheckpointReader, heads: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of a checkpoint's model, from its own ``model_config`` or from its tensors.

    ``heads`` (a preset or a config.json as a dictionary) gives what tensors do not show: head counts,
    rotary base, epsilon, context length. head_dim follows from the query projection. Raises
    CheckpointError where the head counts cannot belong to these projections.
    """
    shapes = {name: reader.shape(name) for name in reader.model}
    seen = infer_shape(shapes)
    own = reader.metadata.get("model_config")
    config = {**heads, **own} if isinstance(own, dict) else dict(heads)
    query_heads, key_value_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if not query_heads or not key_value_heads:
        raise CheckpointError(
            f"checkpoint {reader.path} does not say how many heads its model has: give --model-config"
        )
    query, key_value = seen.pop("query_size"), seen.pop("key_value_size")
    ranks = sliced_over(seen["hidden_size"], query, config)
    if ranks > 1:
        raise CheckpointError(
            f"checkpoint {reader.path} holds the slices of one of {ranks} tensor-parallel ranks ({query} of "
            f"{query * ranks} query rows): give all ranks' files, named ..._rank_K_of_{ranks}.pth"
        )
    head_dim, rest = divmod(query, query_heads)
    if rest or head_dim * key_value_heads != key_value:
        raise CheckpointError(
            f"{query_heads} query and {key_value_heads} key/value heads (--model-config) do not fit "
            f"checkpoint {reader.path}, whose projections give {query} and {key_value} rows"
        )
    config.update(seen)
    config.update(head_dim=head_dim, tie_word_embeddings=reader.tied)
    return config


_CONFIG_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads"), (int,)),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "intermediate_size", "vocab_size"), (int,)),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), (bool,)),
    **dict.fromkeys(("rope_theta", "rms_norm_eps"), (int, float)),
}
_COMPARED = tuple(_CONFIG_KINDS)


def check_model_config(
    reader_config: Mapping[str, Any], requested: Mapping[str, Any], path: Path | str
) -> None:
    """Raise CheckpointError naming both values of every key that differs; absent keys are skipped."""
    differences = [
        f"{key} is {reader_config[key]} in the checkpoint and {requested[key]} in --model-config"
        for key in _COMPARED
        if requested.get(key) is not None
        and reader_config.get(key) is not None
        and reader_config[key] != requested[key]
    ]
    if differences:
        raise CheckpointError(f"checkpoint {path} is of another model: {'; '.join(differences)}")
