"""Keys of samples: safe as names of members, and each unlike all others."""

from __future__ import annotations

import hashlib
import unicodedata

MAX_KEY_BYTES = 1000  # UTF-8; data.tar_index reads names of up to four times as much


def safe_key(name: str) -> str:
    """`name` with everything that is no letter or digit, '_', '-' or '/' replaced by '_'.

    Letters and digits of any script stay: of a folder of Chinese names nothing else would be left.
    """
    name = unicodedata.normalize("NFC", name)  # macOS takes letters and their accents apart
    return "".join(c if c.isalnum() or c in "_-/" else "_" for c in name)


class Keys:
    """Keys for the samples of a split, each unlike all others; linear in their number.

    a.jpg beside a.png is one reason to tell them apart, names that differ in unsafe characters
    only another.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._met: dict[str, int] = {}  # key -> how many came that wanted it, where it was taken

    def of(self, name: str) -> str:
        """The safe key of `name`, with a number behind it where that is taken."""
        wanted = key = _shortened(safe_key(name), name)
        while key in self._taken:
            self._met[wanted] = self._met.get(wanted, 1) + 1
            key = f"{wanted}_{self._met[wanted]}"
        self._taken.add(key)
        return key


def _shortened(key: str, name: str) -> str:
    """`key`, with a hash of `name` for what is above MAX_KEY_BYTES."""
    if len(key.encode()) <= MAX_KEY_BYTES:
        return key
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{key.encode()[:MAX_KEY_BYTES].decode(errors='ignore')}_{digest}"
