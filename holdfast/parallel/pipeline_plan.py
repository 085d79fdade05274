"""From options to a pipeline: which layers go where, and the order of work. Pure; the driver checks with it."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.errors import ConfigurationError
from holdfast.parallel import schedule as schedules
from holdfast.parallel.config import ParallelConfig, ScheduleKind
from holdfast.parallel.partition import LayerCosts, Partition, balanced, from_block_counts
from holdfast.parallel.schedule import Schedule
from holdfast.parallel.schedule_check import check, simulate

__all__ = ["PipelinePlan", "plan_pipeline", "replicas"]

_ZERO_STAGES = (0, 1)
"""Replicas have all of a stage's optimizer state each, or a share."""


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """One step of every process, and the layers of every stage."""

    schedule: Schedule
    """Proven to be free of deadlocks."""
    partition: Partition
    costs: LayerCosts

    @property
    def bubble(self) -> float:
        """Share of all processes' time in which they wait for each other, 0 .. 1, by the costs of the layers; a
        backward pass costs twice a forward pass."""
        forward = [
            sum(self.costs.blocks[number] for number in stage.blocks)
            + self.costs.embedding * stage.has_embedding
            + self.costs.head * stage.has_head
            for stage in self.partition.stages
        ]
        return simulate(self.schedule, forward, [2.0 * cost for cost in forward]).bubble


def replicas(config: ParallelConfig, world: int) -> int:
    """How many shares a global batch is divided into: ranks that see different samples."""
    return max(world // max(config.pipeline, 1), 1)


def plan_pipeline(config: ParallelConfig, costs: LayerCosts, *, world: int, microbatches: int) -> PipelinePlan:
    """``costs`` of the model's layers; ``microbatches`` of one replica and step.

    Raises: ConfigurationError with everything that does not fit together.
    """
    problems, processes = list(_problems(config, world)), config.pipeline
    try:
        schedule = _schedule(config, microbatches)
        if config.blocks:
            counts, n_layers = config.blocks, len(costs.blocks)
            partition = from_block_counts(counts, n_layers=n_layers, processes=processes, chunks=config.chunks)
        else:
            partition = balanced(costs, processes=processes, chunks=config.chunks)
    except ConfigurationError as error:
        raise ConfigurationError([*problems, *(f"parallel: {problem}" for problem in error.problems)]) from error
    if problems:
        raise ConfigurationError(problems)
    check(schedule)
    return PipelinePlan(schedule, partition, costs)


def _problems(config: ParallelConfig, world: int) -> list[str]:
    problems = []
    if world % config.pipeline:
        problems.append(
            f"parallel.pipeline={config.pipeline} must divide the number of ranks, {world}: each replica of the model "
            f"takes as many; try {world + -world % config.pipeline} ranks"
        )
    if config.zero_stage not in _ZERO_STAGES:
        problems.append(
            f"parallel.zero_stage={config.zero_stage} does not go with parallel.pipeline={config.pipeline}: gradients "
            "of all microbatches add up in place, so the replicas of a stage shard their optimizer state at most; use "
            "parallel.zero_stage=1"
        )
    return problems


def _schedule(config: ParallelConfig, microbatches: int) -> Schedule:
    if config.chunks > 1:
        if config.schedule is ScheduleKind.GPIPE:
            raise ConfigurationError("schedule=GPIPE with chunks > 1: only ONE_F_ONE_B is interleaved")
        return schedules.interleaved(config.pipeline, config.chunks, microbatches, swapped=config.swapped)
    build = schedules.gpipe if config.schedule is ScheduleKind.GPIPE else schedules.one_f_one_b
    return build(config.pipeline, microbatches, swapped=config.swapped)
