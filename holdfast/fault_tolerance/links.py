"""A keeper's way to its peers: protocol messages that may be lost, and bytes that must come in time."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from typing import Any, cast

from holdfast.errors import PeerError, SnapshotError
from holdfast.fault_tolerance.brick_store import BrickStore
from holdfast.fault_tolerance.buffer import Bytes
from holdfast.fault_tolerance.peers import Bulk, PeerClient, PeerServer
from holdfast.fault_tolerance.protector import Protector

__all__ = ["PeerLinks"]

logger = logging.getLogger(__name__)

_SAY_S, _FETCH_S, _EXAMINE_S = 5.0, 30.0, 300.0
"""Deadlines: of a message, of a chunk, of checking every digest of a snapshot."""
_BACKLOG = 64
"""Messages waiting for a peer that does not take them; more are lost, and said again later."""


class PeerLinks:
    """See :class:`holdfast.fault_tolerance.protector.Links`. Without a token there are no peers and no socket."""

    def __init__(self, node: int, token: str) -> None:
        self._node, self._token = node, token
        self._server: PeerServer | None = None
        self._peers: dict[int, _Peer] = {}
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        """Where peers reach this keeper; empty without a token."""
        return "" if self._server is None else self._server.address

    def serve(self, protector: Protector, bricks: BrickStore) -> None:
        """Answer peers from now on."""

        def owner(request: Mapping[str, Any]) -> Protector | BrickStore:
            return bricks if request["what"] == "brick" else protector

        if self._token:
            handlers = {
                "say": lambda message, _: protector.hear(message),
                "fetch": lambda request, _: Bulk(None, [owner(request).serve(request).data]),
                "examine": lambda request, _: owner(request).examine(request),
            }
            self._server = PeerServer(self._token, handlers)

    def connect(self, addresses: Mapping[int, str]) -> None:
        """Where the others are now; connections to those that have moved are closed."""
        with self._lock:
            for node, address in addresses.items():
                known = self._peers.get(node)
                if node != self._node and (known is None or known.address != address):
                    self._peers[node] = _Peer(address, self._token)
                    if known is not None:
                        known.close()

    def say(self, node: int, message: Mapping[str, object]) -> None:
        """Returns at once; the message may be lost."""
        peer = self._peers.get(node)
        if peer is not None:
            peer.say(message)

    def fetch(self, node: int, request: Mapping[str, object], into: Bytes) -> None:
        """Bulk bytes; ``request`` as ``serve`` of :class:`Protector` or :class:`BrickStore` understands it.

        Raises: SnapshotError.
        """
        self._peer(node).request("fetch", request, _FETCH_S, into=into.data)

    def ask(self, node: int, request: Mapping[str, object]) -> Sequence[str]:
        """What is wrong with a peer's copy, see ``examine`` of the same. Raises: SnapshotError."""
        return cast(Sequence[str], self._peer(node).request("examine", request, _EXAMINE_S))

    def slow_down(self, bytes_per_s: float, seconds: float) -> None:
        """What peers fetch from here comes at this rate for a while; at once if there are no peers."""
        if self._server is not None:
            self._server.limit(bytes_per_s)
            timer = threading.Timer(seconds, self._server.limit, [0.0])
            timer.daemon = True  # a keeper that ends does not wait for it
            timer.start()

    def close(self) -> None:
        """No peer is answered or asked any more."""
        with self._lock:
            peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            peer.close()
        if self._server is not None:
            self._server.close()

    def _peer(self, node: int) -> _Peer:
        peer = self._peers.get(node)
        if peer is None:
            raise SnapshotError(f"node {self._node} has not been told where the keeper of node {node} is")
        return peer


class _Peer:
    """One other keeper. A thread says what is to be said, so that nobody waits for a peer that does not listen."""

    def __init__(self, address: str, token: str) -> None:
        self.address = address
        self._client = PeerClient(address, token)
        self._messages: queue.Queue[Mapping[str, object] | None] = queue.Queue(_BACKLOG)
        threading.Thread(target=self._speak, name=f"say-{address}", daemon=True).start()

    def say(self, message: Mapping[str, object]) -> None:
        try:
            self._messages.put_nowait(message)
        except queue.Full:
            logger.info("a message to %s is lost: it takes none", self.address)

    def request(self, method: str, request: Mapping[str, object], patience_s: float, **how: Any) -> object:
        try:
            return self._client.request(method, request, deadline_s=patience_s, **how)
        except PeerError as error:
            raise SnapshotError(f"the keeper at {self.address} did not answer: {error}") from error

    def close(self) -> None:
        self._client.close()
        while True:
            try:
                self._messages.put_nowait(None)
                return
            except queue.Full:
                self._messages.get_nowait()

    def _speak(self) -> None:
        while (message := self._messages.get()) is not None:
            try:
                self._client.request("say", message, deadline_s=_SAY_S)
            except PeerError as error:
                logger.info("a message to %s is lost: %s", self.address, error)
