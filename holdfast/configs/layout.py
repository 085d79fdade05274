"""How the ranks of a configuration are laid out, and what batch, pipeline and repair must obey. Pure; no torch."""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.stage_policy import MomentRepair, Repair, StageFacts
from holdfast.parallel.config import ParallelConfig
from holdfast.parallel.pipeline_plan import PipelinePlan, plan_pipeline, replicas
from holdfast.trainer.config import ModelKind
from holdfast.trainer.models import model_of
from holdfast.types import Precision

__all__ = [
    "batch_problems",
    "pipeline_plan",
    "pipeline_problems",
    "replicas_every",
    "replicas_of",
    "stage_facts",
    "stage_repair_problems",
    "world",
]


def world(config: RunConfig) -> int:
    return config.launch.nodes * config.launch.workers_per_node


def replicas_of(config: RunConfig) -> int:
    """Ranks that see different samples; 0 for none."""
    return replicas(config.parallel, world(config)) if world(config) > 0 else 0


def batch_problems(config: RunConfig) -> Iterator[str]:
    batch, micro, count = config.trainer.global_batch, config.trainer.micro_batch, replicas_of(config)
    if min(batch, micro, count) < 1:
        return  # reported already
    who = "ranks" if config.parallel.pipeline <= 1 else "replicas of the pipeline"
    unit = micro * count
    if batch % unit:
        near = [str(near) for near in (batch - batch % unit, batch - batch % unit + unit) if near]
        advice = f"try trainer.global_batch={' or '.join(near)}"
        if batch % count == 0:
            fitting = max(size for size in range(1, micro + 1) if batch // count % size == 0)
            advice += f", or trainer.micro_batch={fitting}"
        else:
            advice += f"; a run that is continued keeps its batch: give it {_fitting_worlds(batch, count)} {who}"
        yield (
            f"trainer.global_batch={batch} must be a multiple of trainer.micro_batch x {who} = "
            f"{micro} x {count} = {unit}; {advice}"
        )
    if config.trainer.eval_windows < count:
        yield (
            f"trainer.eval_windows={config.trainer.eval_windows} must be at least the number of {who}, {count}: "
            f"each evaluates equally many; try trainer.eval_windows={4 * count}"
        )


def _fitting_worlds(batch: int, world: int) -> str:
    """The nearest numbers of ranks that divide the batch, below and above."""
    below = max(n for n in range(1, world + 1) if batch % n == 0)
    above = next((n for n in range(world, batch + 1) if batch % n == 0), below)
    return str(below) if above == below else f"{below} or {above}"


def pipeline_problems(config: RunConfig) -> Iterator[str]:
    parallel, trainer = config.parallel, config.trainer
    if parallel.pipeline == 1:
        is_set = {"chunks": parallel.chunks > 1, "blocks": bool(parallel.blocks), "swapped": parallel.swapped}
        for key in (key for key, is_there in is_set.items() if is_there):
            value = getattr(parallel, key)
            yield f"parallel.{key}={value} is of a pipeline, and there is none; set parallel.pipeline too"
    if parallel.pipeline < 2 or model_of(config.model).problems():
        return  # there is none, or its parts are reported already
    if min(parallel.chunks, world(config), trainer.micro_batch) < 1:
        return
    if problems := model_of(config.model).pipeline_problems():
        yield from problems
        return
    try:
        pipeline_plan(config)
    except ConfigurationError as error:
        yield from error.problems


def stage_repair_problems(config: RunConfig) -> Iterator[str]:
    """A stage is made of others only where it is alike, alone with its layers, and has the end that it needs."""
    stage, parallel = config.recovery.stage, config.parallel
    name = f"recovery.stage.repair={stage.repair.name}"
    if stage.repair is Repair.EXACT:
        return
    if config.model.kind is not ModelKind.DECODER:
        yield f"{name} makes stages of the built-in decoder, and this is model={config.model.kind.value}; use EXACT"
    if parallel.pipeline < 2:
        yield f"{name} is of a pipeline, and there is none; set parallel.pipeline, or EXACT"
    elif parallel.chunks > 1 or replicas_of(config) > 1:
        yield (
            f"{name} needs one stage per rank; with parallel.chunks={parallel.chunks} and "
            f"{replicas_of(config)} replicas a rank holds several, or a part of one; use snapshot.parity, or, with "
            "replicas, parallel.zero_stage=0, where each of them can be copied exactly"
        )
    elif stage.repair is Repair.CHECKFREE_PLUS and not parallel.swapped:
        yield f"{name} copies the ends from what swapped microbatches have trained; set parallel.swapped=true"
    if stage.moments is MomentRepair.AVERAGED and config.optim.name.is_8bit:
        yield (
            f"recovery.stage.moments=AVERAGED with optim.name={config.optim.name.name}: codes of 8 bits have no "
            "average; use RESET, or an optimizer of 32 bits"
        )
    if stage.moments is MomentRepair.EXACT:
        yield "recovery.stage.moments=EXACT: nobody has them any more; use RESET or AVERAGED"
    if stage.repair not in (Repair.RANDOM, Repair.IDENTITY):
        yield from _unlike_stages(config, name)
    if stage.heal_steps:
        yield from _short_logs(config)


def _short_logs(config: RunConfig) -> Iterator[str]:
    """Healing needs one pair to learn from and one to judge by."""
    size = 2 if config.parallel.precision is Precision.BF16 else 4
    entry = config.trainer.micro_batch * config.data.seq_len * model_of(config.model).d_model * size
    if config.recovery.stage.log_mb * 1e6 < 2 * entry:
        yield (
            f"recovery.stage.log_mb={config.recovery.stage.log_mb:g} holds less than two microbatches' hidden states "
            f"of {entry:,} bytes each; give it at least {2 * entry / 1e6:.3g}, or set recovery.stage.heal_steps=0"
        )


def _unlike_stages(config: RunConfig, name: str) -> Iterator[str]:
    if list(pipeline_problems(config)) or config.parallel.pipeline < 2:
        return  # reported already
    counts = pipeline_plan(config).partition.block_counts
    if len(set(counts)) > 1:
        yield (
            f"{name} makes a stage of its neighbours, which have other numbers of blocks: {list(counts)}; set "
            "parallel.blocks to equal numbers, or choose n_layers so that parallel.pipeline divides it"
        )


def stage_facts(config: RunConfig) -> StageFacts | None:
    """Of the pipeline, if its lost stages may be rebuilt from others."""
    wish = config.recovery.stage.repair
    if wish is Repair.EXACT:
        return None
    return StageFacts(pipeline_plan(config).partition.block_counts, wish, config.parallel.swapped)


def replicas_every(parallel: ParallelConfig) -> int:
    """How far apart ranks are that hold the same state; 0 if each holds another part of it."""
    return parallel.pipeline if parallel.zero_stage == 0 else 0


def pipeline_plan(config: RunConfig) -> PipelinePlan:
    """Of a configuration that has a pipeline. Raises: ConfigurationError."""
    microbatches = config.trainer.global_batch // (config.trainer.micro_batch * replicas_of(config))
    costs = model_of(config.model).layer_costs(config.data.seq_len)
    return plan_pipeline(config.parallel, costs, world=world(config), microbatches=microbatches)
