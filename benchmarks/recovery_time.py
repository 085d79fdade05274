"""Seconds from SIGKILL of a worker to the next step that all ranks have committed, split into its parts.

Each repetition kills one rank of a three-rank run several times, with and without a warm spare. The undisturbed
step of the same run is the floor: no recovery can be shorter.
"""

from __future__ import annotations

import argparse
import json
import tempfile

from record import quartiles, table, write_record

from holdfast.configs.schema import LaunchConfig, LaunchKind, RunConfig
from holdfast.fault_tolerance.config import ChaosConfig, SnapshotConfig
from holdfast.launch.run import train
from holdfast.parallel.config import ParallelConfig
from holdfast.trainer.config import DataConfig, TrainerConfig

PARTS = ("detect", "regroup", "restore", "first_step")


def measure(kind: LaunchKind, spares: int, faults: int, stage: int) -> tuple[list[dict[str, float]], list[float]]:
    """Recovery splits and undisturbed step times of one run with ``faults`` kills."""
    every = 10
    with tempfile.TemporaryDirectory() as root:
        config = RunConfig(
            root=root,
            resume="never",
            trainer=TrainerConfig(max_steps=every * (faults + 1), eval_windows=24, generate_bytes=1),
            data=DataConfig(seq_len=128),
            parallel=ParallelConfig(zero_stage=stage),
            snapshot=SnapshotConfig(persist_every_steps=0),
            launch=LaunchConfig(kind=kind, spares=spares),
            chaos=ChaosConfig(
                faults=[f"sigkill rank={i % 3} step={every * (i + 1)} at=step.after_backward" for i in range(faults)]
            ),
        )
        run_dir = train(config).run_dir
        events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
        metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [e["split_s"] for e in events if e["event"] == "recovery_done"], [m["step_s"] for m in metrics if "step_s" in m]


def row(name: str, values: list[float], steps: list[float]) -> list[object]:
    low, middle, high = quartiles(values)
    return [name, len(values), f"{middle:.2f}", f"{low:.2f}–{high:.2f}", f"{middle / quartiles(steps)[1]:.1f}x"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=6)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=["LOCAL", "PROCESS"])
    options = parser.parse_args()
    sections = []
    for kind in options.kinds:
        for spares in (1, 0):
            splits, steps = measure(LaunchKind[kind], spares, options.faults, options.stage)
            rows = [row(part, [s[part] for s in splits], steps) for part in PARTS]
            rows.append(row("**SIGKILL to committed step**", [sum(s.values()) for s in splits], steps))
            name = "a warm spare" if spares else "no spare (fresh process)"
            sections.append(
                f"## launch={kind}, {name}\n\nundisturbed step: {quartiles(steps)[1]:.2f} s\n\n"
                + table(["part", "n", "median s", "quartiles", "undisturbed steps"], rows)
            )
    write_record("recovery_time", f"Recovery time, ZeRO-{options.stage}, 3 ranks", "\n\n".join(sections))


if __name__ == "__main__":
    main()
