"""The process group of one membership epoch: joined on a fresh file, left from any thread, whatever blocks.

gloo has no abort: a rank that waits in a collective for a peer that has died elsewhere in the ring, or has been
stopped, waits until the group's timeout, and destroying the group from another thread does not wake it. Shutting
down the group's connections does. NCCL can abort by itself.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# torch.distributed hands these on without declaring it
from torch._C._distributed_c10d import FileStore, HashStore, Store
from torch.distributed.distributed_c10d import _set_pg_timeout

from holdfast.errors import Abort, CollectiveBroken, InvariantViolation
from holdfast.parallel.connections import Connections

__all__ = ["TorchCommunicator", "broken_collective"]

logger = logging.getLogger(__name__)

_POLL_S = 0.005
_CONNECT_TIMEOUT_S = 5.0
"""Deadline of connecting once everybody has arrived, the only wait that cannot be cut short; gloo takes it five times
for a peer that has frozen just then."""


def broken_collective(error: BaseException) -> bool:
    """Whether an exception means that a peer, or the way to it, is gone. gloo raises bare ``RuntimeError``."""
    if isinstance(error, (CollectiveBroken, dist.DistError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "Gloo", "NCCL", "process group"))


class TorchCommunicator:
    """Collectives of one epoch, besides those that the engine makes on the same group.

    ``abort`` and ``close`` may be called from any thread and more than once; everything else from the training thread.
    """

    def __init__(self, rank: int, world: int, device: torch.device, connections: Connections) -> None:
        self.rank, self.world = rank, world
        self._device, self._connections, self._is_closed = device, connections, False

    @classmethod
    def join(
        cls,
        rendezvous: str,
        *,
        rank: int,
        world: int,
        backend: str,
        timeout_s: float,
        should_leave: Callable[[], bool] = lambda: False,
    ) -> TorchCommunicator:
        """Collective. Meet the other ranks at a file that no earlier epoch has used.

        ``timeout_s`` is the deadline of arriving and of every collective afterwards. Raises: Abort when
        ``should_leave`` turns true before everybody is here; CollectiveBroken after the deadline.
        """
        if dist.is_initialized():
            raise InvariantViolation("this process still belongs to the group of an earlier epoch; close it first")
        store = FileStore(rendezvous, world)
        _await_everybody(store, rank, world, time.monotonic() + timeout_s, should_leave)
        connecting = timedelta(seconds=min(timeout_s, _CONNECT_TIMEOUT_S))
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=connecting)
        except RuntimeError as error:
            raise CollectiveBroken(rank, "join", _first_line(error)) from error
        _set_pg_timeout(timedelta(seconds=timeout_s))
        if backend == "nccl":
            return cls(rank, world, torch.device("cuda", torch.cuda.current_device()), Connections())
        connections = Connections.announced_in(Path(rendezvous).read_bytes())
        if world > 1 and not connections:
            dist.destroy_process_group()
            raise CollectiveBroken(rank, "join", f"of its {world - 1} connections none is left, or none is recognised")
        return cls(rank, world, torch.device("cpu"), connections)

    @classmethod
    def alone(cls, backend: str) -> TorchCommunicator:
        """A group of one, which needs no file to meet at."""
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
        return cls(0, 1, device, Connections())

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Collective. Sum float64 values over all ranks; the result has the same bits on each.

        Raises: CollectiveBroken when a peer is gone.
        """
        sums = torch.tensor(values, dtype=torch.float64, device=self._device)
        try:
            dist.all_reduce(sums)
        except RuntimeError as error:
            if not broken_collective(error):
                raise
            raise CollectiveBroken(self.rank, "all_reduce", _first_line(error)) from error
        return list(map(float, sums.tolist()))

    @property
    def can_abort_for_certain(self) -> bool:
        """NCCL has an abort of its own; gloo misses a collective now and then that begins at that very moment."""
        return self._device.type == "cuda"

    def abort(self) -> None:
        """Wake the training thread, here and at the peers, from whatever collective it is blocked in."""
        if self._device.type == "cuda":
            _abort_nccl()
        else:
            self._connections.shut_down()

    def close(self) -> None:
        """Leave the group. What the peers do, and whether they live, makes no difference."""
        if self._is_closed:
            return
        self._is_closed = True
        self.abort()
        with contextlib.suppress(RuntimeError):  # a group whose peers are gone may complain while it is destroyed
            dist.destroy_process_group()


def _await_everybody(store: Store, rank: int, world: int, deadline_s: float, should_leave: Callable[[], bool]) -> None:
    """torch waits for late ranks inside a call that nothing can interrupt; so nobody enters it before all are here."""
    store.set(f"arrived/{rank}", "")
    missing = [f"arrived/{other}" for other in range(world)]
    while missing := [key for key in missing if not store.check([key])]:
        if should_leave():
            raise Abort(f"rank {rank} left while it waited for {len(missing)} of {world} ranks")
        if time.monotonic() > deadline_s:
            late = ", ".join(key.partition("/")[2] for key in missing)
            raise CollectiveBroken(rank, "join", f"ranks {late} did not arrive in time")
        time.sleep(_POLL_S)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _abort_nccl() -> None:
    try:
        backend = dist.group.WORLD._get_backend(torch.device("cuda"))  # type: ignore[union-attr]  # it is initialised
        backend.abort()
    except (AttributeError, RuntimeError) as error:
        logger.warning("the NCCL group could not be aborted: %s", error)
