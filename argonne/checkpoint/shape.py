"""The shape of a model as a checkpoint tells it: read from tensors, compared with a configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from argonne.checkpoint.tensor_file import Shape
from argonne.errors import CheckpointError

if TYPE_CHECKING:
    from argonne.checkpoint.reader import CheckpointReader


EMBEDDING = "embed_tokens.weight"
NORMS = {"qk_norm": "attn.q_norm", "v_norm": "attn.v_norm_layer", "sandwich_norm": "attn_out_norm"}
"""Switch -> a norm that it brings into each block."""
UNSEEN = {
    "logit_softcap": 0.0,
    "interleaved_local_attention": False,
    "local_attention_window": None,
    "z_loss_weight": 0.0,
}
"""Switches that tensors do not show, and what a stored configuration without them means."""
_HEAD_NORMS = ("blocks.0.attn.q_norm.weight", "blocks.0.attn.v_norm_layer.weight")
_LAYER = re.compile(r"^blocks\.(\d+)\.(.+)$")


def infer_shape(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Sizes of the model that the weights themselves show (no head counts).

    Returns vocab_size, hidden_size, num_hidden_layers, intermediate_size, query_size and key_value_size
    (output rows of q_proj and k_proj), attention_bias, mlp_bias, the switches of the norms, and head_dim
    where a norm over it shows it (else None). Raises CheckpointError naming a weight that is missing or a
    layer that is not there.
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
        **{switch: f"blocks.0.{norm}.weight" in shapes for switch, norm in NORMS.items()},
        "head_dim": next((shapes[name][0] for name in _HEAD_NORMS if name in shapes), None),
    }


def expected_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Shape of every parameter of a model, in the model's order; a tied head is not among them."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, key_value = (head_dim * config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    shapes: dict[str, Shape] = {EMBEDDING: (config["vocab_size"], hidden)}

    def linear(name: str, rows: int, columns: int, bias: bool | None) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    for layer in range(config["num_hidden_layers"]):
        block = f"blocks.{layer}."
        for part, rows in (("q", query), ("k", key_value), ("v", key_value)):
            linear(f"{block}attn.{part}_proj", rows, hidden, config.get("attention_bias"))
        linear(f"{block}attn.o_proj", hidden, query, config.get("attention_bias"))
        heads = ["q_norm", "k_norm"] if config.get("qk_norm") else []
        heads += ["v_norm_layer"] if config.get("v_norm") else []
        shapes |= {f"{block}attn.{norm}.weight": (head_dim,) for norm in heads}
        norms = ["input_norm", "post_norm"]
        norms += ["attn_out_norm", "mlp_out_norm"] if config.get("sandwich_norm") else []
        shapes |= {f"{block}{norm}.weight": (hidden,) for norm in norms}
        for part in ("gate", "up"):
            linear(f"{block}mlp.{part}_proj", wide, hidden, config.get("mlp_bias"))
        linear(f"{block}mlp.down_proj", hidden, wide, config.get("mlp_bias"))
    shapes["norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


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
    config = {**heads, **UNSEEN, **own} if isinstance(own, dict) else dict(heads)
    query, key_value, head_dim = seen.pop("query_size"), seen.pop("key_value_size"), seen.pop("head_dim")
    query_heads, key_value_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if not query_heads or not key_value_heads:
        raise CheckpointError(
            f"checkpoint {reader.path} does not say how many heads its model has: give --model-config"
        )
    for switch in NORMS:
        if isinstance(own, dict) and own.get(switch, seen[switch]) != seen[switch]:
            raise CheckpointError(
                f"checkpoint {reader.path} has {switch} {own[switch]} in its model_config and {seen[switch]} "
                "by its weights: it is damaged, or another model's"
            )
    # With norms on heads the tensors themselves tell head_dim; without, fewer rows are one rank's slice.
    ranks = 1 if head_dim else sliced_over(seen["hidden_size"], query, config)
    if ranks > 1:
        raise CheckpointError(
            f"checkpoint {reader.path} holds the slices of one of {ranks} tensor-parallel ranks ({query} of "
            f"{query * ranks} query rows): give all ranks' files, named ..._rank_K_of_{ranks}.pth"
        )
    has_norms, head_dim = head_dim is not None, head_dim or query // query_heads
    if (head_dim * query_heads, head_dim * key_value_heads) != (query, key_value):
        raise CheckpointError(
            f"{query_heads} query and {key_value_heads} key/value heads (--model-config) do not fit "
            f"checkpoint {reader.path}, whose projections give {query} and {key_value} rows"
            + (f" and whose norms a head_dim of {head_dim}" if has_norms else "")
        )
    config.update({key: value for key, value in seen.items() if value or key not in NORMS or key in config})
    config.update(head_dim=head_dim, tie_word_embeddings=reader.tied)
    return config


CONFIG_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads"), (int,)),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "intermediate_size", "vocab_size"), (int,)),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), (bool,)),
    **dict.fromkeys((*NORMS, "interleaved_local_attention"), (bool,)),
    **dict.fromkeys(("rope_theta", "rms_norm_eps", "logit_softcap", "z_loss_weight"), (int, float)),
    "local_attention_window": (int,),
}

_COMPARED = tuple(CONFIG_KINDS)


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
