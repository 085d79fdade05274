"""Drivers of whole runs: the command a user types in a session of its own, or this process while a thread watches."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import psutil

from holdfast.configs.plain import to_plain
from holdfast.configs.schema import RunConfig

__all__ = ["Driver", "at_step", "await_event", "options_of", "records", "run_dirs", "sound_record", "steps_of", "until"]

_DEADLINE_S = 60.0


def until(condition: Callable[[], Any], what: str, within_s: float = _DEADLINE_S) -> Any:
    """Wait for something; what it returned."""
    end = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {within_s} s"
        time.sleep(0.01)
    return found


def run_dirs(root: Path) -> list[Path]:
    """The runs below a root, oldest first."""
    return sorted(path.parent for path in root.glob("*/*/run.json"))


def records(path: Path) -> list[dict[str, Any]]:
    """Every line of a file of JSON lines; all of them are whole."""
    content = path.read_text() if path.exists() else ""
    assert content == "" or content.endswith("\n"), f"{path} ends inside a line"
    found = [json.loads(line) for line in content.splitlines()]
    assert all(isinstance(record, dict) for record in found)
    return found


def steps_of(run_dir: Path, attempt: int) -> list[int]:
    """Steps in the order in which an attempt finished them."""
    metrics = records(run_dir / "metrics.jsonl")
    return [record["step"] for record in metrics if "loss" in record and record["attempt"] == attempt]


def sound_record(run_dir: Path) -> dict[str, Any]:
    """``run.json`` of a run that nobody drives any more, after a look at what must hold of every such directory."""
    assert not [path for path in run_dir.rglob("*") if ".tmp-" in path.name]
    assert not (run_dir / "rendezvous").exists()
    records(run_dir / "events.jsonl")
    records(run_dir / "metrics.jsonl")
    record: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    attempts = record["attempts"]
    assert [attempt["number"] for attempt in attempts] == list(range(1, len(attempts) + 1))
    assert record["ended"] == attempts[-1]["ended"]
    return record


def await_event(root: Path, kind: str, **fields: object) -> None:
    """Until one of the runs below a root has told of it."""

    def is_told() -> bool:
        told = (record for run_dir in run_dirs(root) for record in _whole_lines(run_dir / "events.jsonl"))
        return any(record["event"] == kind and fields.items() <= record.items() for record in told)

    until(is_told, kind)


@contextmanager
def at_step(root: Path, step: int, action: Callable[[], object]) -> Iterator[None]:
    """While a run trains inside the ``with`` block, do something in a thread once it has finished a step."""
    happened, gone = threading.Event(), threading.Event()

    def watch() -> None:
        while not gone.wait(0.005):
            if any(step <= reached for reached in _reached(root)):
                happened.set()
                action()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        gone.set()
        thread.join()
    assert happened.is_set(), f"step {step} was never finished"


def _reached(root: Path) -> list[int]:
    return [record["step"] for run_dir in run_dirs(root) for record in _whole_lines(run_dir / "metrics.jsonl")]


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """What a file holds that somebody is writing to."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def options_of(config: RunConfig) -> list[str]:
    """The words after ``holdfast train`` that mean this configuration."""
    return [f"{key}={_word(value)}" for key, value in _leaves(config, to_plain(config))]


def _leaves(part: object, plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in plain.items():
        if isinstance(value, Mapping):
            yield from _leaves(getattr(part, name), value, f"{prefix}{name}.")
        else:
            yield prefix + name, getattr(part, name)


def _word(value: object) -> str:
    return value.name if isinstance(value, Enum) else json.dumps(value)


class Driver:
    """``holdfast train`` in a session of its own, as a terminal or a scheduler would start it."""

    def __init__(self, config: RunConfig, temporary: Path | None = None) -> None:
        command = [str(Path(sys.executable).with_name("holdfast")), "train", *options_of(config)]
        assert shutil.which(command[0]), f"{command[0]} is not installed"
        self.root = Path(config.root)
        self._process = subprocess.Popen(
            command,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TMPDIR": str(temporary)} if temporary else None,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def await_step(self, step: int) -> None:
        until(lambda: self._process.poll() is not None or any(s >= step for s in _reached(self.root)), f"step {step}")
        assert self._process.poll() is None, self._process.communicate()[0]

    def await_processes(self, count: int) -> None:
        until(lambda: len(self.family()) >= count, f"{count} processes")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def signal_group(self, number: signal.Signals) -> None:
        os.killpg(self.pid, number)

    def family(self) -> list[int]:
        """All processes of its session that are alive, itself included."""
        return [process.pid for process in psutil.process_iter() if _belongs_to(process, self.pid)]

    def await_end(self) -> tuple[int, str]:
        """Exit code and everything it said."""
        said, _ = self._process.communicate(timeout=_DEADLINE_S)
        return self._process.returncode, said

    def close(self) -> None:
        """End whatever is left, by number."""
        for pid in self.family():
            os.kill(pid, signal.SIGKILL)
        self._process.communicate(timeout=_DEADLINE_S)


def _belongs_to(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
