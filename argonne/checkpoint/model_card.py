"""The README.md of an export: what the checkpoint itself says of the model, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from argonne.checkpoint.reader import CheckpointReader

WRITTEN_BY = "Exported by scripts/export_hf.py"
"""In every card: an export may replace a folder whose card says so."""
_SHOWN_SHARDS = 3


def model_card(
    reader: CheckpointReader, config: Mapping[str, Any], *, architecture: str, dtype: torch.dtype
) -> str:
    """Markdown for the folder's README.md."""
    facts = {
        "Parameters": f"{sum(math.prod(reader.shape(name)) for name in reader.names):,}",
        "Weights in this folder": str(dtype).removeprefix("torch."),
        **_training_facts(reader.metadata),
        **_data_facts(reader.metadata),
    }
    argument, note = "", ""
    if architecture == "ArgonneModel":
        argument = ", trust_remote_code=True"
        note = "\nThe model's code is in this folder: `from_pretrained` needs `trust_remote_code=True`.\n"
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "---",
            "",
            f"# {architecture}",
            "",
            f"{WRITTEN_BY} from `{reader.path.name}`. What follows is what that checkpoint says; of quality, "
            "intended use and licence it says nothing.",
            "",
            *_table(("training", ""), facts),
            "",
            *_table(("configuration", ""), {f"`{key}`": f"{value}" for key, value in config.items()}),
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{argument})',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
            "```",
            note,
        ]
    )


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> list[str]:
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return [f"| {head[0]} | {head[1]} |", "| --- | --- |", *lines]


_AS_THEY_ARE = {
    "model_dtype": "Trained in",
    "global_batch_size": "Sequences a step",
    "seed": "Seed",
    "saved": "Saved",
}


def _training_facts(metadata: Mapping[str, Any]) -> dict[str, str]:
    facts = {}
    for key, name in (("global_step", "Optimizer steps"), ("tokens_processed", "Tokens seen")):
        if isinstance(metadata.get(key), int):
            facts[name] = f"{metadata[key]:,}"
    if isinstance(metadata.get("loss"), int | float):
        facts["Loss of the last step"] = f"{metadata['loss']:.4f} nats a token"
    for key, name in _AS_THEY_ARE.items():
        if metadata.get(key) is not None:
            facts[name] = str(metadata[key]).removeprefix("torch.")
    return facts


def _data_facts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Shards by name; a state of another layout gives no facts."""
    state = metadata.get("data_state")
    shards = state.get("manifest") if isinstance(state, dict) else None
    names = shards.get("names") if isinstance(shards, dict) else None
    if not isinstance(state, dict) or not isinstance(names, list) or not names:
        return {}
    shown = ", ".join(f"`{name}`" for name in names[:_SHOWN_SHARDS])
    rest = f" and {len(names) - _SHOWN_SHARDS} more" if len(names) > _SHOWN_SHARDS else ""
    facts = {"Data": f"{len(names)} shards: {shown}{rest}"}
    if state.get("block_size") is not None:
        facts["Tokens a sequence"] = f"{state['block_size']:,}"
    return facts
