"""Processes of a run that die at a named failpoint, and tell on the way there what they see.

``struck`` makes every worker and keeper that this process starts a witness. A witness kills what a :class:`Strike`
says, at the place it says, and writes digests of the training state into a folder: of the live tensors at each step
boundary, of what its keeper holds when a version is committed, and of the live tensors after a restore. None of it
goes through the code that takes, stores and restores snapshots, so the digests can be held against each other.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from holdfast import failpoints
from holdfast.fault_tolerance.manifest import Manifest
from holdfast.launch import process_fleet
from holdfast.launch.fleet import Role

if TYPE_CHECKING:
    from holdfast.trainer.state import StateView

__all__ = ["Sighting", "Strike", "Victim", "passed", "prepare", "sightings", "struck", "unstruck"]


class Victim(str, Enum):
    """Who gets the SIGKILL."""

    ITSELF = "itself"
    DRIVER = "driver"


@dataclass(frozen=True)
class Strike:
    """What happens when a process of ``role`` passes a failpoint; strikes of a run happen one after the other."""

    role: Role
    number: int
    """Rank of the worker, or node of the keeper."""
    at: str
    step: int
    """The failpoint's step, or a later one."""
    victim: Victim = Victim.ITSELF

    def __str__(self) -> str:
        return f"{self.victim.value} of {self.role.value} {self.number} at {self.at}, step {self.step} or later"


@dataclass(frozen=True)
class Sighting:
    """A rank's state as somebody saw it."""

    what: str
    """live, stored or restored."""
    rank: int
    version: int
    digests: Mapping[str, str]
    """By slice; the scalars are one more."""


# -- in the driver ----------------------------------------------------------------------------------------------------


def prepare(folder: Path, strikes: Sequence[Strike]) -> Path:
    """Write down what is to happen."""
    folder.mkdir(parents=True)
    (folder / "strikes.json").write_text(json.dumps([asdict(strike) for strike in strikes]))
    return folder


@contextmanager
def struck(folder: Path) -> Iterator[None]:
    """Processes that a fleet starts inside the block are witnesses, and carry out what was prepared in ``folder``."""
    run, process_fleet._run = process_fleet._run, functools.partial(_run, str(folder), os.getpid())  # type: ignore[assignment]
    try:
        yield
    finally:
        process_fleet._run = run


def unstruck(folder: Path) -> list[Strike]:
    """Strikes that have not happened."""
    strikes = _read(folder)
    return strikes[_count(folder, len(strikes)) :]


def passed(folder: Path) -> set[tuple[Role, str]]:
    """Failpoints that were reached, with the role of whoever did."""
    pairs = (path.name.split(":") for path in folder.glob("passed:*"))
    return {(Role(role), name) for _, role, name in pairs}


def sightings(folder: Path) -> list[Sighting]:
    """Everything that the witnesses have told."""
    lines = (line for path in sorted(folder.glob("seen-*.jsonl")) for line in path.read_text().splitlines())
    return [Sighting(**json.loads(line)) for line in lines]


def _read(folder: Path) -> list[Strike]:
    entries = json.loads((folder / "strikes.json").read_text())
    return [Strike(**{**entry, "role": Role(entry["role"]), "victim": Victim(entry["victim"])}) for entry in entries]


def _mark(folder: Path, number: int) -> Path:
    return folder / f"struck-{number}"


def _count(folder: Path, strikes: int) -> int:
    """Strikes that have happened."""
    return next((number for number in range(strikes) if not _mark(folder, number).exists()), strikes)


# -- in a worker or a keeper ------------------------------------------------------------------------------------------


def _run(folder: str, driver: int, role: str, spec: str, pipe: Connection) -> None:
    """Body of a process, in place of the fleet's own."""
    witness = _Witness(Path(folder), driver, Role(role))
    (_watch_worker if witness.role is Role.WORKER else _watch_keeper)(witness, json.loads(spec))
    process_fleet._run(role, spec, pipe)


class _Witness:
    def __init__(self, folder: Path, driver: int, role: Role) -> None:
        self.folder, self.driver, self.role = folder, driver, role
        self.number = -1
        self.look: Callable[[str, int], None] = lambda name, step: None
        self._strikes, self._passed = _read(folder), set[str]()
        self._hit, failpoints.hit = failpoints.hit, self.hit

    def hit(self, name: str, step: int = -1) -> None:
        if name not in self._passed:
            self._passed.add(name)
            (self.folder / f"passed:{self.role.value}:{name}").touch()
        self.look(name, step)
        self._strike(name, step)
        self._hit(name, step)

    def _strike(self, name: str, step: int) -> None:
        number = _count(self.folder, len(self._strikes))
        due = self._strikes[number] if number < len(self._strikes) else None
        if due is None or (due.role, due.number, due.at) != (self.role, self.number, name) or step < due.step:
            return
        _mark(self.folder, number).touch()  # first: who kills itself does not come back to do it
        os.kill(os.getpid() if due.victim is Victim.ITSELF else self.driver, signal.SIGKILL)

    def tell(self, sighting: Sighting) -> None:
        """In one write, so that who dies next has told all or nothing."""
        line = json.dumps(asdict(sighting)) + "\n"
        descriptor = os.open(self.folder / f"seen-{os.getpid()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, line.encode())
        os.close(descriptor)


def _watch_worker(witness: _Witness, spec: Mapping[str, Any]) -> None:
    from holdfast.launch.worker import WorkerHost
    from holdfast.trainer.state import StateView

    attach, make, views = WorkerHost.attach, StateView.__init__, list["weakref.ref[StateView]"]()

    def attached(self: WorkerHost, rank: int, ref: Mapping[str, object]) -> None:
        witness.number = rank
        attach(self, rank, ref)

    def made(self: StateView, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        views[:] = [weakref.ref(self)]

    def look(name: str, step: int) -> None:
        kind = {"step.after_update": ("live", step + 1), "recovery.after_restore": ("restored", step)}.get(name)
        view = views[0]() if views else None
        if kind is not None and view is not None and step >= 0:
            witness.tell(Sighting(kind[0], witness.number, kind[1], _digests_of(view)))

    WorkerHost.attach, StateView.__init__ = attached, made  # type: ignore[method-assign]  # of this process only
    witness.look = look


def _digests_of(view: StateView) -> dict[str, str]:
    state = view.capture()
    slices = {piece.spec.name: bytes(piece.tensor.detach().reshape(-1).cpu().untyped_storage())
              if piece.tensor.untyped_storage().nbytes() == piece.tensor.nbytes
              else _bytes_of(piece.tensor) for piece in state.slices}  # fmt: skip
    return _digests(slices, state.scalars)
