"""Curricula without runs: tasks on a random base, and the configuration of the runs that would have made them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from holdfast import adapters
from holdfast.adapters.store import read_sidecar
from holdfast.configs.schema import RunConfig
from holdfast.launch.adapt_model import training_windows
from holdfast.launch.curriculum import Curriculum, Learned, Record
from holdfast.trainer.config import AdapterConfig, DataConfig, DataSource, ModelConfig, TrainerConfig
from holdfast.trainer.export import export_weights
from holdfast.trainer.model import Decoder, initialise

__all__ = ["MODEL", "TARGETS", "config_of", "make_curriculum"]

MODEL = ModelConfig(d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=48, max_seq_len=24)
_SIZES = {key: value for key, value in asdict(MODEL).items() if key not in ("kind", "path", "init", "options")}
TARGETS = ["wq", "wo"]


def make_curriculum(
    root: Path, method: str, tasks: int = 2, texts: Mapping[str, str] | None = None, *, steps: int = 0, **options: Any
) -> Curriculum:
    """``tasks`` domains t0, t1, … of one task each, rank 2, with random tensors or after so many ``steps`` on their
    ``texts``, paths by domain."""
    base = Decoder(MODEL)
    initialise(base, 1)
    source = root / "base.safetensors"
    export_weights(dict(base.named_parameters()), source, metadata={})
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    curriculum = Curriculum(root / "project" / "school")
    curriculum.keep_base(source, digest)
    options = {"rank": 2, **options}
    adapters.inject(base, adapters.create_method(method, options), TARGETS)
    torch.manual_seed(0)
    learned = [_learned(base, curriculum, root, f"t{number}", texts or {}, steps) for number in range(tasks)]
    about = {"method": method, "options": options, "target_modules": TARGETS, "nf4": False}
    curriculum.write(Record(model=_SIZES, adapter=about, base=digest, base_bytes=1, learned=learned))
    return curriculum


def _learned(
    base: Decoder, curriculum: Curriculum, root: Path, task: str, texts: Mapping[str, str], steps: int
) -> Learned:
    adapters.start_task(base, task)
    if steps:
        plan = adapters.TaskPlan(steps=steps, optimizer=partial(torch.optim.AdamW, lr=0.02))
        batches = training_windows(_config(root, AdapterConfig()), texts[task], 4 * steps)
        adapters.train_task(base, batches, lambda model, batch: model(*batch), plan)
    with torch.no_grad():
        for parameter in adapters.trainable_parameters(base) if not steps else ():
            parameter.add_(torch.randn_like(parameter))
    adapters.finish_task(base)
    adapters.save_adapters(base, root / task, only=task)
    digest = read_sidecar(root / task).digest
    return Learned(
        task=task,
        domain=task,
        text=texts.get(task, ""),
        directory=curriculum.keep_task(root / task, task, digest),
        digest=digest,
        size_bytes=1,
        base_bits=8.0,
        before_bits=8.0,
        bits={task: 7.0},
    )


def config_of(root: Path, curriculum: Curriculum, **adapter: Any) -> RunConfig:
    """Of the runs that go on with it."""
    return _config(root, AdapterConfig(**{**curriculum.record().adapter, **adapter}))


def _config(root: Path, adapter: AdapterConfig) -> RunConfig:
    return RunConfig(
        root=str(root),
        trainer=TrainerConfig(global_batch=8, micro_batch=4),
        model=MODEL,
        data=DataConfig(source=DataSource.TEXT, seq_len=16, validation_share=0.2),
        adapter=adapter,
    )
