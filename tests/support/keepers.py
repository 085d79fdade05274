"""Keepers inside the test's own process, workers' hands on their memory, and a fleet that carries calls to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from holdfast.clock import FakeClock
from holdfast.fault_tolerance.arena import Arena, ArenaRef
from holdfast.fault_tolerance.keeper import Keeper
from holdfast.fault_tolerance.snapshot import ArenaSnapshotter, required_bytes
from holdfast.launch.fleet import Address, Completion, Report, Role
from holdfast.launch.protocol import describe_error
from tests.support.snapshots import RUN_TAG, AtOnce, filled_state

__all__ = ["LocalFleet", "Sent", "attach", "make_keeper", "offer", "writer"]


def make_keeper(
    node: int = 0, *, limit_bytes: int = 1 << 26, buffers: int = 3, clock: FakeClock | None = None
) -> Keeper:
    return Keeper(
        node, RUN_TAG, limit_bytes=limit_bytes, buffers=buffers, lease_s=60.0, clock=clock or FakeClock(1000.0)
    )


def attach(keeper: Keeper, rank: int = 0, roster: int = 0) -> Arena:
    """What a worker does first; the reference travels as JSON."""
    return Arena.attach(ArenaRef(**json.loads(json.dumps(keeper.admit(rank, roster)))))


def writer(
    keeper: Keeper, rank: int = 0, *, world: int = 1, epoch: int = 1, persist_every: int = 0, config_digest: str = "cfg"
) -> ArenaSnapshotter:
    """A worker's snapshotter over the memory of ``rank``, with room for ``filled_state``."""
    arena = attach(keeper, rank)
    arena.reserve(required_bytes(filled_state(0)))
    return AtOnce(arena, rank=rank, world=world, epoch=epoch, config_digest=config_digest, persist_every=persist_every)


def offer(snapshots: ArenaSnapshotter, *versions: int, commit: bool = True) -> None:
    """Take versions as a training loop does: each one is committed before the next one is offered."""
    for version in versions:
        assert snapshots.offer(filled_state(version), version)
        if commit:
            snapshots.commit(version)


@dataclass(frozen=True)
class Sent:
    """A call as it left the driver."""

    number: int
    target: Address
    method: str
    args: tuple[object, ...]


class LocalFleet:
    """A fleet whose processes are objects of the test. Arguments and answers travel as JSON.

    ``poll`` carries out what was called since, in order; methods named in ``held_back`` wait until they are not named
    any more. Calls to a process that is not there never complete.
    """

    def __init__(self, bodies: Mapping[Address, object] | None = None) -> None:
        self.bodies = dict(bodies or {})
        self.held_back: set[str] = set()
        self.sent: list[Sent] = []
        self._open: list[Sent] = []
        self.before: Callable[[Sent], None] = lambda sent: None
        """Called before a call is carried out."""

    @classmethod
    def of_keepers(cls, *keepers: Keeper) -> LocalFleet:
        """Keepers of nodes 0, 1, ..."""
        return cls({Address(Role.KEEPER, node): keeper for node, keeper in enumerate(keepers)})

    def hosts(self, nodes: int) -> Sequence[str]:
        return ("localhost",) * nodes

    def host_of(self, target: Address) -> str:
        return "localhost"

    def start(self, target: Address, node: int, spec: Mapping[str, object]) -> int:
        return self.call(target, "ready")

    def call(self, target: Address, method: str, *args: object) -> int:
        sent = Sent(len(self.sent) + 1, target, method, tuple(json.loads(json.dumps(args))))
        self.sent.append(sent)
        self._open.append(sent)
        return sent.number

    def poll(self, timeout_s: float) -> list[Report]:
        due = [s for s in self._open if s.method not in self.held_back and s.target in self.bodies]
        self._open = [s for s in self._open if s not in due]
        return [self._carry_out(sent) for sent in due]

    def _carry_out(self, sent: Sent) -> Completion:
        self.before(sent)
        try:
            result = getattr(self.bodies[sent.target], sent.method)(*sent.args)
            return Completion(sent.number, sent.target, json.loads(json.dumps(result)))
        except Exception as error:  # as in a process of its own
            return Completion(sent.number, sent.target, error=describe_error(error))

    def kill(self, target: Address) -> None:
        self.bodies.pop(target, None)
        self._open = [s for s in self._open if s.target != target]

    def release(self, target: Address) -> None:
        self.kill(target)

    def close(self) -> None:
        self.bodies.clear()

    def methods(self) -> list[str]:
        """Names of all calls so far."""
        return [sent.method for sent in self.sent]
