"""What runs inside a fleet's processes, independent of what started them."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Mapping
from typing import Protocol, cast

from holdfast.clock import SystemClock
from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.keeper import Keeper
from holdfast.launch.fleet import Role

__all__ = ["CONTROL_METHODS", "STORAGE_METHODS", "Host", "KeeperHost", "describe_error", "make_host"]

CONTROL_METHODS = frozenset(
    {"abort", "stop", "drain", "kill", "pulse", "fence", "admit", "inventory", "forget_above", "quarantine"}
)
"""Calls that must not wait behind a long one: an epoch that runs, a checkpoint that is written."""
STORAGE_METHODS = frozenset({"persist"})
"""Calls that take as long as the storage does; they wait for each other, and nothing else waits for them."""


class Host(Protocol):
    """A process body: methods take and return JSON values."""

    def ready(self) -> dict[str, object]: ...

    def hang_up(self) -> None:
        """The driver has gone or lets us go: free everything, return soon."""
        ...


class KeeperHost(Keeper):
    """A keeper that can be asked whether it is up and told to go."""

    def ready(self) -> dict[str, object]:
        return {"pid": os.getpid(), "host": socket.gethostname()}

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
        clock=SystemClock(),
    )


def describe_error(error: BaseException) -> str:
    """One line naming the error, then the traceback, unless the message alone says what to do."""
    head = f"{type(error).__name__}: {error}"
    if isinstance(error, ConfigurationError):
        return head
    return head + "\n" + "".join(traceback.format_exception(error))
