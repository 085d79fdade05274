"""Where the checkpoints are that a command line means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.storage import Storage, open_storage
from holdfast.fault_tolerance.storage_uri import below
from holdfast.launch.find_run import find_run
from holdfast.launch.records import read_yaml
from holdfast.launch.run_dir import RunDir

__all__ = ["CheckpointPlace", "place_of", "place_of_run"]


@dataclass(frozen=True, slots=True)
class CheckpointPlace:
    """Where checkpoints are."""

    name: str
    uri: str
    storage: Storage

    def chosen(self, step: int | None) -> int:
        """This step, or the newest that has a complete checkpoint. Raises: ConfigurationError with those that have."""
        good = [found.step for found in checkpoint.list_checkpoints(self.storage)[0]]
        if step in good:
            return step
        if step is None and good:
            return good[0]
        there = f"there are {', '.join(map(str, sorted(good)))}" if good else "there is none"
        wanted = "" if step is None else f" of step {step}"
        raise ConfigurationError(f"{self.name} has no complete checkpoint{wanted} in {self.uri}: {there}")


def place_of(name: str | None, root: str | None) -> CheckpointPlace:
    """Of a URI, of a directory of checkpoints, or of a run: see :func:`find_run`. Raises: ConfigurationError."""
    if name is not None and len(urlsplit(name).scheme) > 1:
        return CheckpointPlace("storage", name, open_storage(name))
    path = Path(name).expanduser().absolute() if name is not None else Path()
    if name is not None and not (path / "run.json").is_file() and any(path.glob("*step-*")):
        return CheckpointPlace("directory", str(path), open_storage(str(path)))
    return place_of_run(find_run(name, root))


def place_of_run(run: RunDir) -> CheckpointPlace:
    """In the run directory, unless the configuration of the newest attempt names another storage."""
    storage = read_yaml(run.config_file).get("snapshot.storage")
    uri = below(str(storage), run.path.parent.name, run.run_id) if storage else str(run.checkpoints)
    return CheckpointPlace(f"run {run.run_id}", uri, open_storage(uri))
