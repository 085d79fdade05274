"""The record of a run: made, begun, ended, found again or passed over with a reason."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from holdfast.errors import ConfigurationError, SnapshotError
from holdfast.launch.run_dir import RunDir, find_resumable, root_problems

_DIGEST = "d1"


class _Wall:
    """Wall-clock time that passes by one second at each look."""

    def __init__(self, start: float = 1000.0) -> None:
        self.now = start

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def _create(root: Path, run_id: str = "run1", *, digest: str = _DIGEST, at: float = 1000.0) -> RunDir:
    return RunDir.create(str(root), "project", run_id, config_digest=digest, clock=_Wall(at))


def _begin(run: RunDir, **facts: object) -> int:
    return run.begin_attempt(config={"seed": 3}, overrides=["seed=3"], command=["holdfast", "train"], **facts)


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


# -- making and opening -----------------------------------------------------------------------------------------------


def test_a_new_run_has_its_places_and_a_record_that_nobody_has_worked_on_yet(tmp_path: Path) -> None:
    run = _create(tmp_path / "new" / "root")
    assert run.path == tmp_path / "new" / "root" / "project" / "run1"
    assert {p.name for p in run.path.iterdir()} == {"run.json", "logs", "checkpoints", "failures", "export"}
    assert _json(run.path / "run.json") == {
        "format_version": 1,
        "id": "run1",
        "project": "project",
        "config_digest": _DIGEST,
        "created": 1001.0,
        "ended": None,
        "attempts": [],
    }


def test_the_places_are_those_that_are_documented(tmp_path: Path) -> None:
    run = _create(tmp_path)
    assert run.run_id == "run1"
    places = [run.events_file, run.metrics_file, run.checkpoints, run.export, run.driver_log(2), run.rank_log(7, 2)]
    assert [str(place.relative_to(run.path)) for place in places] == [
        "events.jsonl",
        "metrics.jsonl",
        "checkpoints",
        "export",
        "logs/driver.attempt2.log",
        "logs/rank00007.attempt2.log",
    ]


def test_a_run_that_exists_is_not_made_again(tmp_path: Path) -> None:
    _begin(_create(tmp_path))
    with pytest.raises(ConfigurationError, match=r"run run1 exists already in .*resume it or choose another run_id"):
        _create(tmp_path)
    assert len(RunDir.open(str(tmp_path), "project", "run1").record()["attempts"]) == 1


def test_a_directory_whose_making_was_interrupted_is_made_complete(tmp_path: Path) -> None:
    (tmp_path / "project" / "run1" / "logs").mkdir(parents=True)
    assert _create(tmp_path).record()["attempts"] == []


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/abs", "-x", "a b", "x" * 129, "a\n", "ü"])
def test_what_is_no_name_is_refused_and_nothing_is_made(tmp_path: Path, name: str) -> None:
    for project, run_id in ((name, "run1"), ("project", name)):
        with pytest.raises(ConfigurationError, match="must be letters, digits"):
            RunDir.create(str(tmp_path), project, run_id, config_digest=_DIGEST)
        with pytest.raises(ConfigurationError, match="must be letters, digits"):
            RunDir.open(str(tmp_path), project, run_id)
    assert list(tmp_path.iterdir()) == []


def test_all_problems_of_a_new_run_are_told_at_once() -> None:
    with pytest.raises(ConfigurationError) as refused:
        RunDir.create("relative", "a/b", "c d", config_digest=_DIGEST)
    assert [problem.split("=")[0] for problem in refused.value.problems] == ["project", "run_id", "root"]


def test_a_file_in_the_way_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "project").write_text("a file")
    with pytest.raises(ConfigurationError, match=r"project/run1 cannot be made: Not a directory"):
        _create(tmp_path)


def test_opening_gives_the_run_with_all_it_knows(tmp_path: Path) -> None:
    made = _create(tmp_path)
    assert RunDir.open(str(tmp_path), "project", "run1").record() == made.record()


def test_a_run_that_does_not_exist_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "project" / "run1").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match=r"run run1 does not exist: there is no .*project/run1/run\.json"):
        RunDir.open(str(tmp_path), "project", "run1")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "cannot be read: Expecting value"),
        (b'{"format_version": 1', "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[]", "is not the record of a run"),
        (b"null", "is not the record of a run"),
        (b'{"format_version": 1}', "is not the record of a run"),
        (b'{"format_version": 1, "attempts": 3, "ended": null}', "is not the record of a run"),
        (b'{"format_version": 1, "attempts": [], "ended": "yes"}', "is not the record of a run"),
        (b'{"format_version": 1, "attempts": [], "ended": {}}', "is not the record of a run"),
        (b'{"format_version": 2}', "format_version=2, this Holdfast reads 1; use the version that wrote it"),
    ],
)
def test_a_record_that_cannot_be_used_is_an_error_that_names_the_file(
    tmp_path: Path, content: bytes, complaint: str
) -> None:
    run = _create(tmp_path)
    (run.path / "run.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match=complaint):
        RunDir.open(str(tmp_path), "project", "run1")


# -- attempts ---------------------------------------------------------------------------------------------------------


def test_an_attempt_leaves_who_when_how_and_the_facts(tmp_path: Path) -> None:
    run = _create(tmp_path)
    assert _begin(run, git="abc", versions={"torch": "2"}) == 1
    assert run.record()["attempts"] == [
        {
            "number": 1,
            "started": 1002.0,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": ["holdfast", "train"],
            "overrides": ["seed=3"],
            "git": "abc",
            "versions": {"torch": "2"},
            "ended": None,
        }
    ]
    assert (run.path / "config.yaml").read_text() == "seed: 3\n"
    assert (run.path / "overrides.yaml").read_text() == '- "seed=3"\n'


def test_an_attempt_without_overrides_has_an_empty_list_of_them(tmp_path: Path) -> None:
    run = _create(tmp_path)
    run.begin_attempt(config={}, overrides=[], command=[])
    assert (run.path / "overrides.yaml").read_text() == "[]\n"


def test_attempts_are_counted_and_the_run_has_not_ended_while_one_is_at_work(tmp_path: Path) -> None:
    run = _create(tmp_path)
    _begin(run)
    run.end_attempt("stopped", 0, step=40, reason="asked to stop", world=2, findings={"text": "a"})
    ended = {"outcome": "stopped", "exit_code": 0, "step": 40, "reason": "asked to stop", "time": 1003.0, "world": 2}
    ended["findings"] = {"text": "a"}
    assert (run.record()["ended"], run.record()["attempts"][0]["ended"]) == (ended, ended)
    assert _begin(run) == 2
    assert run.record()["ended"] is None
    assert [attempt["ended"] for attempt in run.record()["attempts"]] == [ended, None]


def test_an_attempt_whose_driver_was_killed_has_no_end_and_the_next_one_is_counted_after_it(tmp_path: Path) -> None:
    run = _create(tmp_path)
    assert [_begin(run), _begin(run)] == [1, 2]
    run.end_attempt("finished", 0, step=300)
    assert [attempt["ended"] is None for attempt in run.record()["attempts"]] == [True, False]


def test_a_full_disk_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _create(tmp_path)
    _begin(run)
    before = run.record()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(SnapshotError, match=r"no space left for .*run\.json"):
            run.end_attempt("finished", 0, step=300)
    assert run.record() == before


# -- the lease --------------------------------------------------------------------------------------------------------


def test_a_second_driver_is_refused_while_the_first_one_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.launch.lease.time.sleep", lambda _: None)
    monkeypatch.setattr("holdfast.launch.lease.time.monotonic", iter(range(100)).__next__)
    run = _create(tmp_path)
    assert run.driver() is None
    with run.lock():
        other = RunDir.open(str(tmp_path), "project", "run1")
        assert (other.driver() or "").startswith(f"pid {os.getpid()} on ")
        with pytest.raises(ConfigurationError, match=f"run run1 is being driven by pid {os.getpid()}"), other.lock():
            pytest.fail("two drivers")
    assert run.driver() is None


# -- failures ---------------------------------------------------------------------------------------------------------


def _log(run: RunDir, rank: int, content: bytes) -> Path:
    path = run.rank_log(rank, 1)
    path.write_bytes(content)
    return path


def test_a_fault_is_kept_with_the_last_two_hundred_lines_of_every_log_there_is(tmp_path: Path) -> None:
    run = _create(tmp_path)
    logs = [_log(run, rank, b"".join(b"line %d\n" % n for n in range(1000))) for rank in (0, 3)]
    folder = run.record_failure(1, {"cause": "killed", "ranks": [3]}, [*logs, run.rank_log(9, 1)])
    assert folder == run.path / "failures" / "0001"
    assert {p.name for p in folder.iterdir()} == {"summary.json", "rank00000.tail.txt", "rank00003.tail.txt"}
    assert _json(folder / "summary.json") == {"cause": "killed", "ranks": [3]}
    kept = (folder / "rank00003.tail.txt").read_text().splitlines()
    assert kept == [f"line {n}" for n in range(800, 1000)]


def test_the_faults_of_a_later_attempt_do_not_overwrite_those_of_an_earlier_one(tmp_path: Path) -> None:
    run = _create(tmp_path)
    for cause, number in (("a", 1), ("b", 1), ("c", 1), ("d", 2), ("e", 7)):
        run.record_failure(number, {"cause": cause}, [])
    kept = {p.name: _json(p / "summary.json")["cause"] for p in (run.path / "failures").iterdir()}
    assert kept == {"0001": "a", "0002": "b", "0003": "c", "0004": "d", "0007": "e"}


def test_a_log_that_is_no_text_is_kept_as_far_as_it_is(tmp_path: Path) -> None:
    run = _create(tmp_path)
    folder = run.record_failure(1, {}, [_log(run, 0, b"good \xc3\xbc\n\xff\xfe\n")])
    assert folder is not None
    assert (folder / "rank00000.tail.txt").read_text(encoding="utf-8") == "good ü\n\ufffd\ufffd\n"


def _remove_folder(run: RunDir) -> object:
    shutil.rmtree(run.path / "failures")
    return (run.path / "failures").write_text("a file in its place")


def _nothing(run: RunDir) -> object:
    return None


@pytest.mark.parametrize(("damage", "summary"), [(_remove_folder, {"step": 3}), (_nothing, {"step": object()})])
def test_evidence_that_cannot_be_written_is_logged_and_never_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[RunDir], object], summary: dict[str, object]
) -> None:
    run = _create(tmp_path)
    damage(run)
    log = _log(run, 0, b"x\n")
    with caplog.at_level(logging.WARNING):
        folder = run.record_failure(4, summary, [log])
    assert folder is None
    assert "fault 4 could not be documented" in caplog.text


# -- resuming ---------------------------------------------------------------------------------------------------------


def _runs(root: Path, **ages: float) -> dict[str, RunDir]:
    return {name: _create(root, name, at=age) for name, age in ages.items()}


def _found(root: Path) -> tuple[str | None, tuple[str, ...]]:
    run, reasons = find_resumable(str(root), "project", _DIGEST)
    return (None if run is None else run.run_id), reasons


def test_without_a_project_or_with_an_empty_one_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert _found(tmp_path) == (None, ())
    (tmp_path / "project").mkdir()
    assert _found(tmp_path) == (None, ())


def test_the_newest_run_is_resumed_whatever_its_name(tmp_path: Path) -> None:
    _runs(tmp_path, b=2000.0, c=3000.0, a=4000.0, d=1000.0)
    assert _found(tmp_path) == ("a", ())


@pytest.mark.parametrize("outcome", ["stopped", "failed", None])
def test_a_run_that_was_stopped_or_failed_or_whose_driver_was_killed_is_resumed(
    tmp_path: Path, outcome: str | None
) -> None:
    run = _create(tmp_path)
    _begin(run)
    if outcome:
        run.end_attempt(outcome, 1, step=40)
    assert _found(tmp_path) == ("run1", ())


def test_runs_that_are_passed_over_are_told_with_the_reason_newest_first(tmp_path: Path) -> None:
    _create(tmp_path, "fits", at=1000.0)
    _create(tmp_path, "other", at=3000.0, digest="d2")
    runs = _runs(tmp_path, finished=4000.0, newer=5000.0, driven=6000.0, older=500.0)
    _begin(runs["finished"])
    runs["finished"].end_attempt("finished", 0, step=300)
    runs["newer"]._write({**runs["newer"].record(), "format_version": 2})
    (tmp_path / "project" / "notes.txt").write_text("no run")
    (tmp_path / "project" / "empty").mkdir()
    with runs["driven"].lock():
        run, reasons = _found(tmp_path)
    assert run == "fits"
    assert [reason.partition(" since ")[0] for reason in reasons] == [
        f"driven: driven by pid {os.getpid()} on {socket.gethostname()}",
        "newer: format_version=2, this Holdfast reads 1",
        "finished: finished at step 300",
        "other: another model, data, optimizer, batch, seed or precision",
    ]
    assert _found(tmp_path)[0] == "driven"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b'{"format_version": 1, "config_digest": "d1", "created": "yesterday", "attempts": [], "ended": 3}',
        b'{"format_version": 1, "config_digest": "d1", "created": 9e9, "attempts": [], "ended": {}}',
        b'{"format_version": 1, "config_digest": "d1", "created": 9e9, "attempts": null, "ended": null}',
    ],
)
def test_a_run_with_a_damaged_record_is_passed_over_and_hides_no_other(tmp_path: Path, content: bytes) -> None:
    runs = _runs(tmp_path, good=1000.0, bad=2000.0)
    (runs["bad"].path / "run.json").write_bytes(content)
    run, reasons = _found(tmp_path)
    assert run == "good"
    assert len(reasons) == 1
    assert reasons[0].startswith("bad: ")
    assert "run.json" in reasons[0]


# -- the root ---------------------------------------------------------------------------------------------------------


def test_a_root_that_can_be_used_has_no_problems_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    assert root_problems(str(tmp_path / "made" / "for it"), need_bytes=1000) == []
    assert list((tmp_path / "made" / "for it").iterdir()) == []


@pytest.mark.parametrize("root", ["", "runs", "./runs", "~/runs"])
def test_a_relative_root_is_refused_with_the_absolute_one(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    expected = "/home/me/runs" if root == "~/runs" else str(Path.cwd() / root)
    assert root_problems(root) == [f"root={root!r} must be absolute, for example root={expected}"]


def test_a_root_that_cannot_be_written_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    root = str(tmp_path / "file" / "runs")
    problems = root_problems(root)
    assert len(problems) == 1
    assert problems[0].startswith(f"root={root} cannot be written to: ")
    assert "Not a directory" in problems[0]


def test_a_root_with_too_little_space_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5_000_000))
    assert root_problems(str(tmp_path), need_bytes=5_000_000) == []
    assert root_problems(str(tmp_path), need_bytes=5_000_001) == [
        f"root={tmp_path} has 5,000,000 bytes free, 5,000,001 are needed; set root to a larger file system"
    ]
