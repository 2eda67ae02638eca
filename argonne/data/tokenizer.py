"""Texts to token ids: identify the tokenizer, cut texts into pieces, encode batches.

The ids are exactly those of ``tokenizer(text, add_special_tokens=False)["input_ids"]``, the tokenizer's EOS
after each document, as flat int32 arrays.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from argonne.data.load_tokenizer import load_tokenizer
from argonne.data.texts import LongText
from argonne.errors import one_line

PIECE_CHARACTERS = 1 << 20
"""A longer text is tokenized in pieces of at most this many characters."""
OWN_PROBES = 32
PROBES = (
    "Long long time ago, there were 1,234 dragons.\n\n\tThey didn't\u00a0sleep  \r\n",
    "naïve Ångström \u0041\u030a \u4f60\u597d \u0645\u0631\u062d\u0628\u0627 \U0001f600 \ufb01 \u200d",
    "def f(x):\n    return x**2  # <|endoftext|> </s> <s>[INST]",
)


class Encoder(Protocol):
    """Encodes a batch: ids of all texts in a row, EOS after each flagged last, and the length of each.

    Raises UnencodableError where the tokenizer has no ids for some of them.
    """

    def encode(self, texts: Sequence[str], last: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]: ...


class FastEncoder:
    """The Rust tokenizer alone, without the Python layer around it."""

    def __init__(self, backend: Any, eos_token_id: int) -> None:
        self._backend = backend
        self._eos = eos_token_id

    def encode(self, texts: Sequence[str], last: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
        return encode_all(self._ids, texts, last, self._eos)

    def _ids(self, texts: Sequence[str]) -> Iterable[list[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return (encoding.ids for encoding in encodings)


class PlainEncoder:
    """Any tokenizer, through its call."""

    def __init__(self, tokenizer: Any, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self._eos = eos_token_id

    def encode(self, texts: Sequence[str], last: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
        return encode_all(self._ids, texts, last, self._eos)

    def _ids(self, texts: Sequence[str]) -> Iterable[list[int]]:
        return (plain_ids(self._tokenizer, text) for text in texts)


class UnencodableError(Exception):
    """Texts of a batch that a tokenizer has no ids for; the others are encoded."""

    def __init__(self, ids: np.ndarray, lengths: np.ndarray, reasons: dict[int, str]) -> None:
        super().__init__(ids, lengths, reasons)
        self.ids = ids
        """int32; such a text has none, and no EOS."""
        self.lengths = lengths
        self.reasons = reasons
        """Index of each such text -> what the tokenizer says."""


def encode_all(
    encode: Callable[[Sequence[str]], Iterable[list[int]]],
    texts: Sequence[str],
    last: Sequence[bool],
    eos: int,
) -> tuple[np.ndarray, np.ndarray]:
    """`Encoder.encode` by a function that gives each text's ids; raises UnencodableError."""
    try:
        return join_ids(encode(texts), last, eos)
    except Exception:
        # The tokenizers library raises bare Exception (for a character without id and unknown token), and a
        # tokenizer that brings its own code anything: find the texts that are to blame.
        lists: list[list[int]] = []
        reasons: dict[int, str] = {}
        for index, text in enumerate(texts):
            try:
                lists += encode([text])
            except Exception as error:  # noqa: BLE001 - as above
                lists.append([])
                reasons[index] = one_line(error)
        if not reasons:
            raise
        ends = [flag and index not in reasons for index, flag in enumerate(last)]
        raise UnencodableError(*join_ids(lists, ends, eos), reasons) from None


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of the definition: ``tokenizer(text, add_special_tokens=False)``."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def join_ids(lists: Iterable[list[int]], last: Sequence[bool], eos: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32, lengths int64) of consecutive texts, ``eos`` after those flagged last."""
    flat, ends_at = array("I"), [0]  # unsigned: four times as fast to fill as "i", ten times as numpy
    for ids, ends in zip(lists, last, strict=True):
        flat.fromlist(ids)
        if ends:
            flat.append(eos)
        ends_at.append(len(flat))
    return np.frombuffer(flat, dtype=np.int32), np.diff(np.array(ends_at, dtype=np.int64))


def text_pieces(text: str | LongText) -> Iterable[tuple[str, bool]]:
    """The pieces a text is tokenized in, and whether each is the last one.

    Each is cut after its last newline within PIECE_CHARACTERS, without one at PIECE_CHARACTERS.
    """
    if isinstance(text, str) and len(text) <= PIECE_CHARACTERS:
        return ((text, True),)
    return _cut_pieces(text)


def _cut_pieces(text: str | LongText) -> Iterator[tuple[str, bool]]:
    rest = ""
    for stretch in [text] if isinstance(text, str) else text.stretches():
        rest, start = rest + stretch, 0
        while len(rest) - start > PIECE_CHARACTERS:
            cut = rest.rfind("\n", start, start + PIECE_CHARACTERS) + 1 or start + PIECE_CHARACTERS
            yield rest[start:cut], False
            start = cut
        rest = rest[start:]
    yield rest, True


def _fast_backend(tokenizer: Any) -> Any:
    """The Rust tokenizer in the state in which the plain call uses it; None where there is none."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    plain_ids(tokenizer, "")  # the call itself switches the backend's truncation and padding off
    return tokenizer.backend_tokenizer


def probe_ids(tokenizer: Any, probe: str) -> list[int] | None:
    """The ids of a probe; None where the tokenizer has none for it (no unknown token, another alphabet)."""
    try:
        return plain_ids(tokenizer, probe)
    except Exception:  # noqa: BLE001 - bare in the tokenizers library; the texts themselves are what must encode
        return None


def own_probes(tokenizer: Any) -> list[str]:
    """Texts of the tokenizer's own words, for one that has no ids for those of PROBES."""
    ids = sorted(tokenizer.get_vocab().values())
    words = [tokenizer.decode([index]) for index in ids[:: max(1, len(ids) // OWN_PROBES)]]
    return [*words, "".join(words), " ".join(words)]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of everything that decides the ids: vocabulary, merges, normalizer, EOS, and a few encodings."""
    backend = _fast_backend(tokenizer)
    if backend is not None:
        content = json.loads(backend.to_str())
        parts = {key: content.get(key) for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    else:
        parts = {"vocabulary": sorted(tokenizer.get_vocab().items())}
    parts["eos"] = tokenizer.eos_token_id
    parts["probes"] = [probe_ids(tokenizer, probe) for probe in PROBES]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class EncoderRecipe:
    """How to build the encoder of a tokenizer, here or in another process."""

    tokenizer: Any
    trust_remote_code: bool = False

    def backend(self) -> Any:
        """The Rust tokenizer if it alone gives the plain call's ids, else None."""
        backend = _fast_backend(self.tokenizer)
        if backend is None:
            return None
        probes = {probe: probe_ids(self.tokenizer, probe) for probe in PROBES}
        if None in probes.values():
            probes |= {probe: probe_ids(self.tokenizer, probe) for probe in own_probes(self.tokenizer)}
        known = [probe for probe, ids in probes.items() if ids is not None]
        fast = [encoding.ids for encoding in backend.encode_batch_fast(known, add_special_tokens=False)]
        return backend if any(fast) and fast == [probes[probe] for probe in known] else None

    def build(self) -> Encoder:
        """An encoder whose Rust tokenizer is its own: what others do with theirs cannot change the stream."""
        content = self.for_process()
        if "json" in content:
            return restored_encoder(content)
        return PlainEncoder(self.tokenizer, content["eos"])

    def for_process(self) -> dict[str, Any]:
        """What a process of `encoder_pool` needs to build the same encoder."""
        backend = self.backend()
        content: dict[str, Any] = {"eos": int(self.tokenizer.eos_token_id)}
        if backend is not None:
            return content | {
                "json": backend.to_str(),
                "encode_special_tokens": backend.encode_special_tokens,
            }
        path = str(Path(self.tokenizer.name_or_path).expanduser())
        return content | {"path": path, "trust_remote_code": self.trust_remote_code}


def restored_encoder(content: dict[str, Any]) -> Encoder:
    """The encoder that ``EncoderRecipe.for_process`` describes."""
    if "json" not in content:
        return PlainEncoder(load_tokenizer(content["path"], content["trust_remote_code"]), content["eos"])
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(content["json"])
    backend.encode_special_tokens = content["encode_special_tokens"]
    return FastEncoder(backend, content["eos"])
