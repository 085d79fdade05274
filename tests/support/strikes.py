"""Processes of a run that die at a named failpoint, and tell on the way there what they see.

``struck`` makes every worker and keeper that this process starts a witness; ``witnessed`` also those that are started
by a driver in a process of its own, or by Ray. A witness kills what a :class:`Strike`
says, at the place it says, and writes digests of the training state into a folder: of the live tensors at each step
boundary, of what its keeper holds when a version is committed, and of the live tensors after a restore. None of it
goes through the code that takes, stores and restores snapshots, so the digests can be held against each other.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from holdfast import failpoints
from holdfast.fault_tolerance.commit import CommitRecord
from holdfast.fault_tolerance.manifest import Manifest
from holdfast.fault_tolerance.protector import Protector
from holdfast.fault_tolerance.rotation import newest_committed
from holdfast.launch import process_fleet
from holdfast.launch.fleet import Role

if TYPE_CHECKING:
    from holdfast.launch.ray_fleet import RayFleet
    from holdfast.launch.worker import WorkerHost
    from holdfast.trainer.state import StateView

__all__ = [
    "DRIVER",
    "EXAMINE",
    "REBUILD",
    "Sighting",
    "Strike",
    "passed",
    "prepare",
    "sightings",
    "stored_digests",
    "struck",
    "tell_actors",
    "torn",
    "unstruck",
    "watch",
    "witnessed",
]


DRIVER = "driver"
REBUILD, EXAMINE = "rebuild", "examine"
"""Places without a failpoint: a keeper decodes what was lost; a keeper checks what it holds, for another one's sake."""


_KEEPERS_S = 10.0
_PASSED_ON = "HOLDFAST_WITNESS", "PYTHONPATH"
_PATHS = str(Path(__file__).with_name("witness")), str(Path(__file__).parents[2])


@dataclass(frozen=True)
class Strike:
    """A SIGKILL when a process of ``role`` passes a failpoint; those of a run come one after the other."""

    role: Role
    number: int
    """Rank of the worker, or node of the keeper."""
    at: str
    step: int
    """The failpoint's step, or a later one."""
    victims: tuple[str, ...] = ()
    """Such as ``worker 1``, ``keeper 0`` and ``driver``; nobody: the process itself."""

    def __str__(self) -> str:
        whom = " and ".join(self.victims) or "itself"
        return f"{self.role.value} {self.number} at {self.at}, step {self.step} or later, kills {whom}"


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
    (folder / f"pid of {DRIVER}").write_text(str(os.getpid()))
    run, process_fleet._run = process_fleet._run, functools.partial(_run, str(folder))
    try:
        yield
    finally:
        process_fleet._run = run


@contextmanager
def witnessed(folder: Path) -> Iterator[None]:
    """As :func:`struck`, for all processes of all runs that begin inside the block."""
    from holdfast.launch.ray_fleet import RayFleet

    kept = {name: os.environ.get(name) for name in _PASSED_ON}
    path = [*_PATHS, *filter(None, [kept["PYTHONPATH"]])]
    os.environ.update(HOLDFAST_WITNESS=str(folder), PYTHONPATH=os.pathsep.join(path))
    environment = RayFleet._environment
    try:
        tell_actors(RayFleet)
        with struck(folder):
            yield
    finally:
        RayFleet._environment = environment  # type: ignore[method-assign]
        for name, value in kept.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def tell_actors(fleet: type[RayFleet]) -> None:
    """Ray's actors have the environment of their node, not that of the driver."""
    environment = fleet._environment

    def passed_on(self: RayFleet) -> dict[str, str]:
        return {**environment(self), **{name: os.environ[name] for name in _PASSED_ON if name in os.environ}}

    fleet._environment = passed_on  # type: ignore[method-assign]


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


def torn(seen: Sequence[Sighting]) -> list[str]:
    """What a keeper was about to call committed, and is no state that its rank had after that step."""
    live: dict[tuple[int, int], list[Mapping[str, str]]] = {}
    for one in seen:
        if one.what == "live":
            live.setdefault((one.rank, one.version), []).append(one.digests)
    return [
        f"version {one.version} of rank {one.rank} in a keeper is not what the rank had"
        for one in seen
        if one.what == "stored" and one.digests not in live.get((one.rank, one.version), [one.digests])
    ]


def _read(folder: Path) -> list[Strike]:
    entries = json.loads((folder / "strikes.json").read_text())
    return [Strike(**{**e, "role": Role(e["role"]), "victims": tuple(e["victims"])}) for e in entries]


def _pid(folder: Path, who: str) -> int:
    return int((folder / f"pid of {who}").read_text())


def _mark(folder: Path, number: int) -> Path:
    return folder / f"struck-{number}"


def _count(folder: Path, strikes: int) -> int:
    """Strikes that have happened."""
    return next((number for number in range(strikes) if not _mark(folder, number).exists()), strikes)


# -- in a worker or a keeper ------------------------------------------------------------------------------------------


def _run(folder: str, role: str, spec: str, environment: Mapping[str, str], pipe: Connection) -> None:
    """Body of a process, in place of the fleet's own."""
    watch(folder, Role(role), json.loads(spec))
    process_fleet._run(role, spec, environment, pipe)


def watch(folder: str, role: Role, spec: Mapping[str, Any]) -> None:
    """This process is a witness from now on, if it is none yet."""
    if not isinstance(getattr(failpoints.hit, "__self__", None), _Witness):
        witness = _Witness(Path(folder), role)
        (_watch_worker if role is Role.WORKER else _watch_keeper)(witness, spec)


class _Witness:
    def __init__(self, folder: Path, role: Role) -> None:
        self.folder, self.role = folder, role
        self._end = folder / f"end of {_pid(folder, DRIVER)}"
        self.number = -1
        self.look: Callable[[str, int], None] = lambda name, step: None
        self._strikes, self._passed = _read(folder), set[str]()
        self.has_plans = bool(self._strikes)
        self._hit, failpoints.hit = failpoints.hit, self.hit

    def hit(self, name: str, step: int = -1) -> None:
        if name not in self._passed:
            self._passed.add(name)
            (self.folder / f"passed:{self.role.value}:{name}").touch()
        self.look(name, step)
        self.strike(name, step)
        self._hit(name, step)

    def strike(self, name: str, step: int) -> None:
        number = _count(self.folder, len(self._strikes))
        due = self._strikes[number] if number < len(self._strikes) else None
        if due is None or (due.role, due.number, due.at) != (self.role, self.number, name) or step < due.step:
            return
        if self._end.exists():  # what is left of a run whose driver was killed must not take its successor's turn
            return
        if DRIVER in due.victims:
            self._end.touch()
        _mark(self.folder, number).touch()  # first: who kills itself does not come back to do it
        pids = {_pid(self.folder, victim) for victim in due.victims} or {os.getpid()}
        for pid in sorted(pids, key=lambda pid: pid == os.getpid()):  # itself last
            os.kill(pid, signal.SIGKILL)

    def be(self, number: int) -> None:
        """Rank or node, as soon as it is known."""
        self.number = number
        (self.folder / f"pid of {self.role.value} {number}").write_text(str(os.getpid()))

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
    hosts, begun = list[WorkerHost](), [""]

    def attached(self: WorkerHost, rank: int, *args: Any) -> None:
        witness.be(rank)
        hosts[:] = [self]
        attach(self, rank, *args)

    def made(self: StateView, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        views[:] = [weakref.ref(self)]

    def look(name: str, step: int) -> None:
        if name == "step.begin" and witness.has_plans:
            _wait_for_keepers(hosts[0], step - 1)
        seen = {"step.after_update": [("live", step + 1)], "recovery.after_restore": [("restored", step)]}
        kinds = seen.get(name, [])
        if name in {"recovery.before_restore", "snapshot.before_capture"}:
            begun[0] = name
        elif name == "recovery.after_restore" and begun[0] == "snapshot.before_capture":
            kinds.append(("live", step))  # what was restored is a version of this rank's own
        view = views[0]() if views else None
        for what, version in kinds if view is not None and step >= 0 else ():
            witness.tell(Sighting(what, witness.number, version, _digests_of(view)))

    # Of this process only.
    WorkerHost.attach, StateView.__init__ = attached, made  # type: ignore[method-assign]
    witness.look = look


def _wait_for_keepers(host: WorkerHost, version: int) -> None:
    """Until they have committed it. Steps of a tiny model are shorter than the turn of a thread on a busy machine, and
    keepers that are behind by some steps lose as many."""
    arena, end = host._arena, time.monotonic() + _KEEPERS_S
    assert arena is not None, "attach comes before the first step"
    while newest_committed(arena.slots()) < version and time.monotonic() < end:
        if host._watcher is None or host._watcher.is_aborted:
            return
        time.sleep(0.002)


def _digests_of(view: StateView) -> dict[str, str]:
    import torch

    state = view.marked()  # as a step begins or ends; nothing is written, as it may be being copied
    tensors = {piece.spec.name: piece.tensor.detach().cpu().contiguous().reshape(-1) for piece in state.slices}
    return digests({name: t.view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}, state.scalars)


def _watch_keeper(witness: _Witness, spec: Mapping[str, Any]) -> None:
    make, protectors = Protector.__init__, list[Protector]()
    rebuild, examine = Protector.rebuild, Protector.examine

    def made(self: Protector, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        protectors.append(self)

    def look(name: str, step: int) -> None:
        for rank, arena in protectors[0]._arenas().items() if protectors and name == "keeper.before_flip" else ():
            held = [buffer for buffer in arena.buffers if (s := buffer.describe()).is_complete and s.version == step]
            for buffer in held:
                stored, data = buffer.manifest(buffer.describe()), buffer.data.tobytes()
                witness.tell(Sighting("stored", rank, step, stored_digests(stored, data)))

    def rebuilt(self: Protector, rank: int, record: CommitRecord, *args: Any) -> None:
        witness.strike(REBUILD, record.version)
        rebuild(self, rank, record, *args)

    def examined(self: Protector, request: Mapping[str, Any]) -> list[str]:
        witness.strike(EXAMINE, request["record"]["version"])
        return examine(self, request)

    # Of this process only.
    Protector.__init__ = made  # type: ignore[method-assign]
    Protector.rebuild, Protector.examine = rebuilt, examined  # type: ignore[method-assign]
    witness.be(spec["node"])
    witness.look = look


def stored_digests(manifest: bytes, data: bytes) -> dict[str, str]:
    """Of the bytes that a manifest describes, whatever digests it names itself."""
    found = Manifest.from_bytes(manifest)
    slices = {entry.spec.name: data[entry.offset : entry.offset + entry.length] for entry in found.entries}
    return digests(slices, found.scalars)


def digests(slices: Mapping[str, bytes], scalars: Mapping[str, object]) -> dict[str, str]:
    named = {name: xxhash.xxh3_128_hexdigest(content) for name, content in slices.items()}
    return {**named, "scalars": json.dumps(scalars, sort_keys=True)}
