"""Find the files that --data-glob names: patterns, files and folders, each file once and in natural order."""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argonne.data.flat_tokens import FLAT_SUFFIX
from argonne.data.remote import RemotePath, ShardPath, find_remote, is_url
from argonne.errors import DataError

SHARD_SUFFIXES = (".parquet", ".arrow", FLAT_SUFFIX)
RAW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".txt", ".md", ".jsonl.gz", ".jsonl.zst", ".csv")
"""What scripts/prepare_data.py is for."""
SYSTEM_NAMES = {
    *("_SUCCESS", "_metadata", "_common_metadata", "_temporary", "_delta_log", "__MACOSX", "lost+found"),
    *("Thumbs.db", "desktop.ini"),
}
DATASETS_CACHE = re.compile(r"cache-[0-9a-f]{16}(_\d+_of_\d+)?\.arrow|tmp\w+\.arrow")
"""What `datasets` keeps of a map or filter beside the data itself."""


@dataclass(frozen=True)
class Found:
    """A file, and its name that survives moving the folder and adding others."""

    path: ShardPath
    name: str
    """Its path below the fixed part of the pattern that found it."""


def natural_key(path: str | ShardPath) -> tuple[Any, ...]:
    """Sort key: base name with digits as numbers and letters without case, ties by full path."""
    parts = re.split(r"(\d+)", Path(path).name.lower())
    # re.split alternates text and digits, so equal places hold equal types
    return tuple(int(part) if index % 2 else part for index, part in enumerate(parts)), str(path)


def shown(path: str | ShardPath) -> str:
    """A path for people, JSON and checkpoints: bytes that are not UTF-8 and control characters escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def as_globs(data_glob: str | Sequence[str]) -> tuple[str, ...]:
    """--data-glob as given: once, as a string, or several times."""
    return (data_glob,) if isinstance(data_glob, str) else tuple(data_glob)


def is_system_name(name: str) -> bool:
    """Whether a file or folder of this name belongs to a system, not to the data."""
    return name.startswith((".", "_started_", "_committed_")) or name.endswith(".crc") or name in SYSTEM_NAMES


def find_shards(data_glob: str | Sequence[str], remote_cache: Path | None = None) -> list[Found]:
    """The files of patterns, files, folders and URLs, in natural order; DataError where one of them has none.

    A path that exists is taken literally, whatever characters it has. A file that is reached twice (through
    links, or by two patterns) counts once. A folder that `datasets` saved holds what its state.json says.
    ``remote_cache``: folder that keeps what is read of remote shards.
    """
    by_real_path: dict[str, Found] = {}
    names: set[str] = set()
    for pattern in as_globs(data_glob):
        matches = _at_url(pattern, remote_cache) if _is_remote(pattern) else _matches(pattern)
        for found in sorted(matches, key=lambda found: (is_linked(found.path), str(found.path), found.name)):
            real = os.path.realpath(found.path) if isinstance(found.path, Path) else str(found.path)
            if real not in by_real_path:
                name = _unused_name(found, names)
                names.add(name)
                by_real_path[real] = Found(found.path, name)
    return sorted(by_real_path.values(), key=lambda found: natural_key(found.path))


def is_linked(path: ShardPath) -> bool:
    """Whether the path leads over a link (the same file may be there without)."""
    return isinstance(path, Path) and os.path.realpath(path) != os.path.abspath(path)


def _unused_name(found: Found, names: set[str]) -> str:
    """The name, with as many folders before it as tell it from the files found before."""
    if isinstance(found.path, RemotePath):
        return str(found.path) if found.name in names else found.name
    name, folders = found.name, list(found.path.absolute().parts)
    depth = len(Path(found.name).parts)
    while name in names and depth < len(folders):
        depth += 1
        name = shown(Path(*folders[-depth:]))
    return name


def _matches(pattern: str) -> list[Found]:
    given = pattern if os.path.lexists(pattern) else os.path.expanduser(pattern)
    fixed, parts = _split(given)
    if not parts and os.path.isdir(fixed):
        found = _in_folder(Path(fixed))
        start = fixed
    elif not parts:
        found, start = [fixed], os.path.dirname(fixed)
    else:
        paths = [path for path in _expanded(fixed, parts) if os.path.isfile(path) or not os.path.exists(path)]
        found, start = [path for path in paths if not _is_cache(path)], fixed
    if not found:
        raise DataError(_nothing(pattern, given, fixed, bool(parts)))
    return [Found(Path(path), shown(os.path.relpath(path, start or "."))) for path in found]


def _is_remote(pattern: str) -> bool:
    """Whether a pattern is a URL; DataError for one of a local file."""
    if not is_url(pattern) or os.path.lexists(pattern):
        return False
    if pattern.startswith("file://"):
        raise DataError(f"{pattern!r} (--data-glob) is a URL of local files: give the path alone")
    return True


def _at_url(pattern: str, remote_cache: Path | None) -> list[Found]:
    found = find_remote(pattern, remote_cache)
    if not found:
        raise DataError(f"no shard matches {pattern} (--data-glob): give a URL that matches files")
    fixed = _one_form(re.split(r"[*?\[]", pattern)[0].rpartition("/")[0] + "/")
    named = [(path, _one_form(str(path)).removeprefix(fixed).partition("?")[0]) for path in found]
    return [Found(path, name or path.name) for path, name in named]


def _one_form(url: str) -> str:
    """The URL with two slashes before its host or folder; fsspec's memory answers with three."""
    return re.sub(r"://+", "://", url)


def _split(pattern: str) -> tuple[str, list[str]]:
    """(the part that exists as it is written, the components after it that are a pattern)."""
    if os.path.lexists(pattern):
        return pattern, []
    parts = [part for part in pattern.split("/") if part]
    fixed = "/" if pattern.startswith("/") else ""
    while parts and (os.path.lexists(os.path.join(fixed, parts[0])) or not glob.has_magic(parts[0])):
        if not os.path.lexists(os.path.join(fixed, parts[0])):
            break
        fixed = os.path.join(fixed, parts.pop(0))
    return fixed, parts


def _entries(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder or "."))
    except NotADirectoryError:
        return []
    except OSError as error:
        raise DataError(
            f"cannot read the folder {shown(folder or '.')}: {error.strerror} (--data-glob)"
        ) from error


def _expanded(folder: str, parts: list[str]) -> Iterator[str]:
    """The paths below ``folder`` that match the components; system names are passed over."""
    part, rest = parts[0], parts[1:]
    if part == "**":
        for below in folders_below(folder):
            if rest:
                yield from _expanded(below, rest)
            else:
                yield from (os.path.join(below, name) for name in _entries(below) if not is_system_name(name))
        return
    if os.path.lexists(os.path.join(folder, part)):
        names = [part]
    else:
        wanted = re.compile(fnmatch.translate(part))
        names = [name for name in _entries(folder) if wanted.match(name) and not is_system_name(name)]
    for name in names:
        path = os.path.join(folder, name)
        if not rest:
            yield path
        elif os.path.isdir(path):
            yield from _expanded(path, rest)


def folders_below(folder: str) -> Iterator[str]:
    """``folder`` and all folders in it, links followed, each real folder once (so a loop ends)."""
    seen: set[str] = set()
    waiting = [folder]
    while waiting:
        linked: list[str] = []
        while waiting:  # what is reached without a link comes first and keeps its own name
            here = waiting.pop(0)
            real = os.path.realpath(here or ".")
            if real in seen:
                continue
            seen.add(real)
            yield here
            for name in _entries(here):
                path = os.path.join(here, name)
                if not is_system_name(name) and os.path.isdir(path):
                    (linked if os.path.islink(path) else waiting).append(path)
        waiting = linked


def _is_cache(path: str) -> bool:
    """Whether `datasets` made the file beside the data: by its name, or by the folder's state.json."""
    folder, name = os.path.split(path)
    if DATASETS_CACHE.fullmatch(name):
        return True
    listed = _dataset_files(folder)
    return listed is not None and name.endswith(".arrow") and name not in listed


def _dataset_files(folder: str) -> list[str] | None:
    """The data files of a folder that `datasets` saved, by its state.json; None where it is none."""
    try:
        with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
            state = json.load(file)
        if state.get("_indices_data_files"):
            raise DataError(
                f"{shown(folder)} is a selection of rows that `datasets` saved: save it again with "
                "flatten_indices()"
            )
        return [str(entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _in_folder(folder: Path) -> list[str]:
    names = _dataset_files(str(folder))
    if names is None:
        names = [
            name
            for name in _entries(str(folder))
            if name.endswith(SHARD_SUFFIXES)
            and not is_system_name(name)
            and not DATASETS_CACHE.fullmatch(name)
            and not (folder / name).is_dir()
        ]
    return [os.path.join(folder, name) for name in names]


def _nothing(pattern: str, given: str, fixed: str, is_pattern: bool) -> str:
    """The message where a pattern finds no file, with the pattern that would where there is one."""
    message = f"no shard matches {shown(os.path.abspath(given))!r} (--data-glob)"
    folders = [fixed]
    if is_pattern:
        folders = [path for path in _expanded(fixed, _split(given)[1]) if os.path.isdir(path)]
    start = given.rstrip("/") if is_pattern else glob.escape(given.rstrip("/"))
    if splits := [split for folder in folders for split in _splits(folder)]:
        return f"{message}: it holds splits that `datasets` saved: give {shown(splits[0])!r} or another"
    for below in (below for folder in folders for below in folders_below(folder)):
        if names := _in_folder(Path(below)):
            suffix = os.path.splitext(names[0])[1]
            return f"{message}: the shards lie in folders below: give {f'{shown(start)}/**/*{suffix}'!r}"
    if any(name.endswith(RAW_SUFFIXES) for folder in folders for name in _entries(folder)):
        return f"{message}: make parquet of its text files with scripts/prepare_data.py"
    if "{" in pattern:
        return f"{message}: braces are no pattern here; give --data-glob once for each of them"
    return f"{message}: give a pattern that matches parquet files"


def _splits(folder: str) -> list[str]:
    """The folders of the splits in a folder that `datasets` saved as a dictionary."""
    if not os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        return []
    paths = [os.path.join(folder, name) for name in _entries(folder)]
    return [path for path in paths if _dataset_files(path) is not None]
