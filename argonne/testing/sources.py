"""The options of a small source, for tests and benchmarks."""

from pathlib import Path
from typing import Any

from argonne.data.source import SourceOptions


def source_options(data_glob: str | Path | tuple[str, ...], **changes: Any) -> SourceOptions:
    """Blocks of 8 tokens, 2 samples a step, one tokenizing worker, no cache, switches as a run has them."""
    usual: dict[str, Any] = {
        "block_size": 8,
        "samples_per_step": 2,
        "text_column": "text",
        "streaming": True,
        "packing": True,
        "seed": 0,
        "num_proc": 1,
        "trust_remote_code": False,
        "skip_bad_shards": False,
        "allow_data_change": False,
        "cache_dir": None,
    }
    return SourceOptions(
        data_glob=data_glob if isinstance(data_glob, tuple) else str(data_glob), **usual | changes
    )
