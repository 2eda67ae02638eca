"""Export a checkpoint by its path: choose, resolve the configuration, write the folder."""

from __future__ import annotations

from pathlib import Path

from argonne.errors import ConfigError


def export_checkpoint(
    checkpoint_path: str,
    tokenizer_path: str,
    output_dir: Path,
    *,
    model_config: str | None = None,
    dtype: str | None = None,
    form: str = "argonne",
    trust_remote_code: bool = False,
) -> str:
    """Write the folder; returns warnings and what it is, a line each. Raises ConfigError, CheckpointError.

    ``dtype`` is bf16, fp32 or fp16 (None: what the run trained in), ``form`` argonne or llama.
    """
    from argonne.checkpoint.export_hf import export_hf, quiet_transformers, trained_dtype
    from argonne.tp.precision import DTYPES
    from argonne.training.model_config import resolve_model_config
    from checkpointing import choose_checkpoint, require_safe_torch

    require_safe_torch()
    choice = choose_checkpoint(checkpoint_path, Path())
    reader = choice.reader
    if reader is None:
        raise ConfigError("--checkpoint-path NONE has nothing to export: name a checkpoint")
    weights_dtype = DTYPES[dtype] if dtype else trained_dtype(reader)
    with quiet_transformers():
        folder = export_hf(
            reader,
            resolve_model_config(reader, model_config),
            tokenizer_path,
            output_dir,
            dtype=weights_dtype,
            form=form,
            trust_remote_code=trust_remote_code,
        )
    lines = [f"warning: {warning}" for warning in (*choice.warnings, *reader.warnings)]
    lines.append(f"{folder}: step {reader.step} of {reader.path}, as {form}, {weights_dtype}")
    return "\n".join(lines)
