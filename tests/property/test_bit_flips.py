"""One flipped bit anywhere in what is stored: found where it matters, and undone from parity or an older version.

Every trial flips one random bit, so each class below is counted. What is *not* found, by construction, is a flip
between slices or behind the manifest: nothing there is ever restored. A flip between the slices of one rank can still
spoil the decoding of another rank's bytes, because parity covers whole buffers; what is decoded is then refused.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.errors import InsufficientShards, ManifestMismatch, ShardCorrupt, SnapshotError
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.buffer import Bytes
from holdfast.fault_tolerance.commit_json import from_json, to_json
from holdfast.fault_tolerance.manifest import Manifest, damaged_slices
from holdfast.fault_tolerance.storage import open_storage
from holdfast.fault_tolerance.versions import Held, find_version, held_versions
from tests.support.keepers import writer
from tests.support.ring import Ring, until
from tests.support.snapshots import bytes_of, expected_bytes, filled_state

pytestmark = pytest.mark.timeout(180)

_SEED = 7
_VERSION = 2
_SLOW = 20
"""Of so many trials one restores and repairs, too, which takes longer than to look."""


@pytest.fixture(scope="module")
def ring() -> Iterator[Ring]:
    """Four nodes of one rank each, of which any two may be lost; versions 1 and 2 are committed, nobody trains."""
    made = Ring(4, 2)
    made.begin()
    for version in (1, _VERSION):
        made.train(version)
        until(lambda version=version: made.committed() == version)  # type: ignore[misc]
    made.inventory()
    yield made
    made.close()


def _held(ring: Ring, rank: int) -> Held:
    return find_version(ring.keepers[rank]._arenas[rank], _VERSION)


def _flip(data: Bytes, bit: int) -> None:
    data[bit // 8] ^= 1 << bit % 8


def _class_of(held: Held, byte: int) -> str:
    if byte >= held.slot.manifest_at:
        return "manifest" if byte < held.slot.manifest_at + held.slot.manifest_bytes else "behind"
    return "data" if any(e.offset <= byte < e.offset + e.length for e in held.manifest.entries) else "padding"


def _slice_at(held: Held, byte: int) -> str:
    return next(e.spec.name for e in held.manifest.entries if e.offset <= byte < e.offset + e.length)


def _restored(ring: Ring, rank: int) -> dict[str, bytes]:
    """What a worker that starts now gets."""
    state = filled_state(0)
    reader = writer(ring.keepers[rank], rank, world=ring.world, epoch=ring.epoch)
    reader.restore_into(state, _VERSION)
    reader.close()
    return bytes_of(state)


def test_a_flip_in_memory_is_found_wherever_it_matters_and_undone_from_parity(ring: Ring) -> None:
    chance, seen = random.Random(_SEED), Counter[str]()
    for trial in range(2400):
        rank = chance.randrange(ring.world)
        held, keeper = _held(ring, rank), ring.keepers[rank]
        bit = _pick(chance, held, trial)
        kind = _class_of(held, bit // 8)
        _flip(held.buffer.data, bit)
        if kind == "data":
            assert keeper.verify(rank, _VERSION) == [_slice_at(held, bit // 8)]
            if trial % _SLOW == 1:
                with pytest.raises(ShardCorrupt):
                    _restored(ring, rank)
        elif kind == "manifest":
            assert _VERSION not in [one.slot.version for one in held_versions(keeper._arenas[rank])]
            with pytest.raises(InsufficientShards):
                keeper.verify(rank, _VERSION)
        else:
            assert keeper.verify(rank, _VERSION) == []
            if trial % _SLOW == 0:
                assert _restored(ring, rank) == expected_bytes(_VERSION)
        if kind in ("data", "manifest") and trial % _SLOW == 1:
            ring.rebuild(rank, [rank], _VERSION)
            assert ring.stored(rank, _VERSION) == expected_bytes(_VERSION)
            seen["repaired"] += 1
        else:
            _flip(held.buffer.data, bit)
        seen[kind] += 1
    assert seen.total() - seen["repaired"] == 2400
    assert min(seen[kind] for kind in ("data", "manifest", "padding", "behind", "repaired")) >= 40, seen


def _pick(chance: random.Random, held: Held, trial: int) -> int:
    """A bit of everything that the buffer holds and a little beyond; every tenth one between the slices, which are
    few."""
    end = held.slot.manifest_at + held.slot.manifest_bytes
    if trial % 10:
        return chance.randrange(8 * min(end + 256, len(held.buffer.data)))
    gaps = [byte for byte in range(held.slot.data_bytes) if _class_of(held, byte) == "padding"]
    return 8 * chance.choice(gaps) + chance.randrange(8)


def test_a_flip_of_a_survivor_never_gets_into_what_is_rebuilt(ring: Ring) -> None:
    """With one loss to spare, a damaged survivor is done without; between slices nobody notices it in time."""
    chance, seen = random.Random(_SEED), Counter[str]()
    for trial in range(300):
        lost, flipped = chance.sample(range(ring.world), 2)
        held = _held(ring, flipped)
        bit = _pick(chance, held, trial)
        kind = _class_of(held, bit // 8)
        _flip(held.buffer.data, bit)
        try:
            ring.rebuild(lost, [lost], _VERSION)
            seen[f"{kind}, exact"] += 1
        except ShardCorrupt:
            assert kind == "padding"
            assert _VERSION not in [one.slot.version for one in held_versions(ring.keepers[lost]._arenas[lost])]
            seen[f"{kind}, refused"] += 1
        _flip(held.buffer.data, bit)
        if seen[f"{kind}, refused"]:
            ring.rebuild(lost, [lost], _VERSION)
        assert ring.stored(lost, _VERSION) == expected_bytes(_VERSION)
    assert seen.total() == 300
    assert min(seen["data, exact"], seen["manifest, exact"]) > 20, seen


def test_a_flip_in_parity_is_found_and_done_without(ring: Ring) -> None:
    chance, repaired = random.Random(_SEED), 0
    record = next(r for r in ring.outcome.committed if r.version == _VERSION)
    for trial in range(600):
        lost, flipped = chance.sample(range(ring.world), 2)
        store = ring.keepers[flipped]._protector._stores[flipped]
        memory = store.read(record.key, range(store.size_for(record.parts)))
        bit = chance.randrange(8 * memory.size)
        _flip(memory, bit)
        assert [damage.rank for damage in store.damage(record)] == [flipped]
        if trial % 6 == 0:
            ring.rebuild(lost, [lost], _VERSION)
            assert ring.stored(lost, _VERSION) == expected_bytes(_VERSION)
            repaired += 1
        _flip(memory, bit)
        assert store.damage(record) == []
    assert repaired == 100


def test_a_flip_in_the_words_that_describe_a_buffer_never_passes_other_bytes_off_as_the_version(ring: Ring) -> None:
    chance, seen = random.Random(_SEED), Counter[str]()
    for _ in range(600):
        rank = chance.randrange(ring.world)
        arena = ring.keepers[rank]._arenas[rank]
        descriptor = arena.buffer(chance.randrange(arena.board.buffers))._descriptor
        before, bit = bytes(descriptor), chance.randrange(8 * 80)
        descriptor[bit // 8] ^= 1 << bit % 8
        offered = {one.slot.version: one for one in held_versions(arena)}
        for version, held in offered.items():
            assert held.manifest.version == version
            content = {e.spec.name: held.data[e.offset : e.offset + e.length].tobytes() for e in held.manifest.entries}
            assert list(held.damage()) or content == expected_bytes(version)
        seen["offered" if _VERSION in offered else "not offered"] += 1
        descriptor[:] = before
    assert seen.total() == 600
    assert seen["not offered"] > 50, seen


def test_a_flip_in_a_commit_record_on_its_way_is_found(ring: Ring) -> None:
    record = next(r for r in ring.outcome.committed if r.version == _VERSION)
    text, chance = json.dumps(to_json(record)).encode(), random.Random(_SEED)
    for _ in range(600):
        bit, damaged = chance.randrange(8 * len(text)), bytearray(text)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((ManifestMismatch, ValueError)):  # ValueError: no JSON at all
            from_json(json.loads(bytes(damaged)))


def test_a_flip_in_a_checkpoint_is_found_and_the_one_before_it_is_used(ring: Ring, tmp_path: Path) -> None:
    uri, storage = str(tmp_path), open_storage(str(tmp_path))
    for version in (1, _VERSION):
        receipts = {
            rank: keeper.persist(rank, version, uri, checkpoint.directory(version))
            for rank, keeper in ring.keepers.items()
        }
        checkpoint.commit(storage, version, receipts=receipts, config_digest="cfg")
    chance, seen = random.Random(_SEED), Counter[str]()
    files = sorted((tmp_path / checkpoint.directory(_VERSION)).iterdir())
    for trial in range(900):
        path = files[0] if trial % 3 == 0 else chance.choice(files[1:])
        before = path.read_bytes()
        bit, damaged = chance.randrange(8 * len(before)), bytearray(before)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        newest = _newest_readable(uri, ring.world)
        kind = {".json": "commit record", ".arrow": "manifest"}.get(path.suffix, "data")
        if kind == "data" and _is_between_slices(path, bit // 8):
            kind = "padding"
        assert newest == (_VERSION if kind == "padding" else 1), (path.name, bit)
        path.write_bytes(before)
        seen[kind] += 1
    assert _newest_readable(uri, ring.world) == _VERSION
    assert seen.total() == 900
    assert min(seen["commit record"], seen["manifest"], seen["data"]) > 100, seen


def _newest_readable(uri: str, world: int) -> int:
    """As a driver and its keepers look for one. What is readable is exact."""
    storage = open_storage(uri)
    for found in checkpoint.list_checkpoints(storage)[0]:
        try:
            for rank in range(world):
                stored, data = checkpoint.read_rank(storage, checkpoint.directory(found.step), rank)
                manifest = Manifest.from_bytes(stored)
                for damage in damaged_slices(data, manifest):
                    raise damage
                content = {e.spec.name: data[e.offset : e.offset + e.length] for e in manifest.entries}
                assert content == expected_bytes(found.step)
        except SnapshotError:
            continue
        return found.step
    return -1


def _is_between_slices(path: Path, byte: int) -> bool:
    manifest = Manifest.from_bytes(path.with_suffix(".manifest.arrow").read_bytes())
    return not any(e.offset <= byte < e.offset + e.length for e in manifest.entries)
