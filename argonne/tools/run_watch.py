"""A running job as text, from its files alone: state, progress, loss, throughput, validations."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from argonne.tools.run_history import RunHistory, read_history, smoothed, sparkline

SILENT_SECONDS = 60.0
"""Older heartbeats than this are worth a remark; a run writes one every few seconds."""
_RECENT = 200
"""Steps over which rates are averaged."""


def view(folder: Path, *, width: int = 80, plain: bool = False, now: float | None = None) -> list[str]:
    """The lines to show of the run in ``folder``. Raises DataError where it has recorded nothing yet."""
    run = read_history(folder)
    lines = [_state_line(run, time.time() if now is None else now), _progress_line(run)]
    losses = [float(record["loss"]) for record in run.steps if record.get("loss") is not None]
    line = sparkline(losses, max(10, width - 20), plain=plain)
    lines.append(f"loss {losses[0]:.2f} {line} {smoothed(losses)[-1]:.3f}")
    last = run.steps[-1]
    for name, loss in (last.get("loss_by_source") or {}).items():
        if loss is not None:
            lines.append(f"  {name}: {loss:.3f}")
    for name in run.sets():
        newest = [entry for entry in run.validations if entry["name"] == name][-1]
        bits = newest.get("bits_per_byte")
        rest = "" if bits is None else f", {bits:.3f} bits per byte"
        lines.append(f"validation {name}: {newest['loss']:.3f} nats per token{rest} (step {newest['step']})")
    lines.append(
        f"lr {last.get('lr', 0):.2e} | gradient norm {last.get('grad_norm') or float('nan'):.3f} | "
        f"memory {(last.get('peak_memory_bytes') or 0) / 2**30:.1f} GiB"
    )
    skipped = sum(bool(record.get("skipped")) for record in run.steps)
    if skipped:
        lines.append(f"skipped steps: {skipped}")
    if run.status.get("checkpoint"):
        lines.append(f"checkpoint: {run.status['checkpoint']}")
    return [entry[:width] if entry.startswith("loss ") else entry for entry in lines]


def _state_line(run: RunHistory, now: float) -> str:
    status = run.status
    state = str(status.get("state", "unknown (no run_status.json)"))
    where = f" on {status['host']} (pid {status.get('pid')})" if status.get("host") else ""
    reason = f": {status['reason']}" if status.get("reason") else ""
    silent = _age(status, now) if state == "running" else None
    remark = ""
    if silent is not None and silent > SILENT_SECONDS:
        remark = f", no heartbeat for {_duration(silent)}: that process or its host may be gone"
    return f"{run.name}: {state}{where}{reason}{remark}"


def _age(status: Mapping[str, Any], now: float) -> float | None:
    try:
        return now - datetime.strptime(str(status.get("heartbeat")), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return None


def _progress_line(run: RunHistory) -> str:
    last, recent = run.steps[-1], run.steps[-_RECENT:]
    seconds = sum(float(record.get("step_seconds") or 0.0) for record in recent) / len(recent)
    total = run.status.get("total_steps")
    parts = [f"step {last['step']:,}" + (f" of {total:,}" if isinstance(total, int) else "")]
    if last.get("stage"):
        parts[0] += f" (stage {last['stage']})"
    parts.append(f"{last.get('tokens_processed') or 0:,} tokens")
    rates = [float(record["tokens_per_second"]) for record in recent if record.get("tokens_per_second")]
    if rates:
        parts.append(f"{sum(rates) / len(rates):,.0f} tokens/s")
    if last.get("mfu") is not None:
        parts.append(f"MFU {last['mfu']:.1%}")
    if isinstance(total, int) and total > last["step"]:
        parts.append(f"{_duration((total - last['step']) * seconds)} to go")
    return " | ".join(parts)


def _duration(seconds: float) -> str:
    """``3d 04h``, ``5h 06m``, ``7m 08s`` or ``9s``."""
    whole = round(seconds)
    for name, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{name} {whole % size // part:02d}{below}"
    return f"{whole}s"
