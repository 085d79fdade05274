"""The order of work in a pipeline, as data: which process runs which microbatch through which stage, and when. Pure.

A microbatch goes forward through the stages of its *route*, and backward through them in reverse. The stage that is
first on its route applies the embedding, the one that is last applies the head and the loss. CheckFree+ sends every
other microbatch over a route with both pairs of end stages swapped, so that their neighbours learn to replace them.

Stage c P + p is chunk c of process p, with P processes; without interleaving a process holds one stage, its own
number. ``schedule_check`` proves that a schedule can be executed.

Sources: GPipe, arXiv 1811.06965; 1F1B and its interleaved form, arXiv 2104.04473, section 2.2; CheckFree+,
arXiv 2506.15461, section 4.3.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from holdfast.errors import ConfigurationError, InvariantViolation

__all__ = ["Action", "Kind", "Layout", "Route", "Schedule", "Step", "gpipe", "interleaved", "one_f_one_b"]

Route = tuple[int, ...]
"""Every stage once, in the order in which a microbatch goes forward through them."""

_MIN_SWAPPED_STAGES = 4


class Kind(Enum):
    """What is done with a microbatch at a stage."""

    FORWARD = "F"
    BACKWARD = "B"


@dataclass(frozen=True, slots=True)
class Action:
    """One microbatch's forward or backward pass through one stage."""

    kind: Kind
    microbatch: int
    stage: int

    def __str__(self) -> str:
        return f"{self.kind.name.lower()} of microbatch {self.microbatch} at stage {self.stage}"


@dataclass(frozen=True, slots=True)
class Step:
    """One action as its process carries it out: receive, compute, send.

    A peer is a process. It is this process itself where one of its chunks hands over to another, and nothing is sent.
    A microbatch is in one place at a time, so (kind, microbatch) is enough to name what is handed over.
    """

    action: Action
    chunk: int
    """Which of the process's stages."""
    receive_from: int | None
    """Who has the input (forward) or the gradient of the output (backward); None at the end of a route."""
    send_to: int | None
    """Who gets the output (forward) or the gradient of the input (backward); None at the end of a route."""

    @property
    def is_first(self) -> bool:
        """Whether the stage is first on this microbatch's route: its input are tokens, and get no gradient."""
        return (self.receive_from if self.action.kind is Kind.FORWARD else self.send_to) is None

    @property
    def is_last(self) -> bool:
        """Whether the stage is last on this microbatch's route: its output is the loss, and receives no gradient."""
        return (self.send_to if self.action.kind is Kind.FORWARD else self.receive_from) is None


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the stages are, and which way each microbatch takes through them."""

    processes: int
    chunks: int
    """Stages of each process."""
    routes: tuple[Route, ...]
    """One for every microbatch."""

    @property
    def stages(self) -> int:
        return self.processes * self.chunks

    @property
    def microbatches(self) -> int:
        return len(self.routes)

    @property
    def first_stages(self) -> frozenset[int]:
        """Stages that apply the embedding, to some microbatch."""
        return frozenset(route[0] for route in self.routes)

    @property
    def last_stages(self) -> frozenset[int]:
        """Stages that apply the head, to some microbatch."""
        return frozenset(route[-1] for route in self.routes)

    def process_of(self, stage: int) -> int:
        return stage % self.processes

    def before(self, microbatch: int, stage: int) -> int | None:
        """The stage that precedes this one on the route; None if this is the first."""
        at = self.routes[microbatch].index(stage)
        return self.routes[microbatch][at - 1] if at else None

    def after(self, microbatch: int, stage: int) -> int | None:
        """The stage that follows this one on the route; None if this is the last."""
        at = self.routes[microbatch].index(stage)
        return self.routes[microbatch][at + 1] if at + 1 < self.stages else None

    def source(self, action: Action) -> Action | None:
        """The action at another stage whose result this one takes; None if there is none."""
        is_forward = action.kind is Kind.FORWARD
        stage = (self.before if is_forward else self.after)(action.microbatch, action.stage)
        return None if stage is None else Action(action.kind, action.microbatch, stage)

    def target(self, action: Action) -> Action | None:
        """The action at another stage that takes this one's result; None if there is none."""
        is_forward = action.kind is Kind.FORWARD
        stage = (self.after if is_forward else self.before)(action.microbatch, action.stage)
        return None if stage is None else Action(action.kind, action.microbatch, stage)


@dataclass(frozen=True, slots=True)
class Schedule:
    """What every process does in one optimizer step, in order."""

    layout: Layout
    actions: tuple[tuple[Action, ...], ...]
    """For every process."""

    def steps(self, process: int) -> tuple[Step, ...]:
        """The actions of one process with their peers, for whoever carries them out."""
        return tuple(self.step(action) for action in self.actions[process])

    def step(self, action: Action) -> Step:
        """One action with its peers."""
        source, target = self.layout.source(action), self.layout.target(action)
        return Step(
            action,
            chunk=action.stage // self.layout.processes,
            receive_from=None if source is None else self.layout.process_of(source.stage),
            send_to=None if target is None else self.layout.process_of(target.stage),
        )


def gpipe(processes: int, microbatches: int, *, swapped: bool = False) -> Schedule:
    """All forwards, then all backwards; a stage keeps the activations of every microbatch.

    Raises: ConfigurationError.
    """
    layout = _layout(processes, 1, microbatches, swapped)
    return _planned(layout, {microbatches: [microbatches] * processes}, is_patient=True)


def one_f_one_b(processes: int, microbatches: int, *, swapped: bool = False) -> Schedule:
    """Forwards and backwards in turn; stage i keeps the activations of P - i microbatches, swapped of up to 2 (P - i).

    As in every schedule here, a stage runs its backwards in the order of the microbatches, and so adds up gradients in
    the order of a single process; where routes are swapped, an end stage may do 1 before 0, 3 before 2, and so on.

    Raises: ConfigurationError.
    """
    layout = _layout(processes, 1, microbatches, swapped)
    limits = [processes - _place(layout, process) for process in range(processes)]
    if not swapped:
        return _planned(layout, {microbatches: limits}, is_patient=True)
    # Swapped microbatches travel in pairs, and a pair takes twice as long from one stage to the next. With as many
    # activations as without swaps, a step of many microbatches takes a third longer; with twice as many, no longer.
    return _planned(layout, {microbatches: [2 * limit for limit in limits]}, is_patient=False)


def interleaved(processes: int, chunks: int, microbatches: int, *, swapped: bool = False) -> Schedule:
    """1F1B where each process holds several stages, and fills with one the time that it would wait for another.

    Here swapped routes make a step some percent longer, because from chunk to chunk the two microbatches of a pair
    fall out of step; ``schedule_check.simulate`` says how much. They need up to twice the activations.

    Raises: ConfigurationError, also unless the processes divide the microbatches.
    """
    if chunks < 2:
        raise ConfigurationError(f"chunks={chunks}: interleaving needs at least 2 stages per process; else use 1F1B")
    layout = _layout(processes, chunks, microbatches, swapped)
    if remainder := microbatches % processes:
        raise ConfigurationError(
            f"microbatches={microbatches} must be a multiple of the {processes} processes, because interleaving passes "
            f"them on in groups of that size; try {microbatches + processes - remainder}"
        )
    # Larger groups lose less time between chunks, but with few processes two of them can wait for each other.
    groups = [2 * processes, processes] if swapped else [processes]
    return _planned(layout, {group: _interleaved_limits(layout, group) for group in groups}, is_patient=not swapped)


def _interleaved_limits(layout: Layout, group: int) -> list[int]:
    """Passes whose activations a process keeps: a group's for all chunks but one, and what is underway in that one."""
    slack = len(set(layout.routes))
    places = [_place(layout, process) for process in range(layout.processes)]
    return [2 * (layout.processes - place - 1) + (layout.chunks - 1) * group + slack for place in places]


def _layout(processes: int, chunks: int, microbatches: int, swapped: bool) -> Layout:
    stages = processes * chunks
    sizes = (("processes", processes), ("microbatches", microbatches))
    problems = [f"{name}={n} must be at least 1" for name, n in sizes if n < 1]
    if swapped and stages < _MIN_SWAPPED_STAGES:
        problems.append(
            f"{stages} pipeline stages cannot be swapped: the first pair and the last pair must not share a stage; "
            f"use at least {_MIN_SWAPPED_STAGES}"
        )
    if swapped and microbatches % 2:
        problems.append(
            f"microbatches={microbatches} must be even, because half of them take the swapped route; "
            f"try {microbatches + 1}"
        )
    if problems:
        raise ConfigurationError(problems)
    plain = tuple(range(stages))
    other = (1, 0, *plain[2:-2], stages - 1, stages - 2) if swapped else plain
    return Layout(processes, chunks, tuple(other if microbatch % 2 else plain for microbatch in range(microbatches)))


def _place(layout: Layout, process: int) -> int:
    """The earliest place of the process's first stage on any route."""
    return min(route.index(process) for route in set(layout.routes))


def _planned(layout: Layout, limits: Mapping[int, Sequence[int]], *, is_patient: bool) -> Schedule:
    """With the first size of groups for which there is a plan; each has its own limits."""
    for group, its_limits in limits.items():
        if (schedule := _Planner(layout, its_limits, group, is_patient).plan()) is not None:
            return schedule
    raise InvariantViolation(f"no order of actions found for {layout}")


class _Planner:
    """List scheduling in ticks, one action per process and tick.

    A process has one order for its forwards and one for its backwards, and is only free to choose between the next of
    each. It may be so many forwards ahead of its backwards, its limit.

    If all microbatches take one route, it is patient: forwards up to the limit, then a backward for each forward; it
    waits for the one whose turn it is. That is the textbook's order. Otherwise it takes what is there, backwards first.
    """

    def __init__(self, layout: Layout, limits: Sequence[int], group: int, is_patient: bool) -> None:
        self._layout, self._limits, self._is_patient = layout, limits, is_patient
        self._forwards = [_order(layout, Kind.FORWARD, process, group) for process in range(layout.processes)]
        self._backwards = [_order(layout, Kind.BACKWARD, process, group) for process in range(layout.processes)]
        self._plan: list[list[Action]] = [[] for _ in range(layout.processes)]
        self._done = set[Action]()
        self._sent: defaultdict[tuple[int, int], deque[Action]] = defaultdict(deque)

    def plan(self) -> Schedule | None:
        """None if processes wait for each other."""
        while any(self._backwards):
            chosen = [action for process in range(self._layout.processes) if (action := self._choose(process))]
            if not chosen:
                return None
            for action in chosen:  # only now, so that nobody uses what is finished in the same tick
                self._run(action)
        return Schedule(self._layout, tuple(map(tuple, self._plan)))

    def _choose(self, process: int) -> Action | None:
        forwards, backwards = self._forwards[process], self._backwards[process]
        has_room = bool(forwards) and len(backwards) - len(forwards) < self._limits[process]
        may_go_back = not (self._is_patient and has_room)
        if may_go_back and self._can_run(backwards[0] if backwards else None):
            return backwards[0]
        return forwards[0] if has_room and self._can_run(forwards[0]) else None

    def _can_run(self, action: Action | None) -> bool:
        if action is None:
            return False
        source = self._layout.source(action)
        if source is None:
            return action.kind is Kind.FORWARD or Action(Kind.FORWARD, action.microbatch, action.stage) in self._done
        channel = self._channel(source, action)
        return source in self._done and (channel is None or channel[0] == action)

    def _channel(self, sender: Action, receiver: Action) -> deque[Action] | None:
        """What one process has sent to another and the other has not taken, oldest first; None within a process."""
        ends = self._layout.process_of(sender.stage), self._layout.process_of(receiver.stage)
        return None if ends[0] == ends[1] else self._sent[ends]

    def _run(self, action: Action) -> None:
        process = self._layout.process_of(action.stage)
        (self._forwards if action.kind is Kind.FORWARD else self._backwards)[process].popleft()
        self._plan[process].append(action)
        self._done.add(action)
        source, target = self._layout.source(action), self._layout.target(action)
        if source is not None and (channel := self._channel(source, action)) is not None:
            channel.popleft()
        if target is not None and (channel := self._channel(action, target)) is not None:
            channel.append(target)


def _order(layout: Layout, kind: Kind, process: int, group: int) -> deque[Action]:
    """A process's forwards or backwards: groups of microbatches, each chunk by chunk, and within a chunk in pairs.

    Whichever of a pair comes to the stage sooner is first. Two stages that are swapped then run the two microbatches of
    a pair at the same time, and exchange them.
    """
    direction = 1 if kind is Kind.FORWARD else -1

    def key(action: Action) -> tuple[int, int, int, int, int]:
        microbatch = action.microbatch
        place = layout.routes[microbatch].index(action.stage)
        depth = place // layout.processes
        return microbatch // group, direction * depth, microbatch // 2, direction * place, microbatch

    stages = range(process, layout.stages, layout.processes)
    return deque(sorted((Action(kind, m, stage) for m in range(layout.microbatches) for stage in stages), key=key))
