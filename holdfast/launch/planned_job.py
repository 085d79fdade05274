"""Which run a job would train, judged where it is submitted: as much as can be known away from the cluster."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.configs import validate
from holdfast.configs.plain import to_plain
from holdfast.configs.schema import LaunchKind, RunConfig
from holdfast.errors import ConfigurationError
from holdfast.launch.arguments import Parser
from holdfast.launch.identity import config_digest, new_run_id
from holdfast.launch.records import nested, read_yaml
from holdfast.launch.run_dir import RunDir
from holdfast.launch.upload import RuntimeEnv
from holdfast.trainer.config import DataSource

__all__ = ["PlannedJob", "plan_job", "run_record"]

_RUN = "holdfast_run"
"""Key in a job's metadata: the directory of its run."""
_NOT_A_RUN = frozenset({"auto", "must", "never"})


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """A job that may be submitted."""

    words: tuple[str, ...]
    """The driver's command line."""
    run_id: str
    attempt: int
    about: Mapping[str, str]
    """To be kept with the job, so that whoever attaches later finds its run."""

    def submission_id(self, taken: Sequence[str]) -> str:
        """``<run_id>-a<attempt>``; Ray takes no id twice, not even of a job that never began."""
        used = [found[1] for one in taken if (found := re.fullmatch(rf"{re.escape(self.run_id)}-a(\d+)", one))]
        return f"{self.run_id}-a{max([self.attempt - 1, *map(int, used)]) + 1}"


def plan_job(words: Sequence[str], environment: RuntimeEnv) -> tuple[PlannedJob | None, list[str], list[str]]:
    """The job that ``words`` (``train KEY=VALUE ...``) mean, what is wrong with it, and what is doubtful.

    Raises: ConfigurationError for words that are no configuration.
    """
    overrides, config_dir = _parse(words)
    from holdfast.launch.compose import compose_config

    config = compose_config(overrides, config_dir)
    problems = validate.check(config, validate.Host(free_bytes=1 << 62, ray_address="a cluster"))
    if config.launch.kind is LaunchKind.PROCESS:
        problems.append("launch=process trains on the head node alone, outside Ray; leave it out")
    if problems:
        return None, problems, []
    root = config.root or environment.env_vars.get("HOLDFAST_HOME", "")
    job = _named(config, ["holdfast", *words], Path(root) if root else None)
    return job, [], list(_doubts(config, root))


def _parse(words: Sequence[str]) -> tuple[list[str], str | None]:
    if not words or words[0] != "train":
        raise ConfigurationError(
            f"the job must be `train KEY=VALUE ...` behind --, not {' '.join(words[:1]) or 'nothing'}"
        )
    parser = Parser(prog="holdfast submit -- train", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-dir", "-cd")
    args = parser.parse_intermixed_args(list(words[1:]))
    return args.overrides, args.config_dir


def _doubts(config: RunConfig, root: str) -> list[str]:
    doubts = []
    if not root:
        doubts.append(
            "root is not given: runs go to HOLDFAST_HOME or ~/holdfast-runs of the head node, which must be storage "
            "that all nodes share; set root=DIR"
        )
    elif not Path(root).is_dir():
        doubts.append(f"root={root} is not to be seen from here: the driver chooses the run (resume={config.resume})")
    if config.data.source is not DataSource.LOCAL and not Path(config.data.path).exists():
        doubts.append(f"data.path={config.data.path!r} does not exist here; the head node reads it")
    return doubts


def _named(config: RunConfig, words: list[str], root: Path | None) -> PlannedJob:
    """The run is chosen here if its directory can be seen, so that its number is known; else the driver chooses."""
    named = config.run_id or (config.resume if config.resume not in _NOT_A_RUN else "")
    if root is None or not root.is_dir():
        return PlannedJob(tuple(words), named or new_run_id(), 1, {})
    found = named or (_unfinished(root / config.project, config) if config.resume != "never" else "")
    run_id = found or new_run_id()
    if not named and (found or config.resume != "must"):
        words = [*(word for word in words if word.partition("=")[0] != "run_id"), f"run_id={run_id}"]
    run = RunDir(root / config.project / run_id)
    attempts = len(run.record()["attempts"]) if run.exists() else 0
    return PlannedJob(tuple(words), run_id, attempts + 1, {_RUN: str(run.path)})


def _unfinished(project: Path, config: RunConfig) -> str:
    """The newest run of the same parts that is not finished and has no driver; empty without one. The text is not read
    here, so whether it is the same is left to the driver."""
    ours = config_digest(to_plain(config))
    records = sorted(project.glob("*/run.json"), key=lambda file: file.parent.name, reverse=True)
    for run in (RunDir(record.parent) for record in records):
        try:
            ended = run.record()["ended"]
        except ConfigurationError:
            continue
        is_finished = ended is not None and ended["outcome"] == "finished"
        if not is_finished and run.driver() is None and config_digest(nested(read_yaml(run.config_file))) == ours:
            return run.run_id
    return ""


def run_record(about: Mapping[str, str], submission_id: str) -> int | None:
    """The exit code that run.json has of the attempt that this job was; None if it cannot be seen from here."""
    run = RunDir(Path(about[_RUN])) if _RUN in about else None
    if run is None or not run.exists():
        return None
    try:
        attempts = run.record()["attempts"]
    except ConfigurationError:
        return None
    ended = [attempt["ended"] for attempt in attempts if attempt.get("ray_job") == submission_id]
    return int(ended[-1]["exit_code"]) if ended and ended[-1] else None
