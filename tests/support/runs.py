"""Whole runs in a temporary directory, and what they leave behind, for tests of the outcome."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from holdfast.configs.schema import LaunchConfig, LaunchKind, RunConfig
from holdfast.fault_tolerance.config import ChaosConfig, RecoveryConfig, SnapshotConfig
from holdfast.optim.config import OptimConfig
from holdfast.parallel.config import ParallelConfig
from holdfast.trainer.config import DataConfig, DataSource, ModelConfig, TrainerConfig
from holdfast.types import Precision

__all__ = ["Outcome", "events_of", "outcome_of", "tiny_config", "write_corpus"]


def write_corpus(directory: Path) -> Path:
    """Some hundred kilobytes of regular text in a few dozen files."""
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(40):
        lines = [f"line {n} of file {i} says {(n * 7 + i) % 97} and {(n * n + 3 * i) % 89}" for n in range(60)]
        (directory / f"part{i:02d}.txt").write_text("\n".join(lines))
    return directory


def tiny_config(
    root: Path,
    corpus: Path,
    *,
    stage: int = 2,
    precision: Precision = Precision.FP32,
    steps: int = 8,
    faults: Sequence[str] = (),
    nodes: int = 3,
    spares: int = 1,
    **recovery: float,
) -> RunConfig:
    """A run of a few seconds: tiny model, three ranks in forked processes."""
    return RunConfig(
        root=str(root),
        project="test",
        resume="never",
        trainer=TrainerConfig(
            max_steps=steps,
            global_batch=4 * nodes,
            micro_batch=2,
            log_every=1,
            eval_windows=nodes * 2,
            generate_bytes=8,
        ),
        model=ModelConfig(name="tiny", d_model=64, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=128, max_seq_len=64),
        data=DataConfig(source=DataSource.TEXT, path=str(corpus), seq_len=32, validation_share=0.2),
        optim=OptimConfig(lr=3e-3, warmup_steps=2, min_8bit_size=256),
        parallel=ParallelConfig(zero_stage=stage, precision=precision),
        snapshot=SnapshotConfig(persist_every_steps=0),
        recovery=RecoveryConfig(**recovery),  # type: ignore[arg-type]  # each test names the few it changes
        launch=LaunchConfig(kind=LaunchKind.PROCESS, nodes=nodes, spares=spares),
        chaos=ChaosConfig(faults=list(faults)),
    )


@dataclass(frozen=True)
class Outcome:
    """What an undisturbed and a disturbed run must have in common, to the bit."""

    losses: dict[int, float]
    state: dict[str, bytes]
    """Every file of the last checkpoint that holds state: master weights, codes, absmax, random state."""
    weights: dict[str, bytes]
    """Exported tensors; the file's header may name its metadata in any order."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Outcome) and not self.differences(other)

    def differences(self, other: Outcome) -> list[str]:
        steps = [s for s in self.losses.keys() | other.losses.keys() if self.losses.get(s) != other.losses.get(s)]
        files = [f for f in self.state.keys() | other.state.keys() if self.state.get(f) != other.state.get(f)]
        found = [f"loss of step {s}: {self.losses.get(s)} != {other.losses.get(s)}" for s in sorted(steps)]
        found += [f"{f} differs" for f in sorted(files)]
        return found + ([] if self.weights == other.weights else ["exported weights differ"])


def outcome_of(run_dir: Path) -> Outcome:
    """Read a finished run's directory."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = max((run_dir / "checkpoints").glob("step-*"))
    return Outcome(
        losses={r["step"]: r["loss"] for r in records if "loss" in r},
        state={p.name: p.read_bytes() for p in sorted(last.glob("rank*.bin"))},
        weights={n: t.numpy().tobytes() for n, t in load_file(run_dir / "export" / "model.safetensors").items()},
    )


def events_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Events of one kind, in order."""
    records = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [r for r in records if r["event"] == kind]
