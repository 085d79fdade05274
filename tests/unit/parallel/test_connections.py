"""Which sockets belong to a group: those with an end that is announced in the rendezvous file, and no others."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from holdfast.parallel.connections import Connections

_HOSTS = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


def _kernel_address(end: socket.socket) -> bytes:
    """As gloo gets it, and writes it."""
    buffer, length = ctypes.create_string_buffer(128), ctypes.c_uint32(128)
    assert ctypes.CDLL(None).getsockname(end.fileno(), buffer, ctypes.byref(length)) == 0
    return buffer.raw


class _Pair:
    """A connection and the socket that listens for it, both in this process."""

    def __init__(self, family: socket.AddressFamily, sockets: ExitStack) -> None:
        self.listener = sockets.enter_context(socket.create_server((_HOSTS[family], 0), family=family))
        self.near = sockets.enter_context(socket.socket(family))
        self.near.connect(self.listener.getsockname())
        self.far = sockets.enter_context(self.listener.accept()[0])

    def carries(self) -> bool:
        self.near.settimeout(5.0)
        try:
            self.far.send(b"x")
            return self.near.recv(1) == b"x"
        except OSError:
            return False


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def family(request: pytest.FixtureRequest) -> socket.AddressFamily:
    family: socket.AddressFamily = request.param
    try:
        socket.create_server((_HOSTS[family], 0), family=family).close()
    except OSError:
        pytest.skip("this host has no such addresses")
    return family


def test_connections_to_an_announced_address_are_shut_down_and_others_are_not(
    family: socket.AddressFamily, sockets: ExitStack
) -> None:
    ours, foreign = _Pair(family, sockets), _Pair(family, sockets)
    left, right = socket.socketpair()  # a Unix socket has no address at all
    sockets.enter_context(left)
    sockets.enter_context(right)
    connections = Connections.announced_in(b"key" + _kernel_address(ours.listener) + b"value")
    assert len(connections) == 2  # both ends are in this process; the listening socket is no connection
    assert ours.carries() and foreign.carries()
    connections.shut_down()
    assert not ours.carries() and foreign.carries()
    left.send(b"x")
    assert right.recv(1) == b"x"
    connections.shut_down()


def test_a_listening_socket_survives(family: socket.AddressFamily, sockets: ExitStack) -> None:
    ours = _Pair(family, sockets)
    Connections.announced_in(_kernel_address(ours.listener)).shut_down()
    again = sockets.enter_context(socket.socket(family))
    again.connect(ours.listener.getsockname())


def test_a_descriptor_that_was_used_again_is_left_alone(family: socket.AddressFamily, sockets: ExitStack) -> None:
    ours, other = _Pair(family, sockets), _Pair(family, sockets)
    connections = Connections.announced_in(_kernel_address(ours.listener))
    for old, new in ((ours.near, other.near), (ours.far, other.far)):
        os.dup2(new.fileno(), old.fileno())
    connections.shut_down()
    assert other.carries()


def test_nothing_announced_means_no_connection(sockets: ExitStack) -> None:
    _Pair(socket.AF_INET, sockets)
    assert len(Connections.announced_in(b"")) == 0
    Connections.announced_in(b"").shut_down()
