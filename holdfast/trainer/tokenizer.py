"""Bytes as tokens: the id of a byte is its value, three ids above 255 are special. No vocabulary file, no torch."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["BOS", "EOS", "PAD", "VOCAB_SIZE", "decode", "encode"]

BOS = 256
"""Begins a document."""
EOS = 257
"""Ends a document."""
PAD = 258
"""Fills a sequence; never in a token store."""
VOCAB_SIZE = 259


def encode(text: str) -> list[int]:
    """The UTF-8 bytes of ``text``, without special tokens."""
    return list(text.encode())


def decode(ids: Iterable[int]) -> str:
    """The text of ``ids``: special tokens are dropped, bytes that are not UTF-8 become the replacement character."""
    return bytes(i for i in ids if i < BOS).decode(errors="replace")
