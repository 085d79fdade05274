"""What a snapshot says about itself, and how it notices that somebody changed the words."""

from __future__ import annotations

import random
from dataclasses import replace

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import ManifestMismatch
from holdfast.fault_tolerance.manifest import Entry, Manifest, damaged_slices, digest, lay_out
from holdfast.types import Quantization, SliceSpec

_DATA = bytes(range(200))
_ENTRIES = (
    Entry(SliceSpec("größe.weight/master", (4, 5), 0, 20, "float32"), 0, 80, digest(_DATA[:80])),
    Entry(
        SliceSpec("w/codes", (1 << 40,), 1 << 39, (1 << 39) + 10, "uint8", Quantization(256, "dynamic", "w/absmax")),
        128,
        10,
        digest(_DATA[128:138]),
    ),
    Entry(SliceSpec("empty", (), 0, 0, "bfloat16"), 192, 0, digest(b"")),
)
_MANIFEST = Manifest(
    version=150,
    epoch=3,
    rank=1,
    world=4,
    scalars={"step": 150, "lr": 0.1, "nested": {"steps": [1, 2]}, "none": None},
    entries=_ENTRIES,
    config_digest="9c1e",
)


def test_a_manifest_survives_the_trip() -> None:
    assert Manifest.from_bytes(_MANIFEST.to_bytes()) == _MANIFEST


def test_a_manifest_without_slices_survives_the_trip() -> None:
    empty = replace(_MANIFEST, entries=(), scalars={})
    assert Manifest.from_bytes(empty.to_bytes()) == empty


def test_floats_in_scalars_keep_every_bit() -> None:
    values = [0.1, 1 / 3, 1e-310, 3.4028234663852886e38]
    found = Manifest.from_bytes(replace(_MANIFEST, scalars={"x": values}).to_bytes())
    assert [v.hex() for v in found.scalars["x"]] == [v.hex() for v in values]  # type: ignore[attr-defined]


def test_a_manifest_is_an_arrow_table_for_everybody_else() -> None:
    table = pa.ipc.open_stream(_MANIFEST.to_bytes()).read_all()
    assert table.column("name").to_pylist() == ["größe.weight/master", "w/codes", "empty"]
    assert table.column("block_size").to_pylist() == [None, 256, None]


def test_the_digest_is_the_published_xxh3_128() -> None:
    assert digest(b"") == "99aa06d3014798d86001c324468d497f"


def test_one_flipped_bit_anywhere_is_noticed() -> None:
    intact, chance = _MANIFEST.to_bytes(), random.Random(0)
    for bit in chance.sample(range(8 * len(intact)), 3000):
        damaged = bytearray(intact)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ManifestMismatch, match="does not match its own digest"):
            Manifest.from_bytes(bytes(damaged))


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 500])
def test_a_manifest_cut_short_is_noticed(length: int) -> None:
    with pytest.raises(ManifestMismatch):
        Manifest.from_bytes(_MANIFEST.to_bytes()[:length])


def _sealed(stream: bytes) -> bytes:
    return stream + bytes.fromhex(digest(stream))


def _foreign_table() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"a": [1]})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


@pytest.mark.parametrize("content", [b"", b"not arrow at all", _foreign_table()])
def test_intact_bytes_that_are_no_manifest_are_refused(content: bytes) -> None:
    with pytest.raises(ManifestMismatch, match="not a manifest of Holdfast"):
        Manifest.from_bytes(_sealed(content))


def test_a_format_of_the_future_is_refused_and_names_its_writer() -> None:
    future = replace(_MANIFEST, format_version=2, writer="holdfast 9.9").to_bytes()
    with pytest.raises(ManifestMismatch, match=r"format_version=2.* reads 1.*holdfast 9\.9"):
        Manifest.from_bytes(future)


def test_damaged_slices_are_named_and_the_others_are_not() -> None:
    assert list(damaged_slices(_DATA, _MANIFEST)) == []
    changed = bytearray(_DATA)
    changed[100] ^= 1  # between two slices: nobody's
    changed[130] ^= 1
    (found,) = damaged_slices(changed, _MANIFEST)
    assert (found.name, found.rank, found.version) == ("w/codes", 1, 150)
    assert found.want == _ENTRIES[1].digest != found.have


def test_data_that_ends_before_its_slices_do_is_damaged() -> None:
    assert [d.name for d in damaged_slices(_DATA[:130], _MANIFEST)] == ["w/codes"]


@given(st.lists(st.integers(0, 10_000)))
def test_slices_are_aligned_in_order_and_never_overlap(lengths: list[int]) -> None:
    offsets, total = lay_out(lengths)
    ends = [offset + length for offset, length in zip(offsets, lengths, strict=True)]
    assert all(offset % 64 == 0 for offset in offsets)
    assert all(end <= begin for end, begin in zip(ends, [*offsets[1:], total], strict=False))
    assert total - sum(lengths) < 64 * max(len(lengths), 1)
