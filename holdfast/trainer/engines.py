"""Which engine trains: ZeRO with all layers on every rank, or a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from holdfast import optim
from holdfast.fault_tolerance.config import RecoveryConfig, StageConfig
from holdfast.fault_tolerance.stage_policy import rate_factor
from holdfast.optim.config import OptimConfig
from holdfast.parallel.config import ParallelConfig
from holdfast.parallel.pipeline import Observer
from holdfast.parallel.pipeline_engine import PipelineEngine, PipelineOptions, Place
from holdfast.parallel.pipeline_plan import plan_pipeline, replicas
from holdfast.parallel.zero import ZeroEngine, ZeroOptions
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.models import model_of

__all__ = ["EngineOptions", "Work", "build_engine"]


class EngineOptions(Protocol):
    """The parts of a run's configuration that make an engine."""

    seed: int
    optim: OptimConfig
    parallel: ParallelConfig
    recovery: RecoveryConfig


@dataclass(frozen=True, slots=True)
class Work:
    """What a replica does in a step."""

    micro_batch: int
    microbatches: int
    seq_len: int


def build_engine(
    options: EngineOptions,
    config: ModelConfig,
    device: torch.device,
    work: Work,
    *,
    rank: int,
    world: int,
    observer: Observer | None = None,
    model: nn.Module | None = None,
    initial: bool = True,
) -> ZeroEngine | PipelineEngine:
    """Collective. Freshly initialised, or with ``model``, the only reference to it. ``observer`` is of a pipeline.

    Without ``initial`` all weights are going to be restored, and nobody reads those that the model would begin with.
    """
    if options.parallel.pipeline > 1:
        return _build_pipeline(
            options, config, device, work, rank=rank, world=world, observer=observer, initial=initial
        )
    if model is None:
        model = model_of(config).build(options.seed, initial=initial)
        model.to(device)
    return ZeroEngine(
        model,
        optim.parameter_groups(model, options.optim),
        lambda groups: optim.build_optimizer(options.optim, groups),
        optim,
        ZeroOptions(
            stage=options.parallel.zero_stage,
            precision=options.parallel.precision,
            micro_batch=work.micro_batch,
            accumulation=work.microbatches,
            grad_clip=options.optim.grad_clip,
            bucket_elements=options.parallel.bucket_elements,
            block_size=_block_size(options.optim),
        ),
    )


def _build_pipeline(
    options: EngineOptions,
    config: ModelConfig,
    device: torch.device,
    work: Work,
    *,
    rank: int,
    world: int,
    observer: Observer | None,
    initial: bool,
) -> PipelineEngine:
    parallel, model = options.parallel, model_of(config)
    if world == 1:  # a rehearsal
        parallel = replace(parallel, pipeline=1, chunks=1, blocks=[], swapped=False)
    plan = plan_pipeline(parallel, model.layer_costs(work.seq_len), world=world, microbatches=work.microbatches)
    place, layout = Place(parallel.pipeline, replicas(parallel, world), rank), plan.schedule.layout
    piece, stages = model.piece(plan.partition, layout, place.process, options.seed, initial=initial)
    piece.to(device)
    return PipelineEngine(
        piece,
        stages,
        plan.schedule,
        place,
        optim.parameter_groups(piece, options.optim),
        lambda groups: optim.build_optimizer(options.optim, groups),
        optim,
        PipelineOptions(
            precision=parallel.precision,
            shape=(work.micro_batch, work.seq_len, model.d_model),
            grad_clip=options.optim.grad_clip,
            block_size=_block_size(options.optim),
            is_sharded=parallel.zero_stage > 0,
            rate_factor=_rate_factor(options.recovery.stage),
        ),
        model.layouts(plan.partition, layout),
        observer,
    )


def _rate_factor(stage: StageConfig) -> Callable[[int, int], float]:
    def factor(times: int, steps_since: int) -> float:
        decay = stage.rate_decay_steps
        return rate_factor(stage.rate_factor, stage.rate_mode, times, steps_since=steps_since, decay_steps=decay)

    return factor


def _block_size(config: OptimConfig) -> int:
    return config.block_size if config.name.is_8bit else 1
