"""Ray's job server: submit, look, follow, stop. With :mod:`holdfast.launch.ray_fleet` the only doors to ray.

The job server is asked over HTTP; nothing here joins a cluster or starts one.
"""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import ConfigurationError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE, get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes
    from ray.job_submission import JobSubmissionClient

__all__ = ["UPLOAD_LIMIT_BYTES", "JobState", "RayJobs", "uploaded_files"]

UPLOAD_LIMIT_BYTES = int(DASHBOARD_CLIENT_MAX_SIZE)
"""What the dashboard accepts; a package is not compressed."""


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as its server knows it."""

    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    exit_code: int | None
    """Of the driver; None as long as it runs, and for ever if the job was stopped or never started."""
    message: str
    metadata: Mapping[str, str]

    @property
    def is_over(self) -> bool:
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


class RayJobs:
    """The job server at ``address``, as ``http://HEAD:8265``.

    Raises: ConfigurationError if none answers there, or if it wants a token that is not known here. Afterwards every
    method raises ConnectionError while it does not answer, and ConfigurationError for what it refuses.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        try:
            self._client = JobSubmissionClient(address)
        except Exception as error:  # requests', aiohttp's and Ray's own; the user learns of it
            raise ConfigurationError(
                f"no Ray job server answers at {address} ({_first_line(error)}); start the head with `ray start --head "
                "--include-dashboard=true`, give its address with --address http://HEAD:8265, and where Ray has token "
                "authentication set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here"
            ) from error
        for chatty in ("ray.dashboard.modules", "ray._private.runtime_env.packaging"):  # every upload and websocket
            logging.getLogger(chatty).setLevel(logging.WARNING)

    def ids(self) -> Sequence[str]:
        """Submission ids that are taken, those of jobs that have ended included."""
        return [str(job.submission_id) for job in self._asked(self._client.list_jobs) if job.submission_id]

    def submit(
        self, entrypoint: str, submission_id: str, runtime_env: Mapping[str, object], about: Mapping[str, str]
    ) -> None:
        """Upload the working directory and start the driver; ``about`` is kept with the job."""
        try:
            self._client.submit_job(
                entrypoint=entrypoint, submission_id=submission_id, runtime_env=dict(runtime_env), metadata=dict(about)
            )
        except Exception as error:  # of whatever library; the user learns of it
            raise ConfigurationError(f"Ray refuses the job {submission_id}: {_first_line(error)}") from error

    def state(self, submission_id: str) -> JobState:
        info = self._asked(lambda: self._client.get_job_info(submission_id))
        return JobState(str(info.status), info.driver_exit_code, info.message or "", info.metadata or {})

    def log(self, submission_id: str) -> str:
        """Everything the driver has said so far."""
        return str(self._asked(lambda: self._client.get_job_logs(submission_id)))

    def follow(self, submission_id: str, say: Callable[[str], None]) -> None:
        """Hand on what the driver says, from its first word, until the server closes the stream; which it may do at any
        time, whether the job is over or not."""

        async def listen() -> None:
            async for lines in self._client.tail_job_logs(submission_id):
                say(lines)

        self._asked(lambda: asyncio.run(listen()))

    def stop(self, submission_id: str) -> None:
        """SIGTERM now, SIGKILL after RAY_JOB_STOP_WAIT_TIME_S of the job; returns at once."""
        self._asked(lambda: self._client.stop_job(submission_id))

    def _asked(self, ask: Callable[[], object]):  # type: ignore[no-untyped-def]  # whatever Ray returns
        try:
            return ask()
        except RuntimeError as error:
            if "does not exist" in str(error) or "404" in str(error):
                raise ConfigurationError(f"{self._address}: {_first_line(error)}") from error
            raise ConnectionError(_first_line(error)) from error
        except Exception as error:  # requests', aiohttp's
            raise ConnectionError(_first_line(error)) from error


def uploaded_files(directory: Path, excludes: Sequence[str]) -> dict[str, int]:
    """Relative path -> bytes of what Ray packs, by Ray's rules: ignore files, its own exclusions and ``excludes``."""
    found: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            found[str(path.relative_to(directory))] = path.stat().st_size

    every = [*get_runtime_env_default_excludes(), *excludes]
    quiet = logging.getLogger(f"{__name__}.packing")
    quiet.setLevel(logging.CRITICAL)
    _dir_travel(directory, [_get_excludes(directory, every)], note, include_gitignore=True, logger=quiet)
    return found


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
