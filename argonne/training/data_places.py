"""Places in the data that stages of a recipe leave behind, for later stages that read the same data again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from argonne.config.options import RunConfig

MIXTURE = "mixture"
"""Key of the place in a mixture, which has the places of all its sources by their names."""
PLACE = ("data_position", "data_state")


def data_source(config: RunConfig) -> dict[str, Any]:
    """What names the place in a stage's data, for its checkpoints: a key, and the globs that it reads."""
    data = config.data
    if data.data_mix:
        return {"key": MIXTURE, "globs": [source.glob for source in data.data_mix]}
    # A place in a shuffled order means something at one block size only.
    globs = list(data.data_glob)
    blocks = "" if data.streaming else f" in blocks of {config.training.block_size}"
    return {"key": " ".join(globs) + blocks, "globs": globs if data.streaming else []}


def _same_data(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a place in one names a place in the other."""
    return one["key"] == other["key"] or bool(set(one["globs"]) & set(other["globs"]))


def metadata_for(config: RunConfig, metadata: Mapping[str, Any], *, new_stage: bool) -> dict[str, Any]:
    """``data_position`` and ``data_state`` with which a stage's data is opened.

    Those of ``metadata``, unless a new stage reads other data than the stage before: then those where an
    earlier stage left it, or none.
    """
    own = {key: metadata[key] for key in PLACE if metadata.get(key) is not None}
    before, now = metadata.get("data_source"), data_source(config)
    if not new_stage:
        return own
    if before is not None and not _same_data(before, now):
        own = dict((metadata.get("data_places") or {}).get(now["key"]) or {})
    if config.data.streaming and own.get("data_state"):
        # A stage may change it; that moves no place in a stream.
        own["data_state"] = {**own["data_state"], "block_size": config.training.block_size}
    return own


def places_beside(config: RunConfig, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The places of data that the stage does not read, to be kept for one that will."""
    places = dict(metadata.get("data_places") or {})
    before, now = metadata.get("data_source"), data_source(config)
    if before is not None and metadata.get("data_position") is not None:
        places[before["key"]] = {name: metadata.get(name) for name in PLACE}
        if _same_data(before, now):
            del places[before["key"]]
    places.pop(now["key"], None)
    return places
