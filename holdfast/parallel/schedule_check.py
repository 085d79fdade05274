"""Proofs about schedules, how long they take, and what they look like. Pure.

The model of execution. A process takes its actions in order: it receives the action's input, which blocks until the
message is there; computes; and sends the result, if another process wants it. Between two processes there is one
channel for each direction, which keeps the order of messages. A send returns at once, and at most ``send_slots``
messages per channel may be on their way, sent but not asked for by the receiver: before it leaves the action, a process
waits until that is so. 0 is rendezvous: every send blocks until the receiver asks for the message.

Such processes are deterministic, and letting one of them go on never stops another. So if one order of execution comes
to the end, every one does, whatever the timing: running the schedule once proves that it cannot deadlock. More slots
never hurt.

gloo behaves like this with ``isend``, ``recv`` and at most ``send_slots`` unfinished works per peer. NCCL runs what two
ranks exchange over one communicator one by one, in both directions, so there each direction needs its own group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from holdfast.errors import InvariantViolation
from holdfast.parallel.schedule import Action, Kind, Layout, Schedule, Step

__all__ = ["Proof", "Timeline", "check", "render", "simulate"]

Channel = tuple[int, int]
"""Sending and receiving process."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What is true of a schedule that :func:`check` accepts."""

    send_slots: int
    """The fewest messages that a channel must hold; 0 means that blocking sends do not deadlock either."""
    peak_per_stage: tuple[int, ...]
    """Most microbatches of which a stage keeps activations at one time."""
    peak_per_process: tuple[int, ...]
    """The same for all chunks of a process together."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """When every action starts and ends. Unit: that of the costs; messages take no time."""

    starts: dict[Action, float]
    ends: dict[Action, float]
    length: float
    """From the first start to the last end."""
    bubble: float
    """Share of all processes' time in which they wait, 0 .. 1."""


def check(schedule: Schedule) -> Proof:
    """Prove that a schedule does all its work, in a possible order, without deadlock.

    Raises: InvariantViolation that names the first action that is wrong, by process and place.
    """
    _check_routes(schedule.layout)
    _check_work(schedule)
    _check_order(schedule)
    _check_channels(schedule)
    return Proof(
        _fewest_slots(schedule),
        tuple(_peak(schedule, [stage]) for stage in range(schedule.layout.stages)),
        tuple(
            _peak(schedule, range(process, schedule.layout.stages, schedule.layout.processes))
            for process in range(schedule.layout.processes)
        ),
    )


def simulate(schedule: Schedule, forward: Sequence[float], backward: Sequence[float]) -> Timeline:
    """Run a schedule, given what a microbatch's forward and backward cost at each stage: positive, in any unit.

    Raises: InvariantViolation for a schedule that deadlocks however much the channels hold.
    """
    starts, ends = _run_timed(schedule, forward, backward)
    if len(ends) < sum(map(len, schedule.actions)):
        raise InvariantViolation(_deadlock(schedule, _progress(schedule, _unbounded(schedule))))
    length = max(ends.values())
    busy = sum((forward if a.kind is Kind.FORWARD else backward)[a.stage] for a in ends)
    return Timeline(starts, ends, length, 1 - busy / (length * schedule.layout.processes))


def render(schedule: Schedule) -> str:
    """One line per process, one column per unit of time, every action taking one.

    ``F3`` is the forward of microbatch 3, with interleaving ``F3.1`` that of chunk 1; a dot is waiting. ``?B3`` ends a
    line whose process would wait for ever.
    """
    starts, _ = _run_timed(schedule, *[[1.0] * schedule.layout.stages] * 2)
    rows = [_cells(schedule, actions, starts) for actions in schedule.actions]
    width = max((len(cell) for row in rows for cell in row), default=0)
    label = len(str(len(rows) - 1))
    lines = (f"p{process:<{label}} " + " ".join(f"{c:<{width}}" for c in row) for process, row in enumerate(rows))
    return "\n".join(line.rstrip() for line in lines)


def _check_routes(layout: Layout) -> None:
    for microbatch, route in enumerate(layout.routes):
        if sorted(route) != list(range(layout.stages)):
            raise InvariantViolation(
                f"the route {route} of microbatch {microbatch} must pass each of the {layout.stages} stages once"
            )


def _check_work(schedule: Schedule) -> None:
    """Every microbatch forward and backward once at every stage, by the process that holds it."""
    layout, seen = schedule.layout, set[Action]()
    if len(schedule.actions) != layout.processes:
        raise InvariantViolation(f"{layout.processes} processes, but actions for {len(schedule.actions)}")
    for process, place, action in _listed(schedule):
        where = _where(process, place, action)
        if not (0 <= action.stage < layout.stages and 0 <= action.microbatch < layout.microbatches):
            raise InvariantViolation(
                f"{where}: there are {layout.stages} stages and {layout.microbatches} microbatches, counted from 0"
            )
        if layout.process_of(action.stage) != process:
            raise InvariantViolation(f"{where}: that stage belongs to process {layout.process_of(action.stage)}")
        if action in seen:
            raise InvariantViolation(f"{where}: it has been done before; once is right")
        seen.add(action)
    for microbatch, route in enumerate(layout.routes):
        for kind, stages in ((Kind.FORWARD, route), (Kind.BACKWARD, route[::-1])):
            for stage in stages:
                if (missing := Action(kind, microbatch, stage)) not in seen:
                    raise InvariantViolation(f"{missing} is missing; process {layout.process_of(stage)} must do it")


def _check_order(schedule: Schedule) -> None:
    """What an action needs of its own process has been done. Messages see to the rest."""
    done = set[Action]()
    for process, place, action in _listed(schedule):
        for needed in _needs(schedule.layout, action):
            if schedule.layout.process_of(needed.stage) == process and needed not in done:
                raise InvariantViolation(f"{_where(process, place, action)} comes before the {needed}, which it needs")
        done.add(action)


def _needs(layout: Layout, action: Action) -> Iterator[Action]:
    if action.kind is Kind.BACKWARD:
        yield Action(Kind.FORWARD, action.microbatch, action.stage)
    if source := layout.source(action):
        yield source


def _check_channels(schedule: Schedule) -> None:
    """Both ends of every channel name the same messages in the same order."""
    sent, received = dict[Channel, list[Action]](), dict[Channel, list[Action]]()
    for process, _, action in _listed(schedule):
        step = schedule.step(action)
        if step.send_to not in (None, process):
            sent.setdefault((process, step.send_to), []).append(action)
        if step.receive_from not in (None, process):
            received.setdefault((step.receive_from, process), []).append(action)
    for channel in sorted(sent):
        targets = (schedule.layout.target(action) for action in sent[channel])
        pairs = zip_longest(sent[channel], targets, received[channel])
        for number, (action, expected, actual) in enumerate(pairs):
            if expected != actual:
                raise InvariantViolation(
                    f"message {number} from process {channel[0]} to process {channel[1]} is the result of "
                    f"{action}, but the receiver asks at that place for the input of {actual}: sends and "
                    "receives must be in the same order"
                )


def _fewest_slots(schedule: Schedule) -> int:
    most = _unbounded(schedule)
    if stuck := _unfinished(schedule, _progress(schedule, most)):
        raise InvariantViolation(_deadlock(schedule, stuck))
    return next(n for n in range(most + 1) if not _unfinished(schedule, _progress(schedule, n)))


def _unbounded(schedule: Schedule) -> int:
    """As many slots as there can be messages in a channel."""
    return 2 * schedule.layout.microbatches * schedule.layout.chunks


def _progress(schedule: Schedule, slots: int) -> list[int]:
    """How many actions each process finishes before all have ended, or wait for each other."""
    run = _Run(schedule, slots)
    while sum(run.advance(process) for process in range(schedule.layout.processes)):
        pass
    return run.finished


def _unfinished(schedule: Schedule, finished: Sequence[int]) -> list[int] | None:
    return list(finished) if any(n < len(a) for n, a in zip(finished, schedule.actions, strict=True)) else None


class _Run:
    """Processes and channels, without time."""

    def __init__(self, schedule: Schedule, slots: int) -> None:
        self._steps: list[tuple[Step, ...]] = [schedule.steps(p) for p in range(schedule.layout.processes)]
        self._slots = slots
        self._asked, self._sent = Counter[Channel](), Counter[Channel]()
        self._phase = ["ask"] * len(self._steps)
        self.finished = [0] * len(self._steps)

    def advance(self, process: int) -> bool:
        """Let one process go on until it has to wait; whether it did anything."""
        has_moved = False
        while self.finished[process] < len(self._steps[process]) and self._move(process):
            has_moved = True
        return has_moved

    def _move(self, process: int) -> bool:
        step = self._steps[process][self.finished[process]]
        source, target = _channel(step.receive_from, process), _channel(process, step.send_to)
        if self._phase[process] == "ask":
            self._asked.update([source] if source else [])
            self._phase[process] = "receive"
        elif self._phase[process] == "receive":
            if source and self._sent[source] < self._asked[source]:
                return False
            self._sent.update([target] if target else [])
            self._phase[process] = "leave"
        else:
            if target and self._sent[target] - self._asked[target] > self._slots:
                return False
            self._phase[process], self.finished[process] = "ask", self.finished[process] + 1
        return True


def _channel(sender: int | None, receiver: int | None) -> Channel | None:
    return None if sender is None or receiver is None or sender == receiver else (sender, receiver)


def _peak(schedule: Schedule, stages: Sequence[int]) -> int:
    alive = peak = 0
    for action in schedule.actions[schedule.layout.process_of(stages[0])]:
        if action.stage in stages:
            alive += 1 if action.kind is Kind.FORWARD else -1
            peak = max(peak, alive)
    return peak


def _run_timed(
    schedule: Schedule, forward: Sequence[float], backward: Sequence[float]
) -> tuple[dict[Action, float], dict[Action, float]]:
    """Starts and ends of all actions that are ever run, in unbounded channels."""
    starts, ends = dict[Action, float](), dict[Action, float]()
    places, clocks = [0] * len(schedule.actions), [0.0] * len(schedule.actions)
    has_moved = True
    while has_moved:
        has_moved = False
        for process, actions in enumerate(schedule.actions):
            while places[process] < len(actions):
                action = actions[places[process]]
                source = schedule.layout.source(action)
                if source is not None and source not in ends:
                    break
                starts[action] = max(clocks[process], ends[source] if source else 0.0)
                cost = forward if action.kind is Kind.FORWARD else backward
                ends[action] = clocks[process] = starts[action] + cost[action.stage]
                places[process] += 1
                has_moved = True
    return starts, ends


def _cells(schedule: Schedule, actions: Sequence[Action], starts: dict[Action, float]) -> list[str]:
    row = list[str]()
    for action in actions:
        chunk = f".{action.stage // schedule.layout.processes}" if schedule.layout.chunks > 1 else ""
        text = f"{action.kind.value}{action.microbatch}{chunk}"
        if action not in starts:
            return [*row, "?" + text]
        row += ["."] * (int(starts[action]) - len(row)) + [text]
    return row


def _deadlock(schedule: Schedule, finished: Sequence[int]) -> str:
    waits = [
        f"{_where(process, place, actions[place])} waits for the {schedule.layout.source(actions[place])}"
        for process, (place, actions) in enumerate(zip(finished, schedule.actions, strict=True))
        if place < len(actions)
    ]
    return "deadlock, however many messages a channel holds: " + "; ".join(waits) + "\n" + render(schedule)


def _listed(schedule: Schedule) -> Iterator[tuple[int, int, Action]]:
    for process, actions in enumerate(schedule.actions):
        for place, action in enumerate(actions):
            yield process, place, action


def _where(process: int, place: int, action: Action) -> str:
    return f"process {process}, action {place}: {action}"
