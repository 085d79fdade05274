"""Body of a worker process: one rank of one membership epoch after another, in one process."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from holdfast import failpoints
from holdfast.configs.plain import from_plain
from holdfast.configs.schema import RunConfig
from holdfast.errors import Abort, CollectiveBroken, PeerError, ShardCorrupt, SnapshotError
from holdfast.fault_tolerance import chaos, strikes
from holdfast.fault_tolerance.arena import Arena, ArenaRef
from holdfast.fault_tolerance.brick_store import fetch_brick
from holdfast.fault_tolerance.bricks import Brick, BrickFile
from holdfast.fault_tolerance.damage import flip_snapshot
from holdfast.fault_tolerance.held_shards import HeldPart
from holdfast.fault_tolerance.ledger import Ledger
from holdfast.fault_tolerance.links import PeerLinks
from holdfast.fault_tolerance.messages import Outcome
from holdfast.fault_tolerance.resharding import HeldSnapshot, StoredCheckpoint
from holdfast.fault_tolerance.snapshot import ArenaSnapshotter, copy_versions, required_bytes
from holdfast.fault_tolerance.stage_policy import StageRepair
from holdfast.fault_tolerance.stage_repair import Weighting
from holdfast.fault_tolerance.stage_restore import Remade, StageSnapshot
from holdfast.fault_tolerance.storage import open_storage
from holdfast.launch.inject_files import struck_folder
from holdfast.launch.protocol import EpochPlan, describe_error
from holdfast.launch.watch import BoardWatcher, Heart, StuckWitness
from holdfast.parallel.comms import TorchCommunicator, broken_collective
from holdfast.trainer.build import Job, RankRun
from holdfast.trainer.frozen import Frozen
from holdfast.trainer.loop import Ending, Restorer
from holdfast.trainer.model import RESIDUAL_OUTPUTS
from holdfast.trainer.stage_healing import Boundaries
from holdfast.trainer.token_store import TokenStore
from holdfast.types import Phase

__all__ = ["WorkerHost"]

logger = logging.getLogger(__name__)

_UPDATE_GRACE_S = 0.5
"""For an update that is under way, when all ranks are alive."""
_UNWOKEN_S, _LOOK_S = 3.0, 0.05
_NO_NODE = -1
"""Among keepers; a worker only asks."""


class WorkerHost:
    """Methods are called by the fleet: ``abort``, ``stop`` and ``drain`` from their own threads, the rest in order."""

    def __init__(self, spec: Mapping[str, object]) -> None:
        self._config: RunConfig = from_plain(cast(Mapping[str, Any], spec["config"]))
        self._run_dir, self._attempt = Path(str(spec["run_dir"])), int(cast(int, spec["attempt"]))
        self._job = Job(
            self._config,
            str(spec["store"]),
            str(self._run_dir / "export"),
            seen=cast(Mapping[str, str], spec["seen"]),
        )
        self._bricks = [Brick.from_json(brick) for brick in cast(Sequence[Mapping[str, Any]], spec["bricks"])]
        self._config_digest = str(spec["config_digest"])
        torch.set_num_threads(self._config.launch.threads_per_worker)  # of any fleet: results depend on it to the bit
        recovery = self._config.recovery
        self._heart = Heart(recovery.heartbeat_s, StuckWitness(recovery.suspect_after_s / 2))
        self._arena: Arena | None = None
        self._ref: ArenaRef | None = None
        self._roster = 0
        self._lock = threading.Lock()
        self._left_epoch = self._stopped_epoch = -1
        self._is_out = threading.Event()
        """Nobody is in an epoch, or whoever is has left its last collective."""
        self._is_out.set()
        self._thread = -1
        self._watcher: BoardWatcher | None = None
        self._comm: TorchCommunicator | None = None
        self._notes: list[dict[str, object]] = []
        self._live = -1
        """The version that the state was when the last epoch broke, if memory holds it."""
        self._injected: list[chaos.ChaosFault] = []
        self._ledger = Ledger(struck_folder(self._run_dir))
        stage = self._config.recovery.stage
        self._boundaries = Boundaries(int(stage.log_mb * 1e6)) if stage.heal_steps else None

    # -- calls from the driver ------------------------------------------------------------------------------------

    def ready(self) -> dict[str, object]:
        """Do everything once that takes long the first time, so that a spare is warm."""
        TokenStore.open(self._job.store)
        self._job.rehearse()
        Frozen([brick.file for brick in self._bricks]).warm_up()
        gc.collect()
        gc.freeze()  # leaving an epoch collects garbage; it need not look through all of torch and DeepSpeed for it
        return {"pid": os.getpid(), "host": socket.gethostname()}

    def attach(self, rank: int, ref: Mapping[str, object], roster: int = 0) -> None:
        """Map the rank's arena. Complete versions of an arena whose keeper died are carried over, unless the rank is
        another one by now."""
        arena_ref = ArenaRef(**cast(dict[str, Any], ref))
        if arena_ref == self._ref:
            return
        is_same_rank = self._ref is not None and (self._ref.rank, self._roster) == (rank, roster)
        old, self._arena, self._ref, self._roster = self._arena, Arena.attach(arena_ref), arena_ref, roster
        self._heart.move_to(self._arena.board)
        if old is not None and is_same_rank:
            carried = copy_versions(old, self._arena)
            logger.info("carried %s versions into the arena of a new keeper", carried)
        if old is not None:
            old.close()
        _log_to(self._run_dir / "logs" / f"rank{rank:05d}.attempt{self._attempt}.log")
        self._arm(rank, self._arena)

    def inject(self, entries: Sequence[tuple[str, str]]) -> None:
        """Faults on purpose besides those of the configuration, each with its source; all that there are so far."""
        with self._lock:
            self._injected = [chaos.parse(entry, source=source, any_step=True) for entry, source in entries]
        if self._arena is not None:
            self._arm(self._arena.board.rank, self._arena)

    def _arm(self, rank: int, arena: Arena) -> None:
        """Every thread sees the old hooks or the new ones; none is forgotten in between."""
        own: dict[chaos.Action, strikes.Act] = {
            chaos.Action.FLIP: lambda fault: flip_snapshot(arena, fault),
            chaos.Action.NO_HEARTBEAT: lambda fault: self._heart.pause(fault.for_s or math.inf),
        }
        faults = [*chaos.parse_all(self._config.chaos.faults), *self._injected]
        strikes.arm(faults, chaos.Target.WORKER, rank, self._ledger, own)

    def run_epoch(self, plan: Mapping[str, object]) -> dict[str, object]:
        """Train until the goal, a stop or a fault; always answers with an :class:`Outcome` word."""
        epoch_plan = EpochPlan(**cast(dict[str, Any], plan))
        self._live, self._thread = -1, threading.get_native_id()
        self._is_out.clear()
        try:
            answer = self._guarded(epoch_plan)
        finally:
            self._is_out.set()
        self._park(epoch_plan)
        return {**answer, "live": self._live, "notes": self.drain()}

    def abort(self, epoch: int, may_update: bool = False) -> None:
        """Leave ``epoch``, whichever collective the training thread is blocked in; with ``may_update``, not in the
        middle of an update that may end."""
        with self._lock:
            self._left_epoch = max(self._left_epoch, epoch)
            watcher, comm = self._watcher, self._comm
        if watcher is not None:
            watcher.abort()
            if may_update:
                watcher.await_update(_UPDATE_GRACE_S)
        if comm is not None:
            comm.abort()
            if not comm.can_abort_for_certain:
                self._end_if_unwoken()

    def _end_if_unwoken(self) -> None:
        """A collective that begins while the connections go down may wait for ever. Who computes uses the processor;
        who has not for so long, and has not left either, is of no more use, and quickly replaced."""
        used_s, since_s = _processor_s(self._thread), time.monotonic()
        while not self._is_out.wait(_LOOK_S):
            now_s = _processor_s(self._thread)
            if now_s != used_s:
                used_s, since_s = now_s, time.monotonic()
            elif time.monotonic() - since_s > _UNWOKEN_S:
                logger.error("not woken from a collective after %g s; this process ends", _UNWOKEN_S)
                os.kill(os.getpid(), signal.SIGKILL)

    def stop(self, epoch: int) -> None:
        """Finish the step, agree with the others, settle the state, then leave ``epoch``."""
        with self._lock:
            self._stopped_epoch = max(self._stopped_epoch, epoch)
            if self._watcher is not None:
                self._watcher.ask_to_stop()

    def drain(self) -> list[dict[str, object]]:
        """What has happened besides steps since the last call: evaluations."""
        with self._lock:
            notes, self._notes = self._notes, []
        return notes

    def _note(self, note: dict[str, object]) -> None:
        with self._lock:
            self._notes.append(note)

    def hang_up(self) -> None:
        self._heart.move_to(None)

    # -- one epoch ------------------------------------------------------------------------------------------------

    def _guarded(self, plan: EpochPlan) -> dict[str, object]:
        try:
            return self._train(plan)
        except Abort as left:
            return _answer(Outcome.ABORTED, str(left))
        except ShardCorrupt as corrupt:
            return _answer(Outcome.CORRUPT, str(corrupt), version=corrupt.version)
        except Exception as error:  # the process boundary: the supervisor decides what it means
            return self._classify(error)

    def _classify(self, error: Exception) -> dict[str, object]:
        logger.info("left the epoch: %s", describe_error(error))
        if self._watcher is not None and self._watcher.is_aborted:
            return _answer(Outcome.ABORTED, str(error).splitlines()[0] if str(error) else type(error).__name__)
        if _is_of_a_peer(error):
            return _answer(Outcome.BROKEN, str(error).splitlines()[0])
        return _answer(Outcome.ERROR, describe_error(error))

    def _train(self, plan: EpochPlan) -> dict[str, object]:
        assert self._arena is not None, "attach comes before run_epoch"
        watcher = self._enter_epoch(plan, self._arena)
        watcher.enter(Phase.JOIN, max(plan.version, 0))
        laps = _Laps()
        comm = self._join(plan, watcher)
        laps.end("join")
        failpoints.hit("recovery.after_join", plan.version)
        watcher.enter(Phase.BUILD, max(plan.version, 0))
        snapshots = self._snapshots(plan, self._arena)
        run = RankRun(
            self._job,
            comm,
            snapshots,
            watcher,
            epoch=plan.epoch,
            note=self._note,
            boundaries=self._boundaries,
            frozen=self._frozen(plan),
            starts_fresh=plan.version < 0 or bool(plan.repairs),
        )
        laps.end("build")
        try:
            self._arena.reserve(required_bytes(run.view.capture()))
            laps.end("reserve")
            try:
                source = self._source(plan, snapshots)
                run.trainer.restore(
                    source,
                    plan.version,
                    take_over=bool(plan.held or plan.repairs),
                    mend=lambda: run.heal([repair for repair in _repairs(plan) if repair.is_approximate]),
                )
            except SnapshotError as error:
                if not plan.checkpoints and not plan.held:
                    raise
                return _answer(Outcome.CORRUPT, describe_error(error).splitlines()[0], version=plan.version)
            laps.end("restore")
            logger.info("epoch %d begins at version %d: %s", plan.epoch, plan.version, laps)
            ending = run.trainer.fit()
            result = run.conclude() if ending is Ending.FINISHED else {}
            return _answer(Outcome(ending.value), version=run.view.train.step, result=result)
        except (Abort, Exception) as error:
            self._is_out.set()
            self._live = self._keep_live(run, error)
            raise
        finally:
            snapshots.close()  # first: it may still be copying live tensors
            if not any(slot.is_complete and slot.version == self._live for slot in self._arena.slots()):
                self._live = -1
            run.close()

    def _frozen(self, plan: EpochPlan) -> Frozen:
        """The files that the run reads, which the keepers hold too."""
        held = {brick.file.digest: brick for brick in self._bricks if brick.nodes}

        def fetch(file: BrickFile, out: BinaryIO) -> None:
            with contextlib.closing(PeerLinks(_NO_NODE, plan.token)) as links:
                links.connect({int(node): address for node, address in plan.keepers.items()})
                fetch_brick(held[file.digest], links, out)

        def restored(files: Sequence[BrickFile], why: str) -> None:
            about = {"files": {file.path: file.digest for file in files}, "bytes": sum(file.size for file in files)}
            self._note({"event": "bricks_restored", "rank": plan.rank, **about, "reason": why})

        files = [brick.file for brick in self._bricks]
        return Frozen(files, fetch, restored) if held else Frozen(files)

    def _snapshots(self, plan: EpochPlan, arena: Arena) -> ArenaSnapshotter:
        snapshot = self._config.snapshot
        return ArenaSnapshotter(
            arena,
            rank=plan.rank,
            world=plan.world,
            epoch=plan.epoch,
            config_digest=self._config_digest,
            persist_every=snapshot.persist_every_steps,
            max_bytes_per_s=snapshot.copy_mb_per_s * 1e6,
            fence_timeout_s=snapshot.fence_timeout_s,
        )

    def _keep_live(self, run: RankRun, error: BaseException) -> int:
        """What broke was elsewhere; here the state may be as good as it was."""
        if not isinstance(error, Abort) and not _is_of_a_peer(error):
            return -1
        try:
            return run.trainer.keep_live()
        except (Abort, SnapshotError) as late:  # the keepers have closed the epoch: they have counted what they hold
            logger.info("the live state is not kept: %s", describe_error(late))
            return -1

    def _source(self, plan: EpochPlan, snapshots: ArenaSnapshotter) -> Restorer:
        repairs = [repair for repair in _repairs(plan) if repair.is_approximate]
        if not repairs:
            return self._exact_source(plan, snapshots)
        stage = self._config.recovery.stage
        own = next((repair for repair in repairs if repair.stage == plan.rank), None)
        if own is None:
            return Remade(snapshots, repairs, plan.world, stage.moments)
        parts, weighting = HeldPart.from_json(plan.held), Weighting(exponent=stage.norm_exponent)
        made = StageSnapshot(
            parts, plan.token, self._config_digest, own, weighting, stage.moments, RESIDUAL_OUTPUTS, self._note
        )
        return Remade(made, repairs, plan.world, stage.moments)

    def _exact_source(self, plan: EpochPlan, snapshots: ArenaSnapshotter) -> Restorer:
        if plan.held:
            return HeldSnapshot(HeldPart.from_json(plan.held), plan.token, config_digest=self._config_digest)
        if not plan.checkpoints:
            return snapshots
        return StoredCheckpoint(open_storage(plan.checkpoints), config_digest=self._config_digest)

    def _enter_epoch(self, plan: EpochPlan, arena: Arena) -> BoardWatcher:
        arena.board.take_over(os.getpid(), plan.epoch)
        watcher = BoardWatcher(arena.board, plan.epoch)
        with self._lock:
            self._watcher, self._comm = watcher, None
            if plan.epoch <= self._left_epoch:
                watcher.abort()
            if plan.epoch <= self._stopped_epoch:
                watcher.ask_to_stop()
        watcher.check()
        return watcher

    def _join(self, plan: EpochPlan, watcher: BoardWatcher) -> TorchCommunicator:
        comm = TorchCommunicator.join(
            plan.rendezvous,
            rank=plan.rank,
            world=plan.world,
            backend=self._job.backend,
            timeout_s=self._config.parallel.collective_timeout_s,
            should_leave=lambda: watcher.is_aborted,
        )
        with self._lock:
            self._comm = comm
        watcher.check()
        return comm

    def _park(self, plan: EpochPlan) -> None:
        """Drop the process group and every tensor of the epoch; the process stays."""
        with self._lock:
            comm, self._comm, self._watcher = self._comm, None, None
        if comm is not None:
            comm.close()
        gc.collect()
        if self._arena is not None:
            board = self._arena.board
            board.enter(Phase.PARKED, board.read().step, time.monotonic())
        failpoints.hit("recovery.after_abort", plan.version)


def _repairs(plan: EpochPlan) -> list[StageRepair]:
    return [StageRepair.from_json(repair) for repair in plan.repairs]


class _Laps:
    """Where the seconds between a plan and the first step go."""

    def __init__(self) -> None:
        self._started_s, self._laps = time.monotonic(), dict[str, float]()

    def end(self, name: str) -> None:
        now = time.monotonic()
        self._laps[name], self._started_s = now - self._started_s, now

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self._laps.items())


def _processor_s(thread: int) -> float:
    """Time that a thread of this process has been running, in ticks of a hundredth of a second; Linux only."""
    fields = Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _is_of_a_peer(error: BaseException) -> bool:
    return isinstance(error, (CollectiveBroken, PeerError)) or broken_collective(error)


def _answer(
    outcome: Outcome, detail: str = "", *, version: int = -1, result: Mapping[str, object] | None = None
) -> dict[str, object]:
    return {"outcome": outcome.value, "detail": detail, "version": version, "result": dict(result or {})}


def _log_to(path: Path) -> None:
    """Send this process's stdout, stderr and ``holdfast`` log to a file, whoever started it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    package = logging.getLogger("holdfast")
    package.handlers[:] = [logging.StreamHandler(open(2, "w", buffering=1, closefd=False))]  # noqa: SIM115
    package.handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    package.setLevel(logging.INFO)
    package.propagate = False
