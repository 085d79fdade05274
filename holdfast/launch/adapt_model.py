"""A curriculum's model in this process, and the text that its domains were learned from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from holdfast.adapters import create_method
from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError
from holdfast.launch.adapt_choices import Choices
from holdfast.launch.curriculum import Curriculum, Record
from holdfast.trainer import corpus
from holdfast.trainer.adapting import adapted_base
from holdfast.trainer.config import AdapterConfig, ModelConfig
from holdfast.trainer.data import Batches

__all__ = ["Windows", "adapter_of", "choices_of", "held_out_windows", "load_model", "training_windows"]

Windows = Iterator[tuple[Tensor, Tensor]]
"""Tokens and targets, int64 [B, T], of up to ``trainer.micro_batch`` windows at a time."""


def adapter_of(curriculum: Curriculum, record: Record) -> AdapterConfig:
    """What a run was told of the base and the tasks that are kept."""
    return AdapterConfig(
        **record.adapter,
        base=str(curriculum.brick(record.base)),
        tasks=[str(curriculum.path / task.directory) for task in record.kept],
    )


def choices_of(record: Record) -> Choices:
    """What may act of the tasks that are kept."""
    method = create_method(record.adapter["method"], record.adapter["options"])
    return Choices(method, {task.task: task.domain for task in record.kept})


def load_model(curriculum: Curriculum, record: Record) -> nn.Module:
    """The base with all kept tasks in evaluation mode, on this machine's GPU if it has one.

    Raises: ConfigurationError and ManifestMismatch for files that are not there, damaged, or of something else.
    """
    model = adapted_base(adapter_of(curriculum, record), ModelConfig(**record.model), record.base)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def training_windows(config: RunConfig, path: str, count: int) -> Windows:
    """The first ``count`` that a run on this text would train on. Raises: ConfigurationError, DataError."""
    batches, left, step = _batches(config, path), count, 0
    while left > 0:
        for tokens, targets, _ in batches.microbatches(step):
            if left > 0:
                yield tokens[:left], targets[:left]
                left -= len(tokens)
        step += 1


def held_out_windows(config: RunConfig, path: str, count: int) -> Windows:
    """As many of the held-out text, or as there are. Raises: ConfigurationError, DataError."""
    batches = _batches(config, path).validation(count, config.trainer.micro_batch)
    return ((tokens, targets) for tokens, targets, _ in batches)


def _batches(config: RunConfig, path: str) -> Batches:
    if not Path(path).exists():
        raise ConfigurationError(f"{path}, from which a domain was learned, is not there any more; put it back")
    cache = Path(config.data.cache or Path(config.root, "cache"))
    store = corpus.prepare(replace(config.data, path=path), cache)
    trainer = config.trainer
    return Batches(
        store,
        seed=config.seed,
        seq_len=config.data.seq_len,
        global_batch=trainer.global_batch,
        micro_batch=trainer.micro_batch,
        rank=0,
        world=1,
    )
