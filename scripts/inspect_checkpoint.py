"""Say what a checkpoint is: kind, shape, step, tokens, position, head, optimizer state, health.

    python scripts/inspect_checkpoint.py PATH [--model-config C] [--quick] [--json]

PATH is a file of this suite or of a pipeline script (zip or legacy), one of several parts, a folder of parts,
or a folder of checkpoints, of which the newest is looked at.
Exit code 0 for a healthy checkpoint, 1 otherwise.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.tools.script import OneLineParser, run_script


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser("Say what a checkpoint is and whether it is whole.")
    parser.add_argument("path", help="a checkpoint file, one of its parts, or a folder of either")
    parser.add_argument(
        "--model-config", help="preset or config.json that gives the head counts a file may lack"
    )
    parser.add_argument("--quick", action="store_true", help="read the header only, not the tensors")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def newest_in(path: Path) -> Path:
    """Of a folder of checkpoints the newest (or one of its parts); what else there is as it is."""
    from checkpointing import find_checkpoints

    found = find_checkpoints(path) if path.is_dir() else []
    return found[0][1] if found else path


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """All that the file says, and its health."""
    from argonne.checkpoint.parts import open_any
    from argonne.checkpoint.shape import infer_shape
    from checkpointing import require_safe_torch

    require_safe_torch()
    reader = open_any(newest_in(Path(options.path)))
    shape = infer_shape({name: reader.shape(name) for name in reader.model})
    first = reader.files[0]
    told: dict[str, Any] = {
        "path": str(reader.path),
        "kind": reader.kind,
        "files": [file.path.name for file in reader.files],
        "bytes": reader.size,
        "serialization": first.serialization,
        "proof": _proof(first.sealed, first.has_checksums),
        "global_step": reader.metadata.get("global_step"),
        "tokens_processed": reader.metadata.get("tokens_processed"),
        "loss": reader.metadata.get("loss"),
        "shape": shape,
        "parameters": sum(math.prod(reader.shape(name)) for name in reader.names),
        "weights_dtype": sorted({str(source.dtype) for source in reader.model.values()}),
        "head": "tied to the embedding" if reader.tied else "untied",
        "model_config": reader.metadata.get("model_config"),
        "optimizer_state": "present" if reader.adam else f"absent: {reader.adam_note}",
        "data_position": reader.metadata.get("data_position"),
        "scheduler": reader.metadata.get("scheduler_state_dict"),
        "warnings": list(reader.warnings) + _slice_warning(shape, reader.metadata, options.model_config),
    }
    told["health"] = "not checked (--quick)" if options.quick else _health(reader)
    return told


def _proof(sealed: bool, has_checksums: bool) -> str:
    if sealed:
        return "SHA-256 and checksums: every byte"
    return "checksums of the tensors" if has_checksums else "none in the file: only sizes can be checked"


def _slice_warning(shape: dict[str, Any], metadata: dict[str, Any], model_config: str | None) -> list[str]:
    from argonne.checkpoint.shape import sliced_over
    from argonne.config.presets import load_model_settings

    heads = metadata.get("model_config") or (load_model_settings(model_config) if model_config else {})
    hidden, query = shape["hidden_size"], shape["query_size"]
    ranks = sliced_over(hidden, query, heads) if heads else (hidden // query if hidden % query == 0 else 1)
    if ranks == 1:
        return []
    doubt = "" if heads else " (unless its configuration names a head_dim)"
    return [f"holds the slices of one of {ranks} tensor-parallel ranks{doubt}"]


def _health(reader: Any) -> str:
    """Verify the bytes, then look for values that are not finite."""
    from argonne.checkpoint.contents import TensorEntry
    from argonne.checkpoint.convert import row_parts
    from argonne.checkpoint.finite import require_finite
    from argonne.checkpoint.verifier import verify_file

    for file in reader.files:
        verify_file(file.path, file.serialization)
    for name in reader.names:
        for key in ("param", *(("exp_avg", "exp_avg_sq") if reader.adam else ())):
            source = reader.source(name, key)
            for chunk in row_parts(source, source.dtype):
                require_finite(chunk, TensorEntry(name, key, source.shape).label)
    return "whole; all values finite"


def _print(told: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(told, default=str))
        return
    for key, value in told.items():
        if isinstance(value, dict):
            value = ", ".join(f"{inner} {item}" for inner, item in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        elif type(value) is int:
            value = f"{value:,}"
        print(f"{key.replace('_', ' '):18}{value}")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run_script(lambda: _print(describe(options), as_json=options.json))


if __name__ == "__main__":
    sys.exit(main())
