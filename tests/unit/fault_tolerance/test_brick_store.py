"""Keepers with pieces of frozen files: taken in once, given to peers and workers, and back after a loss."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from holdfast.clock import FakeClock
from holdfast.errors import SnapshotError
from holdfast.fault_tolerance import brick_store
from holdfast.fault_tolerance.brick_store import fetch_brick
from holdfast.fault_tolerance.bricks import Brick, BrickFile
from holdfast.fault_tolerance.keeper import Keeper
from holdfast.fault_tolerance.links import PeerLinks

_TOKEN = "secret of the run"
_CONTENT = bytes(range(256)) * 40 + b"and an end"


@dataclass
class _Cluster:
    """Keepers of one run in this process, over real sockets."""

    keepers: dict[int, Keeper] = field(default_factory=dict)

    def start(self, node: int) -> Keeper:
        self.keepers[node] = keeper = Keeper(
            node, "run", limit_bytes=1 << 20, buffers=3, lease_s=60.0, clock=FakeClock(0.0), token=_TOKEN
        )
        return keeper

    def lose(self, node: int) -> None:
        self.keepers.pop(node).close()

    def hold(self, *bricks: Brick, is_new: bool = True) -> None:
        """As the driver asks for it: JSON."""
        sent = json.loads(json.dumps([asdict(brick) for brick in bricks]))
        for keeper in self.keepers.values():
            keeper.hold_bricks(sent, self.addresses, is_new)

    @property
    def addresses(self) -> dict[str, str]:
        return {str(node): keeper.address for node, keeper in self.keepers.items()}

    def status(self, node: int) -> Mapping[str, Any]:
        found: Mapping[str, Any] = json.loads(json.dumps(self.keepers[node].pulse({})))["bricks"]
        return found

    def statuses(self, key: str) -> list[int]:
        return [self.status(node)[key] for node in sorted(self.keepers)]

    def await_whole(self) -> None:
        _await(lambda: all(self.status(node).get("is_whole") for node in self.keepers))

    def fetch(self, brick: Brick) -> bytes:
        """As a worker does."""
        out = io.BytesIO()
        with closing(PeerLinks(-1, _TOKEN)) as links:
            links.connect({int(node): address for node, address in self.addresses.items()})
            fetch_brick(brick, links, out)
        return out.getvalue()

    def piece(self, brick: Brick, node: int) -> bytes:
        number = brick.nodes.index(node)
        request = {"digest": brick.file.digest, "piece": number, "start": 0, "stop": brick.bytes_of(number)}
        return self.keepers[node]._bricks.serve(request).tobytes()


def _await(holds: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + 20.0
    while not holds():
        assert time.monotonic() < ends_s, "in vain"
        time.sleep(0.01)


@pytest.fixture
def cluster() -> Iterator[_Cluster]:
    found = _Cluster()
    for node in range(3):
        found.start(node)
    yield found
    for keeper in found.keepers.values():
        keeper.close()


@pytest.fixture
def file(tmp_path: Path) -> BrickFile:
    path = tmp_path / "base"
    path.write_bytes(_CONTENT)
    return BrickFile("adapter.base", str(path), hashlib.sha256(_CONTENT).hexdigest(), len(_CONTENT))


def test_every_byte_is_read_sent_and_coded_once(cluster: _Cluster, file: BrickFile) -> None:
    brick, half = Brick(file, (0, 1, 2), 1), len(_CONTENT) // 2
    cluster.hold(brick)
    cluster.await_whole()
    assert [cluster.piece(brick, node) for node in (0, 1)] == [_CONTENT[:half], _CONTENT[half:]]
    assert cluster.piece(brick, 2) == bytes(a ^ b for a, b in zip(_CONTENT[:half], _CONTENT[half:], strict=True))
    told = {key: cluster.statuses(key) for key in ("held", "read", "received", "coded")}
    assert told == {"held": [half] * 3, "read": [half, half, 0], "received": [0, 0, 2 * half], "coded": [0, 0, half]}
    Path(file.path).unlink()  # nobody looks at it again
    cluster.hold(brick, brick, is_new=False)
    for keeper in cluster.keepers.values():
        keeper._bricks._taker.submit(int).result(timeout=20.0)  # behind what was asked for
    assert told == {key: cluster.statuses(key) for key in told}
    assert not any(cluster.statuses("failed"))
    assert cluster.fetch(brick) == _CONTENT


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_new_keeper_gets_the_piece_of_the_lost_one_from_the_others(
    lost: int, cluster: _Cluster, file: BrickFile
) -> None:
    brick = Brick(file, (0, 1, 2), 1)
    cluster.hold(brick)
    cluster.await_whole()
    before = cluster.piece(brick, lost)
    if lost:  # whether it is there or not: the others are asked first
        Path(file.path).unlink()
    cluster.lose(lost)
    assert cluster.fetch(brick) == _CONTENT
    cluster.start(lost)
    cluster.hold(brick, is_new=False)
    cluster.await_whole()
    assert cluster.piece(brick, lost) == before
    assert (cluster.status(lost)["read"], cluster.status(lost)["coded"]) == (0, len(before))


def test_a_damaged_piece_is_not_used_and_is_made_anew(cluster: _Cluster, file: BrickFile) -> None:
    brick = Brick(file, (0, 1, 2), 1)
    cluster.hold(brick)
    cluster.await_whole()
    before = cluster.piece(brick, 1)
    cluster.keepers[1]._bricks._pieces[file.digest].memory[7] ^= 1
    assert cluster.fetch(brick) == _CONTENT
    cluster.await_whole()
    assert cluster.piece(brick, 1) == before


def test_a_file_that_is_damaged_by_now_is_not_taken_in(
    cluster: _Cluster, file: BrickFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brick_store, "_PATIENCE_S", 0.0)
    Path(file.path).write_bytes(_CONTENT[:-1] + b"!")
    brick = Brick(file, (0, 1, 2), 1)
    cluster.hold(brick)
    _await(lambda: all(cluster.statuses("failed")))
    assert all("base has sha256" in str(cluster.status(node)["failed"]) for node in (0, 1))
    assert cluster.statuses("held") == [0, 0, 0]
    with pytest.raises(SnapshotError) as refused:
        cluster.fetch(brick)
    assert "0 of 3 pieces are there" in str(refused.value)
    assert all(f"node {node} has not piece {node}" in str(refused.value) for node in range(3))


def test_without_parity_the_pieces_are_the_file_and_come_from_the_file_again(
    cluster: _Cluster, file: BrickFile
) -> None:
    brick = Brick(file, (0, 1, 2), 0)
    cluster.hold(brick)
    cluster.await_whole()
    assert b"".join(cluster.piece(brick, node) for node in range(3)) == _CONTENT == cluster.fetch(brick)
    cluster.lose(1)
    with pytest.raises(SnapshotError, match=r"2 of 3 pieces are there: node 1"):
        cluster.fetch(brick)
    cluster.start(1)
    cluster.hold(brick, is_new=False)
    cluster.await_whole()
    assert cluster.fetch(brick) == _CONTENT
    assert (cluster.status(1)["read"], cluster.status(1)["coded"]) == (brick.bytes_of(1), 0)
    Path(file.path).unlink()
    cluster.lose(1)
    cluster.start(1)
    cluster.hold(brick, is_new=False)
    _await(lambda: bool(cluster.status(1)["failed"]))  # at once: there is nothing to wait for


def test_a_single_node_holds_the_whole_file(cluster: _Cluster, file: BrickFile) -> None:
    brick = Brick(file, (1,), 0)
    cluster.hold(brick)
    _await(lambda: bool(cluster.status(1)["is_whole"]))
    assert cluster.fetch(brick) == _CONTENT
    assert cluster.status(0) == {}  # which has nothing to do with it


def test_a_keeper_that_is_closed_waits_for_nobody(cluster: _Cluster, file: BrickFile) -> None:
    cluster.lose(0)
    cluster.lose(1)
    cluster.hold(Brick(file, (0, 1, 2), 1))
    began_s, taker = time.monotonic(), cluster.keepers[2]._bricks._taker
    cluster.lose(2)
    taker.shutdown(wait=True)
    assert time.monotonic() - began_s < 10.0
