"""How much memory snapshots and frozen files take, that there is as much, and that a checkpoint of it can be written in
time. No torch unless there are adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from holdfast.configs.adapter_rules import method_problems
from holdfast.configs.host import Host
from holdfast.configs.layout import pipeline_plan, replicas_of, world
from holdfast.configs.protection import brick_bytes, fewer_nodes, parity_ratio, protection_problems
from holdfast.configs.schema import LaunchKind, RunConfig
from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.bricks import BrickFile
from holdfast.optim.config import check as check_optim
from holdfast.optim.config import moment_count
from holdfast.trainer.models import model_of

__all__ = ["bandwidth_problems", "keeper_limit_bytes", "memory_problems", "state_bytes"]

_GB = 10**9


def state_bytes(config: RunConfig) -> int:
    """Bytes of one snapshot of one rank, to about a percent: fp32 master weights and the optimizer's moments.

    Gradients and low-precision copies of the weights are made anew and never stored. Tensors that are too small for
    8-bit moments are not told apart. Source: arXiv 1910.02054, section 5; with 8 bits a code per element and moment,
    and an fp32 scale per block.
    """
    moment = 1 + 4 / config.optim.block_size if config.optim.name.is_8bit else 4
    moments = moment_count(config.optim) * moment
    shards = replicas_of(config) if config.parallel.zero_stage >= 1 else 1
    best = 4 if config.adapter.keep_best else 0
    return math.ceil(_parameters_of_process(config) * (4 + best + moments) / shards)


def _parameters_of_process(config: RunConfig) -> int:
    """That train, of the one that has most."""
    if config.adapter.method:
        from holdfast.trainer.adapting import trainable_elements

        return 0 if method_problems(config) else trainable_elements(config.adapter, config.model)
    try:
        plan = pipeline_plan(config) if config.parallel.pipeline > 1 else None
    except ConfigurationError:  # reported already
        plan = None
    model = model_of(config.model)
    return model.parameters if plan is None else model.largest_piece(plan)


def _has_no_size(config: RunConfig) -> bool:
    return bool(model_of(config.model).problems())


def keeper_limit_bytes(config: RunConfig, host: Host) -> int:
    """Memory that each keeper may use: what the user allows, else its share of half of what ``host`` has free."""
    if config.snapshot.memory_limit_gb > 0:
        return int(config.snapshot.memory_limit_gb * _GB)
    return host.free_bytes // 2 // (config.launch.nodes if _is_one_host(config, host) else 1)


def _is_one_host(config: RunConfig, host: Host) -> bool:
    return config.launch.kind is LaunchKind.PROCESS or not (config.launch.address or host.ray_address)


def memory_problems(config: RunConfig, host: Host, frozen: Callable[[RunConfig], Sequence[BrickFile]]) -> list[str]:
    """Refused here, snapshots cannot end a run hours later. On a cluster only the user's own limit is known."""
    if _has_no_size(config) or check_optim(config.optim) or world(config) < 1 or any(protection_problems(config)):
        return []  # reported already
    own, held = math.ceil(state_bytes(config) * _buffers(config)), brick_bytes(config, frozen(config))
    per_node = own * config.launch.workers_per_node + max(held)
    everywhere = own * world(config) + sum(held)
    limit_gb, is_one_host = config.snapshot.memory_limit_gb, _is_one_host(config, host)
    problems = []
    if limit_gb > 0 and per_node > keeper_limit_bytes(config, host):
        problems.append(
            f"snapshot.memory_limit_gb={limit_gb} must be at least {math.ceil(per_node / _GB * 100) / 100}: "
            f"{_need(config, max(held))} take {per_node:,} bytes per node"
        )
    allowed = host.free_bytes if limit_gb > 0 else host.free_bytes // 2
    if is_one_host and everywhere > allowed:
        share = "" if limit_gb > 0 else "half of "
        problems.append(
            f"snapshots need {everywhere:,} bytes of host memory ({_need(config, max(held))} on "
            f"launch.nodes={config.launch.nodes}), and {share}the {host.free_bytes:,} bytes that are free "
            f"{'are' if limit_gb > 0 else 'is'} not enough; {_way_out(config)}"
        )
    return problems


def bandwidth_problems(config: RunConfig) -> Iterator[str]:
    """A run that is asked to stop must be able to save itself."""
    mb_per_s, grace_s = config.snapshot.persist_mb_per_s, config.recovery.stop_grace_s
    if _has_no_size(config) or check_optim(config.optim) or world(config) < 1 or not 0 < mb_per_s < math.inf:
        return  # reported already, or without a bound
    needed_s = state_bytes(config) * config.launch.workers_per_node / (mb_per_s * 10**6)
    if needed_s > grace_s:
        yield (
            f"snapshot.persist_mb_per_s={mb_per_s} lets a checkpoint take {needed_s:.0f} s, and a run that is asked to "
            f"stop has recovery.stop_grace_s={grace_s}; raise one of them"
        )


def _buffers(config: RunConfig) -> float:
    """Memory for each rank, in buffers. Where the run may go on with fewer nodes there has to be room for the ranks of
    the next smaller world beside those before, what a lost node held included."""
    own, nodes = config.snapshot.buffers + parity_ratio(config), config.launch.nodes
    fewer = next(iter(fewer_nodes(config)), 0)
    if not fewer:
        return own
    growth = nodes / fewer if config.parallel.zero_stage >= 1 else 1.0
    return own * (1 + growth) + (nodes - fewer) / fewer


def _need(config: RunConfig, frozen_bytes: int) -> str:
    fewer = next(iter(fewer_nodes(config)), 0)
    twice = f"; and room to go on with {fewer} nodes (recovery.shrink_after_s)" if fewer else ""
    frozen = f"; and {frozen_bytes:,} bytes per node of frozen files (adapter.in_memory)" if frozen_bytes else ""
    return (
        f"snapshot.buffers={config.snapshot.buffers} of {state_bytes(config):,} bytes, and {parity_ratio(config):.3g} "
        f"more for parity={config.snapshot.parity}, for each of launch.workers_per_node="
        f"{config.launch.workers_per_node} ranks{twice}{frozen}"
    )


def _way_out(config: RunConfig) -> str:
    ways = ["choose a smaller model"]
    if config.parallel.zero_stage == 0 and world(config) > 1:
        ways.append("shard the state with parallel=zero2")
    if not config.optim.name.is_8bit and moment_count(config.optim):
        ways.append(f"keep 8-bit moments with optim={config.optim.name.value}8bit")
    if config.snapshot.buffers > 3:
        ways.append("lower snapshot.buffers to 3")
    if config.adapter.method and config.adapter.in_memory:
        ways.append("leave the frozen files to the storage alone with adapter.in_memory=false")
    if config.snapshot.memory_limit_gb == 0:
        ways.append("set snapshot.memory_limit_gb to use more than half")
    return ", ".join(ways[:-1]) + " or " + ways[-1] if len(ways) > 1 else ways[0]
