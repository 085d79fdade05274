"""A run with a fault, watched while it goes on: what is seen in its files is what its driver told."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.launch.cli import main
from holdfast.launch.find_run import find_run
from holdfast.launch.goodput import Part, driven, goodput
from holdfast.launch.run_dir import RunDir
from holdfast.launch.run_view import RunReader
from tests.support.drivers import Driver, await_event, sound_record
from tests.support.runs import events_of, tiny_config, write_corpus

pytestmark = pytest.mark.timeout(240)

_STEPS = 40


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    fault = "sigkill rank=1 step=6 at=step.begin"
    found = Driver(tiny_config(tmp_path / "runs", write_corpus(tmp_path / "text"), steps=_STEPS, faults=[fault]))
    yield found
    found.close()


def _look(root: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "holdfast", *words, "--root", str(root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _status(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["status", "--json", "--root", str(root)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def _told(tag: str, output: str) -> list[str]:
    return [line[15:] for line in output.splitlines() if line.startswith(tag)]


def test_what_is_seen_of_a_run_while_it_goes_on_is_what_its_driver_tells(
    driver: Driver, capsys: pytest.CaptureFixture[str]
) -> None:
    await_event(driver.root, "run_started")
    following, watching = _look(driver.root, "events", "--follow"), _look(driver.root, "watch")
    try:
        driver.await_step(2)
        driver.signal(signal.SIGSTOP)  # which a driver survives; the run cannot end meanwhile
        seen = _status(driver.root, capsys)
        driver.signal(signal.SIGCONT)
        code, said = driver.await_end()
        followed, watched = following.communicate(timeout=60)[0], watching.communicate(timeout=60)[0]
    finally:
        following.kill()
        watching.kill()
    assert seen["state"] in ("RUNNING", "RESTARTING") and seen["step"] >= 2 and f"pid {driver.pid} " in seen["driver"]
    assert (code, following.returncode, watching.returncode) == (0, 0, 0)
    # Word for word, but for the second in which the console said it.
    for tag in ("FAULT", "PLAN", "DONE", "SAVED", "EVAL", "END"):
        assert _told(tag, said) == _told(tag, followed) == _told(tag, watched) != []
    run = find_run(None, str(driver.root)).path
    assert f"report {run}/report.html" in " ".join(said.split())
    assert sound_record(run)["ended"]["outcome"] == "finished"
    assert (run / "report.html").stat().st_size > 20_000 and "## Faults" in (run / "report.md").read_text()
    _check_goodput(run)


def _check_goodput(path: Path) -> None:
    """Against the clocks of the driver, of the recovery and of the steps themselves."""
    run = RunDir(path)
    view = RunReader(run).view()
    split = goodput(driven(view))
    (ended,) = events_of(path, "run_ended")
    assert split.wall_s == pytest.approx(ended["seconds"], abs=0.5)
    (done,) = events_of(path, "recovery_done")
    # The first step afterwards is a step; what the recovery took beyond it is not.
    beyond_s = done["repaired_in_s"] - done["split_s"]["first_step"]
    assert beyond_s - 0.3 <= split.seconds[Part.RESTORE] <= done["repaired_in_s"] + 0.3
    steps = {line.report.step: line.report for line in view.steps}
    kept_s = sum(one.step_s - one.stall_s for one in steps.values())
    assert split.seconds[Part.USEFUL] == pytest.approx(kept_s, rel=0.05)
