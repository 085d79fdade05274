"""The channel between keepers: requests with JSON arguments, answers with JSON and, if need be, gigabytes.

A frame is a header (magic ``HFP1``, length of the JSON in 32 bits, length of the payload in 64 bits, big endian), the
JSON, and the payload as it lies in memory; nothing is ever unpickled. A connection begins with a hello in which both
sides prove that they know the run's token without sending it. What follows is not encrypted: it belongs on the
cluster's own network. Bulk answers go from the memory of one keeper into the memory of the other, in pieces.

Everything has a deadline: a peer that is frozen, unplugged or slow costs its caller a :class:`PeerError` and the
connection, and the next request connects again.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.errors import PeerError

__all__ = ["Bulk", "Handler", "PeerClient", "PeerServer"]

logger = logging.getLogger(__name__)

_PROTOCOL = 1
_HEADER = struct.Struct("!4sIQ")
_MAGIC = b"HFP1"
_PIECE_BYTES = 1 << 20
_JSON_LIMIT_BYTES = 16 << 20
_HELLO_LIMIT_BYTES = 4 << 10
"""From somebody who has proved nothing yet."""
_ERROR_LIMIT = 2000
"""Characters of an error's message that are passed on."""
_HELLO_DEADLINE_S = 5.0
_REQUEST_DEADLINE_S = 30.0
"""For the rest of a request that has begun."""
_IDLE_S = 120.0
"""The server closes a connection that has been quiet for so long. The client does so earlier, lest they cross."""
_IDLE_CONNECTIONS = 4
_CLOSE_DEADLINE_S = 5.0

Json = Any  # whatever json.dumps takes
Buffer = Any  # a contiguous buffer: bytes, memoryview, a numpy array; typing has no name for it before Python 3.12


@dataclass(frozen=True, slots=True)
class Bulk:
    """An answer with bytes. ``release`` is called when they are sent, or cannot be: until then they must not change."""

    result: Json
    buffers: Sequence[Buffer]
    release: Callable[[], None] | None = None


Handler = Callable[[Json, memoryview], "Json | Bulk"]
"""Gets the arguments and the payload of a request, and returns the answer; called from many threads at once. What it
raises becomes the caller's :class:`PeerError`."""


class _Closed(OSError):
    """The other side has closed the connection."""


class FrameRefused(OSError):
    """What arrives, or should be sent, does not follow the protocol."""


# -- frames ---------------------------------------------------------------------------------------------------------


class _Wire:
    """One connection. Every call ends by its deadline (monotonic seconds); after an OSError it can only be closed."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.used_s = time.monotonic()

    def send(
        self, text: bytes, deadline_s: float, views: Sequence[memoryview] = (), bucket: _Bucket | None = None
    ) -> None:
        header = _HEADER.pack(_MAGIC, len(text), sum(map(len, views)))
        self._send_piece(memoryview(header + text), deadline_s)
        for piece in (view[at : at + _PIECE_BYTES] for view in views for at in range(0, len(view), _PIECE_BYTES)):
            if bucket is not None:
                bucket.take(len(piece), deadline_s)
            self._send_piece(piece, deadline_s)

    def await_frame(self, deadline_s: float) -> None:
        """Wait for its first byte, and leave it there."""
        self._wait_until(deadline_s)
        if not self._socket.recv(1, socket.MSG_PEEK):
            raise _Closed("the connection was closed")

    def receive_head(self, deadline_s: float, *, json_limit: int = _JSON_LIMIT_BYTES) -> tuple[Json, int]:
        """The JSON of the next frame, and how many bytes of payload follow."""
        self.receive_into(header := memoryview(bytearray(_HEADER.size)), deadline_s)
        magic, json_bytes, payload_bytes = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise FrameRefused(f"a frame begins with {magic!r}, not with {_MAGIC!r}")
        if json_bytes > json_limit:
            raise FrameRefused(f"a frame with {json_bytes:,} bytes of JSON, of which {json_limit:,} are allowed")
        self.receive_into(text := memoryview(bytearray(json_bytes)), deadline_s)
        try:
            return json.loads(bytes(text)), payload_bytes
        except (ValueError, RecursionError) as error:
            raise FrameRefused(f"a frame without readable JSON: {error}") from error

    def receive_into(self, target: memoryview, deadline_s: float) -> None:
        while target:
            self._wait_until(deadline_s)
            got = self._socket.recv_into(target[:_PIECE_BYTES])
            if got == 0:
                raise _Closed("the connection was closed")
            target = target[got:]

    def cut(self) -> None:
        """From any thread: whoever uses it gets an error now, and closes it. Closing it here would leave them with a
        descriptor that may soon be another connection's."""
        with contextlib.suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """By its only user."""
        self._socket.close()

    def _send_piece(self, piece: memoryview, deadline_s: float) -> None:
        while piece:
            self._wait_until(deadline_s)
            piece = piece[self._socket.send(piece) :]

    def _wait_until(self, deadline_s: float) -> None:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the deadline has passed")
        self._socket.settimeout(left_s)


class _Bucket:
    """Bytes per second, shared by all who send: each piece is given its own stretch of time, in order."""

    def __init__(self, bytes_per_s: float, stopped: threading.Event) -> None:
        self._bytes_per_s, self._free_s, self._stopped = bytes_per_s, 0.0, stopped
        self._lock = threading.Lock()

    def take(self, size_bytes: int, deadline_s: float) -> None:
        """Wait for the turn. Raises: TimeoutError at once if it comes after the deadline, or when nobody sends more."""
        with self._lock:
            turn_s = max(time.monotonic(), self._free_s)
            if turn_s > deadline_s:
                raise TimeoutError("the rate limit leaves no time before the deadline")
            self._free_s = turn_s + size_bytes / self._bytes_per_s
        if self._stopped.wait(max(turn_s - time.monotonic(), 0.0)):
            raise TimeoutError("the server is closing")


def _encode(value: Json) -> bytes:
    text = json.dumps(value).encode()
    if len(text) > _JSON_LIMIT_BYTES:
        raise FrameRefused(f"{len(text):,} bytes of JSON, of which a frame may have {_JSON_LIMIT_BYTES:,}")
    return text


def _views(buffers: Sequence[Buffer]) -> list[memoryview]:
    """As bytes, without a copy. An empty buffer may have no such view."""
    views = [memoryview(buffer) for buffer in buffers]
    return [view.cast("B") for view in views if view.nbytes]


# -- the hello ------------------------------------------------------------------------------------------------------


def _proof(token: str, role: str, theirs: str, ours: str) -> str:
    """That ``role`` knows the token: depends on a word of either side, so that it can be used once."""
    return hmac.new(token.encode(), f"{role}/{theirs}/{ours}".encode(), hashlib.sha256).hexdigest()


def _is_proof(proof: Json, token: str, role: str, theirs: str, ours: str) -> bool:
    return hmac.compare_digest(str(proof).encode(), _proof(token, role, theirs, ours).encode())


def _welcome(wire: _Wire, token: str) -> None:
    """Server's side: who knows the token may go on. Raises: FrameRefused."""
    deadline_s, ours = time.monotonic() + _HELLO_DEADLINE_S, secrets.token_hex(16)
    wire.send(_encode({"nonce": ours}), deadline_s)
    hello = _receive_hello(wire, deadline_s)
    theirs, protocol, problem = str(hello.get("nonce")), hello.get("protocol"), ""
    if protocol != _PROTOCOL:
        problem = f"this keeper speaks protocol {_PROTOCOL}, not {str(protocol)[:20]}: all need one version of Holdfast"
    elif not _is_proof(hello.get("proof"), token, "client", ours, theirs):
        problem = "the token is not the one of this run"
    if problem:
        wire.send(_encode({"refused": problem}), deadline_s)
        raise FrameRefused(problem)
    wire.send(_encode({"proof": _proof(token, "server", theirs, ours)}), deadline_s)


def _introduce(wire: _Wire, token: str, deadline_s: float) -> None:
    """Client's side. Raises: FrameRefused by the server, or by us when it does not know the token either."""
    theirs, ours = str(_receive_hello(wire, deadline_s).get("nonce")), secrets.token_hex(16)
    proof = _proof(token, "client", theirs, ours)
    wire.send(_encode({"protocol": _PROTOCOL, "nonce": ours, "proof": proof}), deadline_s)
    answer = _receive_hello(wire, deadline_s)
    if not _is_proof(answer.get("proof"), token, "server", ours, theirs):
        raise FrameRefused("it does not know the token of this run: another program listens there")


def _receive_hello(wire: _Wire, deadline_s: float) -> dict[str, Json]:
    value, payload_bytes = wire.receive_head(deadline_s, json_limit=_HELLO_LIMIT_BYTES)
    if payload_bytes or not isinstance(value, dict):
        raise FrameRefused("that is no hello")
    if "refused" in value:
        raise FrameRefused(str(value["refused"]))
    return value


# -- the server -----------------------------------------------------------------------------------------------------


class PeerServer:
    """Answers requests, each connection in a thread of its own, until it is closed.

    Units: ``max_bytes_per_s`` bounds all bulk answers together, 0 does not; ``payload_limit_bytes`` bounds the payload
    of one request, which is held in memory. ``host`` is where others reach this machine; found out if empty.
    """

    def __init__(
        self,
        token: str,
        handlers: Mapping[str, Handler],
        host: str = "",
        *,
        max_connections: int = 64,
        max_bytes_per_s: float = 0.0,
        payload_limit_bytes: int = 64 << 20,
    ) -> None:
        self._token, self._handlers = token, dict(handlers)
        self._max_connections, self._payload_limit_bytes = max_connections, payload_limit_bytes
        self._closing = threading.Event()
        self._bucket: _Bucket | None = None
        self.limit(max_bytes_per_s)
        self._lock = threading.Lock()
        self._open: dict[threading.Thread, _Wire] = {}
        host = host or _reachable_host()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=max_connections)
        port = self._listener.getsockname()[1]
        self.address = f"[{host}]:{port}" if family is socket.AF_INET6 else f"{host}:{port}"
        """For :class:`PeerClient`."""
        self._acceptor = threading.Thread(target=self._accept, name="holdfast-peers", daemon=True)
        self._acceptor.start()

    def limit(self, max_bytes_per_s: float) -> None:
        """From the next answer on, all bulk answers together; 0 does not bound them."""
        self._bucket = _Bucket(max_bytes_per_s, self._closing) if max_bytes_per_s > 0 else None

    def close(self) -> None:
        """Stop listening, cut every connection, and wait for the threads. May be repeated. A handler that does not
        return is left behind after some seconds."""
        with self._lock:
            self._closing.set()
            left = dict(self._open)
        with contextlib.suppress(OSError):  # closed before
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept, which closing alone would not
        self._listener.close()
        for wire in left.values():
            wire.cut()
        deadline_s = time.monotonic() + _CLOSE_DEADLINE_S
        for thread in (self._acceptor, *left):
            thread.join(max(deadline_s - time.monotonic(), 0.0))
            if thread.is_alive():
                logger.warning("%s of the server at %s has not ended", thread.name, self.address)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                self._admit(_Wire(self._listener.accept()[0]))
            except (OSError, RuntimeError) as error:  # gone again, or the process has too many files or threads
                if not self._closing.is_set():
                    logger.warning("a connection to %s was not accepted: %s", self.address, error)
                    self._closing.wait(0.05)

    def _admit(self, wire: _Wire) -> None:
        thread = threading.Thread(target=self._serve, args=(wire,), name="holdfast-peer", daemon=True)
        with self._lock:  # which the thread needs to take itself out again
            has_room = len(self._open) < self._max_connections and not self._closing.is_set()
            if has_room:
                thread.start()
                self._open[thread] = wire
        if not has_room:
            with contextlib.closing(wire):
                problem = f"{self._max_connections} connections are open, and no more are allowed"
                wire.send(_encode({"refused": problem}), time.monotonic() + 0.1)

    def _serve(self, wire: _Wire) -> None:
        try:
            _welcome(wire, self._token)
            while self._answer(wire):
                pass
        except OSError as error:
            if not self._closing.is_set():
                logger.warning("a peer of %s is cut off: %s", self.address, error)
        finally:
            wire.close()
            with self._lock:
                del self._open[threading.current_thread()]

    def _answer(self, wire: _Wire) -> bool:
        """One request. False when the peer has left, or has been quiet for too long."""
        try:
            wire.await_frame(time.monotonic() + _IDLE_S)
        except (_Closed, TimeoutError):
            return False
        began_s = time.monotonic()
        request, payload_bytes = wire.receive_head(began_s + _REQUEST_DEADLINE_S)
        method, args, patience_s = _read_request(request)
        if payload_bytes > self._payload_limit_bytes:
            problem = f"{payload_bytes:,} bytes of payload, of which {self._payload_limit_bytes:,} are allowed"
            wire.send(_encode({"refused": problem}), began_s + patience_s)
            raise FrameRefused(problem)
        wire.receive_into(payload := memoryview(bytearray(payload_bytes)), began_s + _REQUEST_DEADLINE_S)
        with contextlib.ExitStack() as on_sent:
            text, views = self._ask(method, args, payload, on_sent)
            wire.send(text, began_s + patience_s, views, self._bucket)
        return True

    def _ask(
        self, method: str, args: Json, payload: memoryview, on_sent: contextlib.ExitStack
    ) -> tuple[bytes, list[memoryview]]:
        try:
            if method not in self._handlers:
                raise LookupError(f"there is no {method!r} here, only {sorted(self._handlers)}")
            answer = self._handlers[method](args, payload)
            bulk = answer if isinstance(answer, Bulk) else Bulk(answer, ())
            if bulk.release is not None:
                on_sent.callback(bulk.release)
            return _encode({"result": bulk.result}), _views(bulk.buffers)
        except Exception as error:  # a process boundary: the caller learns of it as PeerError
            return _encode({"error": {"kind": type(error).__name__, "message": str(error)[:_ERROR_LIMIT]}}), []


def _read_request(request: Json) -> tuple[str, Json, float]:
    if not isinstance(request, dict) or not isinstance(request.get("deadline_s"), (int, float)):
        raise FrameRefused("that is no request")
    return str(request.get("method")), request.get("args"), float(request["deadline_s"])


def _reachable_host() -> str:
    """The address of this machine on its way to others. Nothing is sent: these two lead nowhere."""
    for family, elsewhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, 9))
            return str(probe.getsockname()[0])
    return "127.0.0.1"  # without a network every keeper is here


# -- the client -----------------------------------------------------------------------------------------------------


class PeerClient:
    """Asks one server, from any number of threads: each request has a connection to itself while it lasts.

    ``address`` is the server's; ``connect_timeout_s`` bounds a connection together with its hello.
    """

    def __init__(self, address: str, token: str, connect_timeout_s: float = 5.0) -> None:
        self.address, self._token, self._connect_timeout_s = address, token, connect_timeout_s
        self._lock, self._is_closed = threading.Lock(), False
        self._idle: list[_Wire] = []
        self._busy: set[_Wire] = set()

    def request(
        self,
        method: str,
        args: Json = None,
        *,
        payload: Sequence[Buffer] = (),
        into: Buffer | None = None,
        deadline_s: float,
    ) -> Json:
        """Call ``method`` over there and return its result. Shapes: a bulk answer has to fill ``into`` exactly.

        Raises: PeerError when there is no answer within ``deadline_s`` seconds, whatever the cause, and when the answer
        is an error. The request may have been carried out all the same, and ``into`` may hold anything.
        """
        began_s = time.monotonic()
        ends_s = began_s + deadline_s
        views = _views(payload)
        target = memoryview(b"") if into is None else next(iter(_views([into])), memoryview(b""))
        try:
            text = _encode({"method": method, "args": args, "deadline_s": deadline_s})
            with self._wire(ends_s) as wire:
                wire.send(text, ends_s, views)
                answer = _receive_answer(wire, target, ends_s)
        except OSError as error:
            spent_s = time.monotonic() - began_s
            raise PeerError(self.address, method, f"{error or type(error).__name__}, after {spent_s:.1f} s") from error
        if "error" in answer:
            raise PeerError(self.address, method, str(answer["error"]["message"]), kind=str(answer["error"]["kind"]))
        return answer.get("result")

    def close(self) -> None:
        """Cut every connection: requests that wait fail, and so do later ones."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            for wire in self._busy:
                wire.cut()
        for wire in idle:
            wire.close()

    @contextlib.contextmanager
    def _wire(self, deadline_s: float) -> Iterator[_Wire]:
        """A connection, kept for another request only if this one came to its end."""
        wire = self._idle_wire() or self._connect(deadline_s)
        try:
            with self._lock:
                if self._is_closed:
                    raise _Closed("this client has been closed")
                self._busy.add(wire)
            yield wire
        except BaseException:
            self._done(wire, has_ended=False)
            raise
        self._done(wire, has_ended=True)

    def _done(self, wire: _Wire, *, has_ended: bool) -> None:
        wire.used_s = time.monotonic()
        with self._lock:
            self._busy.discard(wire)
            is_kept = has_ended and not self._is_closed and len(self._idle) < _IDLE_CONNECTIONS
            if is_kept:
                self._idle.append(wire)
        if not is_kept:
            wire.close()

    def _idle_wire(self) -> _Wire | None:
        """The one that was used last. Those that the server may be about to close are closed."""
        oldest_s = time.monotonic() - _IDLE_S / 2
        with self._lock:
            stale = [wire for wire in self._idle if wire.used_s < oldest_s]
            self._idle = [wire for wire in self._idle if wire.used_s >= oldest_s]
            found = self._idle.pop() if self._idle else None
        for wire in stale:
            wire.close()
        return found

    def _connect(self, deadline_s: float) -> _Wire:
        deadline_s = min(deadline_s, time.monotonic() + self._connect_timeout_s)
        host, _, port = self.address.rpartition(":")
        left_s = max(deadline_s - time.monotonic(), 0.001)
        wire = _Wire(socket.create_connection((host.strip("[]"), int(port)), timeout=left_s))
        try:
            _introduce(wire, self._token, deadline_s)
        except BaseException:
            wire.close()
            raise
        return wire


def _receive_answer(wire: _Wire, target: memoryview, deadline_s: float) -> dict[str, Json]:
    answer, payload_bytes = wire.receive_head(deadline_s)
    if not isinstance(answer, dict):
        raise FrameRefused("that is no answer")
    if "refused" in answer:
        raise FrameRefused(str(answer["refused"]))
    if "error" in answer:
        return answer
    if payload_bytes != len(target):
        raise FrameRefused(f"the answer has {payload_bytes:,} bytes where {len(target):,} are wanted")
    wire.receive_into(target, deadline_s)
    return answer
