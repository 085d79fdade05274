"""Faults on purpose, carried out: by the driver itself, in its keepers, or by those who strike themselves once told."""

from __future__ import annotations

import logging
from collections.abc import Callable

from holdfast.errors import SnapshotError
from holdfast.fault_tolerance import chaos, strikes
from holdfast.fault_tolerance.damage import damage_checkpoint
from holdfast.fault_tolerance.impairment import STORAGE
from holdfast.fault_tolerance.storage import open_storage
from holdfast.launch.calls import Calls
from holdfast.launch.crew import Crew, keeper_address, worker_address
from holdfast.launch.durable import DurableTier
from holdfast.launch.injection import Injector
from holdfast.launch.protection import Protection

__all__ = ["Striker"]

logger = logging.getLogger(__name__)


class Striker:
    """Used from the conductor's thread. What is due, and what has struck, its injector knows."""

    def __init__(
        self,
        injector: Injector,
        crew: Crew,
        calls: Calls,
        *,
        durable: DurableTier,
        protection: Protection,
        keeper_fails: Callable[[int, str], None],
    ) -> None:
        """``keeper_fails``: the keeper of a node is to be given up at once, and why."""
        self._injector, self._crew, self._calls = injector, crew, calls
        self._durable, self._protection, self._keeper_fails = durable, protection, keeper_fails
        STORAGE.heal()  # of what an earlier run of this process has suffered

    def begin(self, version: int) -> None:
        """An epoch starts from there."""
        self._injector.begin(version)

    def strike_due(self, step: int, now: float) -> None:
        """What is due once ``step`` steps are finished, and nobody but the driver can do."""
        for fault in self._injector.due(step, has_checkpoint=self._durable.newest_step >= 0):
            self.report(now)  # some do not return
            self._strike(fault)

    def listen(self, step: int, now: float) -> None:
        """Take up what somebody outside wishes, and tell what has struck."""
        if self._injector.listen(now, step):
            self.arm_workers()
            for node in self._crew.keepers:
                self.arm_keeper(node)
        self._injector.report(now)

    def report(self, now: float) -> None:
        """Tell at once what has struck."""
        self._injector.report(now, is_urgent=True)

    def close(self, now: float) -> None:
        """The run ends: nothing strikes any more."""
        self._injector.close(now)

    def arm_workers(self) -> None:
        """Tell those that have a rank what they do not find in their configuration."""
        entries = self._injector.for_workers()
        for worker in self._crew.workers if entries else ():
            self._calls.tell(worker_address(worker), "inject", entries)

    def arm_keeper(self, node: int) -> None:
        """Tell the keeper of the node what strikes at its failpoints."""
        entries = self._injector.for_keepers()
        if entries:
            self._calls.tell(keeper_address(node), "arm", self._injector.ledger_folder, entries)

    def _strike(self, fault: chaos.ChaosFault) -> None:
        if fault.action is chaos.Action.KEEPER_SIGKILL:
            self._keeper_fails(fault.number, f"killed by {fault.source.partition(':')[0]} ({fault})")
        elif fault.target is chaos.Target.DRIVER:
            strikes.strike(fault, {})
        elif fault.target is chaos.Target.CHECKPOINT:
            self._damage_checkpoint(fault)
        else:
            self._strike_keepers(fault)

    def _strike_keepers(self, fault: chaos.ChaosFault) -> None:
        """What happens in the keeper of a node, in that of a rank, or in all keepers and here."""
        is_rank, roster = fault.target is chaos.Target.WORKER, self._protection.roster
        if is_rank and fault.number >= roster.world:
            logger.warning("chaos: %s, but there are only %d ranks now", fault, roster.world)
            return
        node = roster.node_of(fault.number) if is_rank else fault.number
        pids = self._crew.pids_at(node)
        for keeper in sorted(self._crew.keepers) if node == chaos.ALL else [node]:
            self._calls.tell(keeper_address(keeper), "strike", str(fault), pids)
        if node == chaos.ALL and fault.target is chaos.Target.STORAGE:
            strikes.strike(fault, dict.fromkeys((chaos.Action.DISK_FULL, chaos.Action.SLOW_DISK), STORAGE.suffer))

    def _damage_checkpoint(self, fault: chaos.ChaosFault) -> None:
        try:
            path = damage_checkpoint(open_storage(self._durable.uri), fault)
            logger.warning("chaos: %s, %s", fault, path or "but there is no checkpoint")
        except SnapshotError as error:
            logger.warning("chaos: %s: %s", fault, error)
