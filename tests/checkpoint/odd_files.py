"""Checkpoint files that no one should trust: zip files around a pickle, and one flipped bit."""

import zipfile
from pathlib import Path

import torch

from argonne.checkpoint.safe_pickle import StorageRef, TensorRef, dump_tree


def zip_around(path: Path, data: bytes, records: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in (records or {}).items():
            archive.writestr(name, content)
    return path


def sample_tree(key: str = "0", numel: int = 4) -> bytes:
    ref = TensorRef(StorageRef(key, torch.float32, numel), 0, (numel,), (1,))
    return dump_tree({"model_state_dict": {"embed_tokens.weight": ref}})


def damage(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
