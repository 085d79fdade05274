"""Configuration -> objects. Every choice a rank makes is made here, once per membership epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from holdfast import failpoints
from holdfast.adapters import using_tasks
from holdfast.fault_tolerance.config import RecoveryConfig, SnapshotConfig
from holdfast.fault_tolerance.stage_policy import StageRepair
from holdfast.optim.config import OptimConfig
from holdfast.optim.schedules import learning_rate
from holdfast.parallel.comms import TorchCommunicator
from holdfast.parallel.config import ParallelConfig
from holdfast.parallel.microbatches import Microbatch
from holdfast.parallel.pipeline_engine import PipelineEngine
from holdfast.parallel.pipeline_plan import replicas
from holdfast.parallel.zero import ZeroEngine
from holdfast.trainer.adapting import AdapterTask, trainable_elements
from holdfast.trainer.best import BestState, EndRules
from holdfast.trainer.config import AdapterConfig, DataConfig, ModelConfig, NonFinite, TrainerConfig
from holdfast.trainer.data import Batches
from holdfast.trainer.engines import Work, build_engine
from holdfast.trainer.evaluate import evaluate
from holdfast.trainer.export import export_weights, sample_text
from holdfast.trainer.frozen import Frozen
from holdfast.trainer.loop import Goal, Trainer
from holdfast.trainer.models import model_of
from holdfast.trainer.observers import Watcher
from holdfast.trainer.stage_healing import Boundaries, heal_stages
from holdfast.trainer.state import StateView, TrainState
from holdfast.trainer.step import Communicator, Snapshots, StepParts
from holdfast.types import Phase

__all__ = ["Job", "Note", "RankRun"]

Note = Callable[[dict[str, object]], None]
"""Takes a JSON record of something that happened besides a step."""

_TINY = ModelConfig(name="tiny", d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=32, max_seq_len=8)


class Options(Protocol):
    """The parts of a run's configuration that a rank needs."""

    seed: int
    trainer: TrainerConfig
    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig
    optim: OptimConfig
    parallel: ParallelConfig
    snapshot: SnapshotConfig
    recovery: RecoveryConfig


class Peers(Communicator, Protocol):
    """A communicator that knows its place."""

    rank: int


@dataclass(frozen=True, slots=True)
class Job:
    """What to train, the same on every rank and in every epoch."""

    options: Options
    store: str
    """Directory of the token store."""
    export_dir: str
    seen: Mapping[str, str] = field(default_factory=dict)
    """Token stores of earlier tasks, by their names."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def backend(self) -> str:
        return "nccl" if self.device.type == "cuda" else "gloo"

    def rehearse(self) -> None:
        """Build a tiny engine alone and make a step. Much is imported and compiled on first use; a fault need not
        wait for it then. Takes seconds, once per process."""
        if self.options.adapter.method:
            trainable_elements(self.options.adapter, self.options.model)
        _ = model_of(self.options.model).parameters  # imports what it is made of
        options, tokens = self.options, torch.zeros(1, _TINY.max_seq_len, dtype=torch.long, device=self.device)
        alone = TorchCommunicator.alone(self.backend)
        try:
            engine = build_engine(options, _TINY, self.device, Work(1, 1, _TINY.max_seq_len), rank=0, world=1)
            engine.forward_backward([(tokens, tokens, 0)])
            engine.update(options.optim.lr)
            engine.refresh()
            engine.close()
        finally:
            alone.close()


class RankRun:
    """Collective. One rank in one epoch, with fresh weights: the trainer and what surrounds it."""

    def __init__(
        self,
        job: Job,
        comm: Peers,
        snapshots: Snapshots,
        watcher: Watcher,
        *,
        epoch: int,
        note: Note,
        boundaries: Boundaries | None = None,
        frozen: Frozen | None = None,
        starts_fresh: bool = True,
    ) -> None:
        """Unless it ``starts_fresh``, every weight is going to be restored."""
        self._job, self._comm, self._watcher, self._note = job, comm, watcher, note
        self._frozen = frozen or Frozen()
        self._boundaries = boundaries
        options = job.options
        self._batches = self._open(job.store, comm.rank // options.parallel.pipeline)
        torch.manual_seed(options.seed + comm.rank)  # whatever else this process has drawn
        trainer, shares = options.trainer, replicas(options.parallel, comm.world)
        work = Work(trainer.micro_batch, trainer.global_batch // (trainer.micro_batch * shares), options.data.seq_len)
        self._task = self._adapter_task() if options.adapter.method else None
        self._engine = build_engine(
            options,
            options.model,
            job.device,
            work,
            rank=comm.rank,
            world=comm.world,
            observer=boundaries,
            model=self._task.begin(job.device, options.parallel.precision) if self._task else None,
            initial=starts_fresh,
        )
        self._best = BestState(self._engine, EndRules.of(options.adapter)) if options.adapter.keep_best else None
        self.view = StateView(TrainState(), self._engine, rank=comm.rank, best=self._best)
        self.trainer = Trainer(self.view, self._parts(snapshots, epoch), self._training, self._goal())

    def conclude(self) -> Mapping[str, object]:
        """Collective. Evaluate and export; rank 0 returns what the run has to show.

        Weights that cannot be written are no fault, because nothing that recovery does would help: ``not_exported``
        says why.
        """
        step = self.view.train.step
        self._watcher.enter(Phase.EVALUATE, step)
        kept = self._end_with_best()
        bits, windows = self._measure(step)
        row = self._measure_seen(step) if self._task else {}
        self._watcher.enter(Phase.EXPORT, step)
        failpoints.hit("export.begin", step)
        weights = self._engine.full_weights()
        if self._comm.rank != 0:
            return {}
        model = self._task.finish(weights) if self._task else model_of(self._job.options.model).with_weights(weights)
        found = {"step": step, "bits_per_byte": bits, "windows": windows, **row, **kept}
        found["text"] = sample_text(model, self._job.options.trainer, self._job.options.seed, self._job.options.data)
        try:
            return {**found, "weights": str(self._write(model, weights, step))}
        except OSError as error:
            return {**found, "not_exported": str(error)}

    def _write(self, model: nn.Module, weights: Mapping[str, torch.Tensor], step: int) -> Path:
        """What was trained, to the disk. Raises: OSError."""
        folder = Path(self._job.export_dir)
        if self._task is not None:
            self._task.save(model, folder / "adapter")
            return folder / "adapter"
        export_weights(weights, folder / "model.safetensors", metadata={"format": "pt", "step": str(step)})
        return folder / "model.safetensors"

    def heal(self, repairs: Sequence[StageRepair]) -> None:
        """Collective. Fit stages that were made from others to what their neighbours have logged."""
        if self._boundaries is not None and isinstance(self._engine, PipelineEngine):
            heal_stages(self._engine, self._boundaries, repairs, self._job.options.recovery.stage, self._note)

    def close(self) -> None:
        """Free the engine; the next epoch builds a new one in this process."""
        self._engine.close()

    def _parts(self, snapshots: Snapshots, epoch: int) -> StepParts:
        options, steps = self._job.options, self._job.options.trainer.max_steps
        return StepParts(
            engine=self._engine,
            comm=self._comm,
            snapshots=snapshots,
            watcher=self._watcher,
            learning_rate=lambda step: learning_rate(options.optim, step, steps),
            snapshot_every=options.snapshot.every_steps,
            epoch=epoch,
            rank=self._comm.rank,
            note=self._note,
            persist_every=options.snapshot.persist_every_steps,
            max_age_steps=options.snapshot.max_age_steps,
            judge=self._judge if self._best else None,
        )

    def _goal(self) -> Goal:
        trainer = self._job.options.trainer
        may_skip, every = trainer.nonfinite is NonFinite.SKIP, 0 if self._best else trainer.eval_every
        return Goal(trainer.max_steps, every, self._evaluate, trainer.max_nonfinite if may_skip else 0)

    def _judge(self, step: int) -> None:
        """Collective. An evaluation that decides what is kept belongs to its step: who makes that again gets it."""
        trainer = self._job.options.trainer
        if self._best is not None and (step % trainer.eval_every == 0 or step == trainer.max_steps):
            self._watcher.enter(Phase.EVALUATE, step)
            self._best.judge(step, self._evaluate(step))

    def _end_with_best(self) -> Mapping[str, object]:
        """Collective. Let the best state be the one that is exported; what there is to tell of it."""
        if self._best is None:
            return {}
        self.trainer.give_up_live()
        self._best.put_back()
        return {"best_step": self._best.step, "ended": self._best.ended}

    def _training(self, step: int) -> Sequence[Microbatch]:
        if self._boundaries is not None:
            self._boundaries.step = step
        return [self._on_device(batch) for batch in self._batches.microbatches(step)]

    def _validation(self, batches: Batches) -> Iterator[Microbatch]:
        trainer = self._job.options.trainer
        for batch in batches.validation(trainer.eval_windows, trainer.micro_batch):
            self._watcher.check()
            yield self._on_device(batch)

    def _open(self, store: str, rank: int, world: int = 0) -> Batches:
        """A share of the batches; by default that of one replica among all."""
        options = self._job.options
        return Batches.open(
            store,
            seed=options.seed,
            seq_len=options.data.seq_len,
            global_batch=options.trainer.global_batch,
            micro_batch=options.trainer.micro_batch,
            rank=rank,
            world=world or replicas(options.parallel, self._comm.world),
        )

    def _adapter_task(self) -> AdapterTask:
        """What methods look at is the first batch, whole on every rank."""
        options, whole = self._job.options, self._open(self._job.store, 0, 1)
        return AdapterTask(options.adapter, options.model, options.seed, self._frozen, lambda: whole.microbatches(0))

    def _on_device(self, batch: Microbatch) -> Microbatch:
        tokens, targets, n_bytes = batch
        return tokens.to(self._job.device), targets.to(self._job.device), n_bytes

    def _evaluate(self, step: int) -> float:
        bits, windows = self._measure(step)
        if self._comm.rank == 0:
            self._note({"event": "evaluated", "step": step, "bits_per_byte": bits, "windows": windows})
        return bits

    def _measure(self, step: int) -> tuple[float, int]:
        """Collective. Bits per byte of held-out text, and in how many windows."""
        self._measure_stages(step)
        if self._task is not None and isinstance(self._engine, ZeroEngine):
            self._task.count(self._engine.model, step)
        bits = evaluate(self._engine, self._comm, self._validation(self._batches), step)
        return bits, self._job.options.trainer.eval_windows

    def _measure_seen(self, step: int) -> Mapping[str, object]:
        """Collective. Bits per byte of earlier tasks' held-out text with this task on top, and of this one's own text
        with the earlier tasks only, and with none."""
        assert isinstance(self._engine, ZeroEngine), "adapters have no pipeline"
        stores = {name: self._open(store, self._comm.rank) for name, store in self._job.seen.items()}
        row = {
            name: evaluate(self._engine, self._comm, self._validation(batches), step)
            for name, batches in stores.items()
        }
        without = []
        for first in (len(self._job.options.adapter.tasks), 0):
            with using_tasks(self._engine.model, first=first):
                without.append(evaluate(self._engine, self._comm, self._validation(self._batches), step))
        return {"row": row, "before_bits_per_byte": without[0], "base_bits_per_byte": without[1]}

    def _measure_stages(self, step: int) -> None:
        """Collective. How much each stage between the ends changes what passes it: little means that it can be missed,
        or made from others."""
        if self._boundaries is None or self._job.options.parallel.pipeline < 2:
            return
        own, stages = self._boundaries.redundancy(), self._job.options.parallel.pipeline
        mine = [0.0] * (2 * stages)
        if own is not None and self._comm.rank < stages:
            mine[self._comm.rank], mine[stages + self._comm.rank] = own, 1.0
        sums = self._comm.all_reduce_sum(mine)
        if self._comm.rank == 0:
            angles = {str(stage): sums[stage] for stage in range(stages) if sums[stages + stage]}
            self._note({"event": "stages_measured", "step": step, "angular_distance": angles})
