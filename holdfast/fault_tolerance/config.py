"""Options of snapshots, recovery and injected faults."""

from __future__ import annotations

from dataclasses import dataclass, field

from holdfast import knobs
from holdfast.fault_tolerance.stage_policy import MomentRepair, RateMode, Repair

__all__ = ["ChaosConfig", "RecoveryConfig", "SnapshotConfig", "StageConfig"]


@dataclass(kw_only=True, slots=True)
class SnapshotConfig:
    """In-memory snapshots in the keepers and durable checkpoints."""

    every_steps: int = 1
    """Optimizer steps between snapshots."""
    buffers: int = 3
    """Buffers per rank; 3 lets a new version fill while the last two wait for their fate."""
    parity: int = 1
    """Nodes of a protection group that may be lost at once and are rebuilt from the memory of the others; 0 protects
    from the loss of processes only."""
    group_size: int = 0
    """Nodes in a protection group, about; 0 chooses: all of them, up to 8."""
    copy_mb_per_s: float = 0.0
    """Bound on each rank's copying beside the step, 10^6 bytes per second; 0 copies as fast as it goes."""
    max_age_steps: int = 0
    """A rank fails once the newest version that counts is this many steps old; 0 never: a run that cannot take
    snapshots goes on without."""
    fence_timeout_s: float = 60.0
    """An update waits this long for the copy of the state before; then that version is given up."""
    memory_limit_gb: float = 0.0
    """Host memory one keeper may use, 10^9 bytes; 0 means half of what is free."""
    persist_every_steps: int = 100
    """Steps between durable checkpoints; 0 writes one only when the run stops or ends."""
    persist_every_s: float = 0.0
    """Seconds after which a durable checkpoint is due even without the steps; 0 counts steps only."""
    persist_mb_per_s: float = 0.0
    """Bound on what a keeper writes to storage for its ranks, 10^6 bytes per second; 0 writes as fast as it goes."""
    storage: str = ""
    """Where durable checkpoints go, below it <project>/<run_id>: a path, file://, s3://, gs:// or hdfs:// URI; empty
    means the run directory."""
    keep_last: int = 2
    """Durable checkpoints kept; at least 2, so the last good one outlives a bad write."""


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """How a stage of a pipeline is rebuilt that no memory holds any more. All but EXACT are approximate."""

    repair: Repair = Repair.EXACT
    """EXACT goes back to a durable checkpoint. CHECKFREE averages the neighbours; CHECKFREE_PLUS does inside, and
    copies the ends from what was trained in their place (parallel.swapped); COPY_PREVIOUS, COPY_NEXT, UNIFORM, RANDOM
    and IDENTITY are for comparison."""
    norm_exponent: int = 2
    """Of the gradient norms by which CHECKFREE weighs the neighbours: 1 or 2. Clipping by the global norm, which scales
    both alike, changes nothing."""
    moments: MomentRepair = MomentRepair.RESET
    """The optimizer's: RESET starts them anew, AVERAGED averages those of the neighbours."""
    rate_factor: float = 1.0
    """By which the learning rate of a rebuilt stage is multiplied."""
    rate_mode: RateMode = RateMode.ONCE
    """ONCE however often it is rebuilt, COMPOUNDING each time, DECAYING to 1 again."""
    rate_decay_steps: int = 100
    """Steps that DECAYING takes."""
    heal_steps: int = 0
    """Local updates by which a rebuilt stage is fitted, before it rejoins, to what the lost one answered lately: its
    neighbours log what they exchange with it anyway. 0 logs nothing."""
    heal_lr: float = 1e-3
    """Adam's learning rate at the first of these updates; it falls to 0."""
    log_mb: float = 64.0
    """Memory that each rank may use for either of its two logs, 10^6 bytes."""


@dataclass(kw_only=True, slots=True)
class RecoveryConfig:
    """How faults are noticed and what they may cost."""

    heartbeat_s: float = 0.2
    """Seconds between a rank's heartbeats."""
    suspect_after_s: float = 10.0
    """A rank without a heartbeat for this long is declared frozen and killed. On Ray, a node that has been silent for
    half of it is lost with everything on it, if its raylet does not answer either."""
    abort_after_s: float = 15.0
    """A survivor that has not left its epoch after this long is replaced."""
    start_timeout_s: float = 180.0
    """A worker that is not ready after this long is replaced."""
    step_timeout_s: float = 600.0
    """Without a finished step for this long the slowest rank is replaced."""
    max_failures: int = 10
    """Faults the run survives; the next one ends it with exit code 1."""
    max_preemptions: int = 0
    """Preemptions the run survives, which are no failures: nodes that went after a notice, and ranks that moved because
    of one; the next one ends it with exit code 1. 0 is no limit."""
    max_no_progress: int = 3
    """Recoveries in a row without a new step before the run gives up with exit code 93."""
    stop_grace_s: float = field(default_factory=knobs.stop_grace_s)
    """Seconds from the first signal to the end of the run, which saves what it can in them: half may pass until the
    ranks have left their step, the rest is for the checkpoint. 60, or nine tenths of what ``ray job stop`` leaves a
    Ray job: RAY_JOB_STOP_WAIT_TIME_S, 3 s unless it is set."""
    shrink_after_s: float = 0.0
    """A node that has not been ready for this long after its loss is done without: the run goes on with the others from
    the same version; 0 waits for it until the failures are used up."""
    min_nodes: int = 1
    """The run never goes on with fewer nodes."""
    retry_node_s: float = 60.0
    """Seconds between attempts to start the processes of a node that the run goes on without."""
    lease_s: float = 60.0
    """A keeper that has not heard from a driver for this long ends and frees its memory."""
    stage: StageConfig = field(default_factory=StageConfig)


@dataclass(kw_only=True, slots=True)
class ChaosConfig:
    """Faults to inject on purpose; each one happens once per run."""

    faults: list[str] = field(default_factory=list)
    """Entries ``ACTION KEY=VALUE ...``, for example ``sigkill rank=1 step=150``; ``holdfast inject --list`` has all."""
    allow_inject: bool = True
    """Whether ``holdfast inject`` may add more while the run goes on."""
