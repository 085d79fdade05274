"""Plain DistributedDataParallel for ``torchrun``, fault tolerant the way torch's own tutorial has it: rank 0 saves,
each start loads what is there. Saves after every step, so that none is lost, and renames, so that no file is torn.

    torchrun --standalone --nproc-per-node 3 --max-restarts 3 --monitor-interval 0.1 ddp_torchrun.py TASK.json
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from job import Task, Training


def main() -> None:
    task = Task.read(sys.argv[1])
    dist.init_process_group("gloo")
    rank, path = dist.get_rank(), Path(task.folder) / "checkpoint.pt"
    training = Training(task, rank)
    if path.exists():
        training.load(torch.load(path, weights_only=True))
    while training.step < task.steps:
        training.train_step()
        if rank == 0:
            _save(training, path)
    dist.destroy_process_group()


def _save(training: Training, path: Path) -> None:
    unfinished = path.with_suffix(".tmp")
    torch.save(training.state(), unfinished)
    unfinished.replace(path)


if __name__ == "__main__":
    main()
