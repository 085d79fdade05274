"""The processes of a run as its driver knows them: starting and killing them, and who lives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from holdfast.launch.calls import Calls
from holdfast.launch.fleet import Address, Completion, Fleet, Report, Role

__all__ = ["Crew", "ProcessSpecs", "keeper_address", "worker_address"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProcessSpecs:
    """What a process is told when it starts; JSON values."""

    worker: Mapping[str, object]
    keeper: Mapping[str, object]


def worker_address(number: int) -> Address:
    return Address(Role.WORKER, number)


def keeper_address(node: int) -> Address:
    return Address(Role.KEEPER, node)


class Crew:
    """Used from the conductor's thread. Concludes nothing: it is told who has gone."""

    def __init__(self, fleet: Fleet, calls: Calls, specs: ProcessSpecs) -> None:
        self._fleet, self._calls, self._specs = fleet, calls, specs
        self.keepers: set[int] = set()
        """Nodes whose keeper has been ready and is not known to have gone."""
        self.workers_of_ranks: dict[int, int] = {}
        self._keeper_starts: dict[int, int] = {}
        """The call that started a node's keeper, unless that keeper has gone."""
        self._living: dict[int, tuple[int, int]] = {}
        """Node and pid of every worker that has been ready and is not known to have gone."""
        self._killed: set[Address] = set()
        """Since the last look at what the fleet reports."""

    @property
    def workers(self) -> set[int]:
        """Those that have a rank."""
        return set(self.workers_of_ranks.values())

    def pids_at(self, node: int) -> list[int]:
        """Of the node's workers."""
        return [pid for home, pid in self._living.values() if home == node]

    def poll(self, timeout_s: float) -> Sequence[Report]:
        """What has happened, as ``Fleet.poll``."""
        self._killed.clear()
        return self._fleet.poll(timeout_s)

    def is_old_news(self, report: Report) -> bool:
        """It was killed meanwhile: not to be taken for news of the keeper that has its place by now."""
        return report.target in self._killed

    # -- workers --------------------------------------------------------------------------------------------------

    def start_worker(
        self, worker: int, node: int, *, ready: Callable[[int, str], None], failed: Callable[[str], None]
    ) -> None:
        """``ready`` gets its pid and host."""
        target = worker_address(worker)

        def then(answer: Completion) -> None:
            if answer.error is None:
                pid = int(cast(Mapping[str, Any], answer.result)["pid"])
                self._living[worker] = (node, pid)
                ready(pid, self._fleet.host_of(target))
            else:
                self._kill(target)
                failed(answer.error)

        self._calls.track(self._fleet.start(target, node, self._specs.worker), target, then)

    def worker_gone(self, worker: int, cause: str) -> None:
        """Its open calls fail."""
        self._living.pop(worker, None)  # its pid may soon be somebody else's
        self._calls.forget(worker_address(worker), cause)

    def kill_worker(self, worker: int, reason: str) -> None:
        logger.info("worker %d is killed: %s", worker, reason)
        node, pid = self._living.pop(worker, (-1, 0))
        if node in self.keepers:  # a frozen process does not hear what some fleets ask it to do; its host does
            self._calls.tell(keeper_address(node), "kill", pid)
        self._kill(worker_address(worker))
        self._calls.forget(worker_address(worker), reason)
        self.workers_of_ranks = {r: w for r, w in self.workers_of_ranks.items() if w != worker}

    def release_workers(self) -> None:
        """Those that have a rank may end by themselves."""
        for worker in self.workers:
            self._fleet.release(worker_address(worker))

    # -- keepers --------------------------------------------------------------------------------------------------

    def start_keeper(self, node: int, *, ready: Callable[[str, str], None], failed: Callable[[str], None]) -> None:
        """``ready`` gets the address where other keepers reach it, and its host. Neither is called once it has gone."""
        target = keeper_address(node)
        self._kill(target)  # one that has not become ready in time
        call = self._fleet.start(target, node, {**self._specs.keeper, "node": node})
        self._keeper_starts[node] = call

        def then(answer: Completion) -> None:
            if self._keeper_starts.get(node) != call:
                return
            if answer.error is None:
                self.keepers.add(node)
                ready(cast(Mapping[str, Any], answer.result)["address"], self._fleet.host_of(target))
            else:
                failed(answer.error)

        self._calls.track(call, target, then)

    def keeper_gone(self, node: int, cause: str) -> None:
        """Killed, if it lives, and its open calls fail."""
        self.keepers.discard(node)
        self._keeper_starts.pop(node, None)
        self._kill(keeper_address(node))
        self._calls.forget(keeper_address(node), cause.splitlines()[0])

    def _kill(self, target: Address) -> None:
        self._killed.add(target)
        self._fleet.kill(target)
