"""From which version a membership epoch starts. Pure: an inventory goes in, a reasoned decision comes out.

Sources, best first: the newest version that every rank holds in keeper memory, unless a durable checkpoint is
newer; the newest durable checkpoint; a fresh model, but only where no checkpoint was ever seen. Checkpoints
that exist and cannot be read end the run: starting over would bury them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from holdfast.fault_tolerance.messages import HeldVersion

__all__ = [
    "DISK",
    "DO_NOT_RESTART",
    "FRESH",
    "MEMORY",
    "NOTHING",
    "Decision",
    "View",
    "decide",
    "name_ranks",
    "newest_common",
]

MEMORY, DISK, FRESH, NOTHING = "keeper memory", "disk", "fresh", "nothing"
"""Words of :attr:`Decision.source`."""

DO_NOT_RESTART = 93
"""Exit code: starting the same run again would end the same way."""

Held = Mapping[int, Sequence[HeldVersion]]
"""Complete versions in keeper memory, by rank."""


@dataclass(frozen=True, slots=True)
class View:
    """What could be restored, as far as anybody knows."""

    world: int
    held: Held
    durable: tuple[int, ...] = ()
    """Steps of checkpoints believed good."""
    refused: Mapping[int, str] = field(default_factory=dict)
    """Steps of checkpoints that turned out bad when they were loaded, with the reason."""
    rejected: tuple[str, ...] = ()
    """Checkpoints that were found and cannot be used, each with its reason."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Where to start from, and why not from something better."""

    version: int
    """-1: a fresh model, or nothing at all."""
    source: str
    reason: str
    rejected: tuple[str, ...] = ()
    """Every candidate that would have cost fewer steps, with the reason against it."""
    exit_code: int | None = None
    """Set when the run must end instead."""
    writer_epoch: int | None = None
    """Membership epoch that wrote the chosen version in memory."""


def newest_common(held: Held, world: int) -> int | None:
    """The newest version that all ``world`` ranks hold complete, written in one epoch; None if there is none."""
    found = _common(held, world)
    return None if found is None else found[0]


def decide(view: View) -> Decision:
    """Choose the newest state that is exact on every rank."""
    memory = _common(view.held, view.world)
    disk = max((step for step in view.durable if step not in view.refused), default=None)
    if memory is not None and (disk is None or memory[0] >= disk):
        return _from_memory(view, *memory)
    if disk is not None:
        return _from_disk(view, disk, memory)
    if view.rejected or view.refused:
        return _give_up(view)
    return Decision(-1, FRESH, "no version in memory is complete and there is no checkpoint", _torn(view, above=-1))


def name_ranks(ranks: Sequence[int]) -> str:
    """``rank 3`` or ``ranks 0-2, 7``: runs of neighbours are folded."""
    spans: list[tuple[int, int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], rank)
        else:
            spans.append((rank, rank))
    text = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"


def _common(held: Held, world: int) -> tuple[int, int] | None:
    """Newest (version, epoch) in every rank's memory. One epoch, because ranks of different epochs may have
    computed a step from different parents."""
    keys = [{(h.version, h.epoch) for h in held.get(rank, ()) if h.world == world} for rank in range(world)]
    return max(set.intersection(*keys), default=None) if keys else None


def _from_memory(view: View, version: int, epoch: int) -> Decision:
    reason = f"version {version} is complete in the keepers' memory at every rank"
    against = _torn(view, above=version) + _refusals(view, above=version)
    return Decision(version, MEMORY, reason, against, writer_epoch=epoch)


def _from_disk(view: View, step: int, memory: tuple[int, int] | None) -> Decision:
    why = "no version in memory is complete" if memory is None else f"version {memory[0]} in memory is older"
    reason = f"the checkpoint of step {step} is the newest that can be read; {why}"
    return Decision(step, DISK, reason, _torn(view, above=step) + _refusals(view, above=step) + view.rejected)


def _give_up(view: View) -> Decision:
    against = _refusals(view, above=-1) + view.rejected
    reason = (
        f"{len(against)} checkpoint(s) exist but none can be used: {'; '.join(against)}. "
        "Starting from scratch would bury them, so the run ends: repair them, restore them from a copy, "
        "or start a new run with resume=never"
    )
    return Decision(-1, NOTHING, reason, _torn(view, above=-1) + against, exit_code=DO_NOT_RESTART)


def _refusals(view: View, *, above: int) -> tuple[str, ...]:
    newer = sorted((step for step in view.refused if step > above), reverse=True)
    return tuple(f"checkpoint of step {step}: {view.refused[step]}" for step in newer)


def _torn(view: View, *, above: int) -> tuple[str, ...]:
    """Why each version in memory newer than ``above`` is not used, newest first."""
    versions = {h.version for copies in view.held.values() for h in copies if h.version > above}
    return tuple(f"version {v} in memory: {_against(view, v)}" for v in sorted(versions, reverse=True))


def _against(view: View, version: int) -> str:
    copies = {r: [h for h in view.held.get(r, ()) if h.version == version] for r in range(view.world)}
    missing = [rank for rank, found in copies.items() if not found]
    if missing:
        return f"not complete at {name_ranks(missing)}"
    worlds = {h.world for found in copies.values() for h in found if h.world != view.world}
    if worlds:
        return f"written by {min(worlds)} ranks, this run has {view.world}"
    return "written in different epochs, so its parts may not belong together"
