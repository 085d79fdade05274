"""What share of a training step do snapshots take, and how much slower is a run that takes one every step?

The main job (1m model, three forked ranks, no faults) with a snapshot every step and with none take turns. Blocked is
what rank 0 spent in offer and fence, within the step and as a share of the same step. The slowdown compares the median
step of two neighbouring runs, so it also holds what snapshots cost elsewhere: caches, memory bandwidth, the keepers.
The floor is the run without: nothing blocked, nothing copied.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from record import quartiles, spread, table, write_record
from runs import drive

WARM_UP_STEPS = 5
NEVER = 10**9


@dataclass
class Samples:
    """Of the runs with, or of those without snapshots."""

    medians_s: list[float] = field(default_factory=list)
    """One per run."""
    steps: list[dict[str, Any]] = field(default_factory=list)


def run(root: Path, name: str, every: int, steps: int, overrides: Sequence[str], into: Samples) -> None:
    job = ["experiment=main_job", "launch=process", "chaos.faults=[]", f"trainer.max_steps={steps}"]
    job += ["snapshot.persist_every_steps=0", "trainer.eval_windows=24", "trainer.generate_bytes=1"]
    attempt = drive(root, name, [*job, f"snapshot.every_steps={every}", *overrides])
    records = [record for record in attempt.metrics if "step_s" in record][WARM_UP_STEPS:]
    into.medians_s.append(quartiles([record["step_s"] for record in records])[1])
    into.steps += records


def report(taken: Samples, untaken: Samples, steps: int) -> str:
    stalls_ms = [1000 * step["stall_s"] for step in taken.steps]
    shares = [100 * step["stall_s"] / step["step_s"] for step in taken.steps]
    slowdown = [100 * (a / b - 1) for a, b in zip(taken.medians_s, untaken.medians_s, strict=True)]
    copied_mb = max(step["copy_bytes"] for step in taken.steps) / 1e6
    skipped = sum(step["copy_bytes"] == 0 for step in taken.steps)
    runs = len(slowdown)
    rows = [
        ["median step with a snapshot, ms", runs, spread([1000 * s for s in taken.medians_s], 1)],
        ["median step without, ms", runs, spread([1000 * s for s in untaken.medians_s], 1)],
        ["blocked per step, ms", len(stalls_ms), spread(stalls_ms)],
        ["**blocked, % of the step**", len(shares), spread(shares)],
        ["slower than without, %, pair by pair", runs, spread(slowdown)],
    ]
    copied = f"{copied_mb:.2f} MB per snapshot at rank 0, {skipped} skipped; runs of {steps} steps, the first "
    copied += f"{WARM_UP_STEPS} left out."
    return f"{copied}\n\n{table(['what', 'n', 'median (quartiles)'], rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="runs with and without")
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument("overrides", nargs="*", help="more options of the job, e.g. model=3m")
    options = parser.parse_args()
    taken, untaken = Samples(), Samples()
    with tempfile.TemporaryDirectory() as root:
        for number in range(options.pairs):
            both = [(1, taken), (NEVER, untaken)]
            for every, samples in both if number % 2 == 0 else reversed(both):
                print(f"pair {number + 1} of {options.pairs}, a snapshot every {every} steps", flush=True)
                run(Path(root), f"pair{number}-{every}", every, options.steps, options.overrides, samples)
    body = f"{__doc__}\n{report(taken, untaken, options.steps)}"
    write_record("snapshot_share", "Share of snapshots in a training step, main job", body)


if __name__ == "__main__":
    main()
