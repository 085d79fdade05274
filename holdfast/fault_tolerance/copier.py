"""One version on its way from live tensors into a buffer, beside the step that is computed meanwhile."""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import TypeAlias

from holdfast import failpoints
from holdfast.errors import SnapshotError
from holdfast.fault_tolerance.buffer import Buffer, BufferState
from holdfast.fault_tolerance.capture import Pace, Plan
from holdfast.fault_tolerance.manifest import Manifest, digest

__all__ = ["Copier", "VersionCopy"]

logger = logging.getLogger(__name__)


_Jobs: TypeAlias = "queue.SimpleQueue[Callable[[], None] | None]"


class Copier:
    """A thread that does one thing after another, and is never waited for longer than somebody wants to."""

    def __init__(self, name: str) -> None:
        self._jobs: _Jobs = queue.SimpleQueue()
        threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True).start()
        self._end = weakref.finalize(self, self._jobs.put, None)

    def submit(self, job: Callable[[], None]) -> None:
        """``job`` must not raise."""
        self._jobs.put(job)

    def close(self) -> None:
        """End after what has been submitted."""
        self._end()


def _work(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # what it has held must not live until the next one


class VersionCopy:
    """Made in the training thread right after an update, run by a :class:`Copier`, awaited before the next update.

    The version becomes FILLED only when every byte and the manifest are in place, the epoch lasts, and torch has
    written to no slice since this object was made.
    """

    def __init__(self, plan: Plan, buffer: Buffer, manifest: Manifest, pace: Pace) -> None:
        self._plan, self._buffer, self._manifest, self._pace = plan, buffer, manifest, pace
        self._marks = plan.marks()
        self._is_given_up = False
        self._done, self._lock = threading.Event(), threading.Lock()
        self.copy_s = 0.0
        self.is_complete = False
        self.why_not = ""

    @property
    def version(self) -> int:
        return self._manifest.version

    @property
    def is_over(self) -> bool:
        return self._done.is_set()

    def run(self) -> None:
        """In the copier's thread. Never raises: a snapshot that fails is no failure of the training."""
        started_s = time.perf_counter()
        try:
            self._fill()
        except BaseException as error:
            self.why_not = f"{type(error).__name__}: {error}"
            logger.warning("version %d is not taken", self.version, exc_info=error)
        finally:
            self.copy_s = time.perf_counter() - started_s
            self._settle()
            self._done.set()

    def wait(self, timeout_s: float) -> bool:
        """Whether it is over. The rest is copied without regard to anybody else."""
        self._pace.control.hurry()
        return self._done.wait(timeout_s)

    def give_up(self, why: str) -> None:
        """It will not become FILLED any more, whatever its thread is blocked in."""
        with self._lock:
            self._is_given_up, self.why_not = True, self.why_not or why
        self._pace.control.stop()

    def _fill(self) -> None:
        digests = self._plan.capture(self._buffer.data, self._pace, version=self.version)
        if digests is None:
            self.why_not = self.why_not or "the epoch is over"
        elif self._plan.marks() != self._marks:
            raise SnapshotError(
                f"version {self.version}: a slice was written to while it was copied; the state may change only "
                "between fence and offer"
            )
        else:
            self._publish(self._plan.manifests.to_bytes(self._manifest, digests))
            failpoints.hit("snapshot.after_capture", self.version)

    def _publish(self, manifest: bytes) -> None:
        with self._lock:
            if not self._is_given_up and not self._is_fenced:
                name = digest(manifest)
                self._buffer.publish(manifest, name, data_bytes=self._plan.data_bytes, state=BufferState.FILLED)
                self.is_complete = True

    def _settle(self) -> None:
        """What is not complete is garbage; after a fence the buffer may have a new owner, who knows that."""
        if not self.is_complete and not self._is_fenced:
            self._buffer.release()

    @property
    def _is_fenced(self) -> bool:
        return self._pace.fence is not None and self._pace.fence.is_closed
