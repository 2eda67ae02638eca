"""Places in the data that stages of a recipe leave behind, for later stages that read the same data again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from argonne.config.options import RunConfig


def data_key(config: RunConfig) -> str:
    """What names the place in a stage's data; "" for a mixture, whose sources have names of their own."""
    data = config.data
    if getattr(data, "data_mix", ()):
        return ""
    return data.data_glob if data.streaming else f"{data.data_glob} in blocks of {config.training.block_size}"


def metadata_for(config: RunConfig, metadata: Mapping[str, Any], *, new_stage: bool) -> dict[str, Any]:
    """``data_position`` and ``data_state`` with which a stage's data is opened.

    Those of ``metadata``, unless a new stage reads other data than the stage before: then those where an
    earlier stage left it, or none.
    """
    own = {key: metadata[key] for key in ("data_position", "data_state") if metadata.get(key) is not None}
    key, saved_key = data_key(config), metadata.get("data_source")
    if new_stage and key and saved_key and key != saved_key:
        own = dict((metadata.get("data_places") or {}).get(key) or {})
    if new_stage and config.data.streaming and own.get("data_state"):
        # A stage may change these; they move no place in a stream.
        training = config.training
        own["data_state"] = {**own["data_state"], "block_size": training.block_size}
    return own


def places_beside(config: RunConfig, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The places of data that the stage does not read, to be kept for one that will."""
    places = dict(metadata.get("data_places") or {})
    key, saved_key = data_key(config), metadata.get("data_source")
    if saved_key and metadata.get("data_position") is not None:
        places[saved_key] = {name: metadata.get(name) for name in ("data_position", "data_state")}
    places.pop(key, None)
    return places
