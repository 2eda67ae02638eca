"""``--holdout N``: a source in two parts, split by the text of each document, whatever its place."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from argonne.data.texts import LongText
from argonne.data.token_rows import TokenRow


@dataclass(frozen=True, kw_only=True)
class Holdout:
    """One of the two parts: the documents held out of training, or all others.

    A document is held out where the first 8 bytes of blake2b (digest_size=8) of its UTF-8 text, read as a
    little-endian number, are a multiple of ``every``; of a row of token ids, its little-endian int32 take the
    place of the text.
    """

    every: int
    held_out: bool = False
    """Read the held-out part instead of the training part."""

    def keeps(self, text: str | LongText | TokenRow) -> bool:
        """Whether the document belongs to this part."""
        return (int.from_bytes(document_digest(text, 8), "little") % self.every == 0) == self.held_out


def document_digest(text: str | LongText | TokenRow, size: int) -> bytes:
    """blake2b of the UTF-8 text, or of a row's ids as little-endian int32, ``size`` bytes."""
    digest = hashlib.blake2b(digest_size=size)
    if isinstance(text, TokenRow):
        digest.update(text.ids.astype("<i4", copy=False).tobytes())
    else:
        for stretch in (text,) if isinstance(text, str) else text.stretches():
            digest.update(stretch.encode())
    return digest.digest()
