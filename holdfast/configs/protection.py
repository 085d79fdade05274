"""Which nodes a configuration lets protect each other, and what that takes. Pure; no torch, no Hydra."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.lanes import parity_buffers
from holdfast.fault_tolerance.placement import Grouping, make_groups

__all__ = ["parity_ratio", "protection_groups", "protection_problems", "zones_of"]


def zones_of(config: RunConfig) -> list[str]:
    """Failure domain of each node as far as the configuration tells; "" is unknown."""
    return list(config.launch.zones) or [""] * config.launch.nodes


def protection_groups(config: RunConfig, zones: Sequence[str]) -> Grouping:
    """Which nodes protect each other. Raises: ConfigurationError."""
    return make_groups(zones, config.snapshot.group_size, config.snapshot.parity)


def parity_ratio(config: RunConfig) -> float:
    """Memory for parity of each rank, in buffers of a rank; the most that any protection group needs."""
    grouping = protection_groups(config, zones_of(config))
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
