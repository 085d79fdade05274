"""A file divided over nodes: whichever of them are lost, as many as parity says, what is left gives the exact bytes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import SnapshotError
from holdfast.fault_tolerance import bricks as module
from holdfast.fault_tolerance.bricks import Brick, BrickFile, deal_bricks, held_bytes, join, read_piece, restore_piece
from holdfast.fault_tolerance.buffer import Bytes


@pytest.fixture(scope="module", autouse=True)
def _small_chunks() -> Iterator[None]:
    """So that a few hundred bytes are many of them, and end in the middle of one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_CHUNK_BYTES", 48)
        yield


@dataclass
class _Pieces:
    """All pieces of a file, as the nodes that hold them would read them."""

    brick: Brick
    held: dict[int, Bytes]

    @classmethod
    def cut(cls, data: bytes, k: int, m: int) -> _Pieces:
        """By slicing and, for parity, by the code itself over all data."""
        brick = Brick(BrickFile("base", "", hashlib.sha256(data).hexdigest(), len(data)), tuple(range(k + m)), m)
        held = {piece: np.frombuffer(data, np.uint8)[_span(brick.place(piece))] for piece in range(k)}
        found = cls(brick, held)
        for piece in range(k, k + m):
            held[piece] = found.restored(piece, range(k))
        return found

    def restored(self, piece: int, sources: Collection[int]) -> Bytes:
        out = np.full(self.brick.bytes_of(piece), 0xAA, np.uint8)
        restore_piece(self.brick, piece, sources, self.read, out)
        return out

    def joined(self, sources: Collection[int]) -> bytes:
        file = io.BytesIO()
        join(self.brick, sources, self.read, file)
        return file.getvalue()

    def read(self, piece: int, place: range, into: Bytes) -> None:
        assert 0 <= place.start < place.stop <= self.held[piece].size
        into[:] = self.held[piece][_span(place)]


def _span(place: range) -> slice:
    return slice(place.start, place.stop)


@st.composite
def _cut(draw: st.DrawFn) -> tuple[bytes, _Pieces, list[int]]:
    """A file, its pieces, and as many lost ones as parity restores."""
    data, k, m = draw(st.binary(max_size=700)), draw(st.integers(1, 6)), draw(st.integers(0, 3))
    lost = draw(st.permutations(range(k + m)))[:m]
    return data, _Pieces.cut(data, k, m), list(lost)


@given(_cut())
@settings(max_examples=80, deadline=None)
def test_any_k_pieces_give_the_exact_file_and_every_other_piece(found: tuple[bytes, _Pieces, list[int]]) -> None:
    data, pieces, lost = found
    left = [piece for piece in pieces.held if piece not in lost]
    whole = {piece: held.copy() for piece, held in pieces.held.items()}
    for piece in lost:
        del pieces.held[piece]
    assert pieces.joined(left) == data
    for piece in lost:
        assert np.array_equal(pieces.restored(piece, left), whole[piece])


@given(_cut())
@settings(max_examples=30, deadline=None)
def test_all_nodes_together_hold_the_file_and_its_parity_and_nothing_more(
    found: tuple[bytes, _Pieces, list[int]],
) -> None:
    data, pieces, _ = found
    k, m = pieces.brick.data, pieces.brick.parity
    assert sum(held.size for held in pieces.held.values()) == len(data) + m * -(-len(data) // k)
    assert sum(held_bytes([pieces.brick], node) for node in range(k + m)) == len(data) + m * -(-len(data) // k)


@given(_cut(), st.data())
@settings(max_examples=30, deadline=None)
def test_a_wrong_bit_anywhere_is_never_given_out_as_the_file(
    found: tuple[bytes, _Pieces, list[int]], draw: st.DataObject
) -> None:
    data, pieces, lost = found
    left = [piece for piece in pieces.held if piece not in lost]
    filled = [piece for piece in left if pieces.held[piece].size]
    if not filled:
        return
    piece, k = draw.draw(st.sampled_from(filled)), pieces.brick.data
    place = draw.draw(st.integers(0, pieces.held[piece].size - 1))
    pieces.held[piece] = pieces.held[piece].copy()
    pieces.held[piece][place] ^= 1
    lost_there = [gone for gone in lost if gone < k and place < pieces.brick.bytes_of(gone)]
    if piece < k or (piece in left[:k] and lost_there):
        with pytest.raises(SnapshotError, match="has sha256"):
            pieces.joined(left)
    else:  # nobody has looked at it
        assert pieces.joined(left) == data


@given(st.binary(max_size=300), st.integers(1, 5), st.integers(0, 2))
@settings(max_examples=30, deadline=None)
def test_a_data_piece_is_read_from_the_file_and_only_from_the_right_one(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, k: int, m: int
) -> None:
    path = tmp_path_factory.mktemp("file") / "base"
    brick = Brick(BrickFile("base", str(path), hashlib.sha256(data).hexdigest(), len(data)), tuple(range(k + m)), m)
    outs = [np.empty(brick.bytes_of(piece), np.uint8) for piece in range(k)]
    path.write_bytes(data)
    for piece, out in enumerate(outs):
        read_piece(brick, piece, out)
    assert b"".join(out.tobytes() for out in outs) == data
    for wrong in (data + b"x", data[:-1] + bytes([data[-1] ^ 1]) if data else b"x"):
        path.write_bytes(wrong)
        with pytest.raises(SnapshotError, match="has sha256"):
            read_piece(brick, 0, outs[0])


def _files(sizes: Sequence[int]) -> list[BrickFile]:
    return [BrickFile("adapter.tasks", f"/{n}", f"{n:064x}", size) for n, size in enumerate(sizes)]


def test_files_go_to_the_group_that_holds_least_and_each_digest_once() -> None:
    groups = {(0, 2, 4): 1, (1, 3): 1}
    large, *small = _files([1000, 10, 10, 600, 5])
    dealt = deal_bricks([large, large, *small], groups)
    assert [brick.nodes for brick in dealt] == [(0, 2, 4), (1, 3), (1, 3), (1, 3), (0, 2, 4)]
    assert [brick.file for brick in dealt] == [large, *small]
    assert held_bytes(dealt, 4) == 500 + 3  # parity of 1000 and of 5 bytes over two


def test_too_few_pieces_are_said_to_be_too_few() -> None:
    pieces = _Pieces.cut(bytes(range(200)), 3, 1)
    with pytest.raises(SnapshotError, match=r"2 other pieces of .* are there, and 3 are needed"):
        pieces.joined([1, 3])
