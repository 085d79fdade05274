"""``holdfast status``, ``events``, ``watch``: what they say of a run that starts, trains, ends or is damaged."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import rich.console

from holdfast import events as e
from holdfast.errors import ConfigurationError
from holdfast.launch.cli import main
from holdfast.launch.events_command import events
from holdfast.launch.following import views
from holdfast.launch.run_state import state_of
from holdfast.launch.run_view import RunReader
from holdfast.launch.watch_command import screen, sparkline
from tests.support.told import FAULT, PLAN, Told, story

_GOES_ON, _DRIVER_GONE = 3, 4


def _status(capsys: pytest.CaptureFixture[str], told: Told, *words: str) -> dict[str, Any]:
    assert main(["status", str(told.dir.path), "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def _state(told: Told) -> str:
    with told.dir.lock():
        return state_of(RunReader(told.dir, clock=lambda: told.at).view()).word


# -- states -----------------------------------------------------------------------------------------------------------


def test_a_run_goes_through_the_states_of_ray_train(tmp_path: Path) -> None:
    told = Told(tmp_path)
    assert _state(told) == "INITIALIZING"
    told.attempt()
    assert _state(told) == "INITIALIZING"
    assert _state(told.event(e.RunStarted("r1", 1, 3, "fresh"))) == "SCHEDULING"
    assert _state(told.event(e.Waiting("for a worker"))) == "SCHEDULING"
    assert _state(told.event(e.EpochStarted(1, 3, -1))) == "RUNNING"
    assert _state(told.step(1, 1001.0).event(e.Waiting("a node was lost"))) == "RUNNING"
    assert _state(told.event(FAULT).event(PLAN).event(e.EpochStarted(2, 3, 4))) == "RESTARTING"
    assert _state(told.event(e.RecoveryDone(1, 2, 5, 1.0, 0, 0, 1, 10, {}))) == "RUNNING"
    assert _state(told.event(e.WorldChanged(3, 3, 2, "node 1 is gone"), 1010.0)) == "RESIZING"
    assert _state(told.step(2, 1011.0, epoch=3)) == "RUNNING"
    assert _state(told.end(1012.0)) == "FINISHED"
    assert _state(told.attempt()) == "INITIALIZING"  # whatever the attempt before has told


@pytest.mark.parametrize(
    ("outcome", "code", "word"),
    [("finished", 0, "FINISHED"), ("stopped", 75, "ABORTED"), ("failed", 93, "ERRORED"), ("failed", 1, "ERRORED")],
)
def test_the_exit_code_of_a_run_that_has_ended_is_its_own(
    outcome: str, code: int, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = Told(tmp_path).attempt().end(1005.0, outcome, code, reason="because")
    assert main(["status", str(told.dir.path), "--exit-code"]) == code
    assert f"{word}, " in (out := capsys.readouterr().out) and f"because (exit code {code})" in out


def test_the_exit_code_of_a_run_that_has_not_ended_says_whether_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = Told(tmp_path).attempt().event(e.RunStarted("r1", 1, 3, "fresh"))
    with told.dir.lock():
        assert main(["status", str(told.dir.path), "--exit-code"]) == _GOES_ON
    assert main(["status", str(told.dir.path), "--exit-code"]) == _DRIVER_GONE
    assert "ABORTED" in (out := capsys.readouterr().out) and "gone without a word" in out


# -- status -----------------------------------------------------------------------------------------------------------


def test_the_status_of_a_run_that_trains_names_every_tier_and_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = Told(tmp_path).attempt().event(e.RunStarted("r1", 1, 3, "fresh")).event(e.EpochStarted(1, 3, -1))
    for step in range(1, 8):
        told.step(step, 1001.0 + step)
    told.event(e.CheckpointWritten(4, "step-00000004", 4096, 0.5)).event(FAULT).event(PLAN)
    told.event(e.Protection("reduced", "0 of 1 spares are warm"))
    with told.dir.lock():
        found = _status(capsys, told)
        assert main(["status", str(told.dir.path)]) == 0
    text = capsys.readouterr().out
    expected = {
        "run": "r1",
        "attempt": 1,
        "state": "RESTARTING",
        "step": 7,
        "goal": 9,
        "memory_version": 6,
        "parity": 1,
    }
    expected |= {"protection": "reduced", "checkpoint_step": 4, "world": 3, "failures": 1, "failures_allowed": 10}
    assert expected.items() <= found.items()
    assert found["tokens_per_s"] == pytest.approx(10.0) and found["exit_code"] is None
    assert found["last_fault"] == {"time": 1008.0, "cause": "killed by SIGKILL (pid 4711)"}
    for says in (
        "step   7 of 9, ",
        "memory version 6 in the keepers, 1 step(s) old; parity 1 in groups of all nodes, at most 8",
        "0 of 1 spares are warm",
        "disk   checkpoint of step 4, 3 step(s) and ",
        "world  3 ranks",
        "budget failures 1 of 10 in this attempt",
        "rank 1 lost (node 1, pid 4711): killed by SIGKILL (pid 4711)",
        f"driver pid {os.getpid()} on ",
    ):
        assert says in text, text


def test_a_run_that_has_told_nothing_yet_has_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _status(capsys, Told(tmp_path))
    assert (found["step"], found["goal"], found["checkpoint_step"], found["state"]) == (
        None,
        None,
        None,
        "INITIALIZING",
    )


def test_torn_and_foreign_lines_change_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = story(tmp_path)
    whole = _status(capsys, told)
    for file in (told.dir.events_file, told.dir.metrics_file):
        with file.open("ab") as stream:
            stream.write(
                b'[]\n{"time": 5}\n{"time": "x", "event": "waiting", "what": ""}\n\xff\xfe\n{"time": 1031.0, "ev'
            )
    assert _status(capsys, told) == whole
    for command in ("events", "report", "watch"):
        assert main([command, str(told.dir.path)]) == 0


def test_looking_at_a_run_changes_nothing_and_loads_no_torch(tmp_path: Path) -> None:
    told = story(tmp_path)
    before = {path: path.read_bytes() for path in told.dir.path.rglob("*") if path.is_file()}
    code = (
        "import sys\nfrom holdfast.launch.cli import main\n"
        f"codes = [main([c, {str(told.dir.path)!r}]) for c in ('status', 'events', 'watch')]\n"
        f"codes += [main(['report', {str(told.dir.path)!r}, '--output', {str(tmp_path / 'o.html')!r}])]\n"
        "heavy = {'torch', 'ray', 'hydra', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'{codes} {heavy}' if heavy or any(codes) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path: path.read_bytes() for path in told.dir.path.rglob("*") if path.is_file()} == before


# -- events -----------------------------------------------------------------------------------------------------------


def _events(capsys: pytest.CaptureFixture[str], told: Told, *words: str) -> list[str]:
    assert main(["events", str(told.dir.path), *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_events_are_told_in_the_words_of_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = _events(capsys, story(tmp_path))
    tags = [line.split()[0] for line in lines if not line.startswith(" ")]
    expected = "run resume EVENT CHAOS FAULT GUARD PLAN EVENT DONE GUARD EVAL SAVED TEXT END"
    assert tags == expected.split()
    assert any(" rank 1 lost (node 1, pid 4711): killed by SIGKILL (pid 4711)" in line for line in lines)
    end = "END   finished (exit code 0): step 9 of 9 in 30.0 s; 0.900 bits/byte; 1 fault, 1 step lost"
    assert lines[-1] == f"{end}; 1 injected on purpose"


def test_events_of_some_kinds_and_as_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = story(tmp_path)
    chosen = _events(capsys, told, "--json", "--kind", "fault_detected,recovery_done", "--kind", "evaluated")
    stored = [json.loads(line) for line in told.dir.events_file.read_text().splitlines()]
    wanted = {"fault_detected", "recovery_done", "evaluated"}
    assert [json.loads(line) for line in chosen] == [record for record in stored if record["event"] in wanted]
    for word in ("fault", "fault_detekted"):
        with pytest.raises(ConfigurationError, match=f"--kind={word} is no kind of event; choose from fault_detected"):
            events(["--kind", word, str(told.dir.path)])


def test_an_event_of_another_version_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = story(tmp_path)
    with told.dir.events_file.open("a") as file:
        file.write('{"time": 1031.5, "event": "moon_phase", "phase": "full\\u001b[2J"}\n')
    assert _events(capsys, told)[-1].endswith(" moon_phase: phase=full\\x1b[2J")


def test_following_tells_everything_once_across_attempts_and_ends_with_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = Told(tmp_path).attempt().event(e.RunStarted("r1", 1, 3, "fresh")).event(e.StopRequested("killed soon"))
    codes: list[int] = []
    watcher = threading.Thread(
        target=lambda: codes.append(main(["events", str(told.dir.path), "--follow"])), daemon=True
    )
    watcher.start()
    time.sleep(0.5)
    with told.dir.lock():
        told.attempt().event(e.RunStarted("r1", 2, 3, "auto: step 4"))
        time.sleep(0.3)
        assert watcher.is_alive()
        told.end(1030.0)
    watcher.join(20.0)
    assert codes == [0]
    tags = [line.split()[0] for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert tags == ["run", "resume", "STOP", "run", "resume", "END"]


def test_a_run_that_nobody_drives_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    told, now = Told(tmp_path).attempt(), [0.0]
    seen = views(told.dir, every_s=7.0, now=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    assert len(list(seen)) == 10 and now[0] == 63.0
    now[0] = 0.0
    seen = views(told.dir, every_s=7.0, now=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    with told.dir.lock():
        for _ in range(20):
            next(seen)
    assert len(list(seen)) == 9  # since the driver was seen last


# -- watch ------------------------------------------------------------------------------------------------------------


def _seen(told: Told, width: int = 100) -> str:
    canvas = rich.console.Console(file=io.StringIO(), width=width, force_terminal=False, color_system=None)
    canvas.print(screen(RunReader(told.dir, clock=lambda: 1031.0).view(), width))
    text = canvas.file.getvalue()  # type: ignore[attr-defined]  # the StringIO from above
    return str(text)


def test_the_screen_shows_state_progress_loss_and_the_newest_events(tmp_path: Path) -> None:
    text = _seen(story(tmp_path))
    for says in ("FINISHED", "step 9 of 9", "loss █", "5.000 to 0.556", "DONE ", "EVAL ", "END "):
        assert says in text, text
    assert max(map(len, _seen(story(tmp_path, "r2"), 40).splitlines())) <= 40
    assert "INITIALIZING" in _seen(Told(tmp_path, "r3"))


def test_in_a_pipe_watching_writes_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(story(tmp_path).dir.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("END   finished")
    assert lines[-1].startswith(
        "FINISHED     step 9 loss 0.5556 bpb 0.833 lr 1.0e-03 gnorm 1.00 tok/s 10 snap_age 1 fails 1"
    )


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([float("nan")], ""),
        ([2.0, 2.0], "▁▁ 2.000 to 2.000"),
        ([0.0, 7.0, float("inf"), 3.0], "▁█▄ 7.000 to 0.000"),
        ([1.0, 3.0, 5.0, 7.0, 9.0, 9.0], "▁▅█ 9.000 to 2.000"),
    ],
)
def test_a_sparkline_has_the_means_of_neighbours(values: Sequence[float], line: str) -> None:
    assert sparkline(values, 3) == line
