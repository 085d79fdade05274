"""Which of Ray's nodes each virtual node lives on. Knows of Ray only what it is told; moves nodes that fall silent.

Ray takes 14 s to call a node dead whose processes were killed and more than a minute for one that is frozen, and what
is placed there in the meantime waits as long. So each node's raylet is asked directly before anything is placed on it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from holdfast.errors import ConfigurationError

__all__ = ["RayNode", "RayNodes", "answers"]

_PATIENCE_S = 2.0
_ASKED_AT_ONCE = 16
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000 04 00 00000000")
"""What every gRPC client says first: the preface of HTTP/2 and empty settings (RFC 9113, 3.4). A server answers with
its own settings before it looks at any call, so no call is made."""


@dataclass(frozen=True, slots=True)
class RayNode:
    """A node that Ray believes alive."""

    name: str
    """Ray's id of it."""
    address: str
    port: int
    """Of its raylet."""
    gpus: float = 0.0
    zone: str = ""

    def __str__(self) -> str:
        return f"Ray node {self.name[:8]} at {self.address}"


def answers(node: RayNode) -> bool:
    """Whether its raylet says anything. Waits a few seconds at most; that a port takes the connection proves nothing,
    because the kernel does that for a frozen process, too."""
    try:
        with socket.create_connection((node.address, node.port), _PATIENCE_S) as line:
            line.settimeout(_PATIENCE_S)
            line.sendall(_GREETING)
            return bool(line.recv(1))
    except OSError:
        return False


class RayNodes:
    """Homes of ``count`` virtual nodes, spread as evenly as those that answer allow. Nobody leaves one that answers.

    ``look`` lists what Ray believes alive, ``crowd`` counts our processes on one of them by name, ``gpus`` is what each
    virtual node needs, ``doomed`` are names of nodes that will be taken away.
    Raises: ConfigurationError when no Ray node has so many GPUs.
    """

    def __init__(
        self,
        count: int,
        look: Callable[[], Sequence[RayNode]],
        *,
        crowd: Callable[[str], int] = lambda _: 0,
        gpus: float = 0.0,
        answers: Callable[[RayNode], bool] = answers,
        doomed: Collection[str] = (),
    ) -> None:
        self._look, self._crowd, self._gpus, self._answers = look, crowd, gpus, answers
        self._homes: list[RayNode] = []
        self._doomed: frozenset[str] = frozenset(doomed)
        self._stranded: set[str] = set()
        """Homes that do not answer, but whose tenants found no other; not asked again before ``look_again``."""
        known = look()
        usable: Sequence[RayNode] = self._answering(known)
        if not usable:  # TLS or a firewall: asking is of no use here, so Ray is believed
            usable, self._answers = known, lambda _: True
        usable = self._staying(usable) or usable
        for _ in range(count):
            home = self._roomiest(usable)
            if home is None:
                most = max((node.gpus for node in known), default=0)
                raise ConfigurationError(
                    f"launch.gpus_per_worker: each of launch.nodes={count} needs {gpus:g} GPUs on one Ray node, and "
                    f"the {len(known)} there are have {most:g} at most; use fewer nodes or workers, or add Ray nodes"
                )
            self._homes.append(home)

    @property
    def homes(self) -> Sequence[RayNode]:
        """By virtual node."""
        return tuple(self._homes)

    def leave_silent(self, node: int) -> dict[int, RayNode]:
        """Ask the home of a virtual node. If it is dead or does not answer, everybody moves out of it, and out of every
        other home of that kind; who has moved, and from where. Who finds no room elsewhere is stranded."""
        home = self._homes[node]
        if home.name in self._stranded:
            return {}
        known = {other.name: other for other in self._look()}
        if known.pop(home.name, None) is not None and self._answers(home):
            return {}
        usable = self._answering(known.values())
        answering = {other.name for other in usable}
        moved = {}
        for tenant, old in enumerate(self._homes):
            if old.name in answering:
                continue
            new = self._roomiest(self._staying(usable))
            if new is None:
                self._stranded.add(old.name)
            else:
                self._homes[tenant], moved[tenant] = new, old
        return moved

    def is_stranded(self, node: int) -> bool:
        """Nothing can be started for it now; Ray starts nothing on a node that drains."""
        return self._homes[node].name in self._stranded or self._homes[node].name in self._doomed

    def shun(self, doomed: Collection[str]) -> dict[int, RayNode]:
        """These Ray nodes, by name, will be taken away: nobody moves there, and who lives on one moves out of it when
        there is room elsewhere; who has moved now, and from where."""
        self._doomed = frozenset(doomed)
        if not any(home.name in self._doomed for home in self._homes):
            return {}
        usable = self._answering(self._look())
        moved = {}
        for tenant, old in enumerate(self._homes):
            new = self._roomiest(self._staying(usable)) if old.name in self._doomed else None
            if new is not None:
                self._homes[tenant], moved[tenant] = new, old
        return moved

    def look_again(self) -> None:
        """There may be new nodes, or old ones may answer again."""
        self._stranded.clear()

    def _staying(self, nodes: Iterable[RayNode]) -> list[RayNode]:
        return [node for node in nodes if node.name not in self._doomed]

    def _answering(self, nodes: Iterable[RayNode]) -> list[RayNode]:
        found = sorted(nodes, key=lambda node: node.name)
        with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
            return [node for node, answered in zip(found, pool.map(self._answers, found), strict=True) if answered]

    def _roomiest(self, nodes: Sequence[RayNode]) -> RayNode | None:
        """Fewest virtual nodes; of several the one with most processes, which has spares; None if none has room."""

        def tenants(node: RayNode) -> int:
            return sum(home.name == node.name for home in self._homes)

        with_room = [node for node in nodes if (tenants(node) + 1) * self._gpus <= node.gpus]
        return min(with_room, key=lambda node: (tenants(node), -self._crowd(node.name), node.name), default=None)
