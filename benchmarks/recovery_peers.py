"""How long does a SIGKILL of one rank keep a run from its next step: holdfast against torchrun and Ray Train?

All train the main job's decoder on the same data with the same global batch, AdamW and schedule, 3 ranks on the CPU,
and take turns; the loss of the last step shows that it is the same training. Rank 1 dies after the same steps, in the
backward pass of the next. A recovery lasts from the kill, noted just before it, to the first step finished by all ranks
that they had not finished before. It is back at full speed when three steps in a row take at most 1.1 times the median
step before the first kill; what a new spare costs while it warms up is in there.

- forked, Ray: ``holdfast train`` as the main job has it (ZeRO, a snapshot in every step), on forked processes or on
  Ray, with a warm spare or without. Node kill: keeper and worker of node 1 die at once; parity restores their memory.
  Node frozen: both stop, which is a fault after ``recovery.suspect_after_s`` (10). Stage: a pipeline of 3 without
  parity (its model has 3 blocks); the lost stage becomes the average of its neighbours, so the training is another.
- torchrun: plain DDP, the state saved by ``torch.save`` and renamed after every step, ``--monitor-interval 0.1``, one
  node, whose rendezvous waits for nobody. ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``, because torch 2.13 keeps the store
  of the ranks over a restart and gloo then connects to the addresses of the dead, until the restarts are used up.
- Ray Train: plain DDP in a ``TorchTrainer``, a checkpoint reported after every step,
  ``RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.1`` (default 2), which is also how long a report may wait for the controller; no
  metrics, no dashboard. Needs pandas.

It flatters the peers: their checkpoints are on a local disk, small, and of every step; a step counts before it is
saved; a step that the survivors finish and save while the victim dies in it is not made again; and they import nothing
beside torch, Ray, the model and the data. Every rank of every way has one thread.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import psutil
from peers.job import RANKS, VICTIM, Finished, Kill, Task, read_finished, read_kills
from record import spread, table, write_record
from recovery_time import is_cold, main_job
from runs import drive

from holdfast.launch.compose import compose_config
from holdfast.launch.inject_files import struck_folder
from holdfast.trainer import corpus

SPARE, COLD, RAY = "forked, warm spare", "forked, no spare", "Ray, warm spare"
NODE, FROZEN = "forked, warm spare, node kill", "forked, warm spare, node frozen"
STAGE = "forked, warm spare, node kill, stage made from its neighbours"
TORCHRUN, RAY_TRAIN = "torchrun", "Ray Train"
_LIMITS_S = {SPARE: 3.0, RAY: 3.0, COLD: 12.0, NODE: 10.0, FROZEN: 20.0, STAGE: 3.0}
_TIMES_FASTER = 4.0
_PEERS = Path(__file__).parent / "peers"
_IN_A_ROW, _TOLERANCE = 3, 1.1
_GRACE_S = 30.0
"""For what a finished run leaves to end by itself."""
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class Trail:
    """What one run has left: its kills, and the steps that all ranks have finished."""

    kills: Sequence[Kill]
    finished: Sequence[Finished]
    cold: int = 0
    """Kills that came while the spare was still warming up."""

    @property
    def step_s(self) -> float:
        """Median seconds between steps before the first kill, without the first, in which caches fill."""
        before = [step for step in self.finished if step.time < self.kills[0].time]
        return median(_intervals(before[1:]))


@dataclass(slots=True)
class Samples:
    """Everything measured for one way; one entry per kill unless it says otherwise."""

    recovery_s: list[float] = field(default_factory=list)
    full_speed_s: list[float] = field(default_factory=list)
    never: int = 0
    """Kills after which full speed was not reached before the next kill or the end."""
    steps_lost: int = 0
    cold: int = 0
    step_s: list[float] = field(default_factory=list)
    """One per run."""
    losses: list[float] = field(default_factory=list)
    """Of the last step; one per run."""

    def add(self, trail: Trail) -> None:
        self.step_s.append(trail.step_s)
        self.losses.append(trail.finished[-1].loss)
        self.cold += trail.cold
        for kill, after in _stretches(trail):
            repaired = _repaired(trail, kill, after)
            new = [step for step in repaired if step.step > kill.step]
            self.recovery_s.append(new[0].time - kill.time)
            self.steps_lost += len(repaired) - len(new)
            reached_s = full_speed(new, trail.step_s)
            if reached_s is None:
                self.never += 1
            else:
                self.full_speed_s.append(reached_s - kill.time)


def full_speed(steps: Sequence[Finished], usual_s: float) -> float | None:
    """When the last step before ``_IN_A_ROW`` fast ones ended; ``steps`` are the new ones since a kill."""
    intervals = _intervals(steps)
    for first in range(len(intervals) - _IN_A_ROW + 1):
        if mean(intervals[first : first + _IN_A_ROW]) <= _TOLERANCE * usual_s:
            return steps[first].time
    return None


def _intervals(steps: Sequence[Finished]) -> list[float]:
    return [after.time - before.time for before, after in pairwise(steps)]


def _repaired(trail: Trail, kill: Kill, after: Sequence[Finished]) -> Sequence[Finished]:
    """Without what the membership of before has still finished: a node that is told to stop may end its step first."""
    life = max((step.life for step in trail.finished if step.time < kill.time), default=0)
    return [step for step in after if step.life > life] or after


def _stretches(trail: Trail) -> Iterator[tuple[Kill, Sequence[Finished]]]:
    """Each kill with the steps from it to the next."""
    ends = [kill.time for kill in trail.kills[1:]] + [float("inf")]
    for kill, end_s in zip(trail.kills, ends, strict=True):
        yield kill, [step for step in trail.finished if kill.time < step.time < end_s]


# -- the ways ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """What all ways have in common."""

    root: Path
    faults: int
    every: int
    stage: int
    deadline_s: float

    @property
    def kills(self) -> tuple[int, ...]:
        """Steps finished at each kill."""
        return tuple(self.every * (number + 1) for number in range(self.faults))

    @property
    def steps(self) -> int:
        return self.every * (self.faults + 1)

    def job(self, kind: str) -> list[str]:
        return main_job(kind, self.stage, ["optim=adamw", f"trainer.max_steps={self.steps}"])


Way = Callable[[Setting, str], Trail]
"""Runs once, under this name."""


def holdfast(
    setting: Setting, name: str, *, kind: str, spares: int, fault: str, options: Sequence[str] = ("snapshot.parity=1",)
) -> Trail:
    """``fault`` lacks its step."""
    faults = [f"{fault} step={step}" for step in setting.kills]
    more = [f"launch.spares={spares}", *options, f"recovery.max_failures={setting.faults}"]
    attempt = drive(setting.root, name, [*setting.job(kind), *more, f"chaos.faults={json.dumps(faults)}"])
    (run_dir,) = setting.root.glob(f"*/{name}")
    kills = sorted(_struck(run_dir), key=lambda kill: kill.step)
    finished = [Finished(m["time"], m["step"], m["epoch"], m["loss"]) for m in attempt.metrics if "step_s" in m]
    return Trail(kills, finished, sum(spares > 0 and is_cold(attempt, kill.time) for kill in kills))


def _struck(run_dir: Path) -> Iterator[Kill]:
    """From the ledger, which has a file for each, made just before."""
    for path in struck_folder(run_dir).glob("*.json"):
        yield Kill(path.stat().st_mtime, json.loads(path.read_text())["step"])


def torchrun(setting: Setting, name: str) -> Trail:
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "--monitor-interval=0.1"]
    command += [f"--max-restarts={setting.faults}", str(_PEERS / "ddp_torchrun.py")]
    return _peer(setting, name, command, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})


def ray_train(setting: Setting, name: str) -> Trail:
    quick = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_TRAIN_METRICS_ENABLED": "0"}
    return _peer(setting, name, [str(_PEERS / "ddp_ray_train.py")], quick)


def _peer(setting: Setting, name: str, command: Sequence[str], environment: Mapping[str, str]) -> Trail:
    folder = setting.root / name
    folder.mkdir()
    task, log = folder / "task.json", folder / "output.txt"
    _task(setting, folder).write(task)
    with open(log, "w") as output:
        done = subprocess.run(
            [sys.executable, *command, str(task)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=setting.deadline_s,
        )
    trail = Trail(read_kills(folder), read_finished(folder))
    if done.returncode or tuple(kill.step for kill in trail.kills) != setting.kills:
        raise RuntimeError(f"{name} ended with code {done.returncode}, kills {trail.kills}:\n{log.read_text()[-4000:]}")
    return trail


def _task(setting: Setting, folder: Path) -> Task:
    """The main job's, as ``holdfast train`` would have it."""
    config = compose_config(setting.job("process"))
    optim = config.optim
    return Task(
        folder=str(folder),
        store=str(corpus.prepare(config.data, setting.root / "cache").path),
        steps=setting.steps,
        kills=setting.kills,
        seed=config.seed,
        seq_len=config.data.seq_len,
        global_batch=config.trainer.global_batch,
        model=asdict(config.model),
        betas=(optim.betas[0], optim.betas[1]),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        grad_clip=optim.grad_clip,
        lr=optim.lr,
        warmup_steps=optim.warmup_steps,
        min_lr_ratio=optim.min_lr_ratio,
    )


_STAGE_OPTIONS = (
    "parallel.zero_stage=1",
    f"parallel.pipeline={RANKS}",
    f"model.n_layers={RANKS}",
    f"parallel.blocks={[1] * RANKS}",
    "snapshot.parity=0",
    "recovery.stage.repair=CHECKFREE",
)
_RANK_DIES = f"sigkill rank={VICTIM} at=step.after_backward"
WAYS: Mapping[str, tuple[str, Way]] = {
    "spare": (SPARE, partial(holdfast, kind="process", spares=1, fault=_RANK_DIES)),
    "cold": (COLD, partial(holdfast, kind="process", spares=0, fault=_RANK_DIES)),
    "node": (NODE, partial(holdfast, kind="process", spares=1, fault=f"node_sigkill node={VICTIM}")),
    "frozen": (FROZEN, partial(holdfast, kind="process", spares=1, fault=f"node_sigstop node={VICTIM}")),
    "stage": (
        STAGE,
        partial(holdfast, kind="process", spares=1, fault=f"node_sigkill node={VICTIM}", options=_STAGE_OPTIONS),
    ),
    "ray": (RAY, partial(holdfast, kind="local", spares=1, fault=_RANK_DIES)),
    "torchrun": (TORCHRUN, torchrun),
    "ray-train": (RAY_TRAIN, ray_train),
}
"""Word of the command line -> name in the table, and how to run it."""


# -- nothing is left running ------------------------------------------------------------------------------------------


def adopt_orphans() -> None:
    """Make this process the parent of whatever a run leaves behind, so that it can be found. Linux only."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def sweep() -> None:
    """Wait until nothing of a run is left, then kill what is, so that it disturbs no other."""
    _, left = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=_GRACE_S)
    for process in left:
        print(f"left running, killed: {process}", flush=True)
        process.kill()
    psutil.wait_procs(left)


# -- the record -------------------------------------------------------------------------------------------------------


def results(found: Mapping[str, Samples]) -> str:
    base = found[SPARE].recovery_s if SPARE in found else []
    rows: list[list[object]] = []
    for name, samples in found.items():
        ratios = [own / other for own, other in zip(samples.recovery_s, base, strict=True)] if base else []
        reached = [spread(samples.full_speed_s)] if samples.full_speed_s else []
        never = [f"{samples.never} never"] if samples.never else []
        rows.append(
            [
                name,
                len(samples.recovery_s),
                f"**{spread(samples.recovery_s)}**",
                spread(ratios, 1) if ratios else "",
                ", ".join(reached + never),
                samples.steps_lost,
                samples.cold,
                spread(samples.step_s, 3),
                f"{median(samples.losses):.4f}",
            ]
        )
    columns = ["way", "kills", "kill to the next new step, s: median (quartiles)", f"times that of {SPARE}"]
    columns += ["kill to full speed, s", "steps lost", "kills before the spare was warm", "undisturbed step, s"]
    return table([*columns, "last loss"], rows)


def bars(found: Mapping[str, Samples]) -> str:
    """What the project promises, against the medians."""
    rows: list[list[object]] = []
    for name, limit_s in _LIMITS_S.items():
        if name in found:
            seconds, bar = found[name].recovery_s, f"{name}: at most {limit_s:g} s"
            rows.append([bar, f"{spread(seconds)} s", _verdict(median(seconds) <= limit_s)])
    peers = [found[name].recovery_s for name in (TORCHRUN, RAY_TRAIN) if name in found]
    for name in (SPARE, RAY) if peers else ():
        if name in found:
            times = [min(others) / own for own, *others in zip(found[name].recovery_s, *peers, strict=True)]
            bar = f"{name}: at least {_TIMES_FASTER:g} times as fast as the better peer, kill by kill"
            rows.append([bar, f"{spread(times, 1)} times", _verdict(median(times) >= _TIMES_FASTER)])
    return table(["bar", "median (quartiles)", ""], rows)


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "**missed**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="runs of each way, which take turns")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="which of them")
    parser.add_argument("--faults", type=int, default=3, help="kills per run")
    parser.add_argument("--every", type=int, default=25, help="steps between kills, at least 5")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage of holdfast")
    parser.add_argument("--deadline-s", type=float, default=600.0, help="for a run of a peer")
    options = parser.parse_args()
    if min(options.rounds, options.faults, options.every - 4) < 1:
        parser.error("--rounds and --faults must be at least 1, --every at least 5: the usual step is measured in it")
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing stays behind
    found = {WAYS[word][0]: Samples() for word in options.ways}
    with tempfile.TemporaryDirectory() as root:
        setting = Setting(Path(root), options.faults, options.every, options.stage, options.deadline_s)
        for number in range(options.rounds):
            for word in options.ways[:: 1 if number % 2 == 0 else -1]:
                name, way = WAYS[word]
                print(f"round {number + 1} of {options.rounds}: {name}", flush=True)
                try:
                    found[name].add(way(setting, f"{word}-{number}"))
                finally:
                    sweep()
    body = "\n\n".join([str(__doc__), results(found), bars(found)])
    write_record("recovery_peers", "Recovery time against torchrun and Ray Train, main job, 3 ranks", body)


if __name__ == "__main__":
    main()
