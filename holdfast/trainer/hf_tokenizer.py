"""Tokenizers of Hugging Face: the only door to tokenizers, which is imported when it is first needed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from holdfast.errors import ConfigurationError
from holdfast.trainer.vocabulary import Encoded

__all__ = ["FILE", "HfTokenizer", "write_byte_tokenizer"]

FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"


class HfTokenizer:
    """A ``tokenizer.json``. Documents begin and end with the ``bos_token`` and ``eos_token`` of the
    ``tokenizer_config.json`` beside it, so far as it names them; one token that is both ends documents only."""

    needs_characters = True

    def __init__(self, inner: Any, begin: Sequence[int], end: Sequence[int], digest: str) -> None:
        self._inner, self.begin, self.end, self.digest = inner, begin, end, digest
        self.size = int(inner.get_vocab_size(with_added_tokens=True))

    @classmethod
    def read(cls, directory: str) -> HfTokenizer:
        """Raises: ConfigurationError for a directory without a tokenizer, or where tokenizers is not installed."""
        path = Path(directory) / FILE
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigurationError(
                f"data.tokenizer={directory!r} holds no {FILE} that can be read: {error.strerror or error}"
            ) from error
        try:
            inner = _library().Tokenizer.from_str(content.decode())
        except ConfigurationError:
            raise
        except Exception as error:  # the library raises bare ones
            raise ConfigurationError(f"{path} is no tokenizer: {error}") from error
        inner.no_truncation()
        inner.no_padding()
        begin, end = _ends(inner, _settings(path.with_name(_SETTINGS)))
        digest = xxhash.xxh3_128_hexdigest(content + repr((begin, end)).encode())
        return cls(inner, begin, end, digest)

    def encode(self, text: bytes) -> Encoded:
        characters = text.decode()
        found = self._inner.encode(characters, add_special_tokens=False)
        ids = np.asarray(found.ids, np.uint32)
        return ids, _byte_lengths(characters, [end for _, end in found.offsets], len(text))

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._inner.decode(list(ids), skip_special_tokens=True)
        return text


def write_byte_tokenizer(path: Path) -> None:
    """Our bytes as a ``tokenizer.json``: the same numbers for the same text, <bos> <eos> <pad> behind them.

    Its alphabet is that of GPT-2's byte-level tokenizers, in which each byte is one printable character.
    Source: Radford et al. 2019, section 2.2.
    """
    library = _library()
    letters = {letter: byte for byte, letter in enumerate(_printable_bytes())}
    inner = library.Tokenizer(library.models.BPE(vocab=letters, merges=[]))
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = library.decoders.ByteLevel()
    inner.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    inner.save(str(path))


def _printable_bytes() -> list[str]:
    """By byte: Latin-1's own character if it is visible, else one from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 256 + hidden.index(byte)) for byte in range(256)]


def _library() -> Any:  # Any: tokenizers is not checked
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigurationError(
            "data.tokenizer needs tokenizers, which is not installed: pip install 'holdfast[hf]'"
        ) from error
    return tokenizers


def _settings(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _ends(inner: Any, settings: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    begin, end = (_id_of(inner, settings.get(name)) for name in ("bos_token", "eos_token"))
    return ([] if begin == end else begin), end


def _id_of(inner: Any, token: Any) -> list[int]:
    """A token is written as a string, or as an object with ``content``."""
    content = token.get("content") if isinstance(token, dict) else token
    number = inner.token_to_id(content) if isinstance(content, str) else None
    return [] if number is None else [number]


def _byte_lengths(text: str, ends: Sequence[int], total: int) -> npt.NDArray[np.uint32]:
    """Bytes from the end of one token to the end of the next, whatever the tokenizer drops, adds or cuts in pieces:
    they add up to the text."""
    if not ends:
        return np.empty(0, np.uint32)
    letters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (letters > 0x7F) + (letters > 0x7FF) + (letters > 0xFFFF)
    upto = np.concatenate(([0], np.cumsum(sizes)))[np.asarray(ends)]
    upto = np.maximum.accumulate(upto)
    upto[-1] = total
    return np.diff(upto, prepend=0).astype(np.uint32)
