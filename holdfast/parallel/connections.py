"""The TCP connections of one gloo group, told apart from every other socket of the process, to be shut down."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["Connections"]


class Connections:
    """Open connections, by descriptor and inode: a descriptor's number may be used again after it was closed."""

    def __init__(self, members: Sequence[tuple[int, int]] = ()) -> None:
        self._members = members

    @classmethod
    def announced_in(cls, rendezvous: bytes) -> Connections:
        """Those of the group whose ranks met at a file with this content.

        Every rank has written there where it listens, as the kernel's socket address, and each connection of the
        group has such an address at one end. No other socket of this process has, whichever thread opened it when.
        """
        return cls([entry for entry in _sockets() if any(end in rendezvous for end in _ends(*entry))])

    def __len__(self) -> int:
        return len(self._members)

    def shut_down(self) -> None:
        """Wake whoever waits for one of them, here and at the other end. From any thread."""
        for descriptor, inode in self._members:
            with contextlib.suppress(OSError), _duplicate(descriptor, inode) as connection:
                connection.shutdown(socket.SHUT_RDWR)


def _sockets() -> Iterator[tuple[int, int]]:
    """Descriptor and inode of every open socket."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # it was closed between listing and looking
            status = os.stat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                yield int(name), status.st_ino


@contextlib.contextmanager
def _duplicate(descriptor: int, inode: int) -> Iterator[socket.socket]:
    """A connection that stays what it is while it is used. Raises: OSError when it has been closed."""
    with socket.socket(fileno=os.dup(descriptor)) as duplicate:
        if os.stat(duplicate.fileno()).st_ino != inode:
            raise OSError(f"descriptor {descriptor} has been used again")
        yield duplicate


def _ends(descriptor: int, inode: int) -> Sequence[bytes]:
    """Both addresses of a TCP connection. A socket that only listens has no other end: shutting it down would end the
    process."""
    try:
        with _duplicate(descriptor, inode) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                ends = connection.getsockname(), connection.getpeername()
                return [_address(connection.family, end) for end in ends]
    except OSError:  # not connected, or closed
        pass
    return ()


def _address(family: int, end: tuple[Any, ...]) -> bytes:  # Any: two entries or four, as the family has it
    """The kernel's ``sockaddr_in`` or ``sockaddr_in6``, up to the host."""
    host, port, *flow = end
    head = struct.pack("=H", family) + struct.pack("!H", port) + b"".join(struct.pack("!I", f) for f in flow[:1])
    return head + socket.inet_pton(family, host.partition("%")[0])
