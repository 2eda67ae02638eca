"""How far this rank has come in each process group, by torch's flight recorder.

The recorder sees every collective, those of compiled graphs too, and asks the device's events whether one
has begun or ended, without waiting for it. A rank may have issued a whole step and have entered none of it.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from argonne.run.stalls import GroupWork

BACKGROUND_GROUPS = frozenset({"feed", "save"})
"""Groups of threads beside the loop, in which ranks wait for each other while all is well."""


def recorded_groups(device: torch.device) -> dict[str, GroupWork]:
    """Process group -> this rank's progress in it, for the groups of the loop; empty without a recorder.

    To be called rarely: the recorder lists thousands of collectives.
    """
    bindings = torch._C._distributed_c10d
    entries: list[dict[str, Any]] = []
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # of NCCL's groups, of gloo's
        if (dump := getattr(bindings, name, None)) is None:
            continue
        if device.type == "cuda":
            with torch.cuda.device(device):  # events are asked: not by way of another GPU
                entries += json.loads(dump(includeCollectives=True)).get("entries", [])
        else:
            entries += json.loads(dump(includeCollectives=True)).get("entries", [])
    groups = group_progress(entries)
    if groups:  # a group in which this rank has entered nothing yet
        for group, name in dist.distributed_c10d._world.pg_names.items():
            if group.group_desc not in BACKGROUND_GROUPS:
                groups.setdefault(name, GroupWork(group=_named(group.group_desc)))
    return groups


def group_progress(entries: list[dict[str, Any]]) -> dict[str, GroupWork]:
    """From the recorder's entries, in the order in which they were issued."""
    by_group: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        name, description = entry["process_group"]
        if not entry["is_p2p"] and description not in BACKGROUND_GROUPS:
            by_group.setdefault((name, description), []).append(entry)
    return {name: _progress(description, issued) for (name, description), issued in by_group.items()}


def _progress(group: str, issued: list[dict[str, Any]]) -> GroupWork:
    left = [entry for entry in issued if not entry["retired"] and entry["state"] != "completed"]
    numbers = [entry["collective_seq_id"] for entry in left]
    completed = min(numbers) - 1 if left else max(entry["collective_seq_id"] for entry in issued)
    entered = max((e["collective_seq_id"] for e in left if _is_entered(e)), default=completed)
    following = {entry["collective_seq_id"]: entry["profiling_name"] for entry in left}
    kind = following.get(max(entered, completed + 1), "").rpartition(":")[2]
    return GroupWork(group=_named(group), entered=entered, completed=completed, kind=kind)


def _named(description: str) -> str:
    return "all ranks" if description == "default_pg" else description


def _is_entered(entry: dict[str, Any]) -> bool:
    # gloo begins what is issued; NCCL what the device has come to, which its start events tell.
    return entry["state"] == "started" or entry["profiling_name"].startswith("gloo:")
