"""What the numbers in a token store stand for: bytes, unless the configuration names a tokenizer. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from holdfast.trainer import tokenizer
from holdfast.trainer.config import DataConfig

__all__ = ["Bytes", "Encoded", "Vocabulary", "vocabulary_of"]

Ids = npt.NDArray[np.unsignedinteger]
Encoded = tuple[Ids, "npt.NDArray[np.uint32] | None"]
"""Tokens, and how many bytes of text each of them takes; None where that is one each. The bytes add up to the text."""


class Vocabulary(Protocol):
    """Text in, numbers out, and back."""

    digest: str
    """Of what decides the numbers; empty for bytes."""
    size: int
    """All numbers are below it."""
    begin: Sequence[int]
    """Tokens in front of each document."""
    end: Sequence[int]
    """Tokens behind it."""
    needs_characters: bool
    """Whether ``encode`` takes whole characters of UTF-8 only."""

    def encode(self, text: bytes) -> Encoded:
        """Raises: UnicodeDecodeError for what is not UTF-8 and has to be."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        ...


class Bytes:
    """See :mod:`holdfast.trainer.tokenizer`."""

    digest, size, needs_characters = "", tokenizer.VOCAB_SIZE, False
    begin: Sequence[int] = (tokenizer.BOS,)
    end: Sequence[int] = (tokenizer.EOS,)

    def encode(self, text: bytes) -> Encoded:
        return np.frombuffer(text, np.uint8), None

    def decode(self, ids: Sequence[int]) -> str:
        return tokenizer.decode(ids)


def vocabulary_of(config: DataConfig) -> Vocabulary:
    """Raises: ConfigurationError for a tokenizer that cannot be read, or a package that is missing."""
    if not config.tokenizer:
        return Bytes()
    from holdfast.trainer.hf_tokenizer import HfTokenizer

    return HfTokenizer.read(config.tokenizer)
