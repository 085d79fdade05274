"""Groups of real processes: they agree, break, are left from another thread, and meet again in the same process."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from holdfast.errors import Abort, CollectiveBroken, InvariantViolation
from holdfast.parallel import comms
from holdfast.parallel.comms import TorchCommunicator, broken_collective
from tests.support.local_cluster import LocalCluster, Member, RanksFailed

_CLUSTER = LocalCluster(deadline_s=30.0)
_TIMEOUT_S = 20.0
"""Of collectives: far beyond everything that is measured here."""


def _join(member: Member, name: str = "epoch", *, world: int = 0, timeout_s: float = _TIMEOUT_S) -> TorchCommunicator:
    return TorchCommunicator.join(
        member.rendezvous(name), rank=member.rank, world=world or member.world, backend="gloo", timeout_s=timeout_s
    )


# -- sums -------------------------------------------------------------------------------------------------------------


def _sums(member: Member) -> list[list[float]]:
    comm = _join(member)
    found = []
    for length in (1, 2, 3, 7, 100):
        draw = random.Random(100 * member.rank + length)
        found.append(comm.all_reduce_sum([draw.uniform(-1, 1) * 10 ** draw.randint(-9, 9) for _ in range(length)]))
    comm.close()
    return found


@pytest.mark.parametrize("world", [1, 2, 3])
def test_sums_have_the_same_bits_on_every_rank(world: int) -> None:
    first, *others = _CLUSTER.run(_sums, world)
    assert all(other == first for other in others)
    for length, sums in zip((1, 2, 3, 7, 100), first, strict=True):
        draws = [random.Random(100 * rank + length) for rank in range(world)]
        for total in sums:
            terms = [draw.uniform(-1, 1) * 10 ** draw.randint(-9, 9) for draw in draws]
            assert total == pytest.approx(math.fsum(terms), rel=1e-12, abs=1e-15 * max(map(abs, terms)))


# -- a peer is lost ---------------------------------------------------------------------------------------------------


def _all_reduce(member: Member, world: int) -> None:
    while True:
        dist.all_reduce(torch.ones(1 << 16))


def _broadcast(member: Member, world: int) -> None:
    while True:
        dist.broadcast(torch.ones(1 << 16), src=world - 1)


def _receive(member: Member, world: int) -> None:
    """From a rank that lives and receives too, where there is one: nothing ever tells these two of the loss."""
    survivors = world - 1
    dist.recv(torch.ones(1 << 16), src=(member.rank + 1) % survivors if survivors > 1 else survivors)


_BLOCKED: list[Callable[[Member, int], None]] = [_all_reduce, _broadcast, _receive]


class _Aborter(threading.Thread):
    """The other thread."""

    def __init__(self, comm: TorchCommunicator, *, after_s: float = 0.5) -> None:
        super().__init__()
        self._comm, self._after_s = comm, after_s
        self.start()

    def run(self) -> None:
        time.sleep(self._after_s)
        self.aborted_s = time.monotonic()
        self._comm.abort()


@dataclass(frozen=True)
class _Wake:
    """How a survivor left a collective."""

    message: str
    is_known: bool
    after_abort_s: float
    """Negative: it noticed the loss by itself."""
    closing_s: float


def _lose_one_after_the_other(member: Member, fault: int) -> list[_Wake]:
    """Epochs of ever fewer ranks. In each one the last rank is lost while the others are in a collective."""
    found = []
    for epoch, collective in enumerate(_BLOCKED):
        world = member.world - epoch
        comm = _join(member, f"epoch{epoch}", world=world)
        dist.all_reduce(torch.ones(1 << 16))
        if member.rank == world - 1:
            time.sleep(0.05)
            os.kill(os.getpid(), fault)
        aborter = _Aborter(comm)
        try:
            collective(member, world)
            raise AssertionError("the collective ended")
        except RuntimeError as error:
            message, is_known, woken_s = str(error), broken_collective(error), time.monotonic()
        aborter.join()
        start_s = time.monotonic()
        comm.close()
        found.append(_Wake(message, is_known, woken_s - aborter.aborted_s, time.monotonic() - start_s))
    comm = _join(member, "last", world=member.world - len(_BLOCKED))
    assert comm.all_reduce_sum([1.0]) == [float(comm.world)]
    comm.close()
    return found


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_survivors_of_a_lost_peer_are_woken_by_an_abort_and_meet_again(fault: int) -> None:
    lost = range(2, 2 + len(_BLOCKED))
    results = _CLUSTER.run(_lose_one_after_the_other, 2 + len(_BLOCKED), fault, lost=lost)
    for wakes in results[:2]:
        for wake in wakes:
            assert wake.is_known, wake.message
            assert wake.after_abort_s < 1.0 and wake.closing_s < 1.0
        # The last one waits for a living peer; only its own abort or that peer's, at the same time, can wake it.
        assert wakes[-1].after_abort_s > -0.2


# -- leaving ----------------------------------------------------------------------------------------------------------


def _late_abort(member: Member) -> None:
    old = _join(member, "old")
    assert old.all_reduce_sum([1.0]) == [2.0]  # both have joined
    was_open = _descriptors()
    old.abort()
    with pytest.raises(CollectiveBroken):
        old.all_reduce_sum([1.0])
    old.close()
    new = _join(member, "new")
    assert _descriptors() & was_open, "no descriptor was used again: this test shows nothing"
    late = _Aborter(old, after_s=0.0)
    for _ in range(20):
        assert new.all_reduce_sum([1.0]) == [2.0]
    late.join()
    old.close()  # twice
    assert new.all_reduce_sum([1.0]) == [2.0]
    new.abort()
    new.abort()
    new.close()


def _descriptors() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd")}


def test_a_late_abort_of_an_epoch_that_is_over_does_not_hurt_the_next_one() -> None:
    _CLUSTER.run(_late_abort, 2)


def _alone(member: Member) -> None:
    """Rank 0 of two, whose peer never comes."""

    def join(name: str, **options: Any) -> TorchCommunicator:
        return TorchCommunicator.join(member.rendezvous(name), rank=0, backend="gloo", **options)

    start_s = time.monotonic()
    with pytest.raises(Abort, match="waited for 1 of 2 ranks"):
        join("left", world=2, timeout_s=_TIMEOUT_S, should_leave=lambda: time.monotonic() > start_s + 0.2)
    assert 0.2 <= time.monotonic() - start_s < 1.0
    with pytest.raises(CollectiveBroken, match="ranks 1, 2 did not arrive in time"):
        join("late", world=3, timeout_s=0.3)
    assert time.monotonic() - start_s < 2.0

    comms._CONNECT_TIMEOUT_S = 0.5
    FileStore(member.rendezvous("died"), 2).set("arrived/1", "")
    with pytest.raises(CollectiveBroken):  # it arrived and was gone before it connected
        join("died", world=2, timeout_s=_TIMEOUT_S)
    assert time.monotonic() - start_s < 6.0

    comm = join("alone", world=1, timeout_s=_TIMEOUT_S)
    with pytest.raises(InvariantViolation, match="close it first"):
        join("again", world=1, timeout_s=_TIMEOUT_S)
    assert comm.all_reduce_sum([1.5]) == [1.5]
    comm.abort()
    comm.close()


def test_a_rank_that_waits_for_others_can_leave_or_names_them_in_time() -> None:
    _CLUSTER.run(_alone, 1)


def _slow(member: Member) -> float:
    """The deadline of connecting must not be the deadline of collectives."""
    comms._CONNECT_TIMEOUT_S = 0.3
    comm = _join(member, timeout_s=1.2)
    time.sleep(0.7 * member.rank)
    assert comm.all_reduce_sum([1.0]) == [2.0]
    start_s = time.monotonic()
    if member.rank == 0:
        with pytest.raises(CollectiveBroken):
            comm.all_reduce_sum([1.0])
    else:
        time.sleep(2.0)
    comm.close()
    return time.monotonic() - start_s


def test_a_collective_gets_its_own_deadline() -> None:
    waited_s, _ = _CLUSTER.run(_slow, 2)
    assert waited_s > 1.0


# -- sockets of others ------------------------------------------------------------------------------------------------


def _foreign_sockets(member: Member) -> tuple[int, int]:
    with contextlib.ExitStack() as sockets:
        server = sockets.enter_context(socket.create_server(("127.0.0.1", 0)))
        Path(member.rendezvous(f"server{member.rank}")).write_text(str(server.getsockname()[1]))
        opened, stop = list[tuple[socket.socket, socket.socket]](), threading.Event()

        def open_more() -> None:
            while not stop.is_set():
                near = sockets.enter_context(socket.create_connection(server.getsockname()))
                opened.append((near, sockets.enter_context(server.accept()[0])))
                time.sleep(0.001)

        other = threading.Thread(target=open_more)
        other.start()
        while len(opened) < 3:
            time.sleep(0.001)
        before = len(opened)
        comm = _join(member)
        during = len(opened) - before
        time.sleep(0.02)
        stop.set()
        other.join()
        after = len(opened) - before - during

        comm.abort()
        with pytest.raises(CollectiveBroken):
            comm.all_reduce_sum([1.0])
        for near, far in opened:
            near.settimeout(5.0)
            far.send(b"x")
            assert near.recv(1) == b"x"
        comm.close()
        return during, after


def test_sockets_of_others_survive_an_abort_whenever_they_were_opened() -> None:
    for during, after in _CLUSTER.run(_foreign_sockets, 3):
        assert during > 0 and after > 0


def _connected_peers(member: Member) -> None:
    """A connection to another rank that is none of the group's, made while the group is."""
    ports = Path(member.rendezvous("port"))
    with contextlib.ExitStack() as sockets:
        made = list[socket.socket]()

        def serve() -> None:
            server = sockets.enter_context(socket.create_server(("127.0.0.1", 0)))
            server.settimeout(10.0)
            ports.with_suffix(".tmp").write_text(str(server.getsockname()[1]))
            ports.with_suffix(".tmp").rename(ports)
            made.append(sockets.enter_context(server.accept()[0]))

        def call() -> None:
            while not ports.exists():
                time.sleep(0.0005)
            made.append(sockets.enter_context(socket.create_connection(("127.0.0.1", int(ports.read_text())))))

        other = threading.Thread(target=(serve, call)[member.rank])
        other.start()
        comm = _join(member)
        other.join()
        comm.all_reduce_sum([1.0])
        comm.abort()
        comm.close()
        made[0].settimeout(5.0)
        made[0].send(b"x")
        assert made[0].recv(1) == b"x"


def test_other_connections_between_two_ranks_survive_an_abort() -> None:
    _CLUSTER.run(_connected_peers, 2)


# -- the cluster itself -----------------------------------------------------------------------------------------------


def _fail(member: Member, how: str) -> int:
    print(f"rank {member.rank} was here", flush=True)
    if member.rank == 1 and how == "raises":
        raise ValueError("on purpose")
    if member.rank == 1 and how == "dies":
        os._exit(7)
    if how == "hangs":
        time.sleep(60.0)
    return os.getpid()


@pytest.mark.parametrize(
    ("how", "shown"),
    [
        ("raises", ["rank 1 raised:", "ValueError: on purpose"]),
        ("dies", ["rank 1 died, exit code 7", "rank 1 was here"]),
        ("hangs", ["rank 0 did not finish in time", "in _fail", "rank 1 did not finish in time"]),
    ],
)
def test_a_failed_rank_is_shown(how: str, shown: list[str]) -> None:
    with pytest.raises(RanksFailed) as failure:
        LocalCluster(deadline_s=2.0).run(_fail, 2, how)
    assert all(text in str(failure.value) for text in shown), str(failure.value)


def test_no_process_is_left() -> None:
    for pid in _CLUSTER.run(_fail, 2, "never"):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
