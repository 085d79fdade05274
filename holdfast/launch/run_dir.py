"""The directory of one run: what is where, who drives it, how it went.

::

    <root>/<project>/<run_id>/
      run.json                                id, config digest, how it ended, and one record per attempt
      config.yaml  overrides.yaml             of the newest attempt; older overrides are in run.json
      driver.lock                             held by the driver for its lifetime
      events.jsonl  metrics.jsonl             the truth about the run
      logs/driver.attempt1.log  logs/rank00000.attempt1.log
      checkpoints/                            see holdfast.fault_tolerance.checkpoint
      failures/0001/{summary.json, rank00001.tail.txt}
      export/
      report.html  report.md                  see holdfast.launch.report_command
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

from holdfast.errors import ConfigurationError, SnapshotError
from holdfast.fault_tolerance.storage import DirectoryStorage
from holdfast.launch import lease
from holdfast.launch.records import tail, to_yaml

__all__ = ["RunDir", "find_resumable", "root_problems"]

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_RECORD = "run.json"
_TAIL_LINES = 200
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FOLDERS = ("logs", "checkpoints", "failures", "export")
_WRITE_TEST_BYTES = 1 << 16

Record = dict[str, Any]
"""run.json: JSON values, so opaque to the type checker."""


class RunDir:
    """One run on disk. Only its driver writes, inside :meth:`lock`; ``run.json`` is replaced as a whole."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path, self._clock = path, clock
        self._files = DirectoryStorage(path)

    @classmethod
    def create(
        cls, root: str, project: str, run_id: str, *, config_digest: str, clock: Callable[[], float] = time.time
    ) -> RunDir:
        """Make the directory of a new run.

        Raises: ConfigurationError for names that are no names, a root that is relative or cannot be written,
        something else in the way, or a run that exists already.
        """
        problems = _name_problems(project=project, run_id=run_id) + root_problems(root)
        if problems:
            raise ConfigurationError(problems)
        run = cls(Path(root, project, run_id), clock)
        if run.exists():
            raise ConfigurationError(f"run {run_id} exists already in {run.path}; resume it or choose another run_id")
        try:
            for folder in _FOLDERS:
                (run.path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"{run.path} cannot be made: {error.strerror} ({error.filename})") from error
        run._write(
            {
                "format_version": FORMAT_VERSION,
                "id": run_id,
                "project": project,
                "config_digest": config_digest,
                "created": clock(),
                "ended": None,
                "attempts": [],
            }
        )
        return run

    @classmethod
    def open(cls, root: str, project: str, run_id: str, clock: Callable[[], float] = time.time) -> RunDir:
        """A run that exists. Raises: ConfigurationError if there is none of this name, or one of a newer Holdfast."""
        problems = _name_problems(project=project, run_id=run_id)
        if problems:
            raise ConfigurationError(problems)
        run = cls(Path(root, project, run_id), clock)
        if not run.exists():
            raise ConfigurationError(f"run {run_id} does not exist: there is no {run.path / _RECORD}")
        found = run.record().get("format_version")
        if found != FORMAT_VERSION:
            raise ConfigurationError(
                f"run {run_id} has format_version={found}, this Holdfast reads {FORMAT_VERSION}; "
                "use the version that wrote it"
            )
        return run

    @staticmethod
    def exists_in(root: str, project: str, run_id: str) -> bool:
        """Whether there is a run of this name. Raises: ConfigurationError for names that are no names."""
        problems = _name_problems(project=project, run_id=run_id)
        if problems:
            raise ConfigurationError(problems)
        return RunDir(Path(root, project, run_id)).exists()

    # -- places ---------------------------------------------------------------------------------------------------

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def driver_log(self, attempt: int) -> Path:
        return self.path / "logs" / f"driver.attempt{attempt}.log"

    def rank_log(self, rank: int, attempt: int) -> Path:
        return self.path / "logs" / f"rank{rank:05d}.attempt{attempt}.log"

    # -- the record -----------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        return (self.path / _RECORD).is_file()

    def record(self) -> Record:
        """What ``run.json`` says now. Raises: ConfigurationError if it cannot be read."""
        try:
            found = json.loads((self.path / _RECORD).read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{self.path / _RECORD} cannot be read: {error}") from error
        if not isinstance(found, dict) or (found.get("format_version") == FORMAT_VERSION and not _is_sound(found)):
            raise ConfigurationError(f"{self.path / _RECORD} is not the record of a run")
        return cast(Record, found)

    def begin_attempt(
        self, *, config: Mapping[str, object], overrides: Sequence[str], command: Sequence[str], **facts: object
    ) -> int:
        """Note that a driver starts to work here; returns the number of the attempt, from 1.

        ``facts`` are JSON values worth keeping: versions, git commit, Ray job id.
        """
        record = self.record()
        number = len(record["attempts"]) + 1
        attempt = {
            "number": number,
            "started": self._clock(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": list(command),
            "overrides": list(overrides),
            **facts,
            "ended": None,
        }
        self._files.write(self.config_file.name, [to_yaml(config).encode()])
        self._files.write("overrides.yaml", ["".join(f"- {json.dumps(o)}\n" for o in overrides).encode() or b"[]\n"])
        self._write({**record, "ended": None, "attempts": [*record["attempts"], attempt]})
        return number

    def end_attempt(
        self,
        outcome: str,
        exit_code: int,
        *,
        step: int,
        reason: str = "",
        world: int = 0,
        findings: Mapping[str, object] | None = None,
    ) -> None:
        """Note how the newest attempt, and with it the run, has ended: ``finished``, ``stopped`` or ``failed``; the
        number of ranks that took part last, 0 if nothing had started; and what it has to show, as JSON values."""
        record = self.record()
        ended = {"outcome": outcome, "exit_code": exit_code, "step": step, "reason": reason, "time": self._clock()}
        ended |= {"world": world, "findings": dict(findings or {})}
        *before, last = record["attempts"]
        self._write({**record, "ended": ended, "attempts": [*before, {**last, "ended": ended}]})

    def _write(self, record: Record) -> None:
        self._files.write(_RECORD, [json.dumps(record, indent=1).encode() + b"\n"])

    # -- the lease ------------------------------------------------------------------------------------------------

    def lock(self) -> AbstractContextManager[None]:
        """Be the driver inside a ``with`` block. Raises: ConfigurationError naming the driver there is."""
        return lease.hold(self.path / "driver.lock")

    def driver(self) -> str | None:
        """Who drives the run at this moment, in words."""
        return lease.holder(self.path / "driver.lock")

    # -- failures -------------------------------------------------------------------------------------------------

    def record_failure(self, number: int, summary: Mapping[str, object], tails: Iterable[Path]) -> Path | None:
        """Keep what is known about a fault: ``summary`` and the last 200 lines of each log that exists.

        Each attempt counts its faults from 1, so the first free number from ``number`` on is taken. What cannot
        be written is logged: evidence is never worth a run. Returns the directory.
        """
        try:
            folder = self._new_failure(number)
            for log in tails:
                if log.exists():
                    (folder / f"{log.name.split('.')[0]}.tail.txt").write_bytes(tail(log, _TAIL_LINES).encode())
            (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        except (OSError, TypeError, ValueError) as error:  # the latter two: a summary that is no JSON
            logger.warning("fault %d could not be documented: %s", number, error)
            return None
        return folder

    def _new_failure(self, number: int) -> Path:
        while True:
            folder = self.path / "failures" / f"{number:04d}"
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                number += 1
            else:
                return folder


def _is_sound(record: Record) -> bool:
    """It has the form that is relied on, whoever edited it."""
    ended = record.get("ended")
    is_end = ended is None or (isinstance(ended, dict) and {"outcome", "step"} <= ended.keys())
    return is_end and isinstance(record.get("attempts"), list)


def find_resumable(root: str, project: str, config_digest: str) -> tuple[RunDir | None, tuple[str, ...]]:
    """The newest run that is not finished, has the same digest and no driver; and why newer ones were passed over."""
    folder = Path(root, project)
    candidates = [RunDir(path) for path in folder.iterdir()] if folder.is_dir() else []
    reasons: list[str] = []
    for run in sorted((run for run in candidates if run.exists()), key=_age_key, reverse=True):
        against = _against_resuming(run, config_digest)
        if against is None:
            return run, tuple(reasons)
        reasons.append(f"{run.run_id}: {against}")
    return None, tuple(reasons)


def _age_key(run: RunDir) -> tuple[float, str]:
    try:
        return float(run.record()["created"]), run.run_id
    except (ConfigurationError, KeyError, TypeError, ValueError):
        return float("inf"), run.run_id  # first, so that its reason is told


def _against_resuming(run: RunDir, config_digest: str) -> str | None:
    try:
        record = run.record()
    except ConfigurationError as error:
        return str(error)
    ended, driver = record.get("ended"), run.driver()
    if record.get("format_version") != FORMAT_VERSION:
        return f"format_version={record.get('format_version')}, this Holdfast reads {FORMAT_VERSION}"
    if record.get("config_digest") != config_digest:
        return "another model, data, optimizer, batch, seed or precision"
    if driver is not None:
        return f"driven by {driver}"
    if ended is not None and ended["outcome"] == "finished":
        return f"finished at step {ended['step']}"
    return None


def root_problems(root: str, *, need_bytes: int = 0) -> list[str]:
    """What is wrong with a root directory, each with the way out: relative, not writable, too little space."""
    if not Path(root).is_absolute():
        # A driver inside a Ray job starts in a directory that Ray deletes: a relative root would lose the run.
        return [f"root={root!r} must be absolute, for example root={Path(root).expanduser().absolute()}"]
    test = f"holdfast-write-test-{uuid.uuid4().hex[:8]}"
    try:
        DirectoryStorage(root).write(test, [bytes(_WRITE_TEST_BYTES)])
        DirectoryStorage(root).delete(test)
        free = shutil.disk_usage(root).free
    except (SnapshotError, OSError) as error:
        return [f"root={root} cannot be written to: {error}"]
    if free < need_bytes:
        return [f"root={root} has {free:,} bytes free, {need_bytes:,} are needed; set root to a larger file system"]
    return []


def _name_problems(**names: str) -> list[str]:
    return [
        f"{key}={name!r} must be letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 128"
        for key, name in names.items()
        if not _NAME.fullmatch(name)
    ]
