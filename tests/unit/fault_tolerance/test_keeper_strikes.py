"""What a keeper does to itself, its node and its storage on purpose, and a worker to its own snapshots."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from holdfast import failpoints
from holdfast.errors import SnapshotError
from holdfast.fault_tolerance import chaos
from holdfast.fault_tolerance import keeper as keeper_module
from holdfast.fault_tolerance.arena import Arena
from holdfast.fault_tolerance.damage import flip_snapshot
from holdfast.fault_tolerance.impairment import STORAGE
from holdfast.fault_tolerance.ledger import Ledger
from holdfast.fault_tolerance.peers import Bulk, PeerClient, PeerServer
from holdfast.fault_tolerance.strikes import ChaosException
from holdfast.fault_tolerance.versions import held_versions
from tests.support.keepers import attach, make_keeper, offer, writer


@pytest.fixture(autouse=True)
def nothing_stays_broken() -> Iterator[None]:
    yield
    failpoints.disarm()
    STORAGE.heal()


def _bytes(arena: Arena) -> list[bytes]:
    return [buffer.data.tobytes() for buffer in arena.buffers]


def _changed_bits(before: list[bytes], after: list[bytes]) -> list[int]:
    """Per buffer."""
    pairs = zip(before, after, strict=True)
    return [int(np.unpackbits(np.frombuffer(a, np.uint8) ^ np.frombuffer(b, np.uint8)).sum()) for a, b in pairs]


def test_one_bit_of_the_newest_snapshot_flips_and_its_digests_tell() -> None:
    keeper = make_keeper()
    arena = attach(keeper)
    snapshots = writer(keeper)
    offer(snapshots, 3)
    offer(snapshots, 4, commit=False)
    before = _bytes(arena)
    flip_snapshot(arena, chaos.parse("flip rank=0 step=4 bit=5"))
    assert sorted(_changed_bits(before, _bytes(arena))) == [0] * (len(before) - 1) + [1]
    assert keeper.verify(0, 3) == []
    assert len(keeper.verify(0, 4)) == 1
    flip_snapshot(arena, chaos.parse("flip rank=0 step=4 what=manifest seed=2"))
    assert [held.slot.version for held in held_versions(arena)] == [3]


def test_nothing_flips_where_there_is_no_snapshot() -> None:
    arena = attach(make_keeper())
    flip_snapshot(arena, chaos.parse("flip rank=0 step=4"))
    assert held_versions(arena) == []


def test_a_keeper_is_struck_at_its_failpoint_once_although_it_is_armed_again(tmp_path: Path) -> None:
    keeper = make_keeper()
    entries = [("keeper_exception node=0 step=4 at=keeper.before_vote", "test")]
    for _ in range(2):
        keeper.arm(str(tmp_path), entries)
    failpoints.hit("keeper.before_vote", 3)
    with pytest.raises(ChaosException):
        failpoints.hit("keeper.before_vote", 4)
    keeper.arm(str(tmp_path), entries)
    failpoints.hit("keeper.before_vote", 5)
    assert [event.number for event in Ledger(tmp_path).news()] == [0]


@pytest.mark.parametrize(("word", "number"), [("node_sigkill", signal.SIGKILL), ("node_sigstop", signal.SIGSTOP)])
def test_a_keeper_takes_the_workers_of_its_node_along_and_goes_last(
    word: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []

    def kill(pid: int, what: int) -> None:
        sent.append((pid, what))
        if pid == 111:
            raise ProcessLookupError

    keeper = make_keeper()
    monkeypatch.setattr(keeper_module.os, "kill", kill)
    keeper.strike(f"{word} node=0 step=4", [111, 222])
    assert sent == [(111, number), (222, number), (os.getpid(), number)]


def test_a_keeper_with_a_full_disk_says_so_and_recovers(tmp_path: Path) -> None:
    keeper = make_keeper()
    offer(writer(keeper), 4)
    keeper.strike("disk_full step=4 for=600")
    with pytest.raises(SnapshotError, match="no space left"):
        keeper.persist(0, 4, str(tmp_path), "step-00000004")
    STORAGE.heal()
    assert keeper.persist(0, 4, str(tmp_path), "step-00000004")["bytes"]


def test_a_slow_link_passes_the_same_bytes_and_is_as_fast_as_before_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pieces at a rate of one per twentieth of a second: the second has to wait."""
    payload = bytes(range(256)) * (8 << 10)
    server = PeerServer("secret", {"get": lambda *_: Bulk(None, [payload])}, "127.0.0.1")
    client = PeerClient(server.address, "secret")
    waits: list[float] = []
    wait = server._closing.wait
    monkeypatch.setattr(server._closing, "wait", lambda seconds: waits.append(seconds) or wait(seconds))
    try:
        for rate in (0.0, 20e6, 0.0):
            server.limit(rate)
            client.request("get", into=(got := bytearray(len(payload))), deadline_s=20.0)
            assert got == payload
            assert (max(waits, default=0.0) > 0.01) == (rate > 0)
            waits.clear()
    finally:
        client.close()
        server.close()


def test_parity_flips_in_the_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = make_keeper()
    attach(keeper)
    parity, asked = np.zeros(64, dtype=np.uint8), list[dict[str, object]]()
    monkeypatch.setattr(keeper._protector, "parity_keys", lambda: [(3, 1), (4, 1)])
    monkeypatch.setattr(keeper._protector, "serve", lambda request: asked.append(request) or parity)
    keeper.strike("flip rank=0 step=4 what=parity bit=9")
    assert parity.tolist() == [0, 2, *[0] * 62]
    assert {(request["what"], request["rank"], request["version"]) for request in asked} == {("parity", 0, 4)}
