"""How long does a SIGKILL of one rank keep a run from its next step, with and without a warm spare, and what would a
restart from a checkpoint have cost?

Every way is timed alike, from outside: from the SIGKILL, as the victim logs it, to the first step recorded that nobody
had finished before. Three ways take turns with the same job and the same kills:

- a warm spare takes the dead rank's place, or a fresh process does; the survivors stay;
- restart: nothing is repaired (recovery.max_failures=0). The driver writes a checkpoint and ends, and a fresh driver
  is started with resume=auto at once. That flatters it: the checkpoint is of the very last step, on local disk, and
  nobody needed time to notice that the job had died.

The floor is one undisturbed step of the same runs: nothing can resume faster. The parts are what the driver measured
from the victim's last heartbeat on; they need not add up to the total.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from record import quartiles, spread, table, write_record
from runs import Attempt, drive

OURS = {"warm spare": 1, "no spare": 0}
RESTART = "restart from a checkpoint"
TOTAL = "**SIGKILL to the next new step**"


@dataclass
class Samples:
    """Everything measured for one way of going on; one entry per kill and part."""

    parts: dict[str, list[float]] = field(default_factory=dict)
    steps_s: list[float] = field(default_factory=list)
    steps_lost: int = 0
    cold: int = 0
    """Kills that came while the spare was still warming up."""

    def add(self, **seconds: float) -> None:
        for part, value in seconds.items():
            self.parts.setdefault(part.replace("_", " "), []).append(value)

    @property
    def totals(self) -> list[float]:
        return self.parts.get(TOTAL, [])


def main_job(kind: str, stage: int, more: Sequence[str] = ()) -> list[str]:
    """Options of the main job without what takes time besides its steps; ``kind`` is ``process`` or ``local``."""
    job = ["experiment=main_job", f"launch={kind}", f"parallel=zero{stage}"]
    return [*job, "snapshot.persist_every_steps=0", "trainer.eval_windows=24", "trainer.generate_bytes=1", *more]


def fault(number: int, every: int) -> str:
    """The kill of this number, from 0; each rank has its turn."""
    return f"sigkill rank={number % 3} step={every * (number + 1)} at=step.after_backward"


def repair(
    job: Sequence[str], root: Path, run_id: str, spares: int, options: argparse.Namespace, into: Samples
) -> None:
    """One run that survives all its kills."""
    faults = [fault(i, options.every) for i in range(options.faults)]
    attempt = drive(
        root,
        run_id,
        [
            *job,
            f"launch.spares={spares}",
            f"recovery.max_failures={options.faults}",
            f"trainer.max_steps={options.every * (options.faults + 1)}",
            f"chaos.faults={json.dumps(faults)}",
        ],
    )
    into.steps_s += attempt.steps_s
    for number, (kill_s, done) in enumerate(zip(attempt.kills_s, attempt.of("recovery_done"), strict=True)):
        step = options.every * (number + 1)
        into.add(**{**done["split_s"], TOTAL: attempt.first_step_beyond(step, kill_s) - kill_s})
        into.steps_lost += done["steps_lost"]
        into.cold += spares > 0 and is_cold(attempt, kill_s)


def is_cold(attempt: Attempt, kill_s: float) -> bool:
    levels = [event["level"] for event in attempt.of("protection") if event["time"] < kill_s]
    return bool(levels) and levels[-1] != "full"


def restart(job: Sequence[str], root: Path, run_id: str, options: argparse.Namespace, into: Samples) -> None:
    """One run whose driver ends at every kill, and the driver that continues it."""
    before: Attempt | None = None
    for number in range(options.faults + 1):
        is_last = number == options.faults
        attempt = drive(
            root,
            run_id,
            [
                *job,
                "resume=auto",
                "launch.spares=0",
                "recovery.max_failures=0",
                f"trainer.max_steps={options.every * (options.faults + (0 if is_last else 1)) + 3}",
                f"chaos.faults={json.dumps([] if is_last else [fault(number, options.every)])}",
            ],
            exit_code=0 if is_last else 1,
        )
        into.steps_s += attempt.steps_s
        if before is not None:
            _add_restart(before, attempt, options.every * number, into)
        before = attempt


def _add_restart(before: Attempt, attempt: Attempt, step: int, into: Samples) -> None:
    (kill_s,) = before.kills_s
    begun_s, epoch_s = attempt.of("run_started")[0]["time"], attempt.of("epoch_started")[0]["time"]
    resumed_s = attempt.first_step_beyond(step, attempt.started_s)
    parts = {
        "detect, save, end": before.ended_s - kill_s,
        "start the driver": begun_s - attempt.started_s,
        "start the ranks": epoch_s - begun_s,
        "build, load, first step": resumed_s - epoch_s,
        TOTAL: resumed_s - attempt.started_s + before.ended_s - kill_s,
    }
    into.add(**parts)
    into.steps_lost += step - attempt.of("epoch_started")[0]["version"]


def section(kind: str, found: dict[str, Samples]) -> str:
    floor = quartiles([step_s for samples in found.values() for step_s in samples.steps_s])[1]
    peer, rows = found[RESTART].totals, list[list[object]]()
    for way, samples in found.items():
        for part, values in samples.parts.items():
            ratios = [other / own for other, own in zip(peer, values, strict=True)] if part == TOTAL else []
            in_steps = f"{quartiles(values)[1] / floor:.1f}x"
            rows.append([way, part, len(values), spread(values), in_steps, spread(ratios, 1) + "x" if ratios else ""])
    columns = ["way", "part", "n", "s: median (quartiles)", "undisturbed steps", "faster than restart, kill by kill"]
    lost = ", ".join(f"{way} {samples.steps_lost}" for way, samples in found.items())
    return (
        f"## launch={kind}\n\nundisturbed step: {floor:.3f} s. Steps lost in all: {lost}. Kills before the spare was "
        f"warm again: {found['warm spare'].cold}.\n\n{table(columns, rows)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="runs of each way and kind, which take turns")
    parser.add_argument("--faults", type=int, default=3, help="kills per run")
    parser.add_argument("--every", type=int, default=25, help="steps between kills, in which a new spare warms up")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage")
    parser.add_argument("--kinds", nargs="+", default=["PROCESS", "LOCAL"], help="PROCESS: forked; LOCAL: Ray")
    parser.add_argument("overrides", nargs="*", help="more options of the job, e.g. launch.address=auto")
    options = parser.parse_args()
    found = {kind: {way: Samples() for way in (*OURS, RESTART)} for kind in options.kinds}
    with tempfile.TemporaryDirectory() as root:
        for number in range(options.rounds):
            for kind in options.kinds:
                job = main_job(kind.lower(), options.stage, options.overrides)
                for way in (*OURS, RESTART) if number % 2 == 0 else (RESTART, *reversed(OURS)):
                    run_id = f"{kind}-{way.split()[0]}-{number}"
                    print(f"round {number + 1} of {options.rounds}: {kind}, {way}", flush=True)
                    if way == RESTART:
                        restart(job, Path(root), run_id, options, found[kind][way])
                    else:
                        repair(job, Path(root), run_id, OURS[way], options, found[kind][way])
    sections = [str(__doc__), *(section(kind, samples) for kind, samples in found.items())]
    write_record("recovery_time", f"Recovery time, main job with ZeRO-{options.stage}, 3 ranks", "\n\n".join(sections))


if __name__ == "__main__":
    main()
