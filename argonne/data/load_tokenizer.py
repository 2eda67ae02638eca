"""Find and load a tokenizer: a folder, a file in it, or a name on the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from argonne.errors import DataError, one_line

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")
"""A path to one of these means its folder."""
SENTENCEPIECE_EXTRA = "pip install 'argonne-tensor-parallel[sentencepiece]'"
HUB_SECONDS = 5.0
"""Time that the hub has to answer whether it has a tokenizer of that name."""


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """The Hugging Face tokenizer at ``path``; DataError in one line where there is none, or it has no EOS."""
    folder = tokenizer_folder(path)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        # The tokenizers library raises bare Exception for a broken file, and a tokenizer that brings its own
        # code (--trust-remote-code) anything: either way it is the user's folder that has to be named.
        reason = one_line(error)[:300]
        if needs_sentencepiece(folder, reason):
            reason = f"it needs sentencepiece and protobuf: {SENTENCEPIECE_EXTRA}"
        raise DataError(f"cannot load the tokenizer {path!r} (--tokenizer-path): {reason}") from error
    if len(tokenizer) == 0:
        if needs_sentencepiece(folder, ""):
            raise DataError(
                f"cannot load the tokenizer {path!r} (--tokenizer-path): it needs sentencepiece and "
                f"protobuf: {SENTENCEPIECE_EXTRA}"
            )
        raise DataError(f"no tokenizer at {path!r} (--tokenizer-path): give a folder with tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {path!r} has no EOS token (--tokenizer-path): set eos_token in its config"
        )
    return tokenizer


def tokenizer_folder(path: str) -> str:
    """The folder, or the name on the hub, that ``path`` means; DataError at once where there is neither."""
    local = path if os.path.exists(path) else os.path.expanduser(path)
    if os.path.isdir(local):
        return local
    if os.path.isfile(local):
        if os.path.basename(local) in TOKENIZER_FILES:
            return os.path.dirname(local) or "."
        raise DataError(f"{path!r} is a file (--tokenizer-path): give the folder that holds tokenizer.json")
    missing = f"no tokenizer at {path!r} (--tokenizer-path): give a folder with tokenizer.json"
    parent = path.split("/")[0]
    if path.startswith((".", "/", "~")) or path.count("/") != 1 or os.path.isdir(parent):
        raise DataError(missing)
    if (reason := hub_refusal(path)) is not None:
        raise DataError(f"{missing}, or a name that the Hugging Face hub has ({reason})")
    return path


def hub_refusal(name: str) -> str | None:
    """Why the hub and its cache have no repository of this name; None where they have."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError

    files = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "config.json")
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
            return None
        if constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set and its cache lacks it"
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except GatedRepoError:
        return None  # loading says what is wanted
    except Exception as error:  # noqa: BLE001 - the http client's own, which changes with the hub's version
        return one_line(error)[:120]
    return None


def needs_sentencepiece(folder: str, reason: str) -> bool:
    """Whether a tokenizer did not load because the packages that read its model are missing."""
    if all(importlib.util.find_spec(name) for name in ("sentencepiece", "google")):
        return False
    files = Path(folder)
    models = files.is_dir() and not (files / "tokenizer.json").exists() and any(files.glob("*.model"))
    return models or any(word in reason.lower() for word in ("sentencepiece", "protobuf", "tiktoken"))
