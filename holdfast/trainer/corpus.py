"""From a :class:`DataConfig` to a token store: found again if the text has not changed, built otherwise."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

import xxhash

from holdfast.errors import DataError
from holdfast.trainer.config import DataConfig
from holdfast.trainer.sources import Source, find_source
from holdfast.trainer.split import Division, Split
from holdfast.trainer.token_store import FORMAT_VERSION, TokenStore
from holdfast.trainer.token_writer import StoreWriter, remove_abandoned, write_store
from holdfast.trainer.vocabulary import Vocabulary, vocabulary_of

__all__ = ["describe", "prepare"]

logger = logging.getLogger(__name__)


def prepare(config: DataConfig, cache: Path) -> TokenStore:
    """The token store of the configured text, in a directory of ``cache`` named after what it was made from.

    A store is used again as long as options, file names, sizes and times of change are the same (and for LOCAL the
    interpreter): no text is read then. A damaged one is replaced.
    Raises: DataError when text is missing, unreadable or too short; ConfigurationError when ``cache`` is not writable.
    """
    source, vocabulary = find_source(config), vocabulary_of(config)
    path = cache / f"{config.source.value}-{_key(config, source, vocabulary)}"
    store = _existing(path) or _build(config, source, vocabulary, path)
    _check_length(config, source, store.n_tokens)
    return store


def describe(store: TokenStore) -> str:
    """One line: ``local: standard library + pydoc topics, 10.4 MB, digest 9c1e…, PSF-2.0``."""
    size = _in_words(sum(store.n_bytes.values()))
    return f"{store.title}, {size}, digest {store.digest[:4]}…, {', '.join(store.licences)}"


def _key(config: DataConfig, source: Source, vocabulary: Vocabulary) -> str:
    options = [config.source.value, source.origin, config.field, config.validation_share]
    options += [part for part in (config.split, vocabulary.digest) if part]
    files = [(file.name, file.stamp) for file in source.files]
    return xxhash.xxh3_128_hexdigest(json.dumps([FORMAT_VERSION, options, source.build, files]).encode())


def _existing(path: Path) -> TokenStore | None:
    if not path.exists():
        return None
    try:
        return TokenStore.open(path)
    except DataError as error:
        logger.warning("building the token store again: %s", error)
        return None


def _build(config: DataConfig, source: Source, vocabulary: Vocabulary, path: Path) -> TokenStore:
    started_s = time.monotonic()
    remove_abandoned(path.parent, time.time())

    def fill(writer: StoreWriter) -> None:
        _copy(source, Division([file.name for file in source.files], config.validation_share), writer)
        _check_length(config, source, writer.n_tokens)  # before anything is published

    store = write_store(path, source.title, fill, vocabulary)
    logger.info("built %s from %d files in %.1f s", path, len(source.files), time.monotonic() - started_s)
    return store


def _copy(source: Source, division: Division, writer: StoreWriter) -> None:
    row = 0
    for file in source.files:
        writer.begin_file(file.name, file.licence)
        try:
            for text, begins_document in file.pieces():
                writer.append(division.split_of(file.name, row), text, begins_document=begins_document)
                row += 1
            size = writer.end_file()
        except UnicodeDecodeError as error:
            raise DataError(file.origin, f"is not UTF-8, as data.tokenizer needs it ({error.reason})") from error
        if not size and len(source.files) == 1:  # among others an empty one is nothing
            raise DataError(file.origin, "holds no text; point data.path at another file")


_LONGER = {
    Split.TRAIN: "lower data.validation_share",
    Split.VALIDATION: "raise data.validation_share",
}


def _check_length(config: DataConfig, source: Source, n_tokens: Mapping[Split, int]) -> None:
    need = config.seq_len + 1  # the last token of a window is a target only
    for split, have in n_tokens.items():
        if have < need:
            raise DataError(
                source.origin,
                f"{have:,} tokens are for {split.value}, one window of data.seq_len={config.seq_len} needs {need:,}; "
                f"add text, shorten data.seq_len, or {_LONGER[split]}={config.validation_share}",
            )


def _in_words(size_bytes: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.1f} {name}"
    return f"{size_bytes} bytes"
