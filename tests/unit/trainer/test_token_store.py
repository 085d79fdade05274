"""A store is there as a whole or not at all, is used again while the text is the same, and replaced when damaged."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from holdfast.errors import ConfigurationError, DataError
from holdfast.trainer import corpus, readers, sources
from holdfast.trainer.config import DataConfig, DataSource
from holdfast.trainer.corpus import prepare
from holdfast.trainer.readers import Piece
from holdfast.trainer.split import Split
from holdfast.trainer.token_store import TokenStore
from holdfast.trainer.token_writer import StoreWriter, remove_abandoned, write_store
from holdfast.trainer.vocabulary import vocabulary_of

TEXTS = {f"{i:02d}.txt": f"this is text number {i}\n".encode() * (i + 1) for i in range(20)}


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "in").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "in" / name).write_bytes(text)
    return DataConfig(source=DataSource.TEXT, path=str(tmp_path / "in"), seq_len=8, validation_share=0.2)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def manifest_of(store: TokenStore) -> list[dict[str, Any]]:
    with pa.ipc.open_file((store.path / "manifest.arrow").read_bytes()) as reader:
        rows: list[dict[str, Any]] = reader.read_all().to_pylist()
    return rows


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files read from here on."""
    reads: list[Path] = []
    read_text = readers.read_text

    def counted(path: Path) -> Iterator[Piece]:
        reads.append(path)
        return read_text(path)

    monkeypatch.setattr(sources, "read_text", counted)
    return reads


def touch_later(path: Path) -> None:
    later_ns = path.stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(later_ns, later_ns))


# -- what is in it ----------------------------------------------------------------------------------------------------


def test_the_manifest_has_a_row_per_file_that_anybody_can_check(config: DataConfig, cache: Path) -> None:
    store = prepare(config, cache)
    rows = manifest_of(store)
    assert [row["name"] for row in rows] == sorted(TEXTS)
    for row in rows:
        text = TEXTS[row["name"]]
        assert row["digest"] == xxhash.xxh3_128_hexdigest(text)
        assert (row["documents"], row["bytes"], row["tokens"]) == (1, len(text), len(text) + 2)
        assert row["licence"] == "licence not stated"


def test_the_streams_are_the_documents_in_the_order_of_the_manifest(config: DataConfig, cache: Path) -> None:
    store = prepare(config, cache)
    for split in Split:
        want: list[int] = []
        for row in manifest_of(store):
            if row["split"] == split.value:
                want += [256, *TEXTS[row["name"]], 257]
        raw = (store.path / f"{split.value}.bin").read_bytes()
        assert raw == b"".join(token.to_bytes(2, "little") for token in want)
        assert store.tokens(split).tolist() == want


def test_the_totals_agree_with_the_manifest(config: DataConfig, cache: Path) -> None:
    store = prepare(config, cache)
    rows = manifest_of(store)
    for split in Split:
        assert store.n_tokens[split] == sum(row["tokens"] for row in rows if row["split"] == split.value) > 0
        assert store.n_bytes[split] == sum(row["bytes"] for row in rows if row["split"] == split.value)
    assert store.documents == len(TEXTS)
    assert sum(store.n_bytes.values()) == sum(map(len, TEXTS.values()))


def test_a_file_divided_by_rows_has_a_row_in_each_split(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"0123456789abcde\n" * 5000)
    store = prepare(DataConfig(source=DataSource.TEXT, path=str(tmp_path / "a.txt"), validation_share=0.1), cache)
    rows = manifest_of(store)
    assert [(row["name"], row["split"]) for row in rows] == [("a.txt", "train"), ("a.txt", "validation")]
    assert sum(row["bytes"] for row in rows) == 80_000
    assert sum(row["documents"] for row in rows) == store.documents > 2


def test_tokens_are_mapped_and_cannot_be_written(config: DataConfig, cache: Path) -> None:
    tokens = prepare(config, cache).tokens(Split.TRAIN)
    assert tokens.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_text_longer_than_the_staging_block_arrives_whole(tmp_path: Path) -> None:
    text = np.random.default_rng(0).integers(0, 256, 2_500_001, np.uint8).tobytes()

    def fill(writer: StoreWriter) -> None:
        writer.begin_file("a", "mine")
        writer.append(Split.VALIDATION, b"v", begins_document=True)
        writer.append(Split.TRAIN, text[:7], begins_document=True)
        writer.append(Split.TRAIN, text[7:], begins_document=False)
        writer.append(Split.TRAIN, b"next", begins_document=True)
        assert writer.end_file() == len(text) + 5
        assert writer.n_tokens == {Split.TRAIN: len(text) + 8, Split.VALIDATION: 3}

    store = write_store(tmp_path / "store", "title", fill)
    tokens = store.tokens(Split.TRAIN)
    assert (tokens[0], tokens[1 + len(text)], tokens[2 + len(text)]) == (256, 257, 256)
    assert tokens[1 : 1 + len(text)].astype(np.uint8).tobytes() == text
    assert (store.title, store.licences, store.documents) == ("title", ("mine",), 3)


# -- used again -------------------------------------------------------------------------------------------------------


def test_a_second_start_reads_no_text(config: DataConfig, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = count_reads(monkeypatch)
    first = prepare(config, cache)
    assert len(reads) == len(TEXTS)
    reads.clear()
    assert prepare(config, cache) == first
    assert reads == []


def test_another_sequence_length_uses_the_same_store(config: DataConfig, cache: Path) -> None:
    first = prepare(config, cache)
    config.seq_len = 16
    assert prepare(config, cache) == first


def test_a_store_that_is_too_short_for_longer_sequences_is_refused(config: DataConfig, cache: Path) -> None:
    prepare(config, cache)
    config.seq_len = 100_000
    with pytest.raises(DataError, match=r"one window of data.seq_len=100000 needs 100,001; add text, shorten"):
        prepare(config, cache)


Change = Callable[[DataConfig], None]
CHANGES: dict[str, tuple[Change, bool]] = {  # whether the tokens change too
    "content": (lambda c: rewrite(Path(c.path) / "03.txt", b"other text\n" * 8), True),
    "new file": (lambda c: rewrite(Path(c.path) / "new.txt", b"new\n"), True),
    "file gone": (lambda c: (Path(c.path) / "03.txt").unlink(), True),
    "touched": (lambda c: touch_later(Path(c.path) / "03.txt"), False),
    "share": (lambda c: setattr(c, "validation_share", 0.5), True),
    "field": (lambda c: setattr(c, "field", "other"), False),
}


def rewrite(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    touch_later(path)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_a_new_store(config: DataConfig, cache: Path, change: str) -> None:
    before = prepare(config, cache)
    apply, changes_tokens = CHANGES[change]
    apply(config)
    after = prepare(config, cache)
    assert after.path != before.path
    assert (after.digest != before.digest) == changes_tokens
    assert TokenStore.open(before.path) == before


def test_the_digest_knows_where_a_document_ends(tmp_path: Path) -> None:
    def digest_of(name: str, *documents: bytes) -> str:
        def fill(writer: StoreWriter) -> None:
            writer.begin_file("a", "")
            for document in documents:
                writer.append(Split.TRAIN, document, begins_document=True)
            writer.append(Split.VALIDATION, b"v", begins_document=True)
            writer.end_file()

        return write_store(tmp_path / name, "", fill).digest

    assert digest_of("1", b"ab", b"c") != digest_of("2", b"a", b"bc")
    assert digest_of("3", b"ab", b"c") == digest_of("4", b"ab", b"c")


def test_another_interpreter_has_another_standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> str:
        return corpus._key(DataConfig(), sources.find_source(DataConfig()), vocabulary_of(DataConfig()))

    before = key()
    assert key() == before
    monkeypatch.setattr("sys.version", "3.99.0 (another build)")
    assert key() != before


# -- damaged ----------------------------------------------------------------------------------------------------------


def truncate(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size - by)


def replace(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def set_format_version(store: Path, version: int) -> None:
    content = (store / "manifest.arrow").read_bytes()
    old, new = b'"format_version": 1', b'"format_version": %d' % version
    assert old in content
    (store / "manifest.arrow").write_bytes(content.replace(old, new))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "tokens truncated": lambda s: truncate(s / "train.bin", 2),
    "half a token": lambda s: truncate(s / "validation.bin", 1),
    "tokens gone": lambda s: (s / "train.bin").unlink(),
    "tokens empty": lambda s: replace(s / "train.bin", b""),
    "manifest truncated": lambda s: truncate(s / "manifest.arrow", 20),
    "manifest empty": lambda s: replace(s / "manifest.arrow", b""),
    "manifest gone": lambda s: (s / "manifest.arrow").unlink(),
    "manifest garbage": lambda s: replace(s / "manifest.arrow", b"x" * 500),
    "another format": lambda s: set_format_version(s, 7),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_refused_with_the_way_out_and_replaced(config: DataConfig, cache: Path, damage: str) -> None:
    store = prepare(config, cache)
    DAMAGES[damage](store.path)
    with pytest.raises(DataError, match=f"^{store.path}.*start the run again"):
        TokenStore.open(store.path)
    assert prepare(config, cache) == store
    assert [path.name for path in cache.iterdir()] == [store.path.name]


def test_a_store_of_another_format_says_which(config: DataConfig, cache: Path) -> None:
    store = prepare(config, cache)
    set_format_version(store.path, 7)
    with pytest.raises(DataError, match=r"format_version=7, written by holdfast .*; this version of Holdfast reads 1"):
        TokenStore.open(store.path)


def test_a_directory_that_is_no_store_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(DataError, match="is not a complete token store"):
            TokenStore.open(path)


def test_tokens_that_are_mapped_survive_the_replacement(config: DataConfig, cache: Path) -> None:
    store = prepare(config, cache)
    mapped = store.tokens(Split.TRAIN)
    before = mapped.tolist()
    (store.path / "manifest.arrow").unlink()
    prepare(config, cache)
    assert mapped.tolist() == before


# -- whole or not at all ----------------------------------------------------------------------------------------------


def test_a_build_that_fails_leaves_nothing(config: DataConfig, cache: Path) -> None:
    (Path(config.path) / "19.txt.gz").write_bytes(b"not compressed")
    with pytest.raises(DataError, match=r"19\.txt\.gz"):
        prepare(config, cache)
    assert list(cache.iterdir()) == []


def test_a_full_disk_is_said_with_the_way_out(config: DataConfig, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigurationError, match=r"No space left on device; free space there, or set data\.cache"):
        prepare(config, cache)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_made_is_said_with_the_way_out(config: DataConfig, cache: Path) -> None:
    cache.write_bytes(b"a file")
    with pytest.raises(ConfigurationError, match=r"Not a directory; .*data\.cache"):
        prepare(config, cache / "below")


def test_several_drivers_at_once_end_with_one_store(config: DataConfig, cache: Path) -> None:
    start = threading.Barrier(4)

    def drive(_: int) -> TokenStore:
        start.wait(10)
        return prepare(config, cache)

    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(drive, range(4)))
    assert all(store == stores[0] for store in stores)
    assert [path.name for path in cache.iterdir()] == [stores[0].path.name]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_the_slower_of_two_drivers_uses_the_other_ones_store(
    config: DataConfig, cache: Path, monkeypatch: pytest.MonkeyPatch, is_damaged: bool
) -> None:
    inodes: list[int] = []
    rename = Path.rename

    def rival_first(source: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        theirs = prepare(config, cache).path
        inodes.append(theirs.stat().st_ino)
        if is_damaged:
            truncate(theirs / "train.bin", 2)
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", rival_first)
    store = prepare(config, cache)
    assert (store.path.stat().st_ino != inodes[0]) == is_damaged
    assert TokenStore.open(store.path) == store
    assert [path.name for path in cache.iterdir()] == [store.path.name]


def test_what_a_killed_builder_left_is_removed_after_a_day(config: DataConfig, cache: Path) -> None:
    left = cache / "text-0123.tmp-abc"
    left.mkdir(parents=True)
    (left / "train.bin").write_bytes(b"x" * 10)
    store = prepare(config, cache)
    assert left.exists()  # its builder may be alive
    remove_abandoned(cache, time.time() + 23 * 3600)
    assert left.exists()
    remove_abandoned(cache, time.time() + 25 * 3600)
    assert not left.exists()
    assert TokenStore.open(store.path) == store
