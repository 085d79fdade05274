"""What share of a training step do snapshots take, and how much slower is a run that takes one every step?

Three kinds of run of the main job (1m model, three forked ranks, no faults) take turns: a snapshot every step with
parity over the nodes, as by default; a snapshot every step without parity; none at all. Blocked is what rank 0 spent in
offer and fence, within the step and as a share of the same step. The slowdown compares the median steps of neighbouring
runs, so it also holds what snapshots cost elsewhere: caches, memory bandwidth, processor time of copying threads and
keepers. The floor is the run without: nothing blocked, nothing copied. Where all cores compute, whatever is done beside
a step takes its time away from it.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from record import quartiles, spread, table, write_record
from runs import drive

WARM_UP_STEPS = 5
PROTECTED, ALONE, NONE = "with parity", "without parity", "no snapshots"
KINDS = {
    PROTECTED: ["snapshot.every_steps=1", "snapshot.parity=1"],
    ALONE: ["snapshot.every_steps=1", "snapshot.parity=0"],
    NONE: [f"snapshot.every_steps={10**9}", "snapshot.parity=0"],
}


@dataclass
class Samples:
    """Of the runs of one kind."""

    medians_s: list[float] = field(default_factory=list)
    """One per run."""
    steps: list[dict[str, Any]] = field(default_factory=list)


def run(root: Path, name: str, kind: str, steps: int, overrides: Sequence[str], into: Samples) -> None:
    job = ["experiment=main_job", "launch=process", "chaos.faults=[]", f"trainer.max_steps={steps}"]
    job += ["snapshot.persist_every_steps=0", "trainer.eval_windows=24", "trainer.generate_bytes=1"]
    attempt = drive(root, name, [*job, *KINDS[kind], *overrides])
    records = [record for record in attempt.metrics if "step_s" in record][WARM_UP_STEPS:]
    into.medians_s.append(quartiles([record["step_s"] for record in records])[1])
    into.steps += records


def report(found: Mapping[str, Samples], steps: int) -> str:
    rows = [row for kind, samples in found.items() for row in _rows(kind, samples, found[NONE])]
    taken = found[PROTECTED].steps
    copied_mb, skipped = max(step["copy_bytes"] for step in taken) / 1e6, sum(step["copy_bytes"] == 0 for step in taken)
    copied = (
        f"{copied_mb:.2f} MB per snapshot at rank 0, {skipped} of {len(taken)} skipped with parity; runs of {steps} "
    )
    copied += f"steps, the first {WARM_UP_STEPS} left out."
    return f"{copied}\n\n{table(['runs', 'what', 'n', 'median (quartiles)'], rows)}"


def _rows(kind: str, samples: Samples, untaken: Samples) -> list[list[object]]:
    medians = [kind, "median step, ms", len(samples.medians_s), spread([1000 * s for s in samples.medians_s], 1)]
    if kind == NONE:
        return [medians]
    stalls_ms = [1000 * step["stall_s"] for step in samples.steps]
    shares = [100 * step["stall_s"] / step["step_s"] for step in samples.steps]
    copies_ms = [1000 * step["copy_s"] for step in samples.steps]
    slowdown = [100 * (a / b - 1) for a, b in zip(samples.medians_s, untaken.medians_s, strict=True)]
    return [
        medians,
        [kind, "copy beside the step, ms", len(copies_ms), spread(copies_ms)],
        [kind, "blocked per step, ms", len(stalls_ms), spread(stalls_ms)],
        [kind, "**blocked, % of the step**", len(shares), spread(shares)],
        [kind, "**slower than without, %**, pair by pair", len(slowdown), spread(slowdown)],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument("overrides", nargs="*", help="more options of the job, e.g. model=3m")
    options = parser.parse_args()
    found = {kind: Samples() for kind in KINDS}
    with tempfile.TemporaryDirectory() as root:
        for number in range(options.rounds):
            for kind in random.Random(number).sample(list(KINDS), len(KINDS)):
                print(f"round {number + 1} of {options.rounds}: {kind}", flush=True)
                name = f"round{number}-{kind.replace(' ', '-')}"
                run(Path(root), name, kind, options.steps, options.overrides, found[kind])
    body = f"{__doc__}\n{report(found, options.steps)}"
    write_record("snapshot_share", "Share of snapshots in a training step, main job", body)


if __name__ == "__main__":
    main()
