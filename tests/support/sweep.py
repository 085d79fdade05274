"""Every named failpoint as the place of a SIGKILL, for workers, keepers and the driver, in whole runs.

The kills of a run happen one after the other, each at a later step or during the recovery from another one, so that a
few runs cover all places. What must hold after each of them is in :func:`differences`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import forkserver
from pathlib import Path

from holdfast import failpoints
from holdfast.configs.schema import RunConfig
from holdfast.fault_tolerance import checkpoint
from holdfast.launch.fleet import Role
from holdfast.launch.run import train
from tests.support.drivers import records
from tests.support.runs import Outcome, events_of, outcome_of, tiny_config
from tests.support.strikes import (
    DRIVER,
    Sighting,
    Strike,
    prepare,
    sightings,
    stored_digests,
    struck,
    unstruck,
)

__all__ = [
    "PASSES",
    "STAGES",
    "STEPS",
    "Cells",
    "Struck",
    "Truth",
    "cells_of",
    "differences",
    "driver_is_struck",
    "is_struck",
    "sweep",
    "sweep_config",
    "undisturbed",
]

STAGES = (1, 2, 3)
STEPS = 16
RANKS = 3
_DEADLINE_S = 90.0

PASSES: Mapping[Role, tuple[str, ...]] = {
    Role.WORKER: (
        "step.begin",
        "step.after_backward",
        "step.before_update",
        "step.after_update",
        "snapshot.before_capture",
        "snapshot.mid_capture",
        "snapshot.after_capture",
        "snapshot.before_commit",
        "snapshot.after_commit",
        "recovery.after_abort",
        "recovery.after_join",
        "recovery.before_restore",
        "recovery.after_restore",
        "evaluate.begin",
        "export.begin",
    ),
    Role.KEEPER: (
        "keeper.before_encode",
        "keeper.mid_encode",
        "keeper.before_vote",
        "keeper.after_record",
        "keeper.before_flip",
    ),
}
"""Who comes by where. The driver passes none of them: it is killed when somebody else does."""


# -- what is to happen ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """Kills of one run, in the order in which it comes by, each two steps after the one before."""

    victim: str
    """worker, keeper or driver."""
    stage: int
    names: tuple[str, ...]
    """Failpoints."""

    def __str__(self) -> str:
        return f"{self.victim} under ZeRO-{self.stage}"

    @property
    def strikes(self) -> list[Strike]:
        ordered = sorted(self.names, key=failpoints.NAMES.index)
        return [strike for turn, name in enumerate(ordered) for strike in self._strikes_at(name, turn)]

    def _strikes_at(self, name: str, turn: int) -> list[Strike]:
        role = next(role for role, passed in PASSES.items() if name in passed)
        number, step = turn % RANKS, 2 * turn + 2
        victims = (DRIVER,) if self.victim == DRIVER else ()
        if name == "keeper.after_record":  # only the coordinator tells of records
            return [Strike(role, 0, name, step, victims)]
        if not name.startswith("recovery."):
            return [Strike(role, number, name, step, victims)]
        strike = Strike(role, number, name, -1, victims)
        if victims and name != "recovery.after_abort":  # every driver but the first one recovers
            return [strike]
        return [Strike(Role.WORKER, (number + 1) % RANKS, "step.begin", step), strike]


def cells_of(stage: int, *, shares: int = 1, share: int = 0) -> list[Cells]:
    """All kills under one ZeRO stage, or one of ``shares`` shares of them, which together are all."""
    passed = {**{role.value: names for role, names in PASSES.items()}, DRIVER: failpoints.NAMES}
    return [Cells(victim, stage, tuple(names[share::shares])) for victim, names in passed.items()]


# -- what happens -----------------------------------------------------------------------------------------------------


@dataclass
class Struck:
    """A run that something happened to."""

    run_dir: Path
    folder: Path
    resumed: list[tuple[int, int | None]] = field(default_factory=list)
    """After each death of the driver: newest checkpoint on disk, and the version that its successor began with."""


def sweep_config(root: Path, corpus: Path, *, stage: int, parity: int = 1, persist_every: int = 0) -> RunConfig:
    """Three nodes of one worker each."""
    config = tiny_config(root, corpus, stage=stage, steps=STEPS, spares=0, max_failures=20)
    config.snapshot.parity, config.snapshot.persist_every_steps, config.resume = parity, persist_every, "auto"
    return config


def sweep(cells: Cells, root: Path, corpus: Path) -> Struck:
    """Let all of them happen. The driver's end leaves nothing but checkpoints, hence some."""
    if cells.victim == DRIVER:
        return driver_is_struck(sweep_config(root, corpus, stage=cells.stage, persist_every=2), cells.strikes)
    return is_struck(sweep_config(root, corpus, stage=cells.stage), cells.strikes)


def is_struck(config: RunConfig, strikes: Sequence[Strike]) -> Struck:
    """Train in this process to the end. Every strike must have happened."""
    folder = prepare(Path(config.root) / "seen", strikes)
    with struck(folder):
        result = train(config)
    assert result.exit_code == 0, result.reason
    assert unstruck(folder) == []
    return Struck(result.run_dir, folder)


def driver_is_struck(config: RunConfig, strikes: Sequence[Strike]) -> Struck:
    """Train in a driver of its own, and in another one as often as it is killed. Every strike must have happened."""
    root = Path(config.root)
    folder = prepare(root / "seen", strikes)
    deaths, resumed = sum(DRIVER in strike.victims for strike in strikes), list[int]()
    for _ in range(deaths):
        assert _drive(config, folder) == -signal.SIGKILL, f"the driver outlived {[*map(str, unstruck(folder))][:1]}"
        resumed.append(_newest_checkpoint(root))
    assert _drive(config, folder) == 0
    assert unstruck(folder) == []
    (run_dir,) = (path.parent for path in root.glob("*/*/run.json"))
    return Struck(run_dir, folder, list(zip(resumed, _resumed_from(run_dir, deaths), strict=True)))


def _drive(config: RunConfig, folder: Path) -> int:
    context, server = multiprocessing.get_context("forkserver"), forkserver._forkserver  # type: ignore[attr-defined]
    context.set_forkserver_preload(["holdfast.launch.preload"])  # as a fleet does; too late if the server runs
    server.ensure_running()
    process = context.Process(target=_be_driver, args=(config, folder, server._forkserver_address), daemon=False)
    process.start()
    process.join(_DEADLINE_S)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"the driver has not ended after {_DEADLINE_S} s: {(folder / 'said').read_text()[-2000:]}")
    return process.exitcode


def _be_driver(config: RunConfig, folder: Path, fork_server: str) -> None:
    """Body of a driver's process. Its fork server is this session's: to import torch in one of its own takes longer
    than the run."""
    server = forkserver._forkserver  # type: ignore[attr-defined]
    server._forkserver_address, server.ensure_running = fork_server, lambda: None
    said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    with struck(folder):
        code = train(config).exit_code
    os._exit(code)


def _newest_checkpoint(root: Path) -> int:
    found = (checkpoint.step_of(path.parent.name) for path in root.glob(f"*/*/checkpoints/*/{checkpoint.COMMIT_FILE}"))
    return max((step for step in found if step is not None), default=-1)


def _resumed_from(run_dir: Path, deaths: int) -> list[int | None]:
    """Version that each attempt but the first began with; None of one that was killed before it began."""
    told = [e for e in records(run_dir / "events.jsonl") if e["event"] in ("run_started", "epoch_started")]
    first = dict[int, int]()
    for event, following in pairwise(told):
        if (event["event"], following["event"]) == ("run_started", "epoch_started"):
            first[event["attempt"]] = following["version"]
    return [first.get(attempt) for attempt in range(2, deaths + 2)]


# -- what must hold afterwards ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """An undisturbed run: its end, and every rank's state at every step boundary."""

    outcome: Outcome
    states: Mapping[tuple[int, int], Mapping[str, str]]
    """Digests by rank and version."""


def undisturbed(config: RunConfig) -> Truth:
    found = is_struck(config, [])
    assert not events_of(found.run_dir, "fault_detected")
    states = {(one.rank, one.version): one.digests for one in sightings(found.folder) if one.what == "live"}
    assert sorted(states) == [(rank, version) for rank in range(RANKS) for version in range(1, STEPS + 1)]
    return Truth(outcome_of(found.run_dir), states)


def differences(found: Struck, truth: Truth, *, may_lose: int = 1) -> list[str]:
    """Everything that is wrong with a run that was struck; nothing if it has left no trace.

    A survived kill costs one finished step at most, as long as keepers commit a version before the next step ends,
    which witnesses wait for. A new driver begins with the newest checkpoint whose record is on disk, because all memory
    has gone with the old one.
    """
    wrong = truth.outcome.differences(outcome_of(found.run_dir))
    done = events_of(found.run_dir, "recovery_done")
    wrong += [f"recovery {e['number']} has lost {e['steps_lost']} steps" for e in done if e["steps_lost"] > may_lose]
    wrong += [
        f"the newest checkpoint is {have}, {got} was used" for have, got in found.resumed if got not in (have, None)
    ]
    seen = [*sightings(found.folder), *_on_disk(found.run_dir)]
    wrong += [f"{len(seen)} sightings, none {what}" for what in _expected(found) - {one.what for one in seen}]
    return wrong + [line for one in seen for line in _untrue(one, truth)]


def _expected(found: Struck) -> set[str]:
    has_restored = events_of(found.run_dir, "recovery_planned")
    return {"live", "stored", "on disk"} | ({"restored"} if has_restored else set())


def _on_disk(run_dir: Path) -> list[Sighting]:
    found = list[Sighting]()
    for path in sorted((run_dir / "checkpoints").glob("step-*")):
        step = checkpoint.step_of(path.name)
        for rank in range(RANKS):
            manifest, data = path / checkpoint.manifest_file(rank), path / checkpoint.data_file(rank)
            held = stored_digests(manifest.read_bytes(), data.read_bytes())
            found.append(Sighting("on disk", rank, -1 if step is None else step, held))
    return found


def _untrue(seen: Sighting, truth: Truth) -> list[str]:
    """Torn, stale or mixed: slices that are not what they were after the update of their version."""
    want = truth.states.get((seen.rank, seen.version))
    if seen.version < 1 or want == seen.digests:
        return []
    names = sorted(n for n in {*seen.digests, *(want or {})} if (want or {}).get(n) != seen.digests.get(n))
    return [f"{seen.what} version {seen.version} of rank {seen.rank} differs in {names[:3]} and {len(names)} in all"]
