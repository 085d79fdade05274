"""Which run a command continues, or why it starts a new one."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError
from holdfast.launch.identity import new_run_id
from holdfast.launch.run_dir import RunDir, find_resumable

__all__ = ["Opening", "open_run"]

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


def _named(config: RunConfig, run_id: str, digest: str) -> Opening:
    exists = RunDir.exists_in(config.root, config.project, run_id)
    if not exists and config.resume in ("auto", "never"):
        return _fresh(config, run_id, digest, f"{config.resume}: run {run_id} is new")
    if exists and config.resume == "never":
        raise ConfigurationError(
            f"run {run_id} exists already and resume=never; choose another run_id, or resume=auto to continue it"
        )
    run_dir = RunDir.open(config.root, config.project, run_id)
    record = run_dir.record()
    if record["config_digest"] != digest:
        started = " ".join(record["attempts"][0]["overrides"]) if record["attempts"] else "other options"
        raise ConfigurationError(
            f"run {run_id} was started with another model, data, optimizer, batch, seed or parallel layout "
            f"({started}); give the same options again, or start another run with another run_id"
        )
    ended = record["ended"]
    is_finished = ended is not None and ended["outcome"] == "finished" and ended["step"] >= config.trainer.max_steps
    return Opening(run_dir, f"continuing {run_id}", is_finished)
