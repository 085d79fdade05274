"""Watching a job to its end, however often the connection goes: its state is asked for, never guessed from its log."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from holdfast.errors import ConfigurationError

__all__ = ["JobServer", "Watched", "exit_code_in", "follow_job"]

_POLL_S = 1.0
_REATTACH_S = 2.0
_PATIENCE_S = 600.0
_END = re.compile(r"^END .*\(exit code (\d+)\)", re.MULTILINE)


class JobState(Protocol):
    """See :class:`holdfast.launch.ray_jobs.JobState`."""

    @property
    def status(self) -> str: ...

    @property
    def exit_code(self) -> int | None: ...

    @property
    def message(self) -> str: ...

    @property
    def is_over(self) -> bool: ...


class JobServer(Protocol):
    """What :class:`holdfast.launch.ray_jobs.RayJobs` promises."""

    def state(self, submission_id: str) -> JobState: ...

    def log(self, submission_id: str) -> str: ...

    def follow(self, submission_id: str, say: Callable[[str], None]) -> None: ...

    def stop(self, submission_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Watched:
    """How the watching has ended."""

    state: JobState | None
    """Of the job that is over; None if it goes on, or if nobody knows."""
    said: str
    """The end of the job's log, as far as it is over."""
    why: str = ""
    """Why nobody watches any more, in words."""
    is_forgotten: bool = False
    """The server has known the job and does not any more: its head was started anew."""


def follow_job(
    jobs: JobServer, submission_id: str, *, patience_s: float = _PATIENCE_S, poll_s: float = _POLL_S
) -> Watched:
    """Show the log of a job until the job is over.

    The first Ctrl-C stops the job and waits for it to save itself, the second leaves it alone with that. A server that
    does not answer is asked again for ``patience_s``. Raises: ConfigurationError if it has never known the job.
    """
    log = _Log(jobs, submission_id)
    log.start()
    is_stopping = False
    while True:
        try:
            state = _until_over(jobs, submission_id, patience_s, poll_s)
            if state is None:
                return Watched(None, "", f"the job server has not answered for {patience_s:g} s")
            return Watched(state, log.finish())
        except _Forgotten:
            return Watched(None, "", "the job server has forgotten the job, as after a restart of its head", True)
        except KeyboardInterrupt:
            if is_stopping:
                return Watched(None, "", "a second Ctrl-C; the job goes on stopping")
            is_stopping = True
            _tell(f"stopping {submission_id}: it saves itself and ends; Ctrl-C again leaves it alone with that")
            _stop(jobs, submission_id)


def exit_code_in(log: str) -> int | None:
    """What the last line ``END`` of a driver that has ended says."""
    found = _END.findall(log)
    return int(found[-1]) if found else None


class _Forgotten(Exception):
    """A job that the server has known is unknown to it."""


def _until_over(jobs: JobServer, submission_id: str, patience_s: float, poll_s: float) -> JobState | None:
    """The state of the job once it is over; None when the server has been silent for too long."""
    silent_since: float | None = None
    was_known = False
    while True:
        try:
            state = jobs.state(submission_id)
            was_known = True
        except ConfigurationError as error:
            if was_known:
                raise _Forgotten from error
            raise
        except ConnectionError as error:
            now = time.monotonic()
            if silent_since is None:
                silent_since = now
                _tell(f"the job server does not answer ({error}); the job may go on; asking again")
            elif now - silent_since > patience_s:
                return None
        else:
            silent_since = None
            if state.is_over:
                return state
        time.sleep(poll_s)


def _stop(jobs: JobServer, submission_id: str) -> None:
    try:
        jobs.stop(submission_id)
    except (ConnectionError, ConfigurationError) as error:
        _tell(f"{submission_id} could not be told to stop: {error}")


class _Log:
    """Shows what the driver says, once, whoever closes the stream. Its thread ends with the process."""

    def __init__(self, jobs: JobServer, submission_id: str) -> None:
        self._jobs, self._id = jobs, submission_id
        self._lock = threading.Lock()
        self._shown = 0
        self._is_over = False

    def start(self) -> None:
        threading.Thread(target=self._listen, name="job log", daemon=True).start()

    def finish(self) -> str:
        """The job is over: show what the stream has not brought; the whole log."""
        try:
            whole = self._jobs.log(self._id)
        except (ConnectionError, ConfigurationError) as error:
            _tell(f"the end of the log cannot be read: {error}")
            whole = ""
        with self._lock:
            self._is_over = True
            self._show(whole[self._shown :])
        return whole

    def _listen(self) -> None:
        while not self._is_over:
            position = 0  # a new stream begins with the first word

            def say(text: str) -> None:
                nonlocal position
                with self._lock:
                    if not self._is_over:
                        self._show(text[max(0, self._shown - position) :])
                position += len(text)

            with suppress(ConnectionError, ConfigurationError):  # the main thread tells of a server that is gone
                self._jobs.follow(self._id, say)
            time.sleep(_REATTACH_S)

    def _show(self, text: str) -> None:
        self._shown += len(text)
        sys.stdout.write(text)
        sys.stdout.flush()


def _tell(message: str) -> None:
    sys.stderr.write(f"submit: {message}\n")
