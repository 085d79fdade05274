"""From which version a membership epoch starts. Pure: an inventory goes in, a reasoned decision comes out.

The newest state wins. Of equally new ones the best source: the live state, where every rank still had it when it left
and has brought it into memory; the memory of all ranks' own keepers; parity, where some have lost theirs; what the
ranks of another roster hold, or parity of theirs; a durable checkpoint. Where neither memory nor parity is complete in
any version, replicas are a source too, ranks that hold the same state: all of it but the random numbers, which begin
anew. A fresh model is a source only where no checkpoint was ever seen: checkpoints that exist and cannot be read end
the run, as starting over would bury them.

A run may allow one source that is not exact: when no memory is, lost stages of a pipeline are rebuilt from others of
the newest version that these hold, rather than going back to an older checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from holdfast.fault_tolerance.lanes import Recorded, Roster, lost_beyond_repair
from holdfast.fault_tolerance.messages import HeldVersion
from holdfast.fault_tolerance.stage_policy import RepairPlan, StageFacts, StageRebuild, exact_copy

__all__ = [
    "DISK",
    "DO_NOT_RESTART",
    "FRESH",
    "LIVE",
    "MEMORY",
    "NEIGHBOURS",
    "NOTHING",
    "PARITY",
    "REPLICAS",
    "Decision",
    "View",
    "decide",
    "name_ranks",
    "newest_common",
]

LIVE, REPLICAS, NEIGHBOURS = "live state", "replicas", "neighbours"
MEMORY, PARITY, DISK, FRESH, NOTHING = "keeper memory", "parity", "disk", "fresh", "nothing"
"""Words of :attr:`Decision.source`."""

DO_NOT_RESTART = 93
"""Exit code: starting the same run again would end the same way."""

Held = Mapping[int, Sequence[HeldVersion]]
"""Complete versions in keeper memory, by rank."""


@dataclass(frozen=True, slots=True)
class View:
    """What could be restored, as far as anybody knows."""

    roster: Roster
    """The membership that is to go on."""
    held: Held
    live: Mapping[int, int] = field(default_factory=dict)
    """Version that a rank's state was when it left the last epoch, which memory holds by now."""
    recorded: tuple[Recorded, ...] = ()
    """Versions that the keepers have committed together."""
    former: tuple[Recorded, ...] = ()
    """Versions of other rosters."""
    rosters: Mapping[int, Roster] = field(default_factory=dict)
    """Those that there have been, by number."""
    spoilt: Mapping[tuple[int, int], str] = field(default_factory=dict)
    """Version and epoch of records from which a rank could not be rebuilt, with the reason."""
    durable: tuple[int, ...] = ()
    """Steps of checkpoints believed good."""
    refused: Mapping[int, str] = field(default_factory=dict)
    """Steps of checkpoints that turned out bad when they were loaded, with the reason."""
    rejected: tuple[str, ...] = ()
    """Checkpoints that were found and cannot be used, each with its reason."""
    stages: StageFacts | None = None
    """Of a pipeline whose lost stages may be rebuilt from others."""
    replicas_every: int = 0
    """Ranks that are so far apart hold the same state; 0 if none do."""

    @property
    def world(self) -> int:
        return self.roster.world


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
    recorded: Recorded | None = None
    """What is left of the version that has to be rebuilt from parity."""
    former: Recorded | None = None
    """What is left of the version that the ranks of another roster hold, and every rank now reads its part of."""

    rebuild: StageRebuild | None = None
    """The ranks whose stages are copied or made from others, and the version that these hold."""

    @property
    def incomplete(self) -> Recorded | None:
        """What has to be rebuilt before anybody can start."""
        found = self.recorded or self.former
        return found if found is not None and found.absent else None


def newest_common(held: Held, world: int) -> int | None:
    """The newest version that all ``world`` ranks hold complete, written in one epoch; None if there is none."""
    found = _common(held, world)
    return None if found is None else found[0]


def decide(view: View) -> Decision:
    """Choose the newest state that is exact on every rank."""
    memory, parity, former = _common(view.held, view.world), _restorable(view), _readable(view)
    copies = _copied(view) if memory is None and parity is None else None
    disk = max((step for step in view.durable if step not in view.refused), default=None)
    found = [one.version for one in (parity, copies, former) if one is not None]
    known = [*found, *(() if memory is None else memory[:1]), *(() if disk is None else (disk,))]
    newest = max(known, default=None)
    if not found and memory is None and (others := _from_others(view, disk)) is not None:
        return others
    if newest is None:
        return _give_up(view) if view.rejected or view.refused else _afresh(view)
    if memory is not None and memory[0] == newest:
        return _from_memory(view, *memory)
    if parity is not None and parity.version == newest:
        return _from_parity(view, parity)
    if copies is not None and copies.version == newest:
        return _from_replicas(view, copies)
    if former is not None and former.version == newest:
        return _from_former(view, former)
    return _from_disk(view, newest, memory)


def _copied(view: View) -> Recorded | None:
    """The newest version that each rank or a replica of it holds, if somebody has to be given it."""
    if not view.replicas_every:
        return None
    for version, epoch in sorted(_keys(view), reverse=True):
        holders = _holders(view, version, epoch)
        kinds = {rank % view.replicas_every for rank in holders}
        if len(kinds) == min(view.replicas_every, view.world) and len(holders) < view.world:
            return Recorded(version, epoch, roster=view.roster.number)
    return None


def _from_replicas(view: View, copies: Recorded) -> Decision:
    version, every = copies.version, view.replicas_every
    holders = _holders(view, version, copies.epoch)
    lost = [rank for rank in range(view.world) if rank not in holders]
    sources = {rank: min(h for h in holders if h % every == rank % every) for rank in lost}
    repairs = tuple(exact_copy(rank, source) for rank, source in sources.items())
    reason = (
        f"version {version} is complete but for {name_ranks(lost)}, whose state is that of "
        f"{name_ranks([*set(sources.values())])}; its random numbers begin anew"
    )
    against = _torn(view, above=version) + _unrestorable(view, above=version) + _refusals(view, above=version)
    return Decision(
        version, REPLICAS, reason, against, writer_epoch=copies.epoch, rebuild=StageRebuild(copies, repairs)
    )


def _holders(view: View, version: int, epoch: int) -> set[int]:
    """Ranks that hold it."""
    return {r for r, copies in view.held.items() if any((h.version, h.epoch) == (version, epoch) for h in copies)}


def _from_others(view: View, disk: int | None) -> Decision | None:
    """The newest version of whose lost stages the others are enough, if no checkpoint is as new."""
    for version, epoch in sorted(_keys(view), reverse=True):
        lost, plan = _stage_plan(view, version, epoch)
        if version > (-1 if disk is None else disk) and lost and plan.is_complete:
            what = "; ".join(repair.reason for repair in plan.repairs)
            reason = f"version {version} is complete but for {name_ranks(lost)}, which no memory holds: {what}"
            against = _torn(view, above=version) + _unrestorable(view, above=-1) + _refusals(view, above=version)
            rebuild = StageRebuild(Recorded(version, epoch, roster=view.roster.number), plan.repairs)
            return Decision(version, NEIGHBOURS, reason, against, writer_epoch=epoch, rebuild=rebuild)
    return None


def _keys(view: View) -> set[tuple[int, int]]:
    """Versions that some rank holds."""
    held = {(h.version, h.epoch) for copies in view.held.values() for h in copies if h.world == view.world}
    return held - view.spoilt.keys()


def _stage_plan(view: View, version: int, epoch: int) -> tuple[list[int], RepairPlan]:
    """Ranks without the version, and what is to become of their stages."""
    holders = _holders(view, version, epoch)
    lost = [rank for rank in range(view.world) if rank not in holders]
    if view.stages is None or len(view.stages.layers) != view.world:
        return [], RepairPlan((), ())
    return lost, view.stages.plan(lost)


def _against_others(view: View, *, above: int) -> tuple[str, ...]:
    """Why the newest version that some ranks hold cannot be completed from them."""
    newest = max(_keys(view), default=(-1, -1))
    if newest[0] <= above:
        return ()
    _, plan = _stage_plan(view, *newest)
    return tuple(f"version {newest[0]} from {NEIGHBOURS}: {refusal.reason}" for refusal in plan.refusals)


def _restorable(view: View) -> Recorded | None:
    """The newest recorded version that parity makes whole."""
    good = (r for r in view.recorded if not _against_parity(view, r))
    return max(good, key=lambda recorded: (recorded.version, recorded.epoch), default=None)


def _readable(view: View) -> Recorded | None:
    """The newest version of another roster that is in memory, or can be made whole there."""
    good = (r for r in view.former if not _against_former(view, r))
    return max(good, key=lambda former: (former.version, former.epoch), default=None)


def _against_former(view: View, former: Recorded) -> str:
    if (former.version, former.epoch) in view.spoilt:
        return view.spoilt[former.version, former.epoch]
    return lost_beyond_repair(former, view.rosters[former.roster].lanes)


def _against_parity(view: View, recorded: Recorded) -> str:
    if (recorded.version, recorded.epoch) in view.spoilt:
        return view.spoilt[recorded.version, recorded.epoch]
    if not recorded.absent:
        return "no rank has lost it"
    return lost_beyond_repair(recorded, view.roster.lanes)


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
    against = _torn(view, above=version) + _refusals(view, above=version)
    if all(view.live.get(rank) == version for rank in range(view.world)):
        reason = f"version {version} is what every rank still had when it left; the step after it is made again"
        return Decision(version, LIVE, reason, against, writer_epoch=epoch)
    reason = f"version {version} is complete in the keepers' memory at every rank"
    return Decision(version, MEMORY, reason, against + _against_live(view, version), writer_epoch=epoch)


def _from_parity(view: View, recorded: Recorded) -> Decision:
    lost = name_ranks(recorded.absent)
    reason = f"version {recorded.version} is complete but for {lost}, which parity restores"
    against = _torn(view, above=recorded.version) + _refusals(view, above=recorded.version)
    against += _against_live(view, recorded.version)
    return Decision(recorded.version, PARITY, reason, against, recorded=recorded)


def _from_former(view: View, former: Recorded) -> Decision:
    lost = f"but for {name_ranks(former.absent)}, which parity restores" if former.absent else "in the keepers' memory"
    reason = (
        f"version {former.version}, divided among {view.rosters[former.roster].world} rank(s), is complete {lost}; "
        f"each of now {view.world} reads its part"
    )
    against = _torn(view, above=former.version) + _refusals(view, above=former.version)
    return Decision(former.version, PARITY if former.absent else MEMORY, reason, against, former=former)


def _afresh(view: View) -> Decision:
    reason = "no version in memory is complete and there is no checkpoint"
    against = _torn(view, above=-1) + _unrestorable(view, above=-1) + _against_others(view, above=-1)
    return Decision(-1, FRESH, reason, against)


def _from_disk(view: View, step: int, memory: tuple[int, int] | None) -> Decision:
    why = "no version in memory is complete" if memory is None else f"version {memory[0]} in memory is older"
    reason = f"the checkpoint of step {step} is the newest that can be read; {why}"
    against = _torn(view, above=step) + _unrestorable(view, above=step) + _refusals(view, above=step)
    against += _against_live(view, step) + _against_others(view, above=step)
    return Decision(step, DISK, reason, against + view.rejected)


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


def _unrestorable(view: View, *, above: int) -> tuple[str, ...]:
    """Why each recorded version newer than ``above`` cannot be rebuilt, newest first."""
    own = [(r, _against_parity(view, r)) for r in view.recorded if r.absent]
    all_of_them = own + [(r, _against_former(view, r)) for r in view.former]
    newer = sorted((one for one in all_of_them if one[0].version > above), key=lambda o: (-o[0].version, -o[0].epoch))
    return tuple(f"version {r.version} from parity: {why}" for r, why in newer)


def _against_live(view: View, version: int) -> tuple[str, ...]:
    """Why the state that some ranks have brought out of the last epoch is not taken, if it is as new as ``version``."""
    newest = max(view.live.values(), default=-1)
    if newest < version:
        return ()
    others = [rank for rank in range(view.world) if view.live.get(rank) != newest]
    return (f"live state: {name_ranks(others)} did not bring out version {newest}",) if others else ()


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
