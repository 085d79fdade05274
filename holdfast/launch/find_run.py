"""Which run a command line means."""

from __future__ import annotations

from pathlib import Path

from holdfast import knobs
from holdfast.errors import ConfigurationError
from holdfast.launch.run_dir import RunDir

__all__ = ["find_run"]

_NAMED = 5
"""Runs that an error message names."""


def find_run(name: str | None, root: str | None) -> RunDir:
    """A run by its directory, by its id in any project below ``root`` (None: where runs are by default), or, without a
    name, the one that was begun last.

    Raises: ConfigurationError with the newest runs that there are, or with all those of an id that is not unique.
    """
    if name is not None and (path := Path(name).expanduser().resolve()).joinpath("run.json").is_file():
        return _opened(path)
    runs = Path(root).expanduser().absolute() if root else knobs.home()
    newest_first = sorted((record.parent for record in runs.glob("*/*/run.json")), key=_age, reverse=True)
    same = [run for run in newest_first if name in (None, run.name)]
    if not same:
        raise ConfigurationError(_missing(name, runs, newest_first))
    if name is not None and len(same) > 1:
        raise ConfigurationError(f"run {name} exists in several projects; give one: {', '.join(map(str, same))}")
    return _opened(same[0])


def _opened(path: Path) -> RunDir:
    return RunDir.open(str(path.parent.parent), path.parent.name, path.name)


def _age(run: Path) -> tuple[float, str]:
    """By the record itself: its file is written again with every attempt. What cannot be read is nobody's newest."""
    try:
        return float(RunDir(run).record()["created"]), run.name
    except (ConfigurationError, KeyError, TypeError, ValueError):
        return 0.0, run.name


def _missing(name: str | None, runs: Path, newest_first: list[Path]) -> str:
    if not newest_first:
        wanted = "no run was found" if name is None else f"run {name!r} is neither the directory of a run nor an id"
        return f"{wanted} below {runs}: there is none; --root names another place"
    there = ", ".join(run.name for run in newest_first[:_NAMED])
    return f"run {name!r} is neither the directory of a run nor an id below {runs}; the newest there are {there}"
