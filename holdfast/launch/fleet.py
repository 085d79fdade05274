"""Processes as seen by the conductor: start, call, poll, kill. Nothing here decides anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from holdfast.launch.run_metrics import Meter

__all__ = ["Address", "Completion", "Draining", "Fleet", "Lost", "Report", "Role"]


class Role(str, Enum):
    """What a process is for."""

    KEEPER = "keeper"
    WORKER = "worker"


@dataclass(frozen=True, slots=True)
class Address:
    """A process. A worker's number is never used twice; a keeper's is its node."""

    role: Role
    number: int

    def __str__(self) -> str:
        return f"{self.role.value} {self.number}"


@dataclass(frozen=True, slots=True)
class Completion:
    """A call has ended: ``error`` is None, or one exception's class name and traceback."""

    call: int
    target: Address
    result: object = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """A process has gone; its open calls will not complete."""

    target: Address
    cause: str


@dataclass(frozen=True, slots=True)
class Draining:
    """A machine will be taken away."""

    host: str
    within_s: float
    """Infinite if nobody has said."""
    reason: str


Report = Completion | Lost


class Fleet(Protocol):
    """Starts processes and carries calls to them. Used from one thread, the conductor's.

    ``start`` and ``call`` return at once. ``poll`` waits at most ``timeout_s`` and returns what
    happened since; nothing it returns refers to a process after ``kill``. Calls to one process run in order,
    except those named in ``hosts.CONTROL_METHODS`` and ``hosts.STORAGE_METHODS``, which run beside the others.
    ``close`` ends every process within a deadline and removes what the fleet made.
    """

    def hosts(self, nodes: int) -> Sequence[str]:
        """Name of the machine under each (virtual) node; changes when a node moves, before its losses are reported."""
        ...

    def draining(self) -> Mapping[int, Draining]:
        """(Virtual) nodes whose machine will be taken away, as far as is known; asked often, and returns at once. When
        there is room elsewhere the node moves: ``hosts`` changes, and what lives on the old machine stays there."""
        ...

    def zones(self, nodes: int) -> Sequence[str]:
        """Failure domain of each (virtual) node; "" where nobody knows."""
        ...

    def unshared(self, marker: Path, word: str) -> list[str]:
        """One sentence for each node that does not read ``word`` in the file ``marker``, which the driver has written,
        or runs another Holdfast; empty where all nodes are this host. May take as long as a process needs to start."""
        ...

    def adopt(self, run_tag: str) -> Sequence[Address]:
        """Keepers of another attempt whose driver has died and that have not left yet; from now on they can be called,
        and are to be released."""
        ...

    def start(self, target: Address, node: int, spec: Mapping[str, object]) -> int:
        """Start a process; the returned call completes with ``ready``'s result once it can work."""
        ...

    def call(self, target: Address, method: str, *args: object) -> int:
        """Run a method of the process; the answer arrives as a Completion with this number."""
        ...

    def poll(self, timeout_s: float) -> list[Report]: ...

    def host_of(self, target: Address) -> str:
        """Name of the machine that a process is on, as in ``hosts``; "" of one that has gone: its last answers may come
        later than that."""
        ...

    def kill(self, target: Address) -> None:
        """SIGKILL; no Lost is reported for it. Unknown targets are ignored."""
        ...

    def release(self, target: Address) -> None:
        """End a process that is not needed any more, politely."""
        ...

    def metrics_endpoints(self) -> Mapping[str, str]:
        """URLs where nodes export metrics for Prometheus, by the node's name."""
        ...

    def meter(self) -> Meter | None:
        """What takes the run's numbers there; None where nothing exports any."""
        ...

    def close(self) -> None: ...
