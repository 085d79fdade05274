"""RunConfig: the whole configuration of a run, nesting the options of each part."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from holdfast.fault_tolerance.config import ChaosConfig, RecoveryConfig, SnapshotConfig
from holdfast.optim.config import OptimConfig
from holdfast.parallel.config import ParallelConfig
from holdfast.trainer.config import AdapterConfig, DataConfig, ModelConfig, TrackerConfig, TrainerConfig

__all__ = ["LaunchConfig", "LaunchKind", "RunConfig"]


class LaunchKind(Enum):
    """LOCAL: Ray, started here or joined. PROCESS: forked processes on this host, without Ray."""

    LOCAL = "local"
    PROCESS = "process"


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """Nodes, workers and spares."""

    kind: LaunchKind = LaunchKind.LOCAL
    """LOCAL or PROCESS."""
    nodes: int = 3
    """(Virtual) nodes, one keeper each."""
    workers_per_node: int = 1
    """Ranks per node."""
    zones: list[str] = field(default_factory=list)
    """Failure domain of each node, for example its rack: nodes that protect each other are put in different ones. Empty
    takes the Ray nodes' label ``zone``."""
    spares: int = 1
    """Warm workers in reserve, everything imported, no state."""
    address: str = ""
    """Ray cluster to join (``auto`` for this host's); empty means RAY_ADDRESS, else start Ray here."""
    dashboard: bool = False
    """Start Ray's dashboard together with Ray."""
    gpus_per_worker: float = 0.0
    """GPUs per worker; 0 trains on the CPU."""
    threads_per_worker: int = 1
    """OMP_NUM_THREADS of each worker."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Everything ``holdfast train`` can be told."""

    project: str = "holdfast"
    """First folder below the root, and the W&B project."""
    root: str = ""
    """Root of all run directories, absolute and shared by all nodes; empty means HOLDFAST_HOME or ~/holdfast-runs."""
    run_id: str = ""
    """Name of the run; empty makes a new one, or finds the one to resume."""
    resume: str = "auto"
    """``auto``, ``must``, ``never``, or a run id."""
    seed: int = 0
    """Seeds the initial weights and the sample order."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    snapshot: SnapshotConfig = field(default_factory=SnapshotConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    chaos: ChaosConfig = field(default_factory=ChaosConfig)
