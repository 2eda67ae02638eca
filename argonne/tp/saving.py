"""`save_pretrained` of a split model: whole weights or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from argonne.errors import ConfigError
from argonne.tp.slices import SliceMap


def guard_saving(model: nn.Module, slice_map: SliceMap) -> None:
    """Let transformers' ``save_pretrained`` of a split model write whole weights only.

    A rank holds slices, or at degree 1 perhaps padded weights, and one rank alone, as ``save_pretrained`` is
    usually called, cannot gather them. With ``state_dict=`` of whole weights it works; otherwise it raises
    ConfigError.
    """
    plain: Callable[..., Any] | None = getattr(model, "save_pretrained", None)
    if plain is None or all(slice_map.cut(name) is None for name in slice_map.names):
        return
    tp_size = slice_map.tp_size
    what = f"the slices of one of {tp_size} tensor-parallel ranks" if tp_size > 1 else "padded weights"

    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        state = kwargs.get("state_dict", args[2] if len(args) > 2 else None)
        if state is None or not _is_whole(state, slice_map):
            raise ConfigError(
                f"save_pretrained would write {what}: on every "
                "rank call TensorParallelModel.unsharded_state_dict or tp_shard.unsharded_state_dict(model), "
                "then save_pretrained(folder, state_dict=...) on one"
            )
        return plain(*args, **kwargs)

    model.save_pretrained = save_pretrained  # type: ignore[assignment]


def _is_whole(state: Mapping[str, Tensor], slice_map: SliceMap) -> bool:
    names = slice_map.names
    return all(name in state and tuple(state[name].shape) == slice_map.shape(name) for name in names)
