#!/usr/bin/env python3
"""Evaluate a checkpoint or an exported folder with lm-eval (`pip install -e ".[eval]"`).

    scripts/evaluate.py --checkpoint-path RUN/pretrained --tokenizer-path TOKENIZER --text "held/*.parquet"
    scripts/evaluate.py --checkpoint-path EXPORT --tasks arc_easy,hellaswag --output results.json

--text makes two tasks that need no network: held_out_text (bits per byte, perplexity) and
held_out_continuation (which of four continuations is the document's own). --tasks names lm-eval's own, which
it downloads. A checkpoint is exported to a temporary folder first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.errors import ConfigError, DataError
from argonne.files import json_safe
from argonne.ranks.gpu_environment import set_gpu_environment
from argonne.tools.checkpoint_export import export_checkpoint
from argonne.tools.script import OneLineParser, run_script


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--checkpoint-path", required=True, help="checkpoint file, folder of checkpoints, or exported folder"
    )
    parser.add_argument("--tokenizer-path", help="tokenizer folder (an export brings its own)")
    parser.add_argument("--model-config", help="preset or config.json, where the checkpoint has none")
    parser.add_argument("--text", metavar="GLOB", help="held-out parquet, JSON-lines or text files")
    parser.add_argument("--text-column", default="text", help="column or key of the text (%(default)s)")
    parser.add_argument("--documents", type=int, default=256, help="of --text, at most (%(default)s)")
    parser.add_argument("--tasks", metavar="NAMES", help="tasks of lm-eval, with commas between")
    parser.add_argument("--num-fewshot", type=int, help="examples before each question (the task's own)")
    parser.add_argument("--limit", type=int, help="documents of each task, at most (all)")
    parser.add_argument("--batch-size", default="1", help='sequences, or "auto" (%(default)s)')
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (a GPU where there is one)")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (what the run trained in)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the results as JSON")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let tokenizer and folder run their code"
    )
    return parser


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError with every problem of the flags."""
    problems = []
    if not options.tasks and not options.text:
        problems.append("nothing to evaluate: give --text GLOB, --tasks NAMES or both")
    for name in ("documents", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value}: must be at least 1")
    if options.batch_size != "auto" and not (options.batch_size.isdecimal() and int(options.batch_size) > 0):
        problems.append(f'--batch-size {options.batch_size}: give a number above 0, or "auto"')
    if options.tokenizer_path is None and not is_folder(options):
        problems.append("--tokenizer-path is required: give the folder of the model's tokenizer")
    if problems:
        raise ConfigError("; ".join(problems))


def is_folder(options: argparse.Namespace) -> bool:
    """Whether --checkpoint-path is an exported folder (or another of weights)."""
    path = Path(options.checkpoint_path).expanduser()
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def exported_folder(options: argparse.Namespace, target: Path) -> Path:
    """The folder itself, or the checkpoint exported to ``target``."""
    if is_folder(options):
        return Path(options.checkpoint_path).expanduser()
    told = export_checkpoint(
        options.checkpoint_path,
        options.tokenizer_path,
        target,
        model_config=options.model_config,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
    )
    print(told, file=sys.stderr)
    return target


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Task -> metric -> value. Raises ConfigError, CheckpointError, DataError."""
    # lm-eval imports a package named evaluate: this file's folder must not stand before it.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    try:
        import lm_eval
    except ImportError as error:
        raise ConfigError(
            f'lm-eval is not there ({error}): pip install -e ".[eval]", or pip install lm-eval'
        ) from error
    from lm_eval.tasks import TaskManager

    import model  # noqa: F401  (registers argonne2, so that an export's own code need not run)
    from argonne.tools.held_out_tasks import held_out_tasks, read_documents
    from argonne.tp.precision import DTYPES

    tasks: list[Any] = [name.strip() for name in (options.tasks or "").split(",") if name.strip()]
    manager = TaskManager(include_defaults=bool(tasks))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(f"--tasks: lm-eval does not know {', '.join(unknown)}: see `lm-eval ls tasks`")
    if options.text:
        tasks += held_out_tasks(read_documents(options.text, options.text_column, options.documents))
    with tempfile.TemporaryDirectory(prefix="evaluate_") as temporary:
        folder = exported_folder(options, Path(temporary) / "export")
        arguments = {
            "pretrained": str(folder),
            "tokenizer": options.tokenizer_path or str(folder),
            "dtype": DTYPES[options.dtype] if options.dtype else "auto",
            "trust_remote_code": options.trust_remote_code,
        }
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args=arguments,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            batch_size=options.batch_size,
            device=options.device,
            limit=options.limit,
            log_samples=False,
            bootstrap_iters=0,
        )
    if results is None:
        raise DataError("lm-eval returned no results: run it on one process")
    return {task: dict(values) for task, values in results["results"].items()}


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)

    def work() -> None:
        check(options)
        set_gpu_environment(os.environ, one_queue=False)
        results = evaluate(options)
        for task, values in results.items():
            for metric, value in values.items():
                if isinstance(value, int | float) and "stderr" not in metric:
                    print(f"{task:28}{metric.split(',')[0]:20}{value:.4f}")
        if options.output is not None:
            try:
                options.output.write_text(json.dumps(json_safe(results), indent=2) + "\n", encoding="utf-8")
            except OSError as error:
                raise DataError(f"--output {options.output} cannot be written: {error.strerror}") from error

    return run_script(work)


if __name__ == "__main__":
    sys.exit(main())
