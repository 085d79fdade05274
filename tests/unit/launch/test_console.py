"""The console: exact lines in a pipe, the same lines above a bar on a terminal, and nothing that can stop a run."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast import events as e
from holdfast.launch import console as module
from holdfast.launch.console import Console
from holdfast.launch.wording import clean, duration, size
from holdfast.types import StepReport

_NOW_S = 1_800_000_000.0
_AT = time.strftime("%H:%M:%S", time.localtime(_NOW_S))

_FAULT = e.FaultDetected(1, (1,), 1, 4242, "killed by SIGKILL (pid 4242)", "forward_backward", 151, 0.04)
_DONE = e.RecoveryDone(
    1, 2, 151, 1.31, 1, 0, 1, 10, {"detect": 0.04, "regroup": 0.3, "restore": 0.4, "first_step": 0.61}
)
_END = e.RunEnded("finished", 2000, 192.0, 1, 1, 0, "the goal is reached")


def _report(step: int, *, epoch: int = 1, tokens: int | None = None, committed: int | None = None) -> StepReport:
    return StepReport(
        step=step,
        epoch=epoch,
        loss=1.84211,
        bits_per_byte=2.6581,
        learning_rate=3e-4,
        grad_norm=0.8312,
        tokens=step * 4120 if tokens is None else tokens,
        step_s=0.1,
        stall_s=0.0,
        copy_bytes=0,
        committed=step - 1 if committed is None else committed,
    )


def _console(stream: io.TextIOBase, *, is_terminal: bool = False, log_every: int = 10, total: int = 2000) -> Console:
    return Console(
        total_steps=total,
        log_every=log_every,
        stream=stream,  # type: ignore[arg-type]  # StringIO and TextIOWrapper are text streams in all but name
        is_terminal=is_terminal,
        clock=lambda: _NOW_S,
    )


def _lines(*happenings: e.Event | StepReport, is_terminal: bool = False, log_every: int = 10) -> list[str]:
    out = io.StringIO()
    with _console(out, is_terminal=is_terminal, log_every=log_every) as console:
        for happening in happenings:
            if isinstance(happening, StepReport):
                console.step(happening)
            else:
                console.emit(happening)
    return _screen(out.getvalue()) if is_terminal else out.getvalue().splitlines()


def _screen(output: str) -> list[str]:
    """What a terminal of endless width shows in the end."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.", output, re.DOTALL):
        if token == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif token == "\r":
            column = 0
        elif token == "\x1b[2K":
            lines[row] = ""
        elif token == "\x1b[1A":
            row -= 1
        elif not re.fullmatch(r"\x1b\[[0-9;]*m", token):
            assert token.isprintable(), f"{token!r} is no business of a log"
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + 1 :]
            column += 1
    while lines and not lines[-1]:
        lines.pop()
    return lines


# -- lines ------------------------------------------------------------------------------------------------------------


def test_the_step_line_has_fixed_keys_in_fixed_order() -> None:
    assert _lines(_report(1200)) == [
        "step 1,200 loss 1.8421 bpb 2.658 lr 3.0e-04 gnorm 0.83 tok/s 41,200 snap_age 1 fails 0"
    ]


def test_memory_is_one_word() -> None:
    assert " mem 1.1G snap_age" in _lines(replace(_report(10), memory_bytes=1_130_000_000))[0]
    assert " mem 512.0M snap_age" in _lines(replace(_report(10), memory_bytes=512_000_000))[0]


def test_the_step_line_leaves_out_what_is_not_known() -> None:
    assert "snap_age" not in _lines(_report(10, committed=-1))[0]


def test_steps_are_printed_every_log_every_and_at_the_end() -> None:
    printed = _lines(*(_report(step) for step in range(1971, 2001)), log_every=20)
    assert [line.split()[1] for line in printed] == ["1,980", "2,000"]


def test_a_loss_that_is_not_a_number_is_shown_as_it_is() -> None:
    shown = _lines(replace(_report(10), loss=float("nan"), grad_norm=float("inf")))
    assert "loss nan" in shown[0]
    assert "gnorm inf" in shown[0]


def test_replayed_and_missed_steps_do_not_confuse_the_rate() -> None:
    steps = [*range(1, 16), *range(8, 13), 17, *range(18, 41)]
    printed = _lines(*(_report(step) for step in steps))
    assert {line.split(" tok/s ")[1].split()[0] for line in printed} == {"41,200"}


def test_a_resumed_run_knows_its_rate_at_the_first_step() -> None:
    assert "tok/s 41,200" in _lines(_report(1510), log_every=1)[0]


def test_the_fault_block() -> None:
    plan = e.RecoveryPlanned(1, "keeper memory", 150, "version 150 is complete", ("version 151: torn at rank 1",))
    done = "repaired in 1.31 s, 1 step lost, 0 B moved; failures 1/10"
    assert _lines(_FAULT, plan, _DONE, _report(160)) == [
        f"FAULT {_AT} rank 1 lost (node 1, pid 4242): killed by SIGKILL (pid 4242)",
        "      in forward_backward, last step 151, detected after 0.04 s",
        f"PLAN  {_AT} go on from step 150 (keeper memory): version 150 is complete",
        "      not used: version 151: torn at rank 1",
        f"DONE  {_AT} resumed at step 151: detected after 0.04 s, {done}",
        "      of which regroup 0.30 s, restore 0.40 s, first step 0.61 s",
        "step 160 loss 1.8421 bpb 2.658 lr 3.0e-04 gnorm 0.83 tok/s 41,200 snap_age 1 fails 1",
    ]


def test_a_traceback_is_shown_behind_a_bar_and_shortened() -> None:
    cause = "ValueError: boom\n" + "\n".join(f"line {n}" for n in range(40))
    head, where, *traceback = _lines(e.FaultDetected(2, (0, 1, 3), None, None, cause, "", 7, 0.0))
    assert head == f"FAULT {_AT} ranks 0-1, 3 lost: ValueError: boom"
    assert where == "      last step 7, detected after 0.00 s"
    assert traceback == [f"      | line {n}" for n in range(28, 40)]


def test_a_fault_without_a_lost_process_names_its_cause_only() -> None:
    cause = "no process was lost, but the collective broke at ranks 0-2: timeout"
    assert _lines(e.FaultDetected(1, (), None, None, cause, "", 7, 0.0))[0] == f"FAULT {_AT} {cause}"
    assert _lines(e.FaultDetected(1, (), 2, None, "", "", 7, 0.0))[0] == f"FAULT {_AT} node 2 lost: no reason given"


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            e.RecoveryPlanned(0, "disk", 1500, "it is the newest"),
            "START {} resume from step 1,500 (disk): it is the newest",
        ),
        (e.RecoveryPlanned(2, "fresh", -1, "nothing else"), "PLAN  {} start over with a fresh model: nothing else"),
        (e.Waiting("waiting for 8 GPUs, have 6, 40 s"), "WAIT  {} waiting for 8 GPUs, have 6, 40 s"),
        (e.Protection("reduced", "0 of 1 spares"), "GUARD {} protection is reduced: 0 of 1 spares"),
        (
            e.CheckpointWritten(200, "checkpoints/step-200", 5_200_000, 0.314),
            "SAVED {} checkpoint of step 200: 5.2 MB in 0.31 s, checkpoints/step-200",
        ),
        (e.CheckpointRejected("step-300", "disk full"), "SKIP  {} checkpoint step-300: disk full"),
        (e.Evaluated(2000, 2.31, 96), "EVAL  {} step 2,000: 2.310 bits/byte over 96 windows"),
        (e.StopRequested("SIGTERM"), "STOP  {} SIGTERM"),
    ],
)
def test_every_other_event_is_one_line(event: e.Event, line: str) -> None:
    assert _lines(event) == [line.format(_AT)]


def test_what_the_banner_says_already_is_not_repeated() -> None:
    assert _lines(e.RunStarted("r", 1, 3, "fresh"), e.EpochStarted(1, 3, -1)) == []


def test_the_banner_is_aligned_and_printed_once() -> None:
    out = io.StringIO()
    with _console(out) as console:
        for _ in range(2):
            console.banner({"run": "brisk-otter", "devices": "2 nodes\n2 ranks"})
    assert out.getvalue() == "run     brisk-otter\ndevices 2 nodes\n        2 ranks\n"


# -- the end ----------------------------------------------------------------------------------------------------------


def test_the_end_block_comes_last_whatever_is_told_after_it() -> None:
    out = io.StringIO()
    with _console(out) as console:
        console.emit(_END)
        console.emit(e.Evaluated(2000, 2.31, 96))
        console.conclude({"weights": "/runs/x/export"}, next_command="holdfast train run_id=x trainer.max_steps=4000")
    assert out.getvalue().splitlines()[1:] == [
        "END   finished (exit code 0): step 2,000 of 2,000 in 3 min 12 s; 2.310 bits/byte; 1 fault, 1 step lost",
        "      weights /runs/x/export",
        "NEXT  holdfast train run_id=x trainer.max_steps=4000",
    ]


def test_the_end_of_a_failed_run_says_why_what_is_saved_and_what_to_type() -> None:
    out = io.StringIO()
    with _console(out) as console:
        console.emit(e.CheckpointWritten(40, "checkpoints/step-40", 10, 0.1))
        console.emit(e.RunEnded("failed", 41, 12.0, 3, 2, 1, "recovery.max_failures=2 is used up"))
        console.conclude({}, next_command="holdfast train run_id=x")
    assert out.getvalue().splitlines()[1:] == [
        "END   failed (exit code 1): step 41 of 2,000 in 12.0 s; 3 faults, 2 steps lost",
        "      why   recovery.max_failures=2 is used up",
        "      saved checkpoint of step 40, checkpoints/step-40",
        "NEXT  holdfast train run_id=x",
    ]


def test_a_failed_run_that_saved_nothing_says_so() -> None:
    assert "      saved no checkpoint was written in this attempt" in _lines(e.RunEnded("failed", 0, 1.0, 1, 0, 1, "x"))


def test_without_an_end_nothing_is_said_about_it() -> None:
    assert _lines() == []


# -- terminal ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


_STORY: Sequence[e.Event | StepReport] = (
    *(_report(step) for step in range(1971, 1992)),
    _FAULT,
    e.RecoveryPlanned(1, "keeper memory", 1990, "complete"),
    *(_report(step, epoch=2) for step in range(1991, 2001)),
    _DONE,
    e.Generated(2000, "def f(x):\n\treturn \x1b[2J x"),
    _END,
)


@pytest.mark.usefixtures("terminal")
def test_a_terminal_is_left_with_the_same_lines_as_a_pipe() -> None:
    assert _lines(*_STORY, is_terminal=True) == _lines(*_STORY)


@pytest.mark.usefixtures("terminal")
def test_the_bar_shows_where_the_run_is_even_after_a_rollback() -> None:
    out = io.StringIO()
    console = _console(out, is_terminal=True)
    for report in (_report(1989), _report(1990), _report(1985, epoch=2)):
        console.step(report)
    console.emit(e.Waiting("something"))
    assert re.search(r"step 1,985/2,000 .* loss 1.8421 bpb 2.658 tok/s 41,200 ETA 1.50 s", _screen(out.getvalue())[-1])
    console.close()
    assert not any("ETA" in line for line in _screen(out.getvalue()))


@pytest.mark.usefixtures("terminal")
def test_the_cursor_stays_visible_for_the_case_that_the_driver_is_killed() -> None:
    out = io.StringIO()
    with _console(out, is_terminal=True) as console:
        console.step(_report(1))
    assert "\x1b[?25l" not in out.getvalue()


@pytest.mark.usefixtures("terminal")
def test_a_step_after_closing_brings_no_bar_back() -> None:
    out = io.StringIO()
    console = _console(out, is_terminal=True)
    console.step(_report(1))
    console.close()
    console.step(_report(2))
    console.close()
    assert _screen(out.getvalue()) == []


@pytest.mark.usefixtures("terminal")
def test_stdout_and_stderr_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    errors = sys.stderr
    with Console(total_steps=9, log_every=5, is_terminal=True) as console:
        console.step(_report(1))
        print("a stray line")  # what a library may do
    assert (sys.stdout, sys.stderr) == (out, errors)
    assert _screen(out.getvalue()) == ["a stray line"]


def test_a_pipe_gets_no_control_characters_though_colour_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    with Console(total_steps=9, log_every=1, stream=out) as console:
        console.step(_report(1))
        console.emit(_FAULT)
    assert "\x1b" not in out.getvalue()


# -- hostile text -----------------------------------------------------------------------------------------------------


def test_generated_text_cannot_reach_the_terminal_or_pass_for_our_lines() -> None:
    text = "def f():\n\treturn 1\x1b[2J\x07\r\x9b2J \u202e\udc80\nEND   finished"
    assert _lines(e.Generated(5, text)) == [
        f"TEXT  {_AT} written by the model at step 5:",
        "      | def f():",
        "      |     return 1\\x1b[2J\\x07\\r\\x9b2J \\u202e\\udc80",
        "      | END   finished",
    ]


def test_a_long_line_of_text_stays_inside_the_frame() -> None:
    assert [len(line) for line in _lines(e.Generated(5, "x" * 250))[1:]] == [108, 108, 58]


@given(st.text())
def test_whatever_the_text_only_printable_lines_come_out(text: str) -> None:
    fault = e.FaultDetected(1, (1,), None, None, text, text, 1, 0.0)
    for line in _lines(e.Generated(1, text), fault, e.Waiting(text), e.RunEnded("failed", 1, 1.0, 0, 0, 1, text)):
        assert line.isprintable()
        assert re.match(r"      |(TEXT|FAULT|WAIT|END)\b", line)


@given(st.text())
def test_clean_text_is_one_printable_line(text: str) -> None:
    assert clean(text).isprintable()


# -- a display never stops a run --------------------------------------------------------------------------------------


def _everything(console: Console) -> None:
    with console:
        console.banner({"run": "x"})
        for happening in _STORY:
            if isinstance(happening, StepReport):
                console.step(happening)
            else:
                console.emit(happening)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_broken_pipe_silences_the_console(is_terminal: bool, caplog: pytest.LogCaptureFixture) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:  # closing flushes, and would fail if the pipe were still there
        _everything(_console(stream, is_terminal=is_terminal))
    warned = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert warned == ["nothing more is shown on the console ([Errno 32] Broken pipe); events.jsonl has it all"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_closed_stream_silences_the_console(is_terminal: bool) -> None:
    stream = io.StringIO()
    stream.close()
    _everything(_console(stream, is_terminal=is_terminal))


def test_a_full_disk_costs_lines_and_the_output_goes_on_once_there_is_room() -> None:
    class Disk(io.StringIO):
        is_full = True

        def flush(self) -> None:
            if self.is_full:
                raise OSError(28, "No space left on device")

    disk = Disk()
    console = _console(disk)
    console.emit(e.Waiting("one"))
    disk.is_full = False
    console.emit(e.Waiting("two"))
    assert disk.getvalue().splitlines()[-1] == f"WAIT  {_AT} two"


def test_a_disk_that_stays_full_does_not_spoil_the_end() -> None:
    with Path("/dev/full").open("w") as stream:
        _everything(_console(stream))


@pytest.mark.parametrize("is_terminal", [False, True])
def test_an_encoding_that_lacks_a_character_gets_its_escape(is_terminal: bool) -> None:
    raw = io.BytesIO()
    with contextlib.closing(io.TextIOWrapper(raw, encoding="ascii")) as stream:
        with _console(stream, is_terminal=is_terminal) as console:
            console.step(_report(1))
            console.emit(e.Waiting("für Elise"))
        assert b"f\\xfcr Elise" in raw.getvalue()


def test_a_mistake_of_ours_is_logged_once_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(event: e.Event, at: str) -> list[str]:
        raise RuntimeError("a bug")

    monkeypatch.setattr(module, "describe", broken)
    with _console(io.StringIO()) as console:
        console.emit(_FAULT)
        console.emit(_FAULT)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_a_reader_that_leaves_does_not_change_the_exit_code() -> None:
    program = (
        "from holdfast.launch.console import Console; from holdfast.events import Waiting\n"
        "with Console(total_steps=1, log_every=1) as console:\n"
        "    [console.emit(Waiting('x' * 1000)) for _ in range(200)]\n"
        "print('unheard')"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        complaints = process.stderr.read().decode()
        assert (process.wait(30), complaints.count("\n")) == (0, 1), complaints


# -- quantities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0.00 s"),
        (9.994, "9.99 s"),
        (9.996, "10.0 s"),
        (59.9, "59.9 s"),
        (59.96, "1 min 00 s"),
        (192, "3 min 12 s"),
        (3599.6, "1 h 00 min"),
        (7380, "2 h 03 min"),
    ],
)
def test_durations_are_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("n_bytes", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (5_200_000, "5.2 MB"), (3 * 10**12, "3.0 TB")]
)
def test_sizes_are_words(n_bytes: int, words: str) -> None:
    assert size(n_bytes) == words


@pytest.mark.parametrize("is_terminal", [False, True])
def test_every_line_is_in_the_drivers_log_too(is_terminal: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Ray's own log of a job goes with its cluster."""
    with caplog.at_level(logging.INFO, logger="holdfast"):
        shown = _lines(_report(10), _report(11), _FAULT, _END, is_terminal=is_terminal)
    logged = [record.message.removeprefix("| ") for record in caplog.records if record.message.startswith("| ")]
    assert logged == [line for line in shown if line]
    assert any(line.startswith("step 10 ") for line in logged)
