"""A place in the token stream, and its form in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DataPosition:
    """Names the first input token of the next sample."""

    epoch: int = 0
    file_index: int = 0
    """Place of the shard in the natural order."""
    file_name: str = ""
    """The shard's name; "" where only the index is known (a pipeline checkpoint)."""
    row: int = 0
    """Row of the shard, skipped rows counted."""
    token_offset: int = 0
    """Token of the row's ids (EOS included); one past its end means the next row."""
    sample: int | None = None
    """Without streaming: samples of this epoch already taken; the other places then mean nothing."""
    block_size: int = 1

    @property
    def chunk(self) -> int:
        """The block of the row in which a pipeline script would go on."""
        return self.token_offset // self.block_size

    def describe(self) -> str:
        """The place in words."""
        if self.sample is not None:
            return f"sample {self.sample} of epoch {self.epoch}"
        return f"{self.file_name} row {self.row} token {self.token_offset}, epoch {self.epoch}"

    def to_dict(self, file_names: Sequence[str] = ()) -> dict[str, Any]:
        """Plain containers for a checkpoint, the pipeline scripts' keys beside ours."""
        return {
            "streaming": self.sample is None,
            "current_file_idx": self.file_index,
            "position_in_file": self.row,
            "chunk_offset": self.chunk,
            "current_position": self.sample or 0,
            "epoch": self.epoch,
            "files_processed": list(file_names[: self.file_index + 1]),
            "file_name": self.file_name,
            "row": self.row,
            "token_offset": self.token_offset,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], *, block_size: int, global_step: int) -> DataPosition:
        """Our own position or a pipeline checkpoint's (whose chunk, after the first step, was used)."""
        epoch = int(saved.get("epoch") or 0)
        file_index = int(saved.get("current_file_idx") or 0)
        if not saved.get("streaming", True):
            sample = int(saved.get("current_position") or 0)
            return cls(epoch=epoch, sample=sample, block_size=block_size)
        if "token_offset" in saved:
            return cls(
                epoch=epoch,
                file_index=file_index,
                file_name=str(saved["file_name"]),
                row=int(saved["row"]),
                token_offset=int(saved["token_offset"]),
                block_size=block_size,
            )
        chunk = int(saved.get("chunk_offset") or 0) + (1 if global_step > 0 else 0)
        row = int(saved.get("position_in_file") or 0)
        return cls(
            epoch=epoch,
            file_index=file_index,
            row=row,
            token_offset=chunk * block_size,
            block_size=block_size,
        )
