"""One thread per process, no time limits on single examples, and no test may leave anything running."""

from __future__ import annotations

import os
import signal
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

# Before anything imports torch: results to the bit need one order of summation.
os.environ["OMP_NUM_THREADS"] = "1"
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for one and warns

import hypothesis
import pytest

from tests.support import leftovers

_SESSION = uuid.uuid4().hex
_MEMORY_BEFORE = leftovers.shared_memory()
_LEFT = pytest.StashKey[list[str]]()
_GRACE_S = 5.0
"""For processes that end themselves when their parent is gone."""

os.environ[leftovers.MARK] = _SESSION

hypothesis.settings.register_profile("holdfast", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("holdfast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not _has_cuda():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The session fails when something it started is still there. Processes are then ended; the memory is left as it
    is, because another session on this host may be about to open it."""
    left = session.config.stash.setdefault(_LEFT, [])
    output = getattr(session.config, "workeroutput", None)  # of a process that runs a share of the tests
    if output is not None or session.config.getoption("dist", "no") == "no":
        left += _what_is_left()
    if output is not None:
        output["left"] = left
    if left and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """pytest-xdist: a process that ran a share of the tests has ended."""
    node.config.stash.setdefault(_LEFT, []).extend(getattr(node, "workeroutput", {}).get("left", []))


def _what_is_left() -> list[str]:
    processes, memory = leftovers.wait_for_end(_SESSION, _MEMORY_BEFORE, _GRACE_S)
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    left = [f"process {pid}: {command}" for pid, command in sorted(processes.items())]
    return left + [f"shared memory: /dev/shm/{name}" for name in sorted(memory)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left = config.stash.get(_LEFT, [])
    if left:
        terminalreporter.section("left behind by the tests, which fails the session", red=True)
        for line in left:
            terminalreporter.line(line)
