"""The words of the console: events, steps and the end of a run as lines of text. Pure.

A line begins with a tag of at most five letters, padded to six columns; what continues a line is indented by six.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from holdfast import events as e
from holdfast.fault_tolerance.policy import name_ranks
from holdfast.types import StepReport

__all__ = [
    "TAG_COLUMNS",
    "aligned",
    "clean",
    "describe",
    "duration",
    "ending",
    "percent",
    "size",
    "span",
    "step_line",
    "table",
]

TAG_COLUMNS = 6
_INDENT = " " * TAG_COLUMNS
_FRAME = _INDENT + "| "
_FRAMED_COLUMNS = 100
_TRACEBACK_LINES = 12


# -- safety -----------------------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """One line that cannot do anything to a terminal: what is not printable is shown as its escape sequence."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _framed(text: str) -> Iterator[str]:
    """Foreign text, line by line behind a bar, so that it cannot pass for ours."""
    for line in text.expandtabs(4).split("\n"):
        shown = clean(line)
        for start in range(0, max(len(shown), 1), _FRAMED_COLUMNS):
            yield (_FRAME + shown[start : start + _FRAMED_COLUMNS]).rstrip()


# -- quantities -------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """``0.04 s``, ``12.3 s``, ``3 min 12 s``, ``2 h 03 min``."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(n_bytes: int) -> str:
    """``812 B``, ``5.2 MB``: decimal units."""
    if n_bytes < 1000:
        return f"{n_bytes} B"
    power = next((p for p in range(1, 5) if n_bytes < 999.95 * 1000**p), 5)  # 1000.0 has the next unit
    return f"{n_bytes / 1000**power:.1f} {' kMGTP'[power]}B"


_UNITS = ((365.25 * 86400, "y"), (86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"))


def span(seconds: float) -> str:
    """Three digits in the largest unit of which there is one: ``1.21 ms``, ``17.3 min``, ``9.78 y``."""
    if seconds == 0 or math.isinf(seconds):
        return "0 s" if seconds == 0 else "never"
    length_s, unit = next((u for u in _UNITS if seconds >= u[0]), _UNITS[-1])
    amount = seconds / length_s
    return f"{amount:.3g} {unit}" if amount < 999.5 else f"{amount:,.0f} {unit}"


def percent(share: float) -> str:
    """Two digits of what is lost or of what is left, whichever is less: ``99.9972 %``, ``0.0028 %``, ``88.9 %``."""
    less = 100.0 * min(share, 1.0 - share)
    if less <= 0.0:
        return f"{100.0 * share:.0f} %"
    return f"{100.0 * share:.{min(max(1, 1 - math.floor(math.log10(less))), 12)}f} %"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def aligned(facts: Mapping[str, str], indent: str = "") -> list[str]:
    """``key  value`` with the values below each other; a value of several lines stays in its column."""
    width = max(map(len, facts), default=0)
    lines = []
    for key, value in facts.items():
        head, *more = value.split("\n")
        lines.append(f"{indent}{clean(key):<{width}} {clean(head)}".rstrip())
        lines += [f"{indent}{'':<{width}} {clean(line)}".rstrip() for line in more if line]
    return lines


def table(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """One line per row, its cells below each other. The rows are of one length, and there is one at least."""
    cells = [[clean(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells)
    return [f"{indent}{line}".rstrip() for line in lines]


# -- steps ------------------------------------------------------------------------------------------------------------


def step_line(report: StepReport, *, tokens_per_s: float | None, failures: int, rebuilt: int = 0) -> str:
    """Fixed keys in fixed order; what is not known is left out."""
    facts = {
        "step": f"{report.step:,}",
        "loss": f"{report.loss:.4f}",
        "bpb": f"{report.bits_per_byte:.3f}",
        "lr": f"{report.learning_rate:.1e}",
        "gnorm": f"{report.grad_norm:.2f}",
        "tok/s": "" if tokens_per_s is None else f"{tokens_per_s:,.0f}",
        "mem": size(report.memory_bytes).replace(" ", "").rstrip("B") if report.memory_bytes else "",
        "snap_age": "" if report.committed < 0 else f"{report.step - report.committed}",
        "fails": f"{failures}",
        "approx": f"{rebuilt}" if rebuilt else "",
    }
    return " ".join(f"{key} {value}" for key, value in facts.items() if value)


# -- events -----------------------------------------------------------------------------------------------------------


def describe(event: e.Event, at: str) -> list[str]:
    """What to print when this happens at ``at`` (hh:mm:ss); nothing for events that the console does not show."""
    words = _WORDS.get(type(event))
    return [] if words is None else [clean(line) for line in words(event, at)]


def _fault(event: e.FaultDetected, at: str) -> Iterator[str]:
    first, *traceback = event.cause.splitlines() or ["no reason given"]
    where = f"in {event.phase}, " if event.phase else ""
    yield f"{'DRAIN' if event.is_preemption else 'FAULT'} {at} {_who(event)}{first}"
    yield f"{_INDENT}{where}last step {event.last_step:,}, detected after {duration(event.detected_after_s)}"
    yield from _framed("\n".join(traceback[-_TRACEBACK_LINES:])) if traceback else ()


def _who(event: e.FaultDetected) -> str:
    node = "" if event.node is None else f"node {event.node}"
    if not event.ranks:
        return f"{node} lost: " if node else ""
    place = ", ".join(part for part in (node, "" if event.pid is None else f"pid {event.pid}") if part)
    return f"{name_ranks(event.ranks)} lost{f' ({place})' if place else ''}: "


def _injected(event: e.FaultInjected, at: str) -> Iterator[str]:
    yield f"CHAOS {at} step {event.step:,}, on purpose: {event.source}"


def _late(event: e.RankLate, at: str) -> Iterator[str]:
    since = duration(event.seconds)
    yield f"SLOW  {at} rank {event.rank} has been in {event.phase} for {since}, after step {event.step:,}"
    yield f"{_INDENT}its log, logs/rank{event.rank:05d}.attempt*.log, says where its threads are"


def _planned(event: e.RecoveryPlanned, at: str) -> Iterator[str]:
    if event.number == 0:  # no fault came before: an earlier attempt is continued
        yield f"START {at} resume from step {event.version:,} ({event.source}): {event.reason}"
    elif event.version < 0:
        yield f"PLAN  {at} start over with a fresh model: {event.reason}"
    else:
        yield f"PLAN  {at} go on from step {event.version:,} ({event.source}): {event.reason}"
    yield from (f"{_INDENT}not used: {rejected}" for rejected in event.rejected)


def _world(event: e.WorldChanged, at: str) -> Iterator[str]:
    yield f"WORLD {at} from {_count(event.world_before, 'rank')} to {event.world:,}: {event.reason}"


def _done(event: e.RecoveryDone, at: str) -> Iterator[str]:
    detect_s = event.split_s.get("detect")
    detected = "" if detect_s is None else f"detected after {duration(detect_s)}, "
    yield (
        f"DONE  {at} resumed at step {event.step:,}: {detected}repaired in {duration(event.repaired_in_s)}, "
        f"{_count(event.steps_lost, 'step')} lost, {size(event.bytes_moved)} moved; "
        f"failures {event.failures}/{event.failures_allowed}{_preemptions(event)}"
    )
    rest = {name.replace("_", " "): seconds for name, seconds in event.split_s.items() if name != "detect"}
    if rest:
        yield f"{_INDENT}of which {', '.join(f'{name} {duration(s)}' for name, s in rest.items())}"


def _preemptions(event: e.RecoveryDone) -> str:
    if not event.preemptions:
        return ""
    limit = f"/{event.preemptions_allowed}" if event.preemptions_allowed else ", no limit"
    return f" (preemptions {event.preemptions}{limit})"


def _noticed(event: e.PreemptionNoticed, at: str) -> Iterator[str]:
    within = "soon" if event.within_s is None else f"within {duration(event.within_s)}"
    yield f"DRAIN {at} node {event.node} will be taken away {within}: {event.reason}"


def _waiting(event: e.Waiting, at: str) -> Iterator[str]:
    yield f"WAIT  {at} {event.what}"


def _protection(event: e.Protection, at: str) -> Iterator[str]:
    yield f"GUARD {at} protection is {event.level}: {event.reason}"


def _written(event: e.CheckpointWritten, at: str) -> Iterator[str]:
    took = f"{size(event.bytes)} in {duration(event.seconds)}"
    yield f"SAVED {at} checkpoint of step {event.step:,}: {took}, {event.path}"


def _rejected(event: e.CheckpointRejected, at: str) -> Iterator[str]:
    yield f"SKIP  {at} checkpoint {event.path}: {event.reason}"


def _evaluated(event: e.Evaluated, at: str) -> Iterator[str]:
    yield f"EVAL  {at} step {event.step:,}: {event.bits_per_byte:.3f} bits/byte over {_count(event.windows, 'window')}"


def _left_out(event: e.StepLeftOut, at: str) -> Iterator[str]:
    yield f"SKIP  {at} step {event.step + 1:,}: {event.reason}; all ranks went back to version {event.version:,}"


def _snapshot_cost(event: e.SnapshotCost, at: str) -> Iterator[str]:
    slower = "" if event.slowdown is None else f"; steps beside a copy took {event.slowdown:+.1%}"
    blocked = f"blocked {1000 * event.stall_s:.1f} ms or {event.stall_share:.2%} of a step"
    yield f"COST  {at} snapshots {blocked}, copied {1000 * event.copy_s:.1f} ms beside it{slower}"


def _unprotected(event: e.ProtectionFailed, at: str) -> Iterator[str]:
    yield f"SNAP  {at} versions do not become protected, node {event.node} says: {event.reason}"


def _snapshot_failed(event: e.SnapshotFailed, at: str) -> Iterator[str]:
    yield f"SNAP  {at} version {event.version:,} of rank {event.rank} was not taken: {event.reason}"


def _generated(event: e.Generated, at: str) -> Iterator[str]:
    yield f"TEXT  {at} written by the model at step {event.step:,}:"
    yield from _framed(event.text)


def _rebuilt(event: e.StageRebuilt, at: str) -> Iterator[str]:
    of = f" of {', '.join(f'stage {s}' for s in event.sources)}" if event.sources else ""
    yield (
        f"STAGE {at} stage {event.stage} rebuilt at step {event.version:,} by {event.repair}{of}, {size(event.bytes)} "
        "read; the run is approximate from here on"
    )


def _healed(event: e.StageHealed, at: str) -> Iterator[str]:
    errors = "" if event.before is None else f", error {event.before:.3f} before and {event.after:.3f} after"
    yield f"STAGE {at} stage {event.stage} fitted to {event.pairs} logged microbatches in {event.steps} updates{errors}"


def _stages(event: e.StagesMeasured, at: str) -> Iterator[str]:
    if event.angular_distance:
        angles = ", ".join(f"{stage}: {angle:.3f}" for stage, angle in event.angular_distance.items())
        yield f"STAGE {at} step {event.step:,}: angular distance of stages {angles}; a low one is easily replaced"


def _bricks_held(event: e.BricksHeld, at: str) -> Iterator[str]:
    held = ", ".join(f"node {node}: {n_bytes:,}" for node, n_bytes in event.held.items())
    taken = ", ".join(f"rank {rank}: {n_bytes:,}" for rank, n_bytes in event.snapshot.items())
    files = f"{_count(event.bricks, 'frozen file')}, {event.bytes:,} bytes"
    yield f"GUARD {at} the keepers hold {files}: {held}"
    yield f"{_INDENT}once: {event.read:,} bytes from the files, {event.sent:,} sent on, {event.coded:,} coded"
    yield f"{_INDENT}a snapshot has none of them: {taken} bytes"


def _bricks_restored(event: e.BricksRestored, at: str) -> Iterator[str]:
    first, digest = next(iter(event.files.items()))
    files = f"{_count(len(event.files), 'frozen file')}, {size(event.bytes)},"
    yield f"GUARD {at} rank {event.rank} took {files} from the keepers' memory"
    yield f"{_INDENT}{first} (sha256 {digest[:8]}…): {event.reason}"


def _stop(event: e.StopRequested, at: str) -> Iterator[str]:
    yield f"STOP  {at} {event.reason}"


# Each takes its own kind of event, which a mapping cannot express: hence Any.
_WORDS: Mapping[type[e.Event], Callable[[Any, str], Iterator[str]]] = {
    e.FaultDetected: _fault,
    e.FaultInjected: _injected,
    e.RankLate: _late,
    e.RecoveryPlanned: _planned,
    e.RecoveryDone: _done,
    e.Waiting: _waiting,
    e.Protection: _protection,
    e.WorldChanged: _world,
    e.CheckpointWritten: _written,
    e.CheckpointRejected: _rejected,
    e.Evaluated: _evaluated,
    e.StepLeftOut: _left_out,
    e.SnapshotCost: _snapshot_cost,
    e.PreemptionNoticed: _noticed,
    e.ProtectionFailed: _unprotected,
    e.SnapshotFailed: _snapshot_failed,
    e.StageHealed: _healed,
    e.StageRebuilt: _rebuilt,
    e.StagesMeasured: _stages,
    e.Generated: _generated,
    e.BricksHeld: _bricks_held,
    e.BricksRestored: _bricks_restored,
    e.StopRequested: _stop,
}


# -- the end ----------------------------------------------------------------------------------------------------------


def ending(
    event: e.RunEnded,
    *,
    total_steps: int,
    bits_per_byte: float | None,
    facts: Mapping[str, str],
    next_command: str,
    injected: int = 0,
    rebuilt: int = 0,
) -> Sequence[str]:
    """The last block: how it ended, the facts, and on a line of its own the one command to type next. ``injected`` is
    how often something was broken on purpose, which may be the cause of faults and need not be; ``rebuilt`` counts the
    pipeline stages that were made from others."""
    quality = "" if bits_per_byte is None else f"; {bits_per_byte:.3f} bits/byte"
    faults = f"; {_count(event.faults, 'fault')}, {_count(event.steps_lost, 'step')} lost" if event.faults else ""
    faults += f", {_count(event.preemptions, 'preemption')} of these" if event.preemptions else ""
    faults += f"; {injected:,} injected on purpose" if injected else ""
    faults += f"; approximate: {_count(rebuilt, 'stage')} rebuilt from others" if rebuilt else ""
    reached = f"step {event.step:,} of {total_steps:,}" if event.step >= 0 else "no step saved"
    head = (
        f"END   {event.outcome} (exit code {event.exit_code}): {reached} in {duration(event.seconds)}{quality}{faults}"
    )
    why = {"why": event.reason} if event.reason and event.outcome != "finished" else {}
    following = [clean(f"NEXT  {next_command}")] if next_command else []
    return [clean(head), *aligned({**why, **facts}, _INDENT), *following]
