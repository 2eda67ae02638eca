"""A small model cut over ranks, for checkpoint tests: unsharded values, and what each rank holds of them."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argonne.checkpoint.host_copy import HostCopy
from argonne.checkpoint.save import SaveReport, save_checkpoint
from argonne.tp.head_cuts import head_cut
from argonne.tp.slices import Cut, SliceMap, even_cut

HIDDEN, HEADS, KEY_VALUE_HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY, LAYERS = 24, 4, 2, 6, 50, 101, 2
MODEL_CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 64,
}
PARAM_GROUP = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def sample_shapes(tied: bool = True) -> dict[str, tuple[int, ...]]:
    """Shapes by name, in the model's order."""
    query, key_value = HEADS * HEAD_DIM, KEY_VALUE_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"blocks.{layer}."
        shapes[prefix + "attn.q_proj.weight"] = (query, HIDDEN)
        shapes[prefix + "attn.k_proj.weight"] = (key_value, HIDDEN)
        shapes[prefix + "attn.v_proj.weight"] = (key_value, HIDDEN)
        shapes[prefix + "attn.o_proj.weight"] = (HIDDEN, query)
        shapes[prefix + "input_norm.weight"] = (HIDDEN,)
        shapes[prefix + "post_norm.weight"] = (HIDDEN,)
        shapes[prefix + "mlp.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[prefix + "mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[prefix + "mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    shapes["norm.weight"] = (HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return shapes


def sample_map(
    tp_size: int, *, dp_size: int = 1, tied: bool = True, shard_size: int | None = None
) -> SliceMap:
    """Padded vocabulary and intermediate slices, shared key/value heads at 4 ranks, FSDP chunks over dp."""

    def cut(name: str, shape: tuple[int, ...]) -> Cut | None:
        if "q_proj" in name or "o_proj" in name:
            return head_cut(HEADS, HEAD_DIM, tp_size, int("o_proj" in name))
        if "k_proj" in name or "v_proj" in name:
            return head_cut(KEY_VALUE_HEADS, HEAD_DIM, tp_size, 0, query_heads=HEADS)
        if "norm" in name:
            return None
        dimension = int("down_proj" in name)
        return even_cut(shape[dimension], tp_size, dimension)

    parameters = {name: (shape, cut(name, shape)) for name, shape in sample_shapes(tied).items()}
    return SliceMap(
        parameters, tp_size=tp_size, dp_size=dp_size, dp_sharded=dp_size > 1, shard_size=shard_size
    )


def unsharded(name: str, key: str) -> Tensor:
    """The whole weight ("param") or Adam state, from its names alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {key}".encode()))
    values = torch.randn(sample_shapes(tied=False)[name], generator=generator)
    return values.square() if key == "exp_avg_sq" else values


def empty_slices(slice_map: SliceMap, rank: int) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Local weights and Adam state of a rank, zero."""
    parameters = {name: torch.zeros(slice_map.local_shape(name, rank)) for name in slice_map.names}
    adam = {
        name: {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        for name, p in parameters.items()
    }
    return parameters, adam


def filled_slices(
    slice_map: SliceMap, rank: int, step: int = 7
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Local weights and Adam state of a rank; padding stays zero."""
    parameters, adam = empty_slices(slice_map, rank)
    for name in slice_map.names:
        adam[name]["step"].fill_(step)
        for box in slice_map.rectangles(name, rank):
            parameters[name][box.local_index] = unsharded(name, "param")[box.unsharded_index]
            for key in ("exp_avg", "exp_avg_sq"):
                adam[name][key][box.local_index] = unsharded(name, key)[box.unsharded_index]
    return parameters, adam


def sample_metadata(step: int = 7, *, tied: bool = True) -> dict[str, Any]:
    return {
        "global_step": step,
        "tokens_processed": 64 * step,
        "loss": 2.5,
        "data_position": {"epoch": 0, "file_name": "000_00000.parquet", "row": 3, "token_offset": 17},
        "model_dtype": "torch.float32",
        "model_config": {**MODEL_CONFIG, "tie_word_embeddings": tied},
    }


def save_sample(
    folder: Path,
    step: int = 7,
    *,
    rank: int = 0,
    tp_size: int = 1,
    dp_size: int = 1,
    tied: bool = True,
    metadata: Mapping[str, Any] | None = None,
    spoil: tuple[str, str, float] | None = None,
    spare_bytes: int = 0,
    from_copies: bool = False,
    shard_size: int | None = None,
) -> tuple[Path, SaveReport | None]:
    """Save the sample at ``step``; ``spoil`` (name, key, value) puts one value into a tensor first.

    ``from_copies``: from copies in host memory, as a save in the background does.
    """
    slice_map = sample_map(tp_size, dp_size=dp_size, tied=tied, shard_size=shard_size)
    parameters, adam = filled_slices(slice_map, rank, step)
    if spoil is not None:
        name, key, value = spoil
        (parameters[name] if key == "param" else adam[name][key]).view(-1)[0] = value
    path = Path(folder) / f"tensor_parallel_checkpoint_step_{step}.pth"
    common: dict[str, Any] = {
        "slice_map": slice_map,
        "rank": rank,
        "param_group": PARAM_GROUP,
        "metadata": metadata or sample_metadata(step, tied=tied),
        "tied": tied,
        "control_group": None,
        "spare_bytes": spare_bytes,
    }
    if not from_copies:
        return path, save_checkpoint(path, parameters=parameters, adam=adam, **common)
    copy = HostCopy(slice_map, rank, torch.device("cpu"))
    copy.take(parameters, adam)
    return path, save_checkpoint(path, parameters=copy.parameters, adam=copy.adam, **common)
