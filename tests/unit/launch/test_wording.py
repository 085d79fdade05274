"""Lines of text for people: quantities at their edges, columns, who was lost, how it ended."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast import events as e
from holdfast.launch.wording import TAG_COLUMNS, aligned, describe, duration, ending, percent, size, span, table

_AT = "12:34:56"


@pytest.mark.parametrize(
    ("n_bytes", "words"),
    [
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (999_949_999, "999.9 MB"),
        (999_950_000, "1.0 GB"),
        (10**15, "1.0 PB"),
        (10**18, "1000.0 PB"),  # the last unit there is
    ],
)
def test_a_size_changes_its_unit_where_it_would_be_rounded_to_a_thousand(n_bytes: int, words: str) -> None:
    assert size(n_bytes) == words


@given(st.integers(1000, 10**17))
def test_a_size_is_exact_to_its_last_digit(n_bytes: int) -> None:
    number, unit = size(n_bytes).split()
    scale = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}[unit]
    assert abs(float(number) * scale - n_bytes) <= 0.0501 * scale
    assert unit == "PB" or float(number) < 1000.0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0.00 s"),
        (9.994, "9.99 s"),
        (9.996, "10.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (3599.4, "59 min 59 s"),
        (3600.4, "1 h 00 min"),
        (90_000.0, "25 h 00 min"),
    ],
)
def test_a_duration_is_never_rounded_to_sixty_of_anything(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_values_stand_below_each_other_also_those_of_several_lines() -> None:
    assert aligned({"run": "r1\nwith torch", "devices": "3 nodes"}, indent="  ") == [
        "  run     r1",
        "          with torch",
        "  devices 3 nodes",
    ]
    assert aligned({}) == []


def test_cells_of_a_table_stand_below_each_other_and_nothing_trails() -> None:
    rows = [["", "AT", "STATE"], ["longer", "1", ""], ["a\x1b", "12345", "good"]]
    assert table(rows, "  ") == ["          AT     STATE", "  longer  1", "  a\\x1b   12345  good"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (2e-5, "0.02 ms"),
        (0.0997, "99.7 ms"),
        (0.5, "500 ms"),
        (0.9999, "1,000 ms"),
        (1.0, "1 s"),
        (59.4, "59.4 s"),
        (90, "1.5 min"),
        (3e5, "3.47 d"),
        (365.25 * 86400 * 1234, "1,234 y"),
        (math.inf, "never"),
    ],
)
def test_a_span_has_three_digits_in_the_largest_unit_that_fits(seconds: float, words: str) -> None:
    assert span(seconds) == words


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.889, "88.9 %"),
        (0.5, "50.0 %"),
        (0.000028, "0.0028 %"),
        (0.999972, "99.9972 %"),
    ],
)
def test_a_share_shows_two_digits_of_the_smaller_side(share: float, words: str) -> None:
    assert percent(share) == words


def test_the_events_without_words_are_those_that_other_words_tell() -> None:
    kinds = {kind for kind in vars(e).values() if isinstance(kind, type) and issubclass(kind, e.Event)} - {e.Event}
    silent = {e.RunStarted("r1", 1, 3, "fresh"), e.EpochStarted(1, 3, -1), e.RunEnded("finished", 3, 1.0, 0, 0, 0)}
    assert all(describe(event, _AT) == [] for event in silent)
    shown = [
        e.Waiting("waiting for a worker"),
        e.FaultDetected(1, (1,), 1, 77, "killed", "vote", 6, 0.25),
        e.RecoveryPlanned(1, "keeper memory", 6, "it is complete"),
        e.RecoveryDone(1, 2, 7, 1.5, 0, 0, 1, 10, {}),
        e.Protection("full", "all spares are warm"),
        e.WorldChanged(2, 3, 2, "node(s) 1 are not ready after 10 s"),
        e.CheckpointWritten(6, "step-00000006", 1000, 0.5),
        e.CheckpointRejected("step-00000006", "damaged"),
        e.Evaluated(6, 2.5, 1),
        e.Generated(6, "def"),
        e.FaultInjected("sigkill", "worker", 1, 20, "step.begin", "chaos.faults: sigkill rank=1 step=20"),
        e.SnapshotCost(9, 0.001, 0.003, 0.012, 0.02),
        e.ProtectionFailed(1, "no memory for parity"),
        e.SnapshotFailed(2, 7, "the disk is full"),
        e.BricksHeld(1, 4096, {"0": 4096, "1": 4096}, 4096, 4096, 4096, {"0": 512, "1": 500}),
        e.BricksRestored(1, {"/a/base": "1e9c8503" * 8, "/a/task": "00" * 32}, 4096, "it cannot be read"),
        e.StageHealed(2, 8, 50, 0.5, 0.25, "lower"),
        e.StagesMeasured(7, {"1": 0.25}),
        e.StageRebuilt(2, 7, "checkfree", [1, 3], 0.25, 4096),
        e.StepLeftOut(7, "loss=nan at step 7 is not finite", 6),
        e.RankLate(2, "forward_backward", 7, 12.5),
        e.PreemptionNoticed(1, "ab12", 30.0, "Ray drains it"),
        e.StopRequested("SIGINT received"),
        e.WorldChanged(3, 3, 2, "node 1 did not come back"),
    ]
    assert {type(event) for event in [*silent, *shown]} == kinds
    for event in shown:
        first, *more = describe(event, _AT)
        assert first[:TAG_COLUMNS].strip().isupper() and first[TAG_COLUMNS - 1] == " "
        assert all(line.startswith(" " * TAG_COLUMNS) for line in more)
    (world,) = describe(e.WorldChanged(2, 3, 2, "node(s) 1 are not ready after 10 s"), _AT)
    assert world == f"WORLD {_AT} from 3 ranks to 2: node(s) 1 are not ready after 10 s"
    assert describe(e.Evaluated(6, 2.5, 1), _AT) == [f"EVAL  {_AT} step 6: 2.500 bits/byte over 1 window"]


@pytest.mark.parametrize(
    ("ranks", "node", "pid", "who"),
    [
        ((1,), 1, 77, "rank 1 lost (node 1, pid 77): "),
        ((1,), None, 77, "rank 1 lost (pid 77): "),
        ((0, 1, 3), None, None, "ranks 0-1, 3 lost: "),
        ((), 2, None, "node 2 lost: "),
        ((), None, None, ""),
    ],
)
def test_a_fault_says_who_was_lost(ranks: tuple[int, ...], node: int | None, pid: int | None, who: str) -> None:
    first, second = describe(e.FaultDetected(1, ranks, node, pid, "no heartbeat", "", 1200, 0.25), _AT)
    assert first == f"FAULT {_AT} {who}no heartbeat"
    assert second == "      last step 1,200, detected after 0.25 s"


def test_a_fault_without_a_cause_says_that() -> None:
    assert describe(e.FaultDetected(1, (), None, None, "", "", 0, 0.0), _AT)[0] == f"FAULT {_AT} no reason given"


def test_a_resume_a_recovery_and_a_new_beginning_are_told_apart() -> None:
    first_words = [
        describe(e.RecoveryPlanned(number, "disk", version, "why", ("step 9: damaged",)), _AT)
        for number, version in ((0, 5), (1, 5), (1, -1))
    ]
    assert [lines[0].partition(f" {_AT} ")[::2] for lines in first_words] == [
        ("START", "resume from step 5 (disk): why"),
        ("PLAN ", "go on from step 5 (disk): why"),
        ("PLAN ", "start over with a fresh model: why"),
    ]
    assert {lines[1] for lines in first_words} == {"      not used: step 9: damaged"}


@pytest.mark.parametrize(
    ("event", "bits_per_byte", "head"),
    [
        (
            e.RunEnded("finished", 300, 75.0, 1, 2, 0, "the goal is reached"),
            2.4567,
            "END   finished (exit code 0): step 300 of 300 in 1 min 15 s; 2.457 bits/byte; 1 fault, 2 steps lost",
        ),
        (e.RunEnded("stopped", -1, 1.0, 0, 0, 143, "SIGTERM"), None, "END   stopped (exit code 143): no step saved"),
    ],
)
def test_the_end_is_one_line_with_what_is_known(event: e.RunEnded, bits_per_byte: float | None, head: str) -> None:
    lines = ending(event, total_steps=300, bits_per_byte=bits_per_byte, facts={"run": "/r"}, next_command="again")
    assert lines[0].startswith(head)
    assert lines[-1] == "NEXT  again"
    assert any("why" in line for line in lines) == (event.outcome != "finished")


def test_what_was_broken_on_purpose_is_told_apart_from_faults() -> None:
    event = e.RunEnded("finished", 300, 75.0, 1, 2, 0, "the goal is reached")
    lines = ending(event, total_steps=300, bits_per_byte=None, facts={}, next_command="", injected=3)
    assert lines[0].endswith("; 1 fault, 2 steps lost; 3 injected on purpose")
    strike = e.FaultInjected("sigkill", "worker", 1, 20, "step.begin", "chaos.faults: sigkill rank=1 step=20")
    assert describe(strike, _AT) == [f"CHAOS {_AT} step 20, on purpose: chaos.faults: sigkill rank=1 step=20"]


def test_a_value_that_is_no_number_is_shown_as_it_is() -> None:
    lines = describe(e.Evaluated(6, math.nan, 96), _AT)
    assert lines == [f"EVAL  {_AT} step 6: nan bits/byte over 96 windows"]


@pytest.mark.parametrize(
    ("preemptions", "allowed", "words"),
    [
        (0, 0, "failures 1/10"),
        (2, 0, "failures 1/10 (preemptions 2, no limit)"),
        (2, 3, "failures 1/10 (preemptions 2/3)"),
    ],
)
def test_preemptions_stand_beside_failures_with_a_limit_of_their_own(
    preemptions: int, allowed: int, words: str
) -> None:
    done = e.RecoveryDone(3, 2, 7, 1.5, 0, 0, 1, 10, {}, preemptions, allowed)
    (line,) = describe(done, _AT)
    assert line.endswith(f"; {words}")


def test_a_notice_and_what_follows_from_it_are_no_faults_to_the_eye() -> None:
    assert describe(e.PreemptionNoticed(1, "ab12", 30.0, "Ray drains it"), _AT) == [
        f"DRAIN {_AT} node 1 will be taken away within 30.0 s: Ray drains it"
    ]
    assert describe(e.PreemptionNoticed(1, "ab12", None, "spot"), _AT) == [
        f"DRAIN {_AT} node 1 will be taken away soon: spot"
    ]
    fault = e.FaultDetected(1, (1,), 1, 77, "its host went away", "vote", 6, 0.25, is_preemption=True)
    assert describe(fault, _AT)[0].startswith(f"DRAIN {_AT} rank 1 lost (node 1, pid 77): its host")
    ended = e.RunEnded("stopped", 7, 1.0, 3, 0, 75, "SIGTERM received", preemptions=2)
    (head, *_) = ending(ended, total_steps=9, bits_per_byte=None, facts={}, next_command="")
    assert "3 faults, 0 steps lost, 2 preemptions of these" in head
