"""What runs inside a fleet's processes, independent of what started them."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Protocol, cast

from holdfast.clock import SystemClock
from holdfast.fault_tolerance.keeper import Keeper
from holdfast.launch.fleet import Role

__all__ = ["Host", "KeeperHost", "make_host"]


class Host(Protocol):
    """A process body: methods take and return JSON values."""

    def ready(self) -> dict[str, object]: ...

    def hang_up(self) -> None:
        """The driver has gone or lets us go: free everything, return soon."""
        ...


class KeeperHost(Keeper):
    """A keeper that can be asked whether it is up and told to go."""

    def ready(self) -> dict[str, object]:
        return {"pid": os.getpid(), "host": socket.gethostname(), "address": self.address}

    def hang_up(self) -> None:
        self.close()


def make_host(role: Role, spec: Mapping[str, object]) -> Host:
    """Build the body of a process; torch is imported in workers only."""
    if role is Role.WORKER:
        from holdfast.launch.worker import WorkerHost

        return WorkerHost(spec)
    return KeeperHost(
        int(cast(int, spec["node"])),
        str(spec["run_tag"]),
        limit_bytes=int(cast(int, spec["limit_bytes"])),
        buffers=int(cast(int, spec["buffers"])),
        lease_s=float(cast(float, spec["lease_s"])),
        persist_mb_per_s=float(cast(float, spec.get("persist_mb_per_s", 0.0))),
        clock=SystemClock(),
        token=str(spec.get("token", "")),
        parity_ratio=float(cast(float, spec.get("parity_ratio", 0.0))),
    )
