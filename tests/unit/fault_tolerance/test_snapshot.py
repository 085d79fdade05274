"""Taking, committing and restoring versions: one contract for every snapshotter, then what the arena adds."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import pytest
import torch

from holdfast import failpoints
from holdfast.errors import Abort, InsufficientShards, InvariantViolation, ManifestMismatch, ShardCorrupt
from holdfast.fault_tolerance.arena import Arena
from holdfast.fault_tolerance.buffer import BufferState, Bytes
from holdfast.fault_tolerance.snapshot import (
    ArenaSnapshotter,
    MemorySnapshotter,
    RankSnapshotter,
    copy_versions,
    required_bytes,
)
from holdfast.fault_tolerance.versions import find_version, held_versions
from holdfast.types import CopyReport, RankState, SliceSpec, StateSlice
from tests.support.snapshots import AtOnce, bytes_of, expected_bytes, filled_state, make_arena, set_version, snapshotter

# -- every snapshotter ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A snapshotter and a way to look into what it has stored."""

    snapshots: RankSnapshotter
    versions: Callable[[], list[int]]
    stored: Callable[[int], Bytes]


def _in_arena() -> Subject:
    arena = make_arena(filled_state(0))
    return Subject(snapshotter(arena), lambda: _versions(arena), lambda v: find_version(arena, v).data)


def _in_memory() -> Subject:
    snapshots = MemorySnapshotter()
    return Subject(snapshots, lambda: snapshots.versions, lambda v: snapshots._held[v][0])


def _versions(arena: Arena) -> list[int]:
    return sorted(slot.version for slot in arena.slots() if slot.is_complete)


@pytest.fixture(params=[_in_arena, _in_memory], ids=["arena", "memory"])
def subject(request: pytest.FixtureRequest) -> Subject:
    made: Subject = request.param()
    return made


def test_what_was_offered_comes_back_to_the_bit(subject: Subject) -> None:
    assert subject.snapshots.offer(filled_state(4), 4)
    fresh = filled_state(0)
    scalars = subject.snapshots.restore_into(fresh, 4)
    assert bytes_of(fresh) == expected_bytes(4)
    assert scalars == {"step": 4, "owner": {"steps": [4, 4]}}


def test_the_live_state_may_change_after_the_fence(subject: Subject) -> None:
    state, scalars = filled_state(4), {"step": 4}
    subject.snapshots.offer(RankState(state.slices, scalars), 4)
    subject.snapshots.fence()
    set_version(state, 5)
    scalars["step"] = 5
    assert subject.snapshots.restore_into(state, 4) == {"step": 4}
    assert bytes_of(state) == expected_bytes(4)


def test_two_versions_are_kept_apart(subject: Subject) -> None:
    state = filled_state(1)
    for version in (1, 2):
        subject.snapshots.offer(set_version(state, version), version)
    for version in (2, 1):
        subject.snapshots.restore_into(state, version)
        assert bytes_of(state) == expected_bytes(version)


def test_going_back_to_a_version_means_that_later_ones_never_happened() -> None:
    arena = make_arena(filled_state(0))
    snapshots = snapshotter(arena)
    for version in (1, 2):
        snapshots.offer(filled_state(version), version)
    snapshots.restore_into(filled_state(0), 1)
    assert _versions(arena) == [1]
    assert snapshots.offer(filled_state(2), 2)


def test_room_that_was_promised_is_kept_for_the_next_offer() -> None:
    arena = make_arena(filled_state(0))
    snapshots = snapshotter(arena)
    for version in (1, 2):
        snapshots.offer(filled_state(version), version)
    snapshots.commit(2)
    assert snapshots.has_room(3)
    for index, slot in enumerate(arena.slots()):
        if not slot.is_complete:
            arena.buffer(index).pin(+1)  # the keeper takes whatever it finds free, too late
            arena.buffer(index).pin(-1)
    assert snapshots.has_room(4)  # nothing came of 3
    assert snapshots.offer(filled_state(4), 4)
    assert _versions(arena) == [2, 4]


def test_a_commit_lets_older_versions_go_and_keeps_newer_ones(subject: Subject) -> None:
    for version in (1, 2, 3):
        subject.snapshots.offer(filled_state(version), version)
    subject.snapshots.commit(2)
    subject.snapshots.commit(2)
    assert subject.versions() == [2, 3]


def test_only_a_version_that_is_held_can_be_committed(subject: Subject) -> None:
    subject.snapshots.offer(filled_state(1), 1)
    with pytest.raises(InvariantViolation, match=r"version 2 .*\[1\]"):
        subject.snapshots.commit(2)


@pytest.mark.parametrize("version", [2, 3])
def test_versions_grow(subject: Subject, version: int) -> None:
    subject.snapshots.offer(filled_state(3), 3)
    with pytest.raises(InvariantViolation, match=f"version {version} is offered after 3"):
        subject.snapshots.offer(filled_state(version), version)
    assert subject.versions() == [3]


def test_a_version_that_is_not_held_cannot_be_restored(subject: Subject) -> None:
    subject.snapshots.offer(filled_state(1), 1)
    with pytest.raises(InsufficientShards, match=r"version 2 is wanted.*\[1\]"):
        subject.snapshots.restore_into(filled_state(0), 2)


@pytest.mark.parametrize("place", [0, 3999, -120])
def test_one_flipped_bit_stops_a_restore_before_its_first_byte(subject: Subject, place: int) -> None:
    subject.snapshots.offer(filled_state(4), 4)
    subject.stored(4)[place] ^= 16
    live = filled_state(9)
    with pytest.raises(ShardCorrupt, match="version 4") as found:
        subject.snapshots.restore_into(live, 4)
    assert found.value.version == 4
    assert bytes_of(live) == expected_bytes(9)


def _without_last(state: RankState) -> RankState:
    return RankState(state.slices[:-1])


def _with_another(state: RankState) -> RankState:
    return RankState([*state.slices, StateSlice(SliceSpec("new", (2,), 0, 2, "uint8"), torch.zeros(2).byte())])


def _with_spec(**changes: object) -> Callable[[RankState], RankState]:
    def changed(state: RankState) -> RankState:
        first = state.slices[0]
        spec = replace(first.spec, **changes)  # type: ignore[arg-type]  # each case names real fields
        return RankState([StateSlice(spec, first.tensor), *state.slices[1:]])

    return changed


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_without_last, "holds slice 'counter', which the running model does not have"),
        (_with_another, "running model has slice 'new', which it does not hold"),
        (_with_spec(dtype="int32"), "slice 'embed.weight/master' is .*'float32'.* there and .*'int32'.* here"),
        (_with_spec(shape=(1, 2000)), "slice 'embed.weight/master' is"),
        (_with_spec(start=0, stop=1000), "slice 'embed.weight/master' is"),
    ],
)
def test_a_model_that_does_not_fit_is_told_the_first_difference_and_left_alone(
    subject: Subject, change: Callable[[RankState], RankState], complaint: str
) -> None:
    subject.snapshots.offer(filled_state(4), 4)
    live = change(filled_state(9))
    before = bytes_of(live)
    with pytest.raises(ManifestMismatch, match=complaint):
        subject.snapshots.restore_into(live, 4)
    assert bytes_of(live) == before


def test_scalars_that_are_no_json_values_are_refused_and_nothing_is_stored(subject: Subject) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        subject.snapshots.offer(RankState(filled_state(1).slices, {"x": object()}), 1)
    assert subject.versions() == []


def test_tensors_that_do_not_lie_in_one_piece_are_refused(subject: Subject) -> None:
    torn = StateSlice(SliceSpec("t", (4,), 0, 4, "float32"), torch.zeros(8)[::2])
    with pytest.raises(InvariantViolation, match="must be contiguous"):
        subject.snapshots.offer(RankState([torn]), 1)


def test_two_slices_of_one_name_are_refused(subject: Subject) -> None:
    state = filled_state(1)
    with pytest.raises(InvariantViolation, match="two slices of one rank are named 'counter'"):
        subject.snapshots.offer(RankState([*state.slices, state.slices[-1]]), 1)


# -- beside the step --------------------------------------------------------------------------------------------------


class _Gate:
    """Holds a capture in its middle until it is opened."""

    def __init__(self) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()

    def __call__(self, name: str, step: int) -> None:
        self.reached.set()
        assert self._opened.wait(10.0), "nobody opened the gate"

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
def gate() -> Iterator[_Gate]:
    found = _Gate()
    with failpoints.armed("snapshot.mid_capture", found):
        yield found
        found.open()


def _lazy(arena: Arena, *, rank: int = 0, **options: float) -> ArenaSnapshotter:
    return ArenaSnapshotter(arena, rank=rank, world=1, epoch=1, **options)  # type: ignore[arg-type]


def test_an_offer_returns_while_the_copy_runs_and_the_fence_waits_for_it(gate: _Gate) -> None:
    arena = make_arena(filled_state(0))
    snapshots = _lazy(arena)
    assert snapshots.offer(filled_state(4), 4)
    assert gate.reached.wait(10.0)
    assert _versions(arena) == []
    threading.Timer(0.2, gate.open).start()
    found = snapshots.fence()
    assert (found.version, found.is_complete) == (4, True)
    assert found.waited_s > 0.1
    assert found.copy_s >= found.waited_s / 2
    assert _versions(arena) == [4]


def test_a_version_is_filled_before_the_fence_if_its_copy_is_over_before() -> None:
    arena = make_arena(filled_state(0))
    snapshots = _lazy(arena)
    snapshots.offer(filled_state(4), 4)
    until = time.monotonic() + 10.0
    while _versions(arena) != [4]:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert snapshots.fence().waited_s < 5.0


def test_a_fence_reports_each_version_once() -> None:
    snapshots = _lazy(make_arena(filled_state(0)))
    assert snapshots.fence() == CopyReport()
    snapshots.offer(filled_state(4), 4)
    assert snapshots.fence().version == 4
    assert snapshots.fence() == CopyReport()


def test_a_state_that_changes_while_it_is_copied_is_no_version(gate: _Gate) -> None:
    arena, state = make_arena(filled_state(0)), filled_state(4)
    snapshots = _lazy(arena)
    snapshots.offer(state, 4)
    assert gate.reached.wait(10.0)
    state.slices[-1].tensor.add_(1)
    gate.open()
    assert not snapshots.fence().is_complete
    assert (snapshots.failed, _versions(arena)) == (1, [])
    assert snapshots.offer(filled_state(5), 5)
    assert snapshots.fence().is_complete


def test_scalars_are_taken_by_value(gate: _Gate) -> None:
    snapshots, scalars = _lazy(make_arena(filled_state(0))), {"steps": [4]}
    state = RankState(filled_state(4).slices, {"owner": scalars})
    snapshots.offer(state, 4)
    scalars["steps"][0] = 5
    gate.open()
    snapshots.fence()
    assert snapshots.restore_into(state, 4) == {"owner": {"steps": [4]}}


def test_an_error_in_the_middle_of_a_capture_leaves_the_last_version_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(name: str, step: int) -> None:
        raise RuntimeError(f"{name} {step}")

    arena = make_arena(filled_state(0))
    snapshots = snapshotter(arena)
    snapshots.offer(filled_state(1), 1)
    with failpoints.armed("snapshot.mid_capture", fail):
        assert not snapshots.offer(filled_state(2), 2)
    assert "mid_capture 2" in caplog.text
    assert (snapshots.failed, _versions(arena)) == (1, [1])
    assert snapshots.offer(filled_state(2), 2)


def test_a_copy_that_is_stuck_is_given_up_and_the_training_goes_on(gate: _Gate) -> None:
    arena = make_arena(filled_state(0))
    snapshots = _lazy(arena, fence_timeout_s=0.1)
    snapshots.offer(filled_state(4), 4)
    assert not snapshots.fence().is_complete
    assert not snapshots.offer(filled_state(5), 5), "its thread may still write"
    gate.open()
    until = time.monotonic() + 10.0
    while not snapshots.offer(filled_state(6), 6):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert snapshots.fence().is_complete
    assert _versions(arena) == [6]


def test_whoever_leaves_lets_the_copy_end_first() -> None:
    arena = make_arena(filled_state(0))
    snapshots = _lazy(arena, max_bytes_per_s=1.0)
    snapshots.offer(filled_state(4), 4)
    snapshots.close()
    assert _versions(arena) == [4]


def test_a_snapshotter_that_nobody_needs_any_more_leaves_no_thread() -> None:
    snapshots = _lazy(make_arena(filled_state(0), rank=7), rank=7)
    assert "snapshot-rank7" in [thread.name for thread in threading.enumerate()]
    del snapshots
    until = time.monotonic() + 10.0
    while "snapshot-rank7" in [thread.name for thread in threading.enumerate()]:
        assert time.monotonic() < until
        time.sleep(0.01)


# -- room -------------------------------------------------------------------------------------------------------------


def test_three_buffers_are_enough_for_offers_that_are_committed_or_voted_down() -> None:
    arena = make_arena(filled_state(0))
    snapshots, committed = snapshotter(arena), 0
    for version in range(40):
        assert snapshots.offer(filled_state(version), version)
        if version % 3 != 1:  # every third one is voted down
            snapshots.commit(version)
            committed = version
        assert committed in _versions(arena)
    assert snapshots.skipped == 0


def test_a_version_without_a_buffer_is_skipped_and_counted_and_costs_nothing_else() -> None:
    arena = make_arena(filled_state(0))
    snapshots = snapshotter(arena)
    snapshots.offer(filled_state(1), 1)
    snapshots.commit(1)
    snapshots.offer(filled_state(2), 2)
    arena.buffer(2).pin(+1)
    assert not snapshots.offer(filled_state(3), 3)
    assert (snapshots.skipped, _versions(arena)) == (1, [1, 2])
    arena.buffer(2).pin(-1)
    assert snapshots.offer(filled_state(4), 4)
    assert _versions(arena) == [1, 2, 4]


def test_the_buffer_that_the_keeper_pins_at_the_last_moment_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = make_arena(filled_state(0))
    snapshots = snapshotter(arena)
    for version in (1, 2):
        snapshots.offer(filled_state(version), version)
    snapshots.commit(2)
    slots = Arena.slots

    def pinned_right_after(self: Arena) -> list[object]:
        found = slots(self)
        if not self.slots_seen:  # type: ignore[attr-defined]
            self.buffer(0).pin(+1)
        self.slots_seen = True  # type: ignore[attr-defined]
        return list(found)

    arena.slots_seen = False  # type: ignore[attr-defined]
    monkeypatch.setattr(Arena, "slots", pinned_right_after)
    assert snapshots.offer(filled_state(3), 3)
    assert [slot.version for slot in slots(arena) if slot.is_complete] == [2, 3]
    assert slots(arena)[0].is_pinned
    assert slots(arena)[0].state is BufferState.FREE


def test_an_offer_before_memory_is_reserved_says_what_is_missing() -> None:
    arena = Arena.create(0, "run", 1 << 30, 3)
    with pytest.raises(InvariantViolation, match=r"its buffers have 0; reserve\("):
        snapshotter(arena).offer(filled_state(1), 1)


def test_required_bytes_are_enough_although_numbers_grow_longer() -> None:
    state = filled_state(0)
    arena = make_arena(state)
    assert arena.board.capacity - required_bytes(state) < 1 << 17
    long = RankState(state.slices, {"step": 10**30, "owner": {"steps": [10**30] * 200}})
    assert snapshotter(arena).offer(long, 10**9)


def test_scalars_that_outgrow_the_buffer_are_an_error_that_leaves_the_last_version(
    caplog: pytest.LogCaptureFixture,
) -> None:
    arena = make_arena(filled_state(0))
    snapshots = snapshotter(arena)
    snapshots.offer(filled_state(1), 1)
    assert not snapshots.offer(RankState(filled_state(2).slices, {"log": "x" * 200_000}), 2)
    assert "scalars must have grown" in caplog.text
    assert [slot.state for slot in arena.slots()] == [BufferState.FILLED, BufferState.FREE, BufferState.FREE]


# -- what is copied ---------------------------------------------------------------------------------------------------


def test_every_slice_is_stored_under_its_name_with_its_digest() -> None:
    arena = make_arena(filled_state(0))
    snapshotter(arena).offer(filled_state(3), 3)
    held = find_version(arena, 3)
    assert list(held.damage()) == []
    stored = {e.spec.name: held.data[e.offset : e.offset + e.length].tobytes() for e in held.manifest.entries}
    assert stored == expected_bytes(3)


def test_a_tensor_that_moved_is_copied_from_where_it_is_now() -> None:
    arena = make_arena(filled_state(0))
    snapshots, state = snapshotter(arena), filled_state(1)
    snapshots.offer(state, 1)
    state.slices[0].tensor.data = torch.full((1000,), 7.0)
    snapshots.offer(state, 2)
    set_version(state, 9)
    snapshots.restore_into(state, 2)
    assert state.slices[0].tensor.tolist() == [7.0] * 1000


def test_the_manifest_says_who_wrote_what() -> None:
    arena = make_arena(filled_state(0), rank=0)
    AtOnce(arena, rank=0, world=4, epoch=7, config_digest="9c1e").offer(filled_state(3), 3)
    manifest = find_version(arena, 3).manifest
    assert (manifest.version, manifest.epoch, manifest.rank, manifest.world) == (3, 7, 0, 4)
    assert (manifest.config_digest, manifest.scalars["step"]) == ("9c1e", 3)
    assert [e.spec for e in manifest.entries] == [s.spec for s in filled_state(0).slices]


@pytest.mark.parametrize("other", [{"world": 2}, {"config_digest": "other"}])
def test_a_version_of_another_layout_or_configuration_is_refused(other: Mapping[str, object]) -> None:
    arena = make_arena(filled_state(0))
    snapshotter(arena).offer(filled_state(1), 1)
    arguments = {"rank": 0, "world": 1, "epoch": 2, **other}
    with pytest.raises(ManifestMismatch, match="version 1 was taken of"):
        ArenaSnapshotter(arena, **arguments).restore_into(filled_state(0), 1)  # type: ignore[arg-type]


# -- epochs -----------------------------------------------------------------------------------------------------------


def test_nothing_can_be_offered_fenced_committed_or_restored_after_the_epoch_is_over() -> None:
    arena = make_arena(filled_state(0))
    snapshots, live = snapshotter(arena, epoch=1), filled_state(9)
    snapshots.offer(filled_state(1), 1)
    arena.board.fence(2)
    for call in (
        lambda: snapshots.offer(filled_state(2), 2),
        snapshots.fence,
        lambda: snapshots.commit(1),
        lambda: snapshots.restore_into(live, 1),
    ):
        with pytest.raises(Abort, match="epoch 1 of rank 0 is over"):
            call()
    assert [(s.version, s.state) for s in arena.slots() if s.is_complete] == [(1, BufferState.FILLED)]
    assert bytes_of(live) == expected_bytes(9)


def test_a_fence_in_the_middle_of_a_capture_keeps_the_version_from_being_published() -> None:
    arena = make_arena(filled_state(0))
    snapshots = snapshotter(arena, epoch=1)
    snapshots.offer(filled_state(1), 1)
    with failpoints.armed("snapshot.mid_capture", lambda *_: arena.board.fence(2)), pytest.raises(Abort):
        snapshots.offer(filled_state(2), 2)
    assert _versions(arena) == [1]


def test_a_worker_that_was_fenced_off_does_not_touch_the_buffer_of_its_successor() -> None:
    arena = make_arena(filled_state(0))
    late, successor = snapshotter(arena, epoch=1), snapshotter(arena, epoch=2)

    def be_replaced(*_: object) -> None:
        failpoints.disarm()
        arena.board.fence(2)
        assert successor.offer(filled_state(5), 5)

    with failpoints.armed("snapshot.mid_capture", be_replaced), pytest.raises(Abort):
        late.offer(filled_state(2), 2)
    assert _versions(arena) == [5]
    assert list(find_version(arena, 5).damage()) == []


def test_a_future_published_by_a_worker_of_an_older_epoch_makes_way() -> None:
    arena = make_arena(filled_state(0))
    old, new = snapshotter(arena, epoch=1), snapshotter(arena, epoch=2)
    for version in (4, 5, 6):
        old.offer(filled_state(version), version)
    new.restore_into(filled_state(0), 4)
    assert new.offer(filled_state(5), 5)
    assert [(s.version, s.epoch) for s in sorted(arena.slots(), key=lambda s: s.version) if s.is_complete] == [
        (4, 1),
        (5, 2),
    ]


def test_a_restored_version_counts_as_committed_and_the_one_before_stays_until_the_next_offer() -> None:
    arena = make_arena(filled_state(0))
    old = snapshotter(arena, epoch=1)
    old.offer(filled_state(1), 1)
    old.commit(1)
    old.offer(filled_state(2), 2)
    new = snapshotter(arena, epoch=2)
    new.restore_into(filled_state(0), 2)
    assert _versions(arena) == [1, 2]
    assert arena.board.read().committed == 2
    arena.buffer(2).pin(+1)  # the keeper reads: without the commit there would be no room ever again
    assert new.offer(filled_state(3), 3)
    assert _versions(arena) == [2, 3]


def test_the_board_tells_what_was_committed() -> None:
    arena = make_arena(filled_state(0))
    snapshots = snapshotter(arena)
    snapshots.offer(filled_state(1), 1)
    assert arena.board.read().committed == -1
    snapshots.commit(1)
    assert arena.board.read().committed == 1


# -- durable checkpoints ----------------------------------------------------------------------------------------------


def _run(snapshots: ArenaSnapshotter, versions: range) -> None:
    for version in versions:
        assert snapshots.offer(filled_state(version), version)
        snapshots.commit(version)


def _kept(arena: Arena) -> list[int]:
    return [slot.version for slot in arena.slots() if slot.is_kept and slot.is_complete]


def test_a_due_version_stays_until_the_next_one_is_due() -> None:
    arena = make_arena(filled_state(0))
    snapshots = snapshotter(arena, persist_every=5)
    _run(snapshots, range(5))
    assert _kept(arena) == []
    _run(snapshots, range(5, 10))
    assert (_kept(arena), _versions(arena)) == ([5], [5, 9])
    _run(snapshots, range(10, 12))
    assert (_kept(arena), _versions(arena)) == ([10], [10, 11])
    assert snapshots.skipped == 0


def test_while_the_keeper_reads_one_version_the_next_due_one_is_not_kept() -> None:
    arena = make_arena(filled_state(0))
    snapshots = snapshotter(arena, persist_every=5)
    _run(snapshots, range(6))
    reading = find_version(arena, 5).buffer
    reading.pin(+1)
    _run(snapshots, range(6, 13))
    assert (_kept(arena), _versions(arena)) == ([5], [5, 12])
    reading.pin(-1)
    _run(snapshots, range(13, 17))
    assert (_kept(arena), _versions(arena)) == ([15], [15, 16])


def test_a_version_kept_for_later_makes_way_when_its_buffer_is_needed() -> None:
    arena = make_arena(filled_state(0))
    snapshots = snapshotter(arena, persist_every=5)
    _run(snapshots, range(8))
    assert snapshots.offer(filled_state(8), 8)  # voted down
    assert snapshots.offer(filled_state(9), 9)
    assert (_kept(arena), _versions(arena)) == ([], [7, 8, 9])


# -- a new keeper -----------------------------------------------------------------------------------------------------


def test_a_worker_carries_its_versions_into_the_memory_of_a_new_keeper() -> None:
    old, new = make_arena(filled_state(0)), Arena.create(0, "run", 1 << 30, 3)
    snapshots = snapshotter(old, persist_every=4)
    _run(snapshots, range(6))
    snapshots.offer(filled_state(6), 6)
    assert copy_versions(old, new) == [6, 5, 4]
    assert copy_versions(old, new) == []
    states = {slot.version: (slot.state, slot.is_kept) for slot in new.slots()}
    assert states == {
        6: (BufferState.FILLED, False),
        5: (BufferState.COMMITTED, False),
        4: (BufferState.COMMITTED, True),
    }
    assert new.board.read().committed == 5
    for version in (6, 5, 4):
        state = filled_state(0)
        snapshotter(new, epoch=2).restore_into(state, version)
        assert bytes_of(state) == expected_bytes(version)


def test_a_damaged_version_is_not_carried_over() -> None:
    old, new = make_arena(filled_state(0)), make_arena(filled_state(0))
    snapshots = snapshotter(old)
    for version in (1, 2):
        snapshots.offer(filled_state(version), version)
    find_version(old, 2).data[5] ^= 1
    assert copy_versions(old, new) == [1]
    assert _versions(new) == [1]


def test_a_version_whose_manifest_is_damaged_is_not_offered() -> None:
    arena = make_arena(filled_state(0))
    snapshots = snapshotter(arena)
    for version in (1, 2):
        snapshots.offer(filled_state(version), version)
    slot = arena.slots()[1]
    arena.buffer(1).data[slot.manifest_at + 40] ^= 1
    assert [held.slot.version for held in held_versions(arena)] == [1]


def test_a_descriptor_that_tells_of_another_version_than_the_manifest_is_not_believed() -> None:
    arena = make_arena(filled_state(0))
    snapshotter(arena).offer(filled_state(1), 1)
    arena.board.descriptor(0).cast("q")[3] = 2
    assert held_versions(arena) == []


@pytest.mark.parametrize("field", [5, 6, 7])
@pytest.mark.parametrize("value", [-1, 0, 1 << 62])
def test_a_descriptor_with_impossible_numbers_never_restores_anything_wrong(field: int, value: int) -> None:
    arena = make_arena(filled_state(0))
    snapshotter(arena).offer(filled_state(1), 1)
    arena.board.descriptor(0).cast("q")[field] = value
    live = filled_state(9)
    with contextlib.suppress(InsufficientShards, ShardCorrupt):
        snapshotter(arena, epoch=2).restore_into(live, 1)
    assert bytes_of(live) in (expected_bytes(9), expected_bytes(1)), "either refused or right, never anything else"
