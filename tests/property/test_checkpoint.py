"""Laws of the commit protocol: no damage is missed, and the last good checkpoint never goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from holdfast.errors import SnapshotError
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.storage import MemoryStorage

STEPS = st.integers(0, 6)


def content(step: int, rank: int) -> tuple[bytes, bytes]:
    return bytes([rank]) * (step + 1), f"manifest {step} {rank}".encode()


def write_rank(storage: MemoryStorage, step: int, rank: int) -> Mapping[str, Any]:
    data, manifest = content(step, rank)
    return checkpoint.write_rank(storage, checkpoint.directory(step), rank, data=[data], manifest=manifest)


def committed(step: int, world: int) -> MemoryStorage:
    storage = MemoryStorage()
    receipts = {rank: write_rank(storage, step, rank) for rank in range(world)}
    checkpoint.commit(storage, step, receipts=receipts, config_digest="cfg")
    return storage


@given(step=st.integers(0, 10**12))
def test_a_step_can_be_told_from_its_directory(step: int) -> None:
    assert checkpoint.step_of(checkpoint.directory(step)) == step


@given(name=st.text("step-0123456789rejcd. x", max_size=20))
def test_only_a_name_that_we_make_is_a_step(name: str) -> None:
    step = checkpoint.step_of(name)
    assert step is None or checkpoint.directory(step) == name


@settings(max_examples=400)
@given(step=STEPS, world=st.integers(1, 3), data=st.data())
def test_a_flipped_bit_in_record_or_manifest_is_noticed(step: int, world: int, data: st.DataObject) -> None:
    storage = committed(step, world)
    folder = checkpoint.directory(step)
    before = checkpoint.read_commit(storage, step)
    name = data.draw(st.sampled_from(["commit.json", "rank00000.manifest.arrow"]))
    damaged = bytearray(storage.read(f"{folder}/{name}"))
    bit = data.draw(st.integers(0, 8 * len(damaged) - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    storage.write(f"{folder}/{name}", [damaged])
    try:
        manifest, _ = checkpoint.read_rank(storage, folder, 0)
    except SnapshotError:
        return
    assert checkpoint.read_commit(storage, step) == before, "a flip that went unnoticed must have changed nothing"
    assert manifest == content(step, 0)[1]


@given(step=STEPS, world=st.integers(1, 3), data=st.data())
def test_a_file_cut_anywhere_is_noticed_by_the_listing(step: int, world: int, data: st.DataObject) -> None:
    storage = committed(step, world)
    path = f"{checkpoint.directory(step)}/{data.draw(st.sampled_from(storage.list(checkpoint.directory(step))))}"
    whole = storage.read(path)
    storage.write(path, [whole[: data.draw(st.integers(0, len(whole) - 1))]])
    good, rejected = checkpoint.list_checkpoints(storage)
    assert good == () and [found.name for found in rejected] == [checkpoint.directory(step)]


class Protocol(RuleBasedStateMachine):
    """Ranks write, the driver commits, everybody may stop half-way; readers must never be misled.

    The model keeps what was committed and not damaged, quarantined or retired since.
    """

    WORLD = 2

    def __init__(self) -> None:
        super().__init__()
        self.storage = MemoryStorage()
        self.receipts: dict[int, dict[int, Mapping[str, Any]]] = {}
        self.good: set[int] = set()
        self.published: set[int] = set()

    @rule(step=STEPS, rank=st.integers(0, WORLD - 1))
    def a_rank_writes(self, step: int, rank: int) -> None:
        try:
            self.receipts.setdefault(step, {})[rank] = write_rank(self.storage, step, rank)
        except SnapshotError:
            assert step in self.published

    @rule(step=STEPS, rank=st.integers(0, WORLD - 1))
    def a_rank_dies_between_data_and_manifest(self, step: int, rank: int) -> None:
        """Of another attempt, whose driver holds no receipt of it."""
        if step not in self.published:
            self.storage.write(f"{checkpoint.directory(step)}/{checkpoint.data_file(rank)}", [b"other"])
            self.receipts.get(step, {}).pop(rank, None)

    @rule(step=STEPS)
    def the_driver_commits(self, step: int) -> None:
        receipts = self.receipts.get(step, {})
        if len(receipts) < self.WORLD:
            return
        try:
            checkpoint.commit(self.storage, step, receipts=receipts, config_digest="cfg")
        except SnapshotError:
            return
        if step not in self.published:
            self.good.add(step)
            self.published.add(step)

    @rule(keep_last=st.integers(0, 3))
    def old_ones_are_retired(self, keep_last: int) -> None:
        newest, named = max(self.good, default=None), checkpoint.latest(self.storage)
        gone = {checkpoint.step_of(name) for name in checkpoint.retain(self.storage, keep_last)}
        assert newest not in gone and (named not in gone or named not in self.good)
        self.good -= gone
        self.published -= gone

    @rule(step=STEPS)
    def one_turns_out_bad(self, step: int) -> None:
        if step in self.published:
            checkpoint.quarantine(self.storage, step, "bad")
            self.good.discard(step)
            self.published.discard(step)

    @rule(step=STEPS, rank=st.integers(0, WORLD - 1))
    def a_file_is_lost(self, step: int, rank: int) -> None:
        self.storage.delete(f"{checkpoint.directory(step)}/{checkpoint.manifest_file(rank)}")
        self.good.discard(step)

    @invariant()
    def readers_see_the_good_ones_newest_first_and_whole(self) -> None:
        good, _ = checkpoint.list_checkpoints(self.storage)
        assert [found.step for found in good] == sorted(self.good, reverse=True)
        for found in good:
            for rank in range(self.WORLD):
                data, manifest = content(found.step, rank)
                assert checkpoint.read_rank(self.storage, checkpoint.directory(found.step), rank) == (manifest, data)


TestProtocol = Protocol.TestCase
TestProtocol.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
