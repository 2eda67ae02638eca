"""Export a checkpoint as a Hugging Face folder that opens outside this repository.

    python scripts/export_hf.py --checkpoint-path CK [--model-config C] --tokenizer-path T --output-dir D
                                [--as llama] [--dtype bf16]

CK is a file (or one of its parts) or a folder, whose newest whole checkpoint is taken.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.tools.checkpoint_export import export_checkpoint
from argonne.tools.script import OneLineParser, run_script


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser("Export a checkpoint as a Hugging Face folder.")
    parser.add_argument("--checkpoint-path", required=True, help="checkpoint file, or folder of checkpoints")
    parser.add_argument(
        "--model-config",
        help="preset or config.json; needed where the checkpoint has no model_config (default argonne-2.0)",
    )
    parser.add_argument("--tokenizer-path", required=True, help="tokenizer folder to put beside the weights")
    parser.add_argument("--output-dir", required=True, help="the new folder")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32", "fp16"), help="of the weights (default: what the run trained in)"
    )
    parser.add_argument(
        "--as",
        dest="form",
        choices=("argonne", "llama"),
        default="argonne",
        help="llama: a folder that opens without custom code (LlamaForCausalLM, vLLM, llama.cpp), where the "
        "model has no switch that a Llama lacks (%(default)s)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="let the tokenizer run its own code")
    return parser.parse_args(arguments)


def export(options: argparse.Namespace) -> str:
    """Write the folder; returns what it is. Raises ConfigError, CheckpointError."""
    return export_checkpoint(
        options.checkpoint_path,
        options.tokenizer_path,
        Path(options.output_dir),
        model_config=options.model_config,
        dtype=options.dtype,
        form=options.form,
        trust_remote_code=options.trust_remote_code,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run_script(lambda: print(export(options)))


if __name__ == "__main__":
    sys.exit(main())
