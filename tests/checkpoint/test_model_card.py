"""The card of an export: what the checkpoint says, and nothing where it says nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.checkpoint.model_card import WRITTEN_BY, model_card


class Reader:
    """A checkpoint of two weights."""

    path = Path("folder/step_9.pth")
    names = ("a", "b")

    def __init__(self, **metadata: Any) -> None:
        self.metadata = metadata

    def shape(self, name: str) -> tuple[int, ...]:
        return {"a": (1000, 12), "b": (5,)}[name]


def card(architecture: str = "LlamaForCausalLM", **metadata: Any) -> str:
    reader: Any = Reader(**metadata)
    return model_card(reader, {"hidden_size": 48}, architecture=architecture, dtype=torch.bfloat16)


def rows(text: str) -> dict[str, str]:
    """The tables' rows, key to value."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {entry[0]: entry[1] for entry in cells if len(entry) == 2}


def test_the_facts_of_a_run() -> None:
    data = {"manifest": {"names": ["a.parquet", "b.parquet"]}, "block_size": 4096}
    text = card(
        global_step=1200, tokens_processed=3_000_000, loss=2.34567, model_dtype="torch.float32",
        global_batch_size=16, seed=5, saved="2026-01-02", data_state=data,
    )  # fmt: skip
    found = rows(text)
    assert found["Parameters"] == "12,005" and found["Weights in this folder"] == "bfloat16"
    assert (found["Optimizer steps"], found["Tokens seen"]) == ("1,200", "3,000,000")
    assert (found["Loss of the last step"], found["Trained in"]) == ("2.3457 nats a token", "float32")
    assert (found["Sequences a step"], found["Seed"], found["Saved"]) == ("16", "5", "2026-01-02")
    assert (found["Data"], found["Tokens a sequence"]) == ("2 shards: `a.parquet`, `b.parquet`", "4,096")
    assert found["`hidden_size`"] == "48"
    assert f"{WRITTEN_BY} from `step_9.pth`." in text and "folder/" not in text


def test_of_many_shards_three_are_named() -> None:
    found = rows(card(data_state={"manifest": {"names": list("abcde")}}))
    assert found["Data"] == "5 shards: `a`, `b`, `c` and 2 more" and "Tokens a sequence" not in found


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"data_state": 5},
        {"data_state": {"manifest": {"web": {}}}},
        {"data_state": {"manifest": {"names": []}}},
        {"loss": None, "global_step": None, "saved": None},
        {"loss": "low", "global_step": "many"},
    ],
)
def test_what_is_not_known_is_left_out(metadata: dict[str, Any]) -> None:
    found = rows(card(**metadata))
    expected = {"training", "---", "Parameters", "Weights in this folder", "configuration", "`hidden_size`"}
    assert found.keys() <= expected


def test_only_code_in_the_folder_needs_trust() -> None:
    assert "trust_remote_code" not in card()
    own = card("ArgonneModel")
    assert 'from_pretrained("FOLDER", trust_remote_code=True)' in own and "# ArgonneModel" in own
    assert own.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n")
