"""Any schedule that is built can be executed, and the checker tells exactly those apart that can."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from holdfast.errors import InvariantViolation
from holdfast.parallel.schedule import Kind, Schedule, Step, gpipe, interleaved, one_f_one_b
from holdfast.parallel.schedule_check import check, simulate


@st.composite
def _schedules(draw: st.DrawFn) -> Schedule:
    processes, kind = draw(st.integers(1, 8)), draw(st.sampled_from(["gpipe", "1f1b", "interleaved"]))
    chunks = draw(st.integers(2, 4)) if kind == "interleaved" else 1
    swapped = draw(st.booleans()) and processes * chunks >= 4
    step = (processes if chunks > 1 else 1) * (2 if swapped else 1)
    microbatches = step * draw(st.integers(1, max(1, 24 // step)))
    if kind == "interleaved":
        return interleaved(processes, chunks, microbatches, swapped=swapped)
    return (gpipe if kind == "gpipe" else one_f_one_b)(processes, microbatches, swapped=swapped)


class _Executor:
    """Processes that are scheduled at random, over channels of ``slots`` messages. What is sent is its own history."""

    def __init__(self, schedule: Schedule, slots: int, chooser: random.Random) -> None:
        self.steps = [deque(schedule.steps(p)) for p in range(len(schedule.actions))]
        self.channels: defaultdict[tuple[int, int], deque[tuple[str, int, list[int]]]] = defaultdict(deque)
        self.waiting: defaultdict[tuple[int, int], int] = defaultdict(int)
        self.kept: list[dict[tuple[str, int], list[int]]] = [{} for _ in self.steps]
        self.held: list[set[tuple[int, int]]] = [set() for _ in self.steps]
        self.forwards: dict[int, list[int]] = {}
        self.backwards: dict[int, list[int]] = {}
        self.slots, self.chooser = slots, chooser
        self.is_asking = [False] * len(self.steps)
        self.outbox: list[tuple[int, int] | None] = [None] * len(self.steps)

    def run(self) -> bool:
        """Whether everybody comes to the end."""
        blocked: set[int] = set()
        while len(blocked) < len(self.steps):
            process = self.chooser.choice([p for p in range(len(self.steps)) if p not in blocked])
            if self.move(process):
                blocked.clear()
            else:
                blocked.add(process)
        return not any(self.steps) and not any(self.outbox)

    def has_followed(self, schedule: Schedule) -> bool:
        """Whether what came out at the ends has the history that the routes give it."""
        routes = {microbatch: list(route) for microbatch, route in enumerate(schedule.layout.routes)}
        reverse = {microbatch: route[::-1] for microbatch, route in routes.items()}
        return self.forwards == routes and self.backwards == reverse

    def move(self, process: int) -> bool:
        if (channel := self.outbox[process]) is not None:
            if len(self.channels[channel]) - self.waiting[channel] > self.slots:
                return False
            self.outbox[process] = None
            return True
        if not self.steps[process]:
            return False
        step = self.steps[process][0]
        if step.receive_from not in (None, process) and not self.is_asking[process]:
            self.is_asking[process] = True
            self.waiting[step.receive_from, process] += 1
            return True
        history = self.take(process, step)
        if history is None:
            return False
        self.steps[process].popleft()
        self.compute(process, step, history)
        return True

    def take(self, process: int, step: Step) -> list[int] | None:
        if step.receive_from is None:
            return []
        wanted = (step.action.kind.value, step.action.microbatch)
        if step.receive_from == process:
            return self.kept[process].pop(wanted, None)
        channel = self.channels[step.receive_from, process]
        if not channel:
            return None
        kind, microbatch, history = channel.popleft()
        self.waiting[step.receive_from, process] -= 1
        self.is_asking[process] = False
        if (kind, microbatch) != wanted:
            raise LookupError("a message for somebody else")
        return history

    def compute(self, process: int, step: Step, history: list[int]) -> None:
        action, history = step.action, [*history, step.action.stage]
        if action.kind is Kind.FORWARD:
            self.held[process].add((action.microbatch, action.stage))
        elif (action.microbatch, action.stage) in self.held[process]:
            self.held[process].remove((action.microbatch, action.stage))
        else:
            raise LookupError("no activations")
        if step.send_to is None:
            ends = self.forwards if action.kind is Kind.FORWARD else self.backwards
            ends[action.microbatch] = history
        elif step.send_to == process:
            self.kept[process][action.kind.value, action.microbatch] = history
        else:
            self.outbox[process] = process, step.send_to
            self.channels[process, step.send_to].append((action.kind.value, action.microbatch, history))


@given(_schedules(), st.integers(0, 2**32))
def test_a_built_schedule_takes_every_microbatch_along_its_route_and_back(schedule: Schedule, seed: int) -> None:
    slots = check(schedule).send_slots
    executor = _Executor(schedule, slots, random.Random(seed))
    assert executor.run()
    assert executor.has_followed(schedule)
    assert not any(executor.held) and not any(executor.channels.values())


@given(_schedules(), st.integers(0, 2**32))
def test_fewer_slots_than_the_proof_says_deadlock(schedule: Schedule, seed: int) -> None:
    slots = check(schedule).send_slots
    assume(slots > 0)
    assert not _Executor(schedule, slots - 1, random.Random(seed)).run()


@given(_schedules())
def test_backwards_of_a_stage_are_in_order_up_to_the_pairs_of_swapped_routes(schedule: Schedule) -> None:
    is_swapped = len(set(schedule.layout.routes)) > 1
    for actions in schedule.actions:
        for stage in {action.stage for action in actions}:
            order = [a.microbatch for a in actions if a.kind is Kind.BACKWARD and a.stage == stage]
            assert [m // 2 for m in order] == sorted(m // 2 for m in order)
            assert is_swapped or order == sorted(order)


@given(_schedules())
def test_activations_are_bounded_whatever_the_number_of_microbatches(schedule: Schedule) -> None:
    layout = schedule.layout
    is_swapped = len(set(layout.routes)) > 1
    is_gpipe = all(a.kind is Kind.FORWARD for a in schedule.actions[0][: layout.microbatches]) and layout.chunks == 1
    assume(not is_gpipe)
    for process, peak in enumerate(check(schedule).peak_per_process):
        place = min(route.index(process) for route in layout.routes)
        if layout.chunks == 1:
            assert peak <= (2 if is_swapped else 1) * (layout.processes - place)
        else:
            group = layout.processes * (2 if is_swapped else 1)
            assert peak <= 2 * (layout.processes - place - 1) + (layout.chunks - 1) * group + 1 + is_swapped


@given(_schedules(), st.integers(0, 2**32), st.data())
def test_the_checker_accepts_what_can_be_executed_and_nothing_else(
    schedule: Schedule, seed: int, data: st.DataObject
) -> None:
    process = data.draw(st.integers(0, schedule.layout.processes - 1))
    actions = list(schedule.actions[process])
    first, second = (data.draw(st.integers(0, len(actions) - 1)) for _ in range(2))
    actions.insert(second, actions.pop(first))
    changed = (*schedule.actions[:process], tuple(actions), *schedule.actions[process + 1 :])
    moved = replace(schedule, actions=changed)
    try:
        executor = _Executor(moved, 10**6, random.Random(seed))
        can_run = executor.run() and executor.has_followed(schedule)
    except LookupError:
        can_run = False
    if can_run:
        check(moved)
    else:
        with pytest.raises(InvariantViolation):
            check(moved)


@given(_schedules(), st.data())
def test_a_schedule_with_an_action_too_few_or_too_many_is_refused(schedule: Schedule, data: st.DataObject) -> None:
    process = data.draw(st.integers(0, schedule.layout.processes - 1))
    actions = list(schedule.actions[process])
    place = data.draw(st.integers(0, len(actions) - 1))
    action = actions[place]
    if data.draw(st.booleans()):
        del actions[place]
        problem = f"{action} is missing"
    else:
        actions.insert(data.draw(st.integers(0, len(actions))), action)
        problem = f"{action}: it has been done before"
    changed = (*schedule.actions[:process], tuple(actions), *schedule.actions[process + 1 :])
    with pytest.raises(InvariantViolation, match=problem):
        check(replace(schedule, actions=changed))


@given(_schedules(), st.integers(1, 5), st.integers(1, 5))
def test_time_is_spent_working_or_waiting_and_actions_do_not_overlap(
    schedule: Schedule, forward: int, backward: int
) -> None:
    stages = schedule.layout.stages
    timeline = simulate(schedule, [forward] * stages, [backward] * stages)
    for actions in schedule.actions:
        for earlier, later in pairwise(actions):
            assert timeline.ends[earlier] <= timeline.starts[later]
    for action, start in timeline.starts.items():
        source = schedule.layout.source(action)
        assert source is None or timeline.ends[source] <= start
    work = schedule.layout.microbatches * schedule.layout.chunks * (forward + backward)
    assert timeline.bubble == pytest.approx(1 - work / timeline.length)
