"""A worker between the driver's calls: wishes that come early, notes, and what it leaves on its board."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from holdfast.configs.plain import to_plain
from holdfast.configs.schema import RunConfig
from holdfast.errors import Abort
from holdfast.launch.protocol import EpochPlan
from holdfast.launch.worker import WorkerHost, _processor_s
from holdfast.types import Phase
from tests.support.keepers import attach, make_keeper


@pytest.fixture
def worker(tmp_path: Path) -> WorkerHost:
    spec = {
        "config": to_plain(RunConfig()),
        "run_dir": str(tmp_path),
        "attempt": 1,
        "store": "",
        "config_digest": "",
        "bricks": [],
        "seen": {},
    }
    return WorkerHost(spec)


def _plan(epoch: int, version: int = 4) -> EpochPlan:
    return EpochPlan(epoch, rank=0, world=1, version=version, rendezvous="")


def test_a_stop_that_overtakes_its_epoch_is_heeded_in_it_and_not_in_the_next(worker: WorkerHost) -> None:
    """The driver sends the plan only when all keepers are ready for it, and the user does not wait for that."""
    arena = attach(make_keeper())
    worker.stop(3)
    assert worker._enter_epoch(_plan(3), arena).should_stop()
    assert not worker._enter_epoch(_plan(4), arena).should_stop()


def test_a_stop_within_an_epoch_is_heeded(worker: WorkerHost) -> None:
    watcher = worker._enter_epoch(_plan(3), attach(make_keeper()))
    assert not watcher.should_stop()
    worker.stop(3)
    assert watcher.should_stop()


def test_an_epoch_that_was_left_before_it_began_does_not_begin(worker: WorkerHost) -> None:
    worker.abort(3)
    with pytest.raises(Abort):
        worker._enter_epoch(_plan(3), attach(make_keeper()))


def test_every_note_is_told_once(worker: WorkerHost) -> None:
    note = worker._note  # as a run holds it, over many calls
    note({"step": 2})
    assert worker.drain() == [{"step": 2}]
    note({"step": 4})
    note({"step": 6})
    assert worker.drain() == [{"step": 4}, {"step": 6}]
    assert worker.drain() == []


def test_notes_that_nobody_has_fetched_come_with_the_answer(worker: WorkerHost) -> None:
    worker._note({"step": 2})
    answer = worker.run_epoch({"epoch": 3, "rank": 0, "world": 1, "version": -1, "rendezvous": ""})
    assert (answer["outcome"], answer["notes"]) == ("error", [{"step": 2}])  # there is no memory to train with


def test_a_parked_rank_still_shows_how_far_it_got(worker: WorkerHost) -> None:
    arena = attach(make_keeper())
    worker._arena = arena
    worker._enter_epoch(_plan(3), arena).enter(Phase.VOTE, 9)
    before = time.monotonic()
    worker._park(_plan(3))
    beat = arena.board.read()
    assert (beat.phase, beat.step) == (Phase.PARKED, 9)
    assert beat.progress_s >= before


def test_a_thread_that_computes_uses_the_processor_and_one_that_waits_does_not() -> None:
    own, end = threading.get_native_id(), time.monotonic() + 5.0
    used_s = _processor_s(own)
    while _processor_s(own) == used_s:
        assert time.monotonic() < end
    idle = threading.Event()
    waiting = threading.Thread(target=idle.wait)
    waiting.start()
    try:
        assert waiting.native_id is not None
        used_s = _processor_s(waiting.native_id)
        time.sleep(0.2)
        assert _processor_s(waiting.native_id) - used_s < 0.05
    finally:
        idle.set()
        waiting.join()
