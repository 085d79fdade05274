"""A Ray cluster as an administrator starts it: `ray start` for a head with a dashboard and for a second node on this
host, with token authentication, in an environment of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil

__all__ = ["RayCluster", "ray_cluster"]

_MARK = "HOLDFAST_TEST_CLUSTER"
_REPOSITORY = Path(__file__).parents[2]
_START_S = 150.0
_TRIES = 6


class RayCluster:
    """``environment`` is for whoever submits to it; its nodes have a mark in theirs, too."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._mark = folder, uuid.uuid4().hex
        self._gcs, self._dashboard = _free_port(), _free_port()
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(_REPOSITORY),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        }
        self.address = f"http://127.0.0.1:{self._dashboard}"

    @property
    def gcs(self) -> str:
        return f"127.0.0.1:{self._gcs}"

    def start(self) -> None:
        head = ["--head", f"--port={self._gcs}", f"--dashboard-port={self._dashboard}", f"--temp-dir={self._folder}"]
        self._node(*head, "--include-dashboard=true", f"--ray-client-server-port={_free_port()}")
        self._node(f"--address={self.gcs}")

    def _node(self, *words: str) -> None:
        ports = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
        own = [f"--{name}={_free_port()}" for name in (*ports, "runtime-env-agent-port")]
        common = ["--num-cpus=4", "--object-store-memory=80000000", "--min-worker-port=0", "--max-worker-port=0"]
        command = [str(Path(sys.executable).with_name("ray")), "start", *words, *own, *common]
        environment = {**self.environment, _MARK: self._mark}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_START_S)
        assert done.returncode == 0, done.stdout + done.stderr

    def processes(self, word: str = "") -> list[psutil.Process]:
        """Whatever its nodes have started, with ``word`` in its command line."""
        return [process for process in psutil.process_iter() if self._is_ours(process) and word in _line(process)]

    def driver(self) -> psutil.Process:
        """The only training there is: the job's own process, not the shell that Ray puts around it."""
        (driver,) = [p for p in self.processes("holdfast train") if "python" in p.name() or p.name() == "holdfast"]
        return driver

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def close(self) -> None:
        """By number, again until nothing is left: what dies may have been about to start something."""
        for _ in range(20):
            left = self.processes()
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            if not left:
                return
            psutil.wait_procs(left, timeout=2.0)


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def ray_cluster() -> Iterator[RayCluster]:
    """Two nodes inside a ``with`` block."""
    with contextlib.ExitStack() as stack:
        yield _started(stack)


def _started(stack: contextlib.ExitStack) -> RayCluster:
    """On a busy machine a raylet gives up before its agents are there; another one may have more luck."""
    for left in reversed(range(_TRIES)):
        folder = Path(tempfile.mkdtemp(prefix="hf-", dir="/tmp"))  # short: sockets lie below it
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        cluster = RayCluster(folder)
        stack.callback(cluster.close)
        try:
            cluster.start()
        except AssertionError:
            if not left:
                raise
            cluster.close()
        else:
            return cluster
    raise AssertionError("unreachable")
