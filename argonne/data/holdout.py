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
        digest = hashlib.blake2b(digest_size=8)
        if isinstance(text, TokenRow):
            digest.update(text.ids.astype("<i4", copy=False).tobytes())
        else:
            for stretch in (text,) if isinstance(text, str) else text.stretches():
                digest.update(stretch.encode())
        return (int.from_bytes(digest.digest(), "little") % self.every == 0) == self.held_out
