"""The export of a finished run to --final-model-dir: checked before training, written after it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from argonne.config.options import RunConfig
from argonne.config.presets import PRESETS
from argonne.config.run_options import NO_CHECKPOINT
from argonne.errors import ConfigError, DeviceError
from argonne.files import OutputFolder
from argonne.ranks.agree import on_rank_0
from argonne.ranks.world import World
from argonne.run.control import RunControl
from argonne.run.report import RunReport
from checkpointing import check_export_folder, export_hf, verify_checkpoint

FLAG = "--final-model-dir"


def _other_folders(config: RunConfig) -> Iterator[tuple[str, Path]]:
    """Flag -> folder of what the run reads and writes; an export replaces its own folder whole."""
    output = OutputFolder(Path(config.output.output_dir))
    for folder in (output.root, output.pretrained, output.stats, output.cache):
        yield "--output-dir", folder
    data, checkpoint = config.data, config.checkpoint
    named = {
        "--data-cache-dir": data.data_cache_dir,
        "--tokenizer-path": data.tokenizer_path,
        "--checkpoint-path": checkpoint.checkpoint_path,
        "--model-config": config.model.model_config,
    }
    for flag, name in named.items():
        if name is not None and name not in (*PRESETS, NO_CHECKPOINT):
            yield flag, Path(name).expanduser()


def _is_or_holds(folder: Path, other: Path) -> bool:
    return folder == other or folder in other.parents


def check_final_model_dir(config: RunConfig) -> None:
    """Refuse, before anything is trained, a folder that the export could not take at the end (rank 0).

    Raises:
        ConfigError: it is a file, holds what is no export, or is or holds another folder of the run.
        DeviceError: it cannot be written.
    """
    if config.output.final_model_dir is None:
        return
    target = Path(config.output.final_model_dir)
    try:
        resolved = target.resolve()
        for flag, other in _other_folders(config):
            if other.exists() and _is_or_holds(resolved, other.resolve()):
                raise ConfigError(
                    f"{FLAG} {target} is or holds {other} ({flag}), which the export would replace: name a "
                    f"folder of its own"
                )
        check_export_folder(target, FLAG)
        # The export is written beside its folder and renamed.
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}."):
            pass
    except OSError as error:
        raise DeviceError(
            f"{FLAG} {target} cannot be made or written ({error.strerror}): choose another folder, or free it"
        ) from error


def export_if_asked(
    config: RunConfig,
    checkpoint: Path | None,
    settings: Mapping[str, Any],
    world: World,
    control: RunControl,
    report: RunReport,
) -> None:
    """Export the finished run's last checkpoint to --final-model-dir; on rank 0, the others wait."""
    target = config.output.final_model_dir
    if target is None or checkpoint is None:
        return

    def export() -> None:
        export_hf(
            verify_checkpoint(checkpoint),
            dict(settings),
            config.data.tokenizer_path,
            Path(target),
            trust_remote_code=config.data.trust_remote_code,
            flag=FLAG,
        )

    with control.phase("export"):
        on_rank_0(export, world)
    report.info(f"Exported the model to {target}")
