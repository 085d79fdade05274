"""Which nodes a configuration lets protect each other, and what that takes. Pure; no torch, no Hydra."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.bricks import BrickFile, deal_bricks, groups_of, held_bytes
from holdfast.fault_tolerance.lanes import make_lanes, parity_buffers
from holdfast.fault_tolerance.placement import Grouping, make_groups
from holdfast.parallel.pipeline_plan import replicas

__all__ = ["brick_bytes", "fewer_nodes", "parity_ratio", "protection_groups", "protection_problems", "zones_of"]


def zones_of(config: RunConfig) -> list[str]:
    """Failure domain of each node as far as the configuration tells; "" is unknown."""
    return list(config.launch.zones) or [""] * config.launch.nodes


def protection_groups(config: RunConfig, zones: Sequence[str]) -> Grouping:
    """Which nodes protect each other. Raises: ConfigurationError."""
    return make_groups(zones, config.snapshot.group_size, config.snapshot.parity)


def brick_bytes(config: RunConfig, files: Sequence[BrickFile]) -> list[int]:
    """What each node's keeper holds of frozen files."""
    grouping = protection_groups(config, zones_of(config))
    bricks = deal_bricks(files, groups_of(make_lanes(grouping.groups, 1, grouping.parity), 1))
    return [held_bytes(bricks, node) for node in range(config.launch.nodes)]


def parity_ratio(config: RunConfig) -> float:
    """Memory for parity of each rank, in buffers of a rank; the most that any protection group needs, with as many
    nodes as there may be."""
    return max(_ratio_of(config, nodes) for nodes in (config.launch.nodes, *fewer_nodes(config)))


def fewer_nodes(config: RunConfig) -> list[int]:
    """With how many nodes less than all the run may go on, the most first."""
    recovery, trainer, launch = config.recovery, config.trainer, config.launch
    if not recovery.shrink_after_s or trainer.micro_batch < 1:
        return []
    shares = trainer.global_batch // trainer.micro_batch
    counts = range(launch.nodes - 1, max(recovery.min_nodes, 1) - 1, -1)
    return [nodes for nodes in counts if _divides(config, shares, nodes * launch.workers_per_node)]


def _divides(config: RunConfig, shares: int, ranks: int) -> bool:
    return ranks % config.parallel.pipeline == 0 and shares % replicas(config.parallel, ranks) == 0


def _ratio_of(config: RunConfig, nodes: int) -> float:
    grouping = protection_groups(config, zones_of(config)[:nodes])
    return max(parity_buffers(len(group), min(grouping.parity, len(group) - 1)) for group in grouping.groups)


def protection_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with groups, parity and zones."""
    launch = config.launch
    if launch.zones and len(launch.zones) != launch.nodes:
        yield f"launch.zones={launch.zones} must name one zone for each of launch.nodes={launch.nodes}, or none"
    elif launch.nodes >= 1:
        try:
            protection_groups(config, zones_of(config))
        except ConfigurationError as error:
            yield from (f"snapshot: {problem}" for problem in error.problems)
