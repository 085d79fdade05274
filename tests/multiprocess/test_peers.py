"""The channel between keepers, with real processes that are killed, frozen, strangers or talking nonsense."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from holdfast.errors import PeerError
from holdfast.fault_tolerance import peers
from holdfast.fault_tolerance.peers import Bulk, PeerClient, PeerServer

_TOKEN = "a-secret-of-this-run"
_DEADLINE_S = 20.0
_TOO_LATE = "timed out|deadline has passed"

_SERVER = """
import sys, time
import numpy as np
from holdfast.fault_tolerance.peers import Bulk, PeerServer

made = {}
def data(size, payload):
    if size not in made:
        made[size] = np.full(size, 7, dtype=np.uint8)
    return Bulk({"size": size}, [made[size]])

server = PeerServer(sys.argv[1], {"data": data, "echo": lambda args, _: args}, "127.0.0.1",
                    max_bytes_per_s=float(sys.argv[2]), max_connections=int(sys.argv[3]))
print(server.address, flush=True)
sys.stdin.read()
"""


@contextmanager
def _process(*, max_bytes_per_s: float = 0.0, max_connections: int = 64) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its address and pid."""
    command = [sys.executable, "-c", _SERVER, _TOKEN, str(max_bytes_per_s), str(max_connections)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip(), server.pid
        finally:
            server.kill()


@contextmanager
def _client(address: str, token: str = _TOKEN, connect_timeout_s: float = 5.0) -> Iterator[PeerClient]:
    client = PeerClient(address, token, connect_timeout_s)
    try:
        yield client
    finally:
        client.close()


@contextmanager
def _here(handlers: dict[str, peers.Handler], **options: float) -> Iterator[PeerServer]:
    server = PeerServer(_TOKEN, handlers, "127.0.0.1", **options)  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.close()


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it does not happen"
        time.sleep(0.002)


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("holdfast-peer")}


def _ask_echo(client: PeerClient) -> None:
    assert client.request("echo", {"a": [1, None, "ü"]}, deadline_s=_DEADLINE_S) == {"a": [1, None, "ü"]}


# -- requests and answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4097, 1 << 20, (1 << 20) + 1, 9_999_999])
def test_bytes_arrive_as_they_were_in_both_directions(size: int) -> None:
    there = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    ours = there[::-1].copy()
    cut = size // 3

    def swap(args: object, payload: memoryview) -> Bulk:
        return Bulk([args, hashlib.sha256(payload).hexdigest()], [there[:cut], memoryview(there)[cut:]])

    with _here({"swap": swap}) as server, _client(server.address) as client:
        into = np.zeros(size, dtype=np.uint8)
        result = client.request("swap", "x", payload=[ours[:cut], ours[cut:]], into=into, deadline_s=_DEADLINE_S)
        assert result == ["x", hashlib.sha256(ours).hexdigest()]
        assert np.array_equal(into, there)


def test_an_answer_must_fill_the_memory_it_is_read_into() -> None:
    with _process() as (address, _), _client(address) as client:
        for wrong in (99, 101):
            with pytest.raises(PeerError, match=f"100 bytes where {wrong} are wanted"):
                client.request("data", 100, into=memoryview(bytearray(wrong)), deadline_s=_DEADLINE_S)
        with pytest.raises(PeerError, match="where 0 are wanted"):
            client.request("data", 100, deadline_s=_DEADLINE_S)
        client.request("data", 100, into=memoryview(bytearray(100)), deadline_s=_DEADLINE_S)


def test_what_a_handler_raises_arrives_with_its_name_and_costs_no_connection() -> None:
    def fail(args: object, payload: memoryview) -> object:
        raise KeyError("no such version")

    handlers: dict[str, peers.Handler] = {
        "fail": fail,
        "strange": lambda a, p: object(),
        "long": lambda a, p: "x" * (17 << 20),
        "holes": lambda a, p: Bulk(None, [np.zeros(10, dtype=np.uint8)[::2]]),
        "echo": lambda args, _: args,
    }
    with _here(handlers) as server, _client(server.address) as client:
        for method, kind in {
            "fail": "KeyError",
            "strange": "TypeError",
            "long": "FrameRefused",
            "other": "LookupError",
        }.items():
            with pytest.raises(PeerError) as caught:
                client.request(method, deadline_s=_DEADLINE_S)
            assert (caught.value.kind, caught.value.method, caught.value.peer) == (kind, method, server.address)
        with pytest.raises(PeerError, match="contiguous"):
            client.request("holes", into=bytearray(5), deadline_s=_DEADLINE_S)
        _ask_echo(client)
        assert len(_threads()) == 2, "one that accepts, one connection for all of it"


def test_many_threads_may_ask_at_once() -> None:
    def shift(args: int, payload: memoryview) -> Bulk:
        return Bulk(args, [(np.frombuffer(payload, dtype=np.uint8) + np.uint8(args)).astype(np.uint8)])

    def ask(number: int) -> bool:
        data, into = np.full(1000 * number, number % 256, dtype=np.uint8), np.zeros(1000 * number, dtype=np.uint8)
        result = client.request("shift", number % 7, payload=[data], into=into, deadline_s=_DEADLINE_S)
        return result == number % 7 and bool((into == (number % 256 + number % 7) % 256).all())

    with _here({"shift": shift}) as server, _client(server.address) as client, ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(400)))


def test_connections_are_bounded_and_who_comes_too_much_is_told() -> None:
    with _process(max_connections=2) as (address, _), _client(address) as one, _client(address) as two:
        _ask_echo(one)
        _ask_echo(two)
        with _client(address) as three, pytest.raises(PeerError, match="2 connections are open"):
            three.request("echo", deadline_s=_DEADLINE_S)
        one.close()
        with _client(address) as three:
            _wait_for(lambda: _can_ask(three))


def _can_ask(client: PeerClient) -> bool:
    try:
        _ask_echo(client)
    except PeerError:
        return False
    return True


def test_bulk_answers_keep_to_the_rate() -> None:
    with _process(max_bytes_per_s=16 << 20) as (address, _), _client(address) as client:
        began_s = time.monotonic()
        client.request("data", 6 << 20, into=bytearray(6 << 20), deadline_s=_DEADLINE_S)
        assert time.monotonic() - began_s >= 5 / 16, "the first piece goes at once, each of the others waits its turn"
        with pytest.raises(PeerError):
            client.request("data", 16 << 20, into=bytearray(16 << 20), deadline_s=0.4)


def test_memory_is_released_when_it_was_sent_and_when_it_cannot_be() -> None:
    sent = threading.Semaphore(0)
    data = np.zeros(64 << 20, dtype=np.uint8)
    handlers: dict[str, peers.Handler] = {"data": lambda size, _: Bulk(None, [data[:size]], sent.release)}
    with _here(handlers) as server, _client(server.address) as client:
        client.request("data", 10, into=bytearray(10), deadline_s=_DEADLINE_S)
        assert sent.acquire(timeout=_DEADLINE_S)
        with pytest.raises(PeerError, match="are wanted"):  # leaves while most of it is still to come
            client.request("data", len(data), into=bytearray(10), deadline_s=_DEADLINE_S)
        assert sent.acquire(timeout=_DEADLINE_S)


# -- peers that die, freeze, or were never there --------------------------------------------------------------------


def _begin_transfer(client: PeerClient, pool: ThreadPoolExecutor, deadline_s: float) -> Callable[[], object]:
    """A large answer, of which the first bytes have come; how to wait for its end."""
    into = np.zeros(64 << 20, dtype=np.uint8)
    future = pool.submit(client.request, "data", len(into), into=into, deadline_s=deadline_s)
    _wait_for(lambda: bool(into[0]))
    return lambda: future.result(_DEADLINE_S)


def test_a_peer_that_is_killed_in_a_transfer_is_noticed_at_once() -> None:
    with _process(max_bytes_per_s=8 << 20) as (address, pid), _client(address) as client, ThreadPoolExecutor(1) as pool:
        end = _begin_transfer(client, pool, 600.0)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(PeerError):
            end()
        with pytest.raises(PeerError, match=r"refused|reset"):
            client.request("echo", deadline_s=_DEADLINE_S)


def test_a_peer_that_freezes_in_a_transfer_costs_the_deadline_and_no_more() -> None:
    with _process(max_bytes_per_s=8 << 20) as (address, pid), _client(address) as client, ThreadPoolExecutor(1) as pool:
        end = _begin_transfer(client, pool, 1.5)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(PeerError, match=_TOO_LATE):
            end()
        with pytest.raises(PeerError, match=_TOO_LATE):
            client.request("echo", deadline_s=0.2)
        os.kill(pid, signal.SIGCONT)
        _wait_for(lambda: _can_ask(client))


def test_the_time_to_connect_is_bounded_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel connects, nobody says hello
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with _client(address, connect_timeout_s=0.2) as client, pytest.raises(PeerError, match=_TOO_LATE):
            client.request("echo", deadline_s=60.0)


def test_a_handler_that_takes_too_long_costs_the_deadline() -> None:
    go = threading.Event()
    handlers: dict[str, peers.Handler] = {"wait": lambda a, p: go.wait(_DEADLINE_S), "echo": lambda args, _: args}
    with _here(handlers) as server, _client(server.address) as client:
        with pytest.raises(PeerError, match=_TOO_LATE):
            client.request("wait", deadline_s=0.3)
        _ask_echo(client)
        go.set()


def test_a_connection_that_was_idle_for_long_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_IDLE_S", 0.4)
    with _here({"echo": lambda args, _: args}) as server, _client(server.address) as client:
        _ask_echo(client)
        _wait_for(lambda: len(_threads()) == 1)
        _ask_echo(client)


# -- strangers ------------------------------------------------------------------------------------------------------


def test_another_token_is_refused_by_either_side() -> None:
    with _process() as (address, _):
        with _client(address, "another") as client, pytest.raises(PeerError, match="token is not the one of this run"):
            client.request("echo", deadline_s=_DEADLINE_S)
        with _client(address) as client:
            _ask_echo(client)


def _frame(text: bytes, payload_bytes: int = 0) -> bytes:
    return struct.pack("!4sIQ", b"HFP1", len(text), payload_bytes) + text


def test_a_server_without_the_token_learns_nothing_and_is_not_believed() -> None:
    heard = bytearray()

    def pretend() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(_DEADLINE_S)
            connection.sendall(_frame(b'{"nonce": "x"}'))
            heard.extend(connection.recv(4096))
            connection.sendall(_frame(b'{"proof": "y"}'))

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        told = pool.submit(pretend)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with _client(address) as client, pytest.raises(PeerError, match="another program listens there"):
            client.request("echo", deadline_s=_DEADLINE_S)
        told.result(_DEADLINE_S)
    assert b"proof" in heard and _TOKEN.encode() not in heard


def test_another_version_of_the_protocol_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with _process() as (address, _):
        monkeypatch.setattr(peers, "_PROTOCOL", 2)
        with _client(address) as client, pytest.raises(PeerError, match="speaks protocol 1, not 2"):
            client.request("echo", deadline_s=_DEADLINE_S)


@pytest.mark.parametrize(
    "nonsense",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(5000),
        struct.pack("!4sIQ", b"HFP1", 0xFFFFFFFF, 0),
        _frame(b"{}", 1 << 60),
        _frame(b"[" * 4000),
        _frame(b"[]"),
        _frame(b"\xff\xfe"),
        _frame(b'{"protocol": 1, "nonce": 5, "proof": null}'),
    ],
    ids=["http", "random", "long json", "long payload", "deep", "no hello", "no text", "wrong types"],
)
def test_nonsense_is_cut_off_and_harms_nobody(nonsense: bytes) -> None:
    with _process() as (address, _), _client(address) as client:
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=_DEADLINE_S) as stranger:
            stranger.sendall(nonsense)
            _read_to_end(stranger)
        _ask_echo(client)


def _read_to_end(connection: socket.socket) -> None:
    connection.settimeout(_DEADLINE_S)
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:  # it was cut while our bytes were still on their way
        pass


def test_frames_over_the_limits_are_refused_by_name() -> None:
    handlers: dict[str, peers.Handler] = {"echo": lambda args, _: args}
    with _here(handlers, payload_limit_bytes=1000) as server, _client(server.address) as client:
        client.request("echo", payload=[bytes(1000)], deadline_s=_DEADLINE_S)
        with pytest.raises(PeerError, match="1,001 bytes of payload, of which 1,000 are allowed"):
            client.request("echo", payload=[bytes(1001)], deadline_s=_DEADLINE_S)
        with pytest.raises(PeerError, match="of which a frame may have 16,777,216"):
            client.request("echo", "x" * (16 << 20), deadline_s=_DEADLINE_S)
        _ask_echo(client)


# -- the end --------------------------------------------------------------------------------------------------------


def test_closing_the_server_ends_every_thread_and_every_request() -> None:
    before = _threads()
    go = threading.Event()
    with _here({"wait": lambda a, p: go.wait(0.3)}, max_bytes_per_s=1.0) as server, _client(server.address) as client:
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(client.request, "wait", deadline_s=60.0) for _ in range(4)]
            _wait_for(lambda: len(_threads()) == 5)
            server.close()
            assert all(isinstance(future.exception(_DEADLINE_S), PeerError) for future in asked)
        assert _threads() == before
        with pytest.raises(PeerError):
            client.request("wait", deadline_s=_DEADLINE_S)


def test_closing_the_client_ends_its_requests() -> None:
    with _process(max_bytes_per_s=1 << 20) as (address, _), ThreadPoolExecutor(1) as pool:
        client = PeerClient(address, _TOKEN)
        end = _begin_transfer(client, pool, 600.0)
        client.close()
        with pytest.raises(PeerError):
            end()
        with pytest.raises(PeerError, match="has been closed"):
            client.request("echo", deadline_s=_DEADLINE_S)


def test_a_server_is_found_at_an_address_of_this_machine() -> None:
    server = PeerServer(_TOKEN, {"echo": lambda args, _: args})
    try:
        assert not server.address.startswith("0.0.0.0")
        with _client(server.address) as client:
            _ask_echo(client)
    finally:
        server.close()


def test_ipv6_addresses_are_understood() -> None:
    try:
        server = PeerServer(_TOKEN, {"echo": lambda args, _: args}, "::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    try:
        assert server.address.startswith("[::1]:")
        with _client(server.address) as client:
            _ask_echo(client)
    finally:
        server.close()


def test_throughput_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    size, rates = 256 << 20, []
    into = np.zeros(size, dtype=np.uint8)
    with _process() as (address, _), _client(address) as client:
        for _ in range(3):
            began_s = time.monotonic()
            client.request("data", size, into=into, deadline_s=_DEADLINE_S)
            rates.append(size / (time.monotonic() - began_s) / 1e9)
    with capsys.disabled():
        print(f"\nbulk answers over loopback: {min(rates):.2f}-{max(rates):.2f} GB/s")
    assert int(into.min()) == 7
