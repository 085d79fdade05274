"""The same for Ray Train, as its guide to fault tolerance has it: ``TorchTrainer`` with ``FailureConfig``, a checkpoint
reported after every step, ``get_checkpoint`` at every start. Needs pandas besides holdfast's own dependencies.

    python ddp_ray_train.py TASK.json

Ray has CPUs for two groups of ranks, so that a new one never waits for those of the old.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import ray
import ray.train
import torch
from job import RANKS, Task, Training
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def train_loop(config: dict[str, str]) -> None:
    """Runs in each worker; Ray has made the process group."""
    task, rank = Task.read(config["task"]), ray.train.get_context().get_world_rank()
    training = Training(task, rank)
    newest = ray.train.get_checkpoint()
    if newest is not None:
        with newest.as_directory() as folder:
            training.load(torch.load(Path(folder) / "state.pt", weights_only=True))
    while training.step < task.steps:
        training.train_step()
        _report(training, rank)


def _report(training: Training, rank: int) -> None:
    """Collective."""
    with tempfile.TemporaryDirectory() as folder:
        if rank == 0:
            torch.save(training.state(), Path(folder) / "state.pt")
        checkpoint = Checkpoint.from_directory(folder) if rank == 0 else None
        ray.train.report({"step": training.step}, checkpoint=checkpoint)


def main() -> None:
    task = Task.read(sys.argv[1])
    ray.init("local", num_cpus=2 * RANKS, include_dashboard=False, log_to_driver=False)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"task": sys.argv[1]},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=RANKS),
        run_config=RunConfig(
            name="run",
            storage_path=task.folder,
            failure_config=FailureConfig(max_failures=len(task.kills)),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        trainer.fit()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
