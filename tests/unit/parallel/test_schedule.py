"""Schedules against the textbook's, written down independently, and broken ones against the checker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from holdfast.errors import ConfigurationError, InvariantViolation
from holdfast.parallel.schedule import Action, Kind, Layout, Schedule, gpipe, interleaved, one_f_one_b
from holdfast.parallel.schedule_check import check, render, simulate

_SIZES = [(p, m) for p in (1, 2, 3, 5, 8) for m in (1, 2, 5, 8, 19)]
_CHUNKED = [(p, v, p * groups) for p in (1, 2, 3, 6) for v in (2, 3) for groups in (1, 2, 5)]
_RATIOS = [(1, 1), (1, 2), (1, 3)]


def _actions(text: str) -> tuple[Action, ...]:
    """``F0 F1.2``: the forward of microbatch 0 at stage 0, that of microbatch 1 at stage 2."""
    parts = [word[1:].partition(".") for word in text.split()]
    kinds = [Kind(word[0]) for word in text.split()]
    return tuple(
        Action(kind, int(microbatch), int(stage or 0))
        for kind, (microbatch, _, stage) in zip(kinds, parts, strict=True)
    )


def _pattern(warm_up: int, forwards: Sequence[Action], backwards: Sequence[Action]) -> tuple[Action, ...]:
    """So many forwards, then one forward and one backward in turn, then the backwards that are left."""
    ahead = min(warm_up, len(forwards))
    actions = list(forwards[:ahead])
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        actions += [forward, backward]
    return (*actions, *backwards[len(forwards) - ahead :])


@pytest.mark.parametrize(("processes", "microbatches"), _SIZES)
def test_1f1b_is_the_textbooks(processes: int, microbatches: int) -> None:
    """arXiv 2104.04473, section 2.2.1 and figure 4 (top)."""
    for process, actions in enumerate(one_f_one_b(processes, microbatches).actions):
        forwards = [Action(Kind.FORWARD, m, process) for m in range(microbatches)]
        backwards = [Action(Kind.BACKWARD, m, process) for m in range(microbatches)]
        assert actions == _pattern(processes - process - 1, forwards, backwards)


@pytest.mark.parametrize(("processes", "microbatches"), _SIZES)
def test_gpipe_is_the_textbooks(processes: int, microbatches: int) -> None:
    for process, actions in enumerate(gpipe(processes, microbatches).actions):
        assert actions == tuple(Action(kind, m, process) for kind in Kind for m in range(microbatches))


@pytest.mark.parametrize(("processes", "chunks", "microbatches"), _CHUNKED)
def test_interleaved_1f1b_is_megatrons(processes: int, chunks: int, microbatches: int) -> None:
    """arXiv 2104.04473, section 2.2.2; the rule is that of Megatron-LM's published schedule."""

    def passes(process: int, kind: Kind) -> list[Action]:
        order = range(chunks) if kind is Kind.FORWARD else range(chunks)[::-1]
        return [
            Action(kind, first + member, chunk * processes + process)
            for first in range(0, microbatches, processes)
            for chunk in order
            for member in range(processes)
        ]

    for process, actions in enumerate(interleaved(processes, chunks, microbatches).actions):
        warm_up = 2 * (processes - process - 1) + (chunks - 1) * processes
        assert actions == _pattern(warm_up, passes(process, Kind.FORWARD), passes(process, Kind.BACKWARD))


@pytest.mark.parametrize("ratio", _RATIOS)
@pytest.mark.parametrize(("processes", "microbatches"), _SIZES)
def test_the_bubble_has_its_closed_form(processes: int, microbatches: int, ratio: tuple[int, int]) -> None:
    """(p - 1) / (m + p - 1) of the time: arXiv 2104.04473, section 2.2.1, as a share of the whole."""
    forward, backward = ([cost] * processes for cost in ratio)
    for schedule in (gpipe(processes, microbatches), one_f_one_b(processes, microbatches)):
        timeline = simulate(schedule, forward, backward)
        assert timeline.bubble == pytest.approx((processes - 1) / (microbatches + processes - 1))
        assert timeline.length == sum(ratio) * (microbatches + processes - 1)


@pytest.mark.parametrize("ratio", _RATIOS)
@pytest.mark.parametrize(("processes", "chunks", "microbatches"), _CHUNKED)
def test_interleaving_divides_the_bubble(
    processes: int, chunks: int, microbatches: int, ratio: tuple[int, int]
) -> None:
    """The bubble is v times smaller: arXiv 2104.04473, section 2.2.2."""
    forward, backward = ([cost] * processes * chunks for cost in ratio)
    timeline = simulate(interleaved(processes, chunks, microbatches), forward, backward)
    assert timeline.bubble == pytest.approx((processes - 1) / (chunks * microbatches + processes - 1))


def test_a_slow_stage_sets_the_pace() -> None:
    timeline = simulate(one_f_one_b(3, 5), [1, 4, 1], [2, 8, 2])
    assert timeline.length == 1 + 5 * 12 + 2
    assert timeline.bubble == pytest.approx(1 - 5 * (3 + 12 + 3) / (3 * 63))


@pytest.mark.parametrize("ratio", _RATIOS)
@pytest.mark.parametrize("microbatches", [2, 4, 6, 8, 16, 32])
@pytest.mark.parametrize("processes", [4, 5, 6, 8, 12])
def test_swapped_routes_take_no_longer(processes: int, microbatches: int, ratio: tuple[int, int]) -> None:
    forward, backward = ([cost] * processes for cost in ratio)
    for build in (gpipe, one_f_one_b):
        swapped = simulate(build(processes, microbatches, swapped=True), forward, backward)
        assert swapped.length <= simulate(build(processes, microbatches), forward, backward).length


@pytest.mark.parametrize("ratio", _RATIOS)
@pytest.mark.parametrize(("processes", "chunks"), [(4, 2), (5, 3), (8, 2)])
def test_swapped_and_interleaved_loses_little(processes: int, chunks: int, ratio: tuple[int, int]) -> None:
    forward, backward = ([cost] * processes * chunks for cost in ratio)
    swapped = simulate(interleaved(processes, chunks, 8 * processes, swapped=True), forward, backward)
    assert swapped.length <= 1.1 * simulate(interleaved(processes, chunks, 8 * processes), forward, backward).length


def test_swapped_routes_are_those_of_the_paper() -> None:
    """arXiv 2506.15461, section 4.3: both pairs at once, every other microbatch."""
    assert one_f_one_b(4, 4, swapped=True).layout.routes == ((0, 1, 2, 3), (1, 0, 3, 2)) * 2
    assert gpipe(7, 2, swapped=True).layout.routes[1] == (1, 0, 2, 3, 4, 6, 5)
    assert interleaved(2, 3, 2, swapped=True).layout.routes[1] == (1, 0, 2, 3, 5, 4)


def test_with_swapped_routes_two_stages_need_the_embedding_and_two_the_head() -> None:
    layout = one_f_one_b(5, 2, swapped=True).layout
    assert (layout.first_stages, layout.last_stages) == ({0, 1}, {3, 4})
    assert (gpipe(5, 2).layout.first_stages, gpipe(5, 2).layout.last_stages) == ({0}, {4})


@pytest.mark.parametrize(
    ("action", "receive_from", "send_to", "is_first", "is_last"),
    [
        ("F0.0", None, 1, True, False),
        ("B0.0", 1, None, True, False),
        ("F0.3", 2, None, False, True),
        ("B0.3", None, 2, False, True),
        ("F1.0", 1, 3, False, False),
        ("B1.0", 3, 1, False, False),
        ("F1.1", None, 0, True, False),
        ("B1.2", None, 3, False, True),
        ("F1.2", 3, None, False, True),
    ],
)
def test_peers_and_ends_follow_the_route(
    action: str, receive_from: int | None, send_to: int | None, is_first: bool, is_last: bool
) -> None:
    step = one_f_one_b(4, 2, swapped=True).step(*_actions(action))
    assert (step.receive_from, step.send_to) == (receive_from, send_to)
    assert (step.is_first, step.is_last) == (is_first, is_last)


def test_a_process_hands_over_to_itself_where_a_swap_brings_its_chunks_together() -> None:
    schedule = interleaved(2, 3, 2, swapped=True)
    step = schedule.step(*_actions("F1.2"))
    assert (step.receive_from, step.send_to, step.chunk) == (0, 1, 1)
    assert [s.action for s in schedule.steps(0)] == list(schedule.actions[0])


def test_limits_of_memory() -> None:
    assert check(gpipe(3, 5)).peak_per_stage == (5, 5, 5)
    assert check(one_f_one_b(4, 9)).peak_per_stage == (4, 3, 2, 1)
    assert check(one_f_one_b(6, 32, swapped=True)).peak_per_stage == (12, 11, 8, 6, 2, 2)
    assert check(interleaved(4, 2, 16)).peak_per_process == (11, 9, 7, 5)


def test_gpipe_needs_no_buffers_and_1f1b_one_message_each_way() -> None:
    """In 1F1B both neighbours send first and receive then."""
    assert check(gpipe(4, 8)).send_slots == 0
    assert check(one_f_one_b(4, 8)).send_slots == 1


def test_a_timeline_shows_who_waits() -> None:
    assert render(one_f_one_b(3, 3)).splitlines() == [
        "p0 F0 F1 F2 .  .  B0 .  B1 .  B2",
        "p1 .  F0 F1 .  B0 F2 B1 .  B2",
        "p2 .  .  F0 B0 F1 B1 F2 B2",
    ]
    assert render(interleaved(2, 2, 2)).splitlines()[1] == "p1 .    F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 B0.0 B1.0"


_PAIR = one_f_one_b(2, 2)
"""F0 F1 B0 B1 on process 0; F0 B0 F1 B1 on process 1."""


def _broken(*processes: str, layout: Layout = _PAIR.layout) -> str:
    with pytest.raises(InvariantViolation) as caught:
        check(Schedule(layout, tuple(map(_actions, processes))))
    return str(caught.value)


def test_the_pair_itself_is_accepted() -> None:
    assert check(Schedule(_PAIR.layout, (_actions("F0 F1 B0 B1"), _actions("F0.1 B0.1 F1.1 B1.1")))).send_slots == 1


def test_a_dropped_action_is_named() -> None:
    assert _broken("F0 F1 B0 B1", "F0.1 F1.1 B1.1").startswith("backward of microbatch 0 at stage 1 is missing")


def test_a_second_forward_is_named() -> None:
    message = _broken("F0 F1 F0 B0 B1", "F0.1 B0.1 F1.1 B1.1")
    assert message == "process 0, action 2: forward of microbatch 0 at stage 0: it has been done before; once is right"


def test_a_backward_before_its_forward_is_named() -> None:
    assert _broken("F0 F1 B0 B1", "B0.1 F0.1 F1.1 B1.1") == (
        "process 1, action 0: backward of microbatch 0 at stage 1 comes before the forward of microbatch 0 at stage 1, "
        "which it needs"
    )


def test_a_process_of_several_chunks_must_keep_their_order() -> None:
    layout = Layout(1, 2, ((0, 1),))
    assert "comes before the forward of microbatch 0 at stage 0" in _broken("F0.1 F0.0 B0.1 B0.0", layout=layout)
    assert "comes before the backward of microbatch 0 at stage 1" in _broken("F0.0 F0.1 B0.0 B0.1", layout=layout)


def test_an_action_of_another_process_is_named() -> None:
    assert _broken("F0 F1 B0 F0.1", "B0.1") == (
        "process 0, action 3: forward of microbatch 0 at stage 1: that stage belongs to process 1"
    )


@pytest.mark.parametrize("action", ["F0.2", "F2.0"])
def test_what_does_not_exist_is_named(action: str) -> None:
    assert "action 1: forward" in _broken(f"F0 {action}", "")


def test_messages_in_another_order_are_named() -> None:
    message = _broken("F0 F1 B0 B1", "F1.1 B1.1 F0.1 B0.1")
    assert message.startswith(
        "message 0 from process 0 to process 1 is the result of forward of microbatch 0 at stage 0, but the receiver "
        "asks at that place for the input of forward of microbatch 1 at stage 1"
    )


def test_two_processes_that_wait_for_each_other_are_shown() -> None:
    message = _broken("F0 B0 F1 B1", "F0.1 F1.1 B0.1 B1.1")
    assert message.splitlines() == [
        (
            "deadlock, however many messages a channel holds: "
            "process 0, action 1: backward of microbatch 0 at stage 0 waits for the backward of microbatch 0 at stage 1"
            "; process 1, action 1: forward of microbatch 1 at stage 1 waits for the forward of microbatch 1 at stage 0"
        ),
        "p0 F0  ?B0",
        "p1 .   F0  ?F1",
    ]
    with pytest.raises(InvariantViolation, match="deadlock"):
        simulate(Schedule(_PAIR.layout, (_actions("F0 B0 F1 B1"), _actions("F0.1 F1.1 B0.1 B1.1"))), [1, 1], [1, 1])


def test_crossed_sends_of_swapped_routes_deadlock() -> None:
    """Each of the first pair waits for the microbatch that the other would start with."""
    schedule = one_f_one_b(4, 2, swapped=True)
    crossed = (_actions("F1 F0 B1 B0"), _actions("F0.1 F1.1 B0.1 B1.1"), *schedule.actions[2:])
    with pytest.raises(InvariantViolation, match=r"process 0, action 0: forward of microbatch 1 at stage 0 waits"):
        check(replace(schedule, actions=crossed))


def test_a_route_must_pass_every_stage() -> None:
    with pytest.raises(InvariantViolation, match=r"route \(0, 0\) of microbatch 1"):
        check(Schedule(Layout(2, 1, ((0, 1), (0, 0))), ((), ())))


def test_every_process_must_have_its_actions() -> None:
    assert _broken("F0 F1 B0 B1") == "2 processes, but actions for 1"


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (lambda: gpipe(0, 0), r"processes=0 must be at least 1\nmicrobatches=0 must be at least 1"),
        (lambda: one_f_one_b(3, 4, swapped=True), "3 pipeline stages cannot be swapped.*at least 4"),
        (lambda: one_f_one_b(4, 5, swapped=True), "microbatches=5 must be even.*try 6"),
        (lambda: interleaved(4, 2, 10), "microbatches=10 must be a multiple of the 4 processes.*try 12"),
        (lambda: interleaved(4, 1, 8), "chunks=1: interleaving needs at least 2"),
    ],
)
def test_what_cannot_be_scheduled_is_explained(build: object, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        build()  # type: ignore[operator]
