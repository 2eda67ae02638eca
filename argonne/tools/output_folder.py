"""The folder that prepare_data.py fills; nothing is deleted but what an earlier run wrote there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from argonne.errors import ConfigError, RunError
from argonne.files import read_json, synchronize, write_json

MANIFEST = "prepare_data.json"
"""What a run wrote into the folder: {"files": {name: {"bytes", "digest"}}}."""


def check_output(output: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """ConfigError where the folder cannot be filled, or --overwrite would delete what is the user's."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file (--output-dir): give a folder")
    if not output.is_dir() or not any(output.iterdir()):
        return
    real = output.resolve()
    held = [path for path in inputs if path.resolve().is_relative_to(real)]
    if held:
        raise ConfigError(f"{output} holds the input {held[0]} (--output-dir): give another folder")
    foreign = foreign_names(output)
    if foreign:
        named = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        reason = f"{output} holds what this script did not write ({named})"
        raise ConfigError(f"{reason}: give another --output-dir")
    if not overwrite:
        raise ConfigError(f"{output} is not empty (--output-dir): give another folder, or --overwrite")


def foreign_names(output: Path) -> list[str]:
    """Names in the folder that are not, unchanged, what its manifest says was written."""
    written = written_files(output)
    return sorted(
        path.name
        for path in output.iterdir()
        if path.name != MANIFEST and (path.name not in written or not is_as_written(path, written[path.name]))
    ) + ([MANIFEST] if not written and (output / MANIFEST).exists() else [])


def is_manifest(path: Path) -> bool:
    """Whether the file is the list that `prepare_data.py` leaves beside what it wrote."""
    return path.name == MANIFEST and "written_by" in (read_json(path) or {})


def written_files(output: Path) -> dict[str, dict[str, Any]]:
    """What an earlier run wrote into the folder, by its manifest; none where it has no manifest of ours."""
    manifest = read_json(output / MANIFEST) or {}
    files = manifest.get("files")
    return files if manifest.get("written_by") == "prepare_data.py" and isinstance(files, dict) else {}


def is_as_written(path: Path, entry: Any) -> bool:
    """Whether a file is still what the manifest says of it."""
    from argonne.data.formats import content_digest

    try:
        is_plain = path.is_file() and not path.is_symlink()
        return is_plain and entry == {"bytes": path.stat().st_size, "digest": content_digest(path)}
    except OSError:
        return False


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, whose files appear in ``output`` once all are whole; a failure leaves nothing of it.

    What an earlier run wrote in ``output`` is replaced. The folder itself, or a link to it, stays.
    Raises RunError, naming --output-dir, where it cannot be written.
    """
    partial: Path | None = None
    try:
        real = output.resolve()
        real.parent.mkdir(parents=True, exist_ok=True)
        existed = real.is_dir()
        # A name of its own: one ending in .partial could be the user's.
        partial = Path(tempfile.mkdtemp(prefix=f"{real.name}.partial-", dir=real if existed else real.parent))
        partial.chmod(0o777 & ~_umask())
        yield partial
        publish(partial, real)
    except OSError as error:
        reason = f"cannot write {output}: {error.strerror or error}"
        raise RunError(f"{reason}: free space or give another --output-dir") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, output: Path) -> None:
    """Give what was written in ``partial`` its place in ``output``, with a manifest; may raise OSError."""
    write_manifest(partial)
    synchronize(partial)
    if output.is_dir():
        move_into(partial, output)
    else:
        partial.rename(output)
    synchronize(output.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_manifest(folder: Path) -> None:
    """Say in the folder which files were written there; folders in it are not named."""
    from argonne.data.formats import content_digest

    files = {
        path.name: {"bytes": path.stat().st_size, "digest": content_digest(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    write_json(folder / MANIFEST, {"written_by": "prepare_data.py", "files": files})


def move_into(partial: Path, output: Path) -> None:
    """Replace what an earlier run wrote by the new files."""
    old = written_files(output)
    new = written_files(partial)
    # For a moment it owns the files of both runs: after a crash --overwrite still knows them as ours.
    write_json(output / MANIFEST, {"written_by": "prepare_data.py", "files": {**old, **new}})
    for name in old:
        (output / name).unlink(missing_ok=True)
    for path in partial.iterdir():
        if path.name != MANIFEST:
            path.rename(output / path.name)
    (partial / MANIFEST).rename(output / MANIFEST)
    synchronize(output)
