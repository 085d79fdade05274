"""Text reaches the store byte for byte, and whatever is wrong with a file is said with its name and row."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from holdfast.errors import ConfigurationError, DataError
from holdfast.trainer import readers
from holdfast.trainer.config import DataConfig, DataSource
from holdfast.trainer.corpus import describe, prepare
from holdfast.trainer.split import Division, Split
from holdfast.trainer.token_store import TokenStore


def documents(store: TokenStore, split: Split) -> list[bytes]:
    """The documents of a split, told apart in plain Python."""
    found: list[bytearray] = []
    is_open = False
    for token in np.fromfile(store.path / f"{split.value}.bin", "<u2").tolist():
        if token == 256:
            assert not is_open
            found.append(bytearray())
        elif token < 256:
            assert is_open
            found[-1].append(token)
        is_open = token != 257
    assert not is_open
    return [bytes(document) for document in found]


def all_documents(store: TokenStore) -> list[bytes]:
    return sorted(documents(store, Split.TRAIN) + documents(store, Split.VALIDATION))


def text_of(i: int) -> bytes:
    return f"file {i}: grüße\n".encode() * (i + 3)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    compressed: bytes = sink.getvalue().to_pybytes()
    return compressed


def no_change(data: bytes) -> bytes:
    return data


COMPRESSIONS = {"": no_change, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}


def config(path: Path, source: DataSource = DataSource.TEXT, **options: Any) -> DataConfig:
    defaults = {"seq_len": 8, "validation_share": 0.3}
    return DataConfig(source=source, path=str(path), **{**defaults, **options})


def jsonl(rows: Iterable[object]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# -- what is read -----------------------------------------------------------------------------------------------------


def test_the_standard_library_and_its_topics_are_the_default(tmp_path: Path) -> None:
    store = prepare(DataConfig(), tmp_path)
    train, held_out = documents(store, Split.TRAIN), documents(store, Split.VALIDATION)
    found = set(train + held_out)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("abc.py", "asyncio/base_events.py", "json/decoder.py", "idlelib/editor.py", "this.py"):
        assert (stdlib / name).read_bytes() in found
    assert {text.encode() for text in topics.values()} <= found
    assert not any(b"class TestCase(unittest.TestCase)" in d for d in found if (stdlib / "test").is_dir())
    assert (stdlib / "encodings/cp1252.py").read_bytes() not in found
    assert 0.03 < len(held_out) / len(found) < 0.08
    assert store.licences == ("PSF-2.0",)
    assert describe(store).startswith("local: standard library + pydoc topics, ")
    assert describe(store).endswith(f"digest {store.digest[:4]}…, PSF-2.0")


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_directory_of_text_is_read_at_any_depth_and_in_order(tmp_path: Path, suffix: str) -> None:
    names = [f"b{i}.txt" for i in range(8)] + ["a/deep/er/c.md", "a/d.RST", "z.text"]
    for i, name in enumerate(names):
        write(tmp_path / "in" / (name + suffix), COMPRESSIONS[suffix](text_of(i)))
    for name in (".hidden.txt", ".git/x.txt", "other.bin", "txt"):
        write(tmp_path / "in" / name, b"not to be read")
    store = prepare(config(tmp_path / "in"), tmp_path / "cache")
    assert all_documents(store) == sorted(text_of(i) for i in range(len(names)))
    for split in Split:
        assert documents(store, split) == sorted(documents(store, split), key=lambda d: names_in_order(names, d))


def names_in_order(names: list[str], document: bytes) -> str:
    return names[int(document.split(b":")[0].split()[1])]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_single_text_file_loses_no_byte_to_the_split(tmp_path: Path, suffix: str) -> None:
    lines = b"".join(b"line %d of a longer text\n" % i for i in range(20_000))
    path = write(tmp_path / f"any.name{suffix}", COMPRESSIONS[suffix](lines))
    store = prepare(config(path, validation_share=0.1), tmp_path / "cache")
    runs = documents(store, Split.TRAIN) + documents(store, Split.VALIDATION)
    runs.sort(key=lines.index)
    assert b"".join(runs) == lines
    assert all(run.endswith(b"\n") for run in runs)
    assert store.n_bytes[Split.VALIDATION] / len(lines) == pytest.approx(0.1, abs=0.03)


def test_neighbouring_chunks_of_one_split_stay_one_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"0123456789abcde\n" * 256 * 40)  # 40 chunks and no rest
    store = prepare(config(path, validation_share=0.05), tmp_path / "cache")
    assert [len(d) for d in documents(store, Split.VALIDATION)] == [4112, 4112]
    assert len(documents(store, Split.TRAIN)) == 3


def test_bytes_of_a_text_file_are_taken_as_they_are(tmp_path: Path) -> None:
    blob = bytes(range(256)) * 300  # few line breaks, no UTF-8
    store = prepare(config(write(tmp_path / "blob", blob)), tmp_path / "cache")
    assert sum(store.n_bytes.values()) == len(blob)


def test_a_file_without_line_breaks_comes_in_bounded_pieces(tmp_path: Path) -> None:
    path = write(tmp_path / "long.txt", b"x" * 1_000_000)
    pieces = [piece for piece, _ in readers.read_text(path)]
    assert max(map(len, pieces)) < 100_000
    assert sum(map(len, pieces)) == 1_000_000


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_each_line_of_jsonl_is_a_document(tmp_path: Path, suffix: str) -> None:
    texts = [f"row {i} \u20ac \U0001f9a6 \n with a break" for i in range(60)]
    content = jsonl({"id": i, "body": text} for i, text in enumerate(texts))
    content = b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n\r\n", 2) + b'{"body": ""}\n'  # as some editors save it
    path = write(tmp_path / f"rows.jsonl{suffix}", COMPRESSIONS[suffix](content))
    store = prepare(config(path, DataSource.JSONL, field="body"), tmp_path / "cache")
    assert all_documents(store) == sorted(text.encode() for text in texts)
    assert store.documents == 60


STRING_TYPES = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", STRING_TYPES, ids=str)
def test_each_row_of_parquet_is_a_document(tmp_path: Path, kind: Any) -> None:
    texts = ["", *(f"row {i} \u20ac" for i in range(700)), ""]
    table = pa.table({"id": list(range(702)), "body": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=300)
    store = prepare(config(tmp_path / "rows.parquet", DataSource.PARQUET, field="body"), tmp_path / "cache")
    assert all_documents(store) == sorted(text.encode() for text in texts if text)


def test_rows_of_several_files_are_documents_too(tmp_path: Path) -> None:
    for i in range(30):
        write(tmp_path / "in" / f"sub{i % 3}" / f"{i}.jsonl", jsonl([{"text": f"{i} one"}, {"text": f"{i} two"}]))
    store = prepare(config(tmp_path / "in", DataSource.JSONL), tmp_path / "cache")
    assert all_documents(store) == sorted(f"{i} {word}".encode() for i in range(30) for word in ("one", "two"))
    for split in Split:  # whole files: both rows of one are on the same side
        firsts = [d.split()[0] for d in documents(store, split)]
        assert firsts[::2] == firsts[1::2]


def test_a_file_whose_name_is_not_utf8_is_read(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt.gz")
    write(tmp_path / "in" / name, gzip.compress(b"some text\n" * 4000))
    store = prepare(config(tmp_path / "in"), tmp_path / "cache")
    assert sum(store.n_bytes.values()) == 40_000


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "blobs" / "0123", b"some text\n" * 4000)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").symlink_to(tmp_path / "blobs" / "0123")
    store = prepare(config(tmp_path / "in"), tmp_path / "cache")
    assert sum(store.n_bytes.values()) == 40_000


def test_a_description_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"0123456789abcde\n" * 2000)
    line = describe(prepare(config(path), tmp_path / "cache"))
    assert line.startswith(f"text: {path}, 32.0 kB, digest ")
    assert line.endswith("…, licence not stated")


# -- the split --------------------------------------------------------------------------------------------------------


def test_the_split_of_a_file_depends_on_its_relative_name_only(tmp_path: Path) -> None:
    stores = []
    for place in ("here", "there/below"):
        for i in range(20):
            write(tmp_path / place / "x" / f"{i}.txt", text_of(i))
        stores.append(prepare(config(tmp_path / place), tmp_path / "cache"))
    assert stores[0].path != stores[1].path
    assert stores[0].digest == stores[1].digest


def test_the_split_of_names_and_rows_is_the_same_on_every_machine() -> None:
    names = [f"part{i:02d}.txt" for i in range(40)]
    by_file = Division(names, 0.1)
    held = [name for name in names if by_file.split_of(name, 0) is Split.VALIDATION]
    assert held == ["part07.txt", "part13.txt", "part25.txt", "part34.txt", "part38.txt"]
    by_row = Division(["only.txt"], 0.05)
    assert [row for row in range(60) if by_row.split_of("only.txt", row) is Split.VALIDATION] == [12, 33, 46]


@pytest.mark.parametrize(("n_files", "share"), [(2, 0.5), (10, 0.1), (40, 0.05), (2, 0.99), (500, 0.2)])
def test_whole_files_are_held_out_and_never_none_or_all(n_files: int, share: float) -> None:
    names = [f"{i}.txt" for i in range(n_files)]
    division = Division(names, share)
    held = {name for name in names if division.split_of(name, 7) is Split.VALIDATION}
    assert division.is_by_file
    assert 0 < len(held) < n_files


@pytest.mark.parametrize(("n_files", "share"), [(1, 0.9), (3, 0.05), (19, 0.05)])
def test_few_files_are_divided_by_rows(n_files: int, share: float) -> None:
    names = [f"{i}.txt" for i in range(n_files)]
    division = Division(names, share)
    held = sum(division.split_of(names[0], row) is Split.VALIDATION for row in range(10_000))
    assert held / 10_000 == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize("share", [0.003, 0.01, 0.02, 0.05, 0.1, 0.15, 0.25, 0.5])
def test_some_row_of_every_few_is_held_out(share: float) -> None:
    division = Division(["only"], share)
    held = [row for row in range(5000) if division.split_of("only", row) is Split.VALIDATION]
    gaps = [after - before for before, after in zip([-1, *held], held, strict=False)]
    assert max(gaps) <= 2 / share


# -- what is refused --------------------------------------------------------------------------------------------------

GOOD = jsonl([{"text": "one"}, {"text": "two"}])
BAD_ROWS: dict[str, tuple[bytes, str]] = {
    "not UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8 at byte 13"),
    "not JSON": (b"text: three", "not JSON"),
    "half a row": (b'{"text": "thr', "not JSON"),
    "too deep": (b"[" * 100_000, "not JSON"),
    "no object": (b'["text"]', "holds a list, not an object"),
    "no field": (b'{"txt": "three", "n": 3}', "no field 'text'; set data.field to one of 'txt', 'n'"),
    "nothing": (b"{}", "no field 'text'; use another file"),
    "null": (b'{"text": null}', "field 'text' holds null, not a string"),
    "number": (b'{"text": 3.5}', "field 'text' holds a number, not a string"),
    "list": (b'{"text": ["a"]}', "field 'text' holds a list, not a string"),
    "surrogate": (b'{"text": "\\ud83d"}', "half a character"),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_line_of_jsonl_is_named(tmp_path: Path, case: str, suffix: str) -> None:
    line, words = BAD_ROWS[case]
    path = write(tmp_path / "in" / f"b.jsonl{suffix}", COMPRESSIONS[suffix](GOOD + b"\n" + line + b"\n" + GOOD))
    write(tmp_path / "in" / "a.jsonl", GOOD)
    with pytest.raises(DataError, match=words) as caught:
        prepare(config(tmp_path / "in", DataSource.JSONL), tmp_path / "cache")
    assert (caught.value.path, caught.value.row) == (str(path), 4)  # the blank line counts
    assert str(caught.value).startswith(f"{path}, row 4: ")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_MAX_ROW_BYTES", 1 << 20)
    path = write(tmp_path / "array.jsonl", GOOD + b"[" + b'{"text": "x"},' * 100_000)
    with pytest.raises(DataError, match="longer than 1 MiB; write one JSON object per line") as caught:
        prepare(config(path, DataSource.JSONL), tmp_path / "cache")
    assert caught.value.row == 3


def bad_utf8() -> Any:
    offsets, text = np.array([0, 1, 2], np.int32), b"a\xff"
    return pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(offsets), pa.py_buffer(text)])


BAD_COLUMNS: dict[str, tuple[Callable[[], Any], int | None, str]] = {
    "null": (lambda: pa.array([*["x"] * 300, None, "y"]), 301, "is null"),
    "number": (lambda: pa.array([1, 2]), None, "holds int64, not strings; set data.field to one of 'other'"),
    "list": (lambda: pa.array([["a"]] * 2), None, "not strings"),
    "bytes": (lambda: pa.array([b"a", b"b"]), None, "holds binary, not strings"),
    "not UTF-8": (bad_utf8, 2, "not UTF-8 at byte 0"),
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
def test_a_bad_row_of_parquet_is_named(tmp_path: Path, case: str) -> None:
    make, row, words = BAD_COLUMNS[case]
    column, path = make(), tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": column, "other": ["x"] * len(column)}), path)
    with pytest.raises(DataError, match=words) as caught:
        prepare(config(path, DataSource.PARQUET), tmp_path / "cache")
    assert (caught.value.path, caught.value.row) == (str(path), row)


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"no column 'text'; set data.field to one of 'body', 'n'"):
        prepare(config(tmp_path / "rows.parquet", DataSource.PARQUET), tmp_path / "cache")


def test_damage_inside_parquet_is_named_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"text": [f"row {i}" for i in range(600)]})
    pq.write_table(table, path, row_group_size=300, use_dictionary=False, compression="gzip")
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start + 40 : start + 200] = bytes(160)
    with pytest.raises(DataError, match="cannot be read") as caught:
        prepare(config(write(path, bytes(content)), DataSource.PARQUET), tmp_path / "cache")
    assert caught.value.path == str(path)
    assert caught.value.row is not None
    assert 250 < caught.value.row <= 301


@pytest.mark.parametrize("source", [DataSource.TEXT, DataSource.JSONL, DataSource.PARQUET])
def test_a_missing_path_is_an_error_that_names_it(tmp_path: Path, source: DataSource) -> None:
    with pytest.raises(DataError, match=r"gone/x: cannot be read: No such file or directory"):
        prepare(config(tmp_path / "gone" / "x", source), tmp_path / "cache")


@pytest.mark.parametrize("source", [DataSource.TEXT, DataSource.JSONL, DataSource.PARQUET])
def test_no_path_at_all_is_not_the_working_directory(tmp_path: Path, source: DataSource) -> None:
    with pytest.raises(ConfigurationError, match=f"data.source={source.name} needs data.path="):
        prepare(DataConfig(source=source), tmp_path / "cache")


WANTED = {DataSource.TEXT: r"\*\.txt \*\.text", DataSource.JSONL: r"\*\.jsonl", DataSource.PARQUET: r"\*\.parquet"}


@pytest.mark.parametrize("source", WANTED)
def test_a_directory_without_a_match_says_what_was_looked_for(tmp_path: Path, source: DataSource) -> None:
    write(tmp_path / "in" / "a.docx", b"x")
    with pytest.raises(DataError, match=f"in: holds no {WANTED[source]}"):
        prepare(config(tmp_path / "in", source), tmp_path / "cache")


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_an_empty_file_is_an_error_that_names_it_and_among_others_nothing(tmp_path: Path, name: str) -> None:
    for i in range(4):
        write(tmp_path / "in" / f"b{i}.txt", text_of(i))
    without = prepare(config(tmp_path / "in"), tmp_path / "cache").digest
    path = write(tmp_path / "in" / name, b"")
    assert prepare(config(tmp_path / "in"), tmp_path / "cache").digest == without
    with pytest.raises(DataError, match="holds no text") as caught:
        prepare(config(path), tmp_path / "cache")
    assert caught.value.path == str(path)


def test_rows_that_are_all_empty_make_an_empty_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl([{"text": ""}] * 3))
    with pytest.raises(DataError, match="holds no text"):
        prepare(config(path, DataSource.JSONL), tmp_path / "cache")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="holds no text"):
        prepare(config(tmp_path / "a.parquet", DataSource.PARQUET), tmp_path / "cache")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_a_truncated_or_mislabelled_compressed_file_is_named(tmp_path: Path, suffix: str) -> None:
    whole = COMPRESSIONS[suffix](os.urandom(300_000))
    for content in (whole[:-20], b"plain text that is not compressed"):
        path = write(tmp_path / f"a.txt{suffix}", content)
        with pytest.raises(DataError, match=r"cannot be read: .*; repair or remove the file") as caught:
            prepare(config(path), tmp_path / "cache")
        assert caught.value.path == str(path)


def test_a_truncated_compressed_jsonl_is_named_with_its_line(tmp_path: Path) -> None:
    content = gzip.compress(jsonl({"text": os.urandom(30).hex()} for _ in range(20_000)))
    path = write(tmp_path / "a.jsonl.gz", content[: len(content) // 2])
    with pytest.raises(DataError, match="cannot be read") as caught:
        prepare(config(path, DataSource.JSONL), tmp_path / "cache")
    assert caught.value.row is not None
    assert caught.value.row > 1000


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", GOOD)
    with pytest.raises(DataError, match="cannot be read: Parquet magic bytes not found") as caught:
        prepare(config(path, DataSource.PARQUET), tmp_path / "cache")
    assert (caught.value.path, caught.value.row) == (str(path), None)


def test_a_dangling_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"in/a\.txt: cannot be read: No such file"):
        prepare(config(tmp_path / "in"), tmp_path / "cache")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: is not a regular file"):
        prepare(config(tmp_path / "pipe"), tmp_path / "cache")


def test_an_unreadable_folder_is_not_left_out_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in" / "locked" / "a.txt", b"x")
    scandir = os.scandir

    def refusing(path: str) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"in/locked: cannot be read: Permission denied"):
        prepare(config(tmp_path / "in"), tmp_path / "cache")


def test_too_little_text_says_how_much_there_is_and_how_much_is_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"short\n")
    with pytest.raises(DataError) as caught:
        prepare(config(path, seq_len=64), tmp_path / "cache")
    assert str(caught.value) == (
        f"{path}: 8 tokens are for train, one window of data.seq_len=64 needs 65; "
        "add text, shorten data.seq_len, or lower data.validation_share=0.3"
    )
    path = write(tmp_path / "b.txt", b"longer\n" * 1000)
    with pytest.raises(DataError) as caught:
        prepare(config(path, seq_len=64, validation_share=0.01), tmp_path / "cache")
    assert str(caught.value) == (
        f"{path}: 0 tokens are for validation, one window of data.seq_len=64 needs 65; "
        "add text, shorten data.seq_len, or raise data.validation_share=0.01"
    )
