"""Which run a command continues, or why it starts a new one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError, SnapshotError
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.storage import open_storage
from holdfast.fault_tolerance.storage_uri import below
from holdfast.launch.identity import new_run_id
from holdfast.launch.run_dir import RunDir, find_resumable

__all__ = ["Opening", "checkpoints_uri", "open_run"]

_POLICIES = ("auto", "must", "never")


@dataclass(frozen=True, slots=True)
class Opening:
    """A run directory and how it was chosen."""

    run_dir: RunDir
    how: str
    """In words, with the reason against every run that was passed over."""
    is_finished: bool = False
    """There is nothing left to do."""


def open_run(config: RunConfig, digest: str) -> Opening:
    """Find the run that ``run_id`` and ``resume`` mean, or make a new one.

    Raises: ConfigurationError when the run to resume does not exist or is made of other parts.
    """
    name = config.run_id or (config.resume if config.resume not in _POLICIES else "")
    if name:
        return _named(config, name, digest)
    if config.resume == "never":
        return _fresh(config, new_run_id(), digest, "never: starting fresh")
    found, against = find_resumable(config.root, config.project, digest)
    passed_over = "".join(f"\nnot resumed: {reason}" for reason in against)
    if found is not None:
        return Opening(found, f"{config.resume}: continuing {found.run_id}{passed_over}")
    if config.resume == "must":
        raise ConfigurationError(
            f"resume=must, but project {config.project!r} below {config.root} has no unfinished run of this "
            f"configuration{passed_over}; use resume=auto to start one"
        )
    return _fresh(config, new_run_id(), digest, f"auto: nothing to continue, starting fresh{passed_over}")


def _fresh(config: RunConfig, run_id: str, digest: str, how: str) -> Opening:
    return Opening(RunDir.create(config.root, config.project, run_id, config_digest=digest), how)


def checkpoints_uri(config: RunConfig, run_dir: RunDir) -> str:
    """Where the durable checkpoints of a run are."""
    if not config.snapshot.storage:
        return str(run_dir.checkpoints)
    return below(config.snapshot.storage, config.project, run_dir.run_id)


def _stored(config: RunConfig, run_id: str) -> str | None:
    """Where checkpoints of the run are, apart from its directory, which another machine has made; None if nowhere.

    Whether they can be used is found out by whoever resumes from them.
    """
    if not config.snapshot.storage:
        return None
    uri = below(config.snapshot.storage, config.project, run_id)
    try:
        good, rejected = checkpoint.list_checkpoints(open_storage(uri))
    except SnapshotError as error:
        raise ConfigurationError(f"run {run_id}: nobody knows whether it has checkpoints in {uri}: {error}") from error
    return uri if good or rejected else None


def _named(config: RunConfig, run_id: str, digest: str) -> Opening:
    exists = RunDir.exists_in(config.root, config.project, run_id)
    stored = None if exists and config.resume != "never" else _stored(config, run_id)
    if (exists or stored) and config.resume == "never":
        where = f" in {stored}" if stored else ""
        raise ConfigurationError(
            f"run {run_id} exists already{where} and resume=never; choose another run_id, or resume=auto to continue it"
        )
    if stored:
        return _fresh(config, run_id, digest, f"continuing {run_id} from {stored}; its directory is new here")
    if not exists and config.resume in ("auto", "never"):
        return _fresh(config, run_id, digest, f"{config.resume}: run {run_id} is new")
    run_dir = RunDir.open(config.root, config.project, run_id)
    record = run_dir.record()
    if record["config_digest"] != digest:
        started = " ".join(record["attempts"][0]["overrides"]) if record["attempts"] else "other options"
        raise ConfigurationError(
            f"run {run_id} was started with another model, data, optimizer, batch, seed or precision "
            f"({started}); give the same options again, or start another run with another run_id"
        )
    ended = record["ended"]
    is_finished = ended is not None and ended["outcome"] == "finished" and _is_at_goal(ended, config.trainer.max_steps)
    return Opening(run_dir, f"continuing {run_id}", is_finished)


def _is_at_goal(ended: Mapping[str, Any], max_steps: int) -> bool:
    """Or evaluations have ended it before."""
    return bool(ended["step"] >= max_steps or ended.get("findings", {}).get("ended"))
