"""The driver's part in keeping frozen files: it tells the keepers which pieces to hold, and the user when they do."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

from holdfast.events import BricksHeld, EventSink, Protection
from holdfast.fault_tolerance.bricks import Brick
from holdfast.fault_tolerance.protection import REDUCED
from holdfast.launch.calls import Calls
from holdfast.launch.crew import keeper_address
from holdfast.launch.pulse import Pulse

__all__ = ["FrozenFiles"]

_NOTHING = BricksHeld(0, 0, {}, 0, 0, 0, {})


class FrozenFiles:
    """Used from the conductor's thread. Without bricks it does nothing."""

    def __init__(self, bricks: Sequence[Brick], calls: Calls, events: EventSink, pulse: Pulse) -> None:
        self._bricks, self._calls, self._events, self._pulse = bricks, calls, events, pulse
        self._nodes: Collection[int] = ()
        """Whose keepers have been asked last."""
        self._said: set[str] = set()
        self._told = _NOTHING

    @property
    def exist(self) -> bool:
        return bool(self._bricks)

    def hold(self, addresses: Mapping[int, str]) -> None:
        """An epoch has begun: the keepers at these addresses take in, in the background, what they do not have."""
        if not self._bricks:
            return
        is_new = not self._nodes
        self._nodes, self._pulse.bricks = addresses.keys(), {}
        bricks, places = (
            [asdict(brick) for brick in self._bricks],
            {str(n): address for n, address in addresses.items()},
        )
        for node in sorted(addresses):
            self._calls.tell(keeper_address(node), "hold_bricks", bricks, places, is_new)

    def tell_news(self, world: int) -> None:
        """Once all pieces are there and each of ``world`` ranks has a snapshot; and what keeps a piece away."""
        status = {node: found for node in self._nodes if (found := self._pulse.bricks.get(node))}
        for node, found in status.items():
            for why in set(found["failed"]) - self._said:
                self._said.add(why)
                self._events.emit(Protection(REDUCED, f"node {node} does not hold its piece of a frozen file: {why}"))
        if status and len(status) == self._holders and all(found["is_whole"] for found in status.values()):
            self._tell(status, world)

    @property
    def _holders(self) -> int:
        return len({node for brick in self._bricks for node in brick.nodes} & set(self._nodes))

    def _tell(self, status: Mapping[int, Mapping[str, Any]], world: int) -> None:
        newest = {rank: max(held, key=_age) for rank, held in sorted(self._pulse.versions.items()) if held}
        if len(newest) < world:
            return
        event = BricksHeld(
            bricks=len(self._bricks),
            bytes=sum(brick.file.size for brick in self._bricks),
            held={str(node): found["held"] for node, found in sorted(status.items())},
            read=sum(found["read"] for found in status.values()),
            sent=sum(found["received"] for found in status.values()),
            coded=sum(found["coded"] for found in status.values()),
            snapshot={str(rank): slot["bytes"] for rank, slot in newest.items()},
        )
        if replace(event, snapshot=self._told.snapshot) != self._told:
            self._told = event
            self._events.emit(event)


def _age(slot: Mapping[str, Any]) -> tuple[int, int]:
    return cast(int, slot["version"]), cast(int, slot["epoch"])
