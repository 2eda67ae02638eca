"""What a checkpoint's data says to today's sources: whose place is whose, and what has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from argonne.data.mixture import MixtureProgress, shares, sum_counts
from argonne.data.shards import Shard, manifest_difference, renamed
from argonne.data.source import NO_HASH, DataProgress, MixPart
from argonne.errors import DataError

Saved = Mapping[str, Any]
"""A source in a checkpoint: ``position``, and where its ``data_state`` was kept too ``samples``, ``tokens``,
``counts`` and ``manifest``."""


@dataclass(kw_only=True)
class MixturePlan:
    """Where the sources of a mixture begin."""

    known: dict[str, Saved] = field(default_factory=dict)
    """The saved places of today's sources; the others begin at their start."""
    taken: dict[str, int] = field(default_factory=dict)
    """Samples of each source since the mixture began."""
    past: dict[str, Saved] = field(default_factory=dict)
    """The saved places of sources that are not in today's mixture."""
    notices: list[str] = field(default_factory=list)


def plan_mixture(
    parts: Sequence[MixPart],
    corpora: Mapping[str, list[Shard]],
    position: Mapping[str, Any] | None,
    state: Mapping[str, Any] | None,
    allow_data_change: bool,
) -> MixturePlan:
    """Give each source its saved place by its name. DataError where one was renamed or none is known."""
    plan = MixturePlan(taken={part.name: 0 for part in parts})
    if position is None:
        return plan
    if "mixture" not in position:
        _from_one_source(plan, corpora, position, state, allow_data_change)
        return plan
    every = saved_sources(position, state)
    _settle_renamed(plan, every, list(position["sources"]), corpora, allow_data_change)
    plan.known = {name: every[name] for name in corpora if name in every}
    plan.past = {name: saved for name, saved in every.items() if name not in corpora}
    before, now = position["mixture"]["weights"], {part.name: part.weight for part in parts}
    if list(shares(before).items()) == list(shares(now).items()):
        plan.taken = {name: int(position["sources"][name]["samples"]) for name in now}
    else:
        plan.notices.append(_changed(before, now, plan.known))
    return plan


def saved_sources(position: Mapping[str, Any], state: Mapping[str, Any] | None) -> dict[str, Saved]:
    """Every source that a checkpoint of a mixture knows."""
    state = state or {}
    states = state.get("sources", {})
    here = {name: {"position": place, **states.get(name, {})} for name, place in position["sources"].items()}
    return {**state.get("past_sources", {}), **here}


def _is_of(saved: Saved, shards: Sequence[Shard]) -> bool:
    """Whether the shards are those of a saved source, whatever the pattern names them by."""
    return not manifest_difference(renamed(saved["manifest"], shards), shards)


def _settle_renamed(
    plan: MixturePlan,
    every: dict[str, Saved],
    was: Sequence[str],
    corpora: Mapping[str, list[Shard]],
    allow_data_change: bool,
) -> None:
    """A new name with the shards of one that is gone: the same source, which must not begin anew unseen."""
    for old in [name for name in was if name not in corpora and "manifest" in every[name]]:
        for new, shards in corpora.items():
            if new in every or not _is_of(every[old], shards):
                continue
            renamed = f"the source {old!r} is gone, and {new!r} has its shards"
            if not allow_data_change:
                raise DataError(
                    f"{renamed} (--data-mix): name it {old!r} again, or --allow-data-change to go on with "
                    "its place under the new name"
                )
            every[new] = every.pop(old)
            plan.notices.append(f"{renamed}: it goes on at the place of {old!r}")
            break


def _changed(before: Mapping[str, str], now: Mapping[str, str], known: Mapping[str, Saved]) -> str:
    new = [name for name in now if name not in known]
    text = f"the mixture was {weights_text(before)}, is {weights_text(now)}: the sources keep their places"
    begun = f" ({', '.join(new)} from the start)" if new else ""
    return f"{text}{begun}, the shares count from here on"


def weights_text(weights: Mapping[str, str]) -> str:
    """``web=0.7 code=0.3``"""
    return " ".join(f"{name}={weight}" for name, weight in weights.items())


def _from_one_source(
    plan: MixturePlan,
    corpora: Mapping[str, list[Shard]],
    position: Mapping[str, Any],
    state: Mapping[str, Any] | None,
    allow_data_change: bool,
) -> None:
    """A checkpoint without a mixture: its place goes to the source that has its shards."""
    if state is None:
        plan.notices.append(
            "the checkpoint's data position belongs to no source of the mixture: all begin at their start"
        )
        return
    if "manifest" in state:
        for name, shards in corpora.items():
            if _is_of(state, shards):
                tokens = int(state["samples"]) * int(state["block_size"])
                keys = ("samples", "counts", "manifest")
                saved = {"position": position, "tokens": tokens, **{key: state[key] for key in keys}}
                plan.known[name] = saved
                plan.notices.append(f"the checkpoint is of one source: {name!r} has its shards and its place")
                return
    message = "no source of the mixture has the checkpoint's shards"
    if not allow_data_change:
        raise DataError(
            f"{message} (--data-mix): give them to one of the sources, or --allow-data-change to begin all "
            "sources at their start"
        )
    plan.notices.append(f"{message}: all sources begin at their start")


def source_state(
    name: str, plan: MixturePlan, state: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any] | None, dict[str, Any] | None]:
    """(position, state) with which one source of the mixture resumes, as if it were alone; None: anew."""
    saved = plan.known.get(name)
    if saved is None:
        return None, None
    if state is None or "manifest" not in saved:
        return saved["position"], None
    skipped = [
        {key: value for key, value in skip.items() if key != "source"}
        for skip in state["skipped"]
        if skip.get("source", name) == name
    ]
    return saved["position"], {**state, **saved, "stream_hash": NO_HASH, "skipped": skipped}


def mixture_start(
    weights: Mapping[str, str],
    sources: Mapping[str, DataProgress],
    plan: MixturePlan,
    state: Mapping[str, Any] | None,
) -> MixtureProgress:
    """The state of a mixture before its first step of this run."""
    state = state or {}
    alone = next(iter(plan.known), "")
    return MixtureProgress(
        position=next(iter(sources.values())).position,
        stream_hash=str(state.get("stream_hash", NO_HASH)),
        samples=int(state.get("samples", 0)),
        counts=sum_counts([progress.counts for progress in sources.values()], plan.past),
        skipped=tuple({"source": alone, **skip} for skip in state.get("skipped", ())),
        weights=dict(weights),
        sources=dict(sources),
        taken=dict(plan.taken),
        tokens={name: int(plan.known.get(name, {}).get("tokens", 0)) for name in sources},
        past=plan.past,
    )


def one_of_mixture(
    position: Mapping[str, Any],
    state: Mapping[str, Any] | None,
    shards: Sequence[Shard],
    allow_data_change: bool,
) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None, list[str]]:
    """(position, state, notices) for one source from a checkpoint of a mixture, by its shards."""
    for name, saved in saved_sources(position, state).items():
        if "manifest" in saved and _is_of(saved, shards):
            notice = f"the checkpoint is of a mixture: its source {name!r} goes on alone"
            return saved["position"], {**(state or {}), "manifest": saved["manifest"]}, [notice]
    names = ", ".join(position["sources"])
    message = f"the checkpoint is of a mixture ({names}), and --data-glob gives the shards of none of them"
    if not allow_data_change:
        raise DataError(f"{message}: give --data-mix, or --allow-data-change to begin the data at its start")
    return None, None, [f"{message}: the data begins at its start"]
