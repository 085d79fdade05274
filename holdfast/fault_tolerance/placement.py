"""Which nodes protect each other: protection groups across failure domains. Pure and deterministic.

Nodes are dealt to the groups in turn, zone after zone. The groups' sizes then differ by one at most, and so do each
zone's shares of them, which makes the largest share ``ceil(nodes of the zone / groups)``: as small as any division
into as many groups can make it, and for every zone at once. So if the loss of a zone can be survived, it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.stripes import MAX_MEMBERS

__all__ = ["DEFAULT_SIZE", "Grouping", "make_groups"]

DEFAULT_SIZE = 8
"""Most members of a group whose size nobody has chosen: with one parity block, a seventh more memory."""
_LARGEST = MAX_MEMBERS // 2
"""What may be asked for: groups that come out larger, because the nodes do not divide, still have a code."""


@dataclass(frozen=True, slots=True)
class Grouping:
    """Every node belongs to one group."""

    groups: tuple[tuple[int, ...], ...]
    """Nodes of each group, ascending; a node's place in it is its member number."""
    parity: int
    """Losses that every group survives: as many as were asked for, or as there are nodes for."""
    warnings: tuple[str, ...]
    """What the user should know about it, one sentence each."""


def make_groups(zones: Sequence[str], size: int, parity: int) -> Grouping:
    """Divide nodes 0 .. N-1 into groups of about ``size``, members of one group in different zones as far as possible.

    ``zones``: the failure domain of each node (a rack, a power supply); "" is unknown and taken for one of its own.
    ``size``: members of a group; 0 for groups of up to 8, or of more where ``parity`` needs them.
    ``parity``: lost members that a group has to survive; 0 for no protection. A group has more members than that.
    Raises: ConfigurationError.
    """
    nodes = len(zones)
    problems = _problems(nodes, size, parity)
    if problems:
        raise ConfigurationError(problems)
    possible = min(parity, nodes - 1)
    count = _group_count(nodes, size, possible)
    groups = _deal(zones, count)
    warnings = _of_too_few(nodes, parity) + _of_sizes(groups, size)
    if possible:
        warnings += _of_zones(zones, groups, possible)
    return Grouping(groups, possible, tuple(warnings))


def _problems(nodes: int, size: int, parity: int) -> list[str]:
    problems = []
    if not nodes:
        problems.append("there are no nodes to divide into protection groups; give each node a zone, '' if unknown")
    if not 0 <= parity < _LARGEST:
        problems.append(f"parity={parity} must be from 0 to {_LARGEST - 1}")
    if not 0 <= size <= _LARGEST:
        problems.append(f"group size={size} must be from 1 to {_LARGEST}, or 0 to have it chosen")
    elif 0 < size <= parity:
        problems.append(f"group size={size} must be more than parity={parity}; raise the one or lower the other")
    return problems


def _group_count(nodes: int, size: int, parity: int) -> int:
    """As close to ``size`` as balanced groups come, rather larger than smaller, and never without enough members."""
    most = max(nodes // (parity + 1), 1)
    if not size:
        return min(-(-nodes // DEFAULT_SIZE), most)
    fewer = max(nodes // size, 1)
    is_closer = abs(nodes / (fewer + 1) - size) < abs(nodes / fewer - size)
    return min(fewer + is_closer, most)


def _deal(zones: Sequence[str], count: int) -> tuple[tuple[int, ...], ...]:
    in_turn = sorted(range(len(zones)), key=lambda node: (zones[node], node))
    return tuple(tuple(sorted(in_turn[first::count])) for first in range(count))


def _of_too_few(nodes: int, parity: int) -> list[str]:
    if parity < nodes:
        return []
    if nodes == 1:
        return ["a single node has no other to hold its parity: if it is lost, only durable checkpoints are left"]
    used = f"{nodes} nodes survive the loss of {nodes - 1} at most, so parity={nodes - 1} is used instead of {parity}"
    return [f"{used}; for that, give the run {parity + 1} nodes"]


def _of_sizes(groups: Sequence[Sequence[int]], size: int) -> list[str]:
    sizes = Counter(map(len, groups))
    nodes = sum(map(len, groups))
    if not size or nodes == 1 or set(sizes) == {size}:
        return []
    made = " and ".join(f"{number} of {members}" for members, number in sorted(sizes.items(), reverse=True))
    return [f"{nodes} nodes do not divide into groups of {size}; there will be {made}"]


def _of_zones(zones: Sequence[str], groups: Sequence[Sequence[int]], parity: int) -> list[str]:
    warnings = [
        _of_zone(zone, zones.count(zone), held, parity, _safe_size(zones, parity))
        for zone in sorted(set(zones) - {""})
        if (held := _too_many(zones, groups, zone, parity))
    ]
    unknown = [node for node, zone in enumerate(zones) if not zone]
    if 0 < len(unknown) < len(zones):
        names = ", ".join(map(str, unknown))
        warnings.append(f"node(s) {names} have no zone: what takes several of them at once cannot be foreseen")
    return warnings


def _too_many(zones: Sequence[str], groups: Sequence[Sequence[int]], zone: str, parity: int) -> dict[int, int]:
    """Members in the zone, of every group that its loss destroys."""
    held = {number: sum(zones[node] == zone for node in group) for number, group in enumerate(groups)}
    return {number: members for number, members in held.items() if members > parity}


def _safe_size(zones: Sequence[str], parity: int) -> int:
    """The largest group size with which the loss of any one zone is survived; 0 if there is none."""
    nodes, largest = len(zones), max(Counter(zone for zone in zones if zone).values(), default=0)
    sizes = range(min(nodes, _LARGEST), parity, -1)
    return next((size for size in sizes if _group_count(nodes, size, parity) * parity >= largest), 0)


def _of_zone(zone: str, nodes: int, held: dict[int, int], parity: int, safe_size: int) -> str:
    numbers = ", ".join(map(str, held))
    way_out = (
        f"groups of {safe_size} would survive it, at the price of more memory"
        if safe_size
        else "spread the nodes over more zones or raise the parity"
    )
    return (
        f"losing zone {zone!r} ({nodes} nodes) destroys protection group(s) {numbers}: it has {max(held.values())} "
        f"members of one, and parity={parity} restores {parity}; {way_out}"
    )
