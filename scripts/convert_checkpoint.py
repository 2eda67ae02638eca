"""Convert a checkpoint between this suite and the pipeline scripts, and join checkpoints cut into parts.

    convert_checkpoint.py --checkpoint-path IN --output OUT --to tensor-parallel [--model-config C]
    convert_checkpoint.py --checkpoint-path IN --output OUT --to pipeline [--dtype bf16]

IN is a file, one of its parts (``..._stage_K_of_N.pth``, ``..._rank_K_of_N.pth``) or a folder of parts; of a
folder of checkpoints the newest is taken. OUT is the new file or a folder for it. Weights, optimizer state,
step, tokens and position go along; a few megabytes are in memory at a time.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.errors import ConfigError
from argonne.tools.script import OneLineParser, run_script

FORMS = ("tensor-parallel", "pipeline")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser("Convert or join checkpoints, streaming.")
    parser.add_argument(
        "--checkpoint-path",
        required=True,
        help="file, one of its parts, or a folder of either (the newest checkpoint)",
    )
    parser.add_argument("--output", required=True, help="new file, or folder for it")
    parser.add_argument("--to", required=True, choices=FORMS, help="what the new file is for")
    parser.add_argument(
        "--model-config",
        help="preset or config.json that gives what a checkpoint without model_config does not show: head "
        "counts (else argonne-2.0's) and, where it has norms on heads, the family's other switches",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="weights in a pipeline file"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser.parse_args(arguments)


def convert(options: argparse.Namespace) -> str:
    """Write the new file; returns what it is. Raises ConfigError for an output that is there already."""
    from inspect_checkpoint import newest_in

    from argonne.checkpoint.convert import write_converted
    from argonne.checkpoint.verifier import verify_checkpoint
    from argonne.tp.precision import DTYPES
    from argonne.training.model_config import resolve_model_config
    from checkpointing import checkpoint_path, require_safe_torch

    require_safe_torch()
    reader = verify_checkpoint(newest_in(Path(options.checkpoint_path)))
    config = resolve_model_config(reader, options.model_config)
    output = Path(options.output)
    ours = options.to == FORMS[0]
    if output.suffix != ".pth":
        pipeline_path = output / f"streaming_checkpoint_step_{reader.step}.pth"
        output = checkpoint_path(output, reader.step) if ours else pipeline_path
    if output.exists() and not options.overwrite:
        raise ConfigError(f"--output {output} exists: name another file or pass --overwrite")
    if ours and options.dtype != "fp32":
        raise ConfigError(f"--dtype {options.dtype} is for --to pipeline: this suite keeps float32")
    size = write_converted(reader, output, model_config=config if ours else None, dtype=DTYPES[options.dtype])
    state = "with optimizer state" if reader.adam else f"without optimizer state ({reader.adam_note})"
    lines = [f"warning: {warning}" for warning in reader.warnings]
    lines.append(f"{output}: step {reader.step}, {size:,} bytes, {state}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run_script(lambda: print(convert(options)))


if __name__ == "__main__":
    sys.exit(main())
