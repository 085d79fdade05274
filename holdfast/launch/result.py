"""How a run ended, and what it left, for whoever has called ``holdfast.train``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.storage_uri import below
from holdfast.launch.checkpoint_place import place_of_run
from holdfast.launch.read_lines import records
from holdfast.launch.run_dir import RunDir

__all__ = ["Result"]


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended and where it is. What it wrote is read when it is asked for."""

    outcome: str
    """finished, stopped, failed."""
    exit_code: int
    step: int
    """Steps finished and, unless it failed, saved."""
    reason: str
    run_dir: Path
    findings: Mapping[str, object] = field(default_factory=dict)
    """What a finished run has to show: bits_per_byte, text, weights."""

    def __repr__(self) -> str:
        told = f"{self.outcome} at step {self.step}, exit code {self.exit_code}"
        if "bits_per_byte" in self.findings:
            told += f", {self.findings['bits_per_byte']:.3f} bits/byte"
        if self.outcome != "finished" and self.reason:
            told += f": {self.reason}"
        return f"Result({told}; {self.run_dir})"

    @property
    def metrics(self) -> list[Mapping[str, Any]]:
        """One row per step, in order: step, loss, bits_per_byte, learning_rate, grad_norm, tokens, step_s and more.
        Of a step that was done again only what counts: the last."""
        rows = {row["step"]: row for row in records(self.run_dir / "metrics.jsonl") if "loss" in row}
        return [rows[step] for step in sorted(rows)]

    @property
    def events(self) -> list[Mapping[str, Any]]:
        """Everything that happened, in order, all attempts: ``event`` is its kind, ``time`` seconds since 1970."""
        return list(records(self.run_dir / "events.jsonl"))

    @property
    def weights(self) -> Path | None:
        """The exported fp32 weights, a safetensors file or an adapter's directory; None unless the run finished."""
        where = self.findings.get("weights")
        return None if where is None else Path(str(where))

    @property
    def checkpoint(self) -> str | None:
        """Where the newest checkpoint of this run that is complete is, a path or a URI; None if there is none."""
        place = place_of_run(RunDir(self.run_dir))
        found, _ = checkpoint.list_checkpoints(place.storage)
        return below(place.uri, checkpoint.directory(found[0].step)) if found else None
