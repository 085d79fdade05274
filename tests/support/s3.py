"""An S3 server in a process of its own, and a way to it that can be broken."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import fs

__all__ = ["BrokenWay", "S3Server", "s3_server"]

_START_S = 30.0


class S3Server:
    """``moto`` on a port of its own. What it holds is lost with it."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process, self.port = process, port

    def uri(self, bucket: str, prefix: str = "runs", port: int = 0) -> str:
        """Of a place in a bucket, at the server or at a way to it."""
        end = f"127.0.0.1:{port or self.port}"
        return f"s3://{bucket}/{prefix}?region=us-east-1&scheme=http&endpoint_override={end}"

    def make_bucket(self, name: str) -> None:
        self.files(allow_bucket_creation=True).create_dir(name)

    def files(self, **options: bool) -> fs.S3FileSystem:
        """As somebody else sees it."""
        return fs.S3FileSystem(
            access_key="key",
            secret_key="secret",
            region="us-east-1",
            scheme="http",
            endpoint_override=f"127.0.0.1:{self.port}",
            **options,
        )

    def names(self, bucket: str) -> list[str]:
        """Of all objects that are to be seen."""
        found = self.files().get_file_info(fs.FileSelector(bucket, recursive=True))
        return sorted(one.path for one in found if one.type == fs.FileType.File)


@contextmanager
def s3_server(log: Path, **environment: str) -> Iterator[S3Server]:
    """Started, answering, and killed at the end."""
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
    try:
        _await(port, process, log)
        yield S3Server(process, port)
    finally:
        process.kill()
        process.wait(timeout=20)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _await(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=2):
            return
        time.sleep(0.05)
    raise AssertionError(f"the server does not answer: {log.read_text()[-2000:]}")


class BrokenWay:
    """A TCP relay that breaks every connection once so many bytes have gone to the server, until it is mended."""

    def __init__(self, target_port: int, after_bytes: int) -> None:
        self._target_port, self._left = target_port, float(after_bytes)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def mend(self) -> None:
        self._left = float("inf")

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target_port))
                for source, target, counts in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._relay, args=(source, target, counts), daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        with contextlib.suppress(OSError):
            while self._left > 0 and (data := source.recv(1 << 16)):
                self._left -= len(data) if counts else 0
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
