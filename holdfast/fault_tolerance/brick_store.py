"""A keeper's pieces of frozen files: taken in once by digest, beside the training, and given to whoever needs them.

When a run begins, data pieces come from the file and parity is coded over the peers' pieces. A keeper that takes a lost
one's place asks its peers first. See :mod:`holdfast.fault_tolerance.bricks` for what a piece is.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import xxhash

from holdfast.errors import SnapshotError
from holdfast.fault_tolerance.bricks import Brick, Read, join, read_piece, restore_piece
from holdfast.fault_tolerance.buffer import Bytes
from holdfast.fault_tolerance.parity import real_memory
from holdfast.fault_tolerance.protector import Links, go_last

__all__ = ["BrickStore", "fetch_brick"]

logger = logging.getLogger(__name__)

_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
"""Between two looks at what the peers have."""
_PATIENCE_S = 600.0
"""For peers that have not taken in theirs; the next epoch begins to wait anew."""


@dataclass(frozen=True, slots=True)
class _Piece:
    brick: Brick
    number: int
    memory: Bytes
    digest: str
    """xxh3 of the bytes when they were taken in."""

    def damage(self) -> str:
        have = xxhash.xxh3_128_hexdigest(self.memory.data)
        return "" if have == self.digest else f"is damaged: xxh3 {have}, not {self.digest}"


@dataclass(slots=True)
class _Work:
    """What this keeper has done since it was started, in bytes."""

    read: int = 0
    """Of data pieces, from files."""
    received: int = 0
    """From peers."""
    coded: int = 0
    """Of pieces that were computed from others."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why a piece is not here, by the digest of its brick."""


class BrickStore:
    """The pieces of one node. Methods may be called from any thread and return at once."""

    def __init__(self, node: int, links: Links) -> None:
        self._node, self._links = node, links
        self._bricks: Mapping[str, Brick] = {}
        self._pieces: dict[str, _Piece] = {}
        self._work = _Work()
        self._is_closed = threading.Event()
        self._taker = ThreadPoolExecutor(1, "bricks", initializer=go_last)

    def hold(self, bricks: Sequence[Brick], *, is_new: bool) -> None:
        """Take in this node's pieces that are not here yet, in the background. ``is_new``: peers have none either."""
        self._bricks = {brick.file.digest: brick for brick in bricks if self._node in brick.nodes}
        self._taker.submit(self._take_all, list(self._bricks.values()), is_new)

    def serve(self, request: Mapping[str, Any]) -> Bytes:
        """Bytes of a piece. Raises: SnapshotError when it is not here."""
        held = self._pieces.get(request["digest"])
        if held is None or held.number != request["piece"]:
            raise SnapshotError(self._absent(request))
        return held.memory[request["start"] : request["stop"]]

    def examine(self, request: Mapping[str, Any]) -> list[str]:
        """What is wrong with a piece, in words. One that is damaged is dropped, and taken in again."""
        held = self._pieces.get(request["digest"])
        if held is None or held.number != request["piece"]:
            return [self._absent(request)]
        damage = held.damage()
        if damage:
            self._pieces.pop(request["digest"], None)
            self._work.failed[request["digest"]] = damage
            self._taker.submit(self._take_all, list(self._bricks.values()), False)
        return [f"its piece {damage}"] if damage else []

    @property
    def status(self) -> dict[str, object]:
        """For the driver; empty without bricks. Bytes as in :class:`_Work`."""
        if not self._bricks:
            return {}
        held, work = list(self._pieces.values()), self._work
        return {
            "is_whole": self._pieces.keys() >= self._bricks.keys(),
            "held": sum(piece.memory.size for piece in held),
            "read": work.read,
            "received": work.received,
            "coded": work.coded,
            "failed": [f"{self._bricks[digest].file.path}: {why}" for digest, why in list(work.failed.items())],
        }

    def close(self) -> None:
        """Nothing more is taken in."""
        self._is_closed.set()
        self._taker.shutdown(wait=False, cancel_futures=True)

    def _absent(self, request: Mapping[str, Any]) -> str:
        why = self._work.failed.get(request["digest"], "not taken in yet")
        return f"node {self._node} has not piece {request['piece']} of {request['digest']}: {why}"

    # -- in the background ----------------------------------------------------------------------------------------

    def _take_all(self, bricks: Sequence[Brick], is_new: bool) -> None:
        for brick in bricks:
            held = self._pieces.get(brick.file.digest)
            if held is not None and held.brick == brick:
                continue
            try:
                self._take(brick, is_new)
                self._work.failed.pop(brick.file.digest, None)
            except Exception as error:  # the boundary of a thread: the driver is told, and training does not mind
                logger.warning("%s is not taken in: %s", brick.file.path, error)
                self._work.failed[brick.file.digest] = str(error)

    def _take(self, brick: Brick, is_new: bool) -> None:
        number = brick.nodes.index(self._node)
        out, ends_s = real_memory(brick.bytes_of(number), "holdfast-brick"), time.monotonic() + _PATIENCE_S
        said = dict[str, str]()
        for fill, pause_s in zip(self._ways(brick, number, is_new), _pauses(), strict=False):
            try:
                fill(brick, number, out)
            except SnapshotError as error:
                said[fill.__name__] = str(error)
                if self._is_closed.wait(pause_s) or time.monotonic() > ends_s:
                    raise SnapshotError("; ".join(said.values())) from error
                continue
            self._pieces[brick.file.digest] = _Piece(brick, number, out, xxhash.xxh3_128_hexdigest(out.data))
            return
        raise SnapshotError("; ".join(said.values()))

    def _ways(self, brick: Brick, number: int, is_new: bool) -> Iterator[Callable[[Brick, int, Bytes], None]]:
        """In which order to try them. The file is tried once: it does not get better by itself, and may be long."""
        file = [self._read] if number < brick.data else []
        if not brick.parity:
            return iter(file)
        first = [*file, self._restore] if is_new else [self._restore, *file]
        return itertools.chain(first, itertools.repeat(self._restore))

    def _read(self, brick: Brick, number: int, out: Bytes) -> None:
        read_piece(brick, number, out)
        self._work.read += out.size

    def _restore(self, brick: Brick, number: int, out: Bytes) -> None:
        intact = _intact(brick, self._links, besides=number)
        restore_piece(brick, number, [piece for piece, why in intact.items() if not why], self._counted(brick), out)
        self._work.coded += out.size

    def _counted(self, brick: Brick) -> Read:
        fetch = _reader(brick, self._links)

        def read(piece: int, place: range, into: Bytes) -> None:
            fetch(piece, place, into)
            self._work.received += into.size

        return read


def fetch_brick(brick: Brick, links: Links, file: BinaryIO) -> None:
    """Write the whole brick, verified, from what the keepers hold.

    Raises: SnapshotError, with what every keeper said when they hold too little; OSError of ``file``.
    """
    found = _intact(brick, links)
    sources = [piece for piece, why in found.items() if not why]
    if not sources or len(sources) < brick.data:
        said = "; ".join(why for why in found.values() if why) or "no keeper holds a piece of it"
        raise SnapshotError(f"{len(sources)} of {len(brick.nodes)} pieces are there: {said}")
    join(brick, sources, _reader(brick, links), file)


def _intact(brick: Brick, links: Links, *, besides: int = -1) -> dict[int, str]:
    """Of each piece what is wrong with it, nothing for those that can be read."""
    return {piece: _examined(brick, piece, links) for piece in range(len(brick.nodes)) if piece != besides}


def _examined(brick: Brick, piece: int, links: Links) -> str:
    request = {"what": "brick", "digest": brick.file.digest, "piece": piece}
    try:
        return "; ".join(links.ask(brick.nodes[piece], request))
    except SnapshotError as error:
        return f"node {brick.nodes[piece]}: {error}"


def _reader(brick: Brick, links: Links) -> Read:
    def read(piece: int, place: range, into: Bytes) -> None:
        request = {"what": "brick", "digest": brick.file.digest, "piece": piece}
        links.fetch(brick.nodes[piece], {**request, "start": place.start, "stop": place.stop}, into)

    return read


def _pauses() -> Iterator[float]:
    return (min(_PAUSE_S * 2**turn, _LONGEST_PAUSE_S) for turn in itertools.count())
