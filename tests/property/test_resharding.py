"""Whatever ranks have stored, any other ranks restore what they would have held: against a check element by element."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import ManifestMismatch, ShardCorrupt, SnapshotError
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.coverage import cover
from holdfast.fault_tolerance.manifest import Entry, Manifest
from holdfast.fault_tolerance.resharding import StorageShards, StoredCheckpoint, restore_resharded
from holdfast.fault_tolerance.storage import MemoryStorage
from holdfast.types import Quantization, RankState, SliceSpec, StateSlice
from tests.support.stored import Held, write_checkpoint

_law = settings(deadline=None)  # a busy machine is no counter-example

_STEP, _BLOCK = 7, 4
_SCALARS: Mapping[str, object] = {"step": _STEP, "tokens": 1234, "owner": {"0": {"step": _STEP}}}
_SIZES = {"float32": 4, "uint8": 1, "bfloat16": 2}


@dataclass(frozen=True)
class _Tensor:
    """A global tensor; codes bring their scales along."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    quantization: Quantization | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def content(self) -> bytes:
        """No two elements of a model alike, as far as that goes; NaNs too, whose bits must survive."""
        seed = sum(self.name.encode())
        drawn = np.random.default_rng(seed).integers(0, 256, self.numel * _SIZES[self.dtype], np.uint8)
        return bytes(drawn.tobytes())

    def held(self, start: int, stop: int) -> Held:
        size = _SIZES[self.dtype]
        spec = SliceSpec(self.name, self.shape, start, stop, self.dtype, self.quantization)
        return spec, self.content[start * size : stop * size]


@st.composite
def _models(draw: st.DrawFn) -> list[list[_Tensor]]:
    """Parameters of one tensor, or of three that are cut together: master weights, codes and their scales."""
    shapes = draw(st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3), min_size=1, max_size=4))
    parameters = []
    for number, dims in enumerate(shapes):
        name, shape = f"p{number}", tuple(dims)
        tensors = [_Tensor(f"{name}/master", shape, draw(st.sampled_from(["float32", "bfloat16"])))]
        if draw(st.booleans()):
            blocks = -(-math.prod(shape) // _BLOCK)
            how = Quantization(_BLOCK, "dynamic-signed", f"{name}/absmax")
            tensors += [_Tensor(f"{name}/codes", shape, "uint8", how), _Tensor(f"{name}/absmax", (blocks,), "float32")]
        parameters.append(tensors)
    return parameters


@st.composite
def _layouts(draw: st.DrawFn, model: list[list[_Tensor]]) -> list[list[Held]]:
    """One to five ranks. Every parameter is cut at any block boundaries; a replicated one is held whole by all."""
    world = draw(st.integers(1, 5))
    ranks: list[list[Held]] = [[] for _ in range(world)]
    is_replicated = draw(st.booleans())
    for parameter in model:
        numel = parameter[0].numel
        inner = draw(st.lists(st.integers(0, -(-numel // _BLOCK)), min_size=world - 1, max_size=world - 1))
        cuts = [0, *sorted(min(block * _BLOCK, numel) for block in inner), numel]
        for rank, (start, stop) in enumerate([(0, numel)] * world if is_replicated else pairwise(cuts)):
            ranks[rank] += [t.held(*_part(t, start, stop)) for t in parameter] if start < stop else []
    return ranks


def _part(tensor: _Tensor, start: int, stop: int) -> tuple[int, int]:
    return (start // _BLOCK, -(-stop // _BLOCK)) if tensor.name.endswith("absmax") else (start, stop)


def _blank(held: Sequence[Held]) -> RankState:
    """Live state of the same slices, filled with something else."""
    tensors = [
        torch.full((spec.stop - spec.start,), 77, dtype=torch.uint8)
        if spec.dtype == "uint8"
        else torch.full((spec.stop - spec.start,), 77.0, dtype=getattr(torch, spec.dtype))
        for spec, _ in held
    ]
    return RankState([StateSlice(spec, tensor) for (spec, _), tensor in zip(held, tensors, strict=True)])


def _bytes(state: RankState) -> list[bytes]:
    return [s.tensor.view(torch.uint8).numpy().tobytes() for s in state.slices]


def _stored(ranks: Sequence[Sequence[Held]]) -> tuple[MemoryStorage, StorageShards]:
    storage = MemoryStorage()
    return storage, StorageShards(storage, write_checkpoint(storage, _STEP, ranks, scalars=_SCALARS))


_both_layouts = _models().flatmap(lambda model: st.tuples(_layouts(model), _layouts(model)))


@_law
@given(_both_layouts)
def test_any_layout_restores_any_other_bit_for_bit(layouts: tuple[list[list[Held]], list[list[Held]]]) -> None:
    written, read = layouts
    _, shards = _stored(written)
    for held in read:
        state = _blank(held)
        assert restore_resharded(shards, state) == _SCALARS
        assert _bytes(state) == [content for _, content in held]


@_law
@given(_both_layouts, st.data())
def test_what_is_missing_is_named_and_duplicates_do_no_harm(
    layouts: tuple[list[list[Held]], list[list[Held]]], data: st.DataObject
) -> None:
    written, read = layouts
    pieces = [(rank, held) for rank, some in enumerate(written) for held in some]
    lost = data.draw(st.sets(st.integers(0, len(pieces) - 1), max_size=3))
    doubled = data.draw(st.lists(st.tuples(st.integers(0, len(pieces) - 1), st.integers(0, len(written) - 1))))
    ranks: list[list[Held]] = [[] for _ in written]
    places = [(rank, held) for number, (rank, held) in enumerate(pieces) if number not in lost]
    places += [(rank, pieces[number][1]) for number, rank in doubled if number not in lost]
    for rank, held in places:
        if held not in ranks[rank]:  # names identify the slices of one rank
            ranks[rank].append(held)
    _, shards = _stored(ranks)
    there = {(spec.name, element) for some in ranks for spec, _ in some for element in range(spec.start, spec.stop)}
    for held in read:
        state = _blank(held)
        before = _bytes(state)
        wanted = [(spec.name, element) for spec, _ in held for element in range(spec.start, spec.stop)]
        missing = [place for place in wanted if place not in there]
        if not missing:
            restore_resharded(shards, state)
            assert _bytes(state) == [content for _, content in held]
            continue
        with pytest.raises(ManifestMismatch) as error:
            restore_resharded(shards, state)
        assert _bytes(state) == before
        (name, first), spec = missing[0], next(spec for spec, _ in held if spec.name == missing[0][0])
        last = next((e for e in range(first, spec.stop) if (name, e) in there), spec.stop)
        assert str(error.value).startswith(f"elements {first} to {last} of slice {name!r} are stored by no rank")


@_law
@given(_both_layouts, st.data())
def test_damage_is_found_before_anything_changes_wherever_it_is_needed(
    layouts: tuple[list[list[Held]], list[list[Held]]], data: st.DataObject
) -> None:
    written, read = layouts
    storage, shards = _stored(written)
    rank = data.draw(st.sampled_from([r for r, some in enumerate(written) if some]))
    entry = data.draw(st.sampled_from(shards.manifests[rank].entries))
    path = f"{checkpoint.directory(_STEP)}/{checkpoint.data_file(rank)}"
    content = bytearray(storage.read(path))
    content[entry.offset + data.draw(st.integers(0, entry.length - 1))] ^= 1 << data.draw(st.integers(0, 7))
    storage.write(path, [content])
    for held in read:
        state = _blank(held)
        before = _bytes(state)
        moves = cover(shards.manifests, [spec for spec, _ in held])
        if any((move.source.rank, move.source.entry) == (rank, entry) for move in moves):
            with pytest.raises(ShardCorrupt) as error:
                restore_resharded(shards, state)
            assert (error.value.name, error.value.rank) == (entry.spec.name, rank)
            assert _bytes(state) == before
        else:
            restore_resharded(shards, state)
            assert _bytes(state) == [content for _, content in held]


@_law
@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 9))
def test_equal_shares_need_no_more_moves_than_both_layouts_have_boundaries(blocks: int, n: int, m: int) -> None:
    """Source of the bound: at most N + M - 1 messages for one flat index that is cut into N and into M parts."""
    tensor = _Tensor("p/master", (blocks * _BLOCK + 1,), "float32")
    shares = [_shares(tensor, ranks) for ranks in (n, m)]
    entries = [tuple(Entry(spec, 0, len(content), "0" * 32) for spec, content in held) for held in shares[0]]
    manifests = {rank: Manifest(_STEP, 1, rank, n, _SCALARS, some) for rank, some in enumerate(entries)}
    moves = [move for held in shares[1] for move in cover(manifests, [spec for spec, _ in held])]
    assert len(moves) <= n + m - 1
    assert sum(move.stop - move.start for move in moves) == tensor.numel


def _shares(tensor: _Tensor, ranks: int) -> list[list[Held]]:
    share = _BLOCK * math.ceil(math.ceil(tensor.numel / _BLOCK) / ranks)
    cuts = [min(rank * share, tensor.numel) for rank in range(ranks + 1)]
    return [[tensor.held(start, stop)] if start < stop else [] for start, stop in pairwise(cuts)]


# -- replicas ----------------------------------------------------------------------------------------------------------

_WEIGHTS = [_Tensor(f"w{number}/master", (8,), "float32") for number in range(9)]


def test_replicas_are_read_from_all_ranks_alike() -> None:
    whole = [tensor.held(0, 8) for tensor in _WEIGHTS]
    _, shards = _stored([whole] * 3)
    moves = cover(shards.manifests, [spec for spec, _ in whole])
    assert Counter(move.source.rank for move in moves) == {0: 3, 1: 3, 2: 3}


def test_overlapping_slices_that_are_no_replicas_are_taken_whole_where_that_saves_moves() -> None:
    tensor = _Tensor("p/master", (16,), "float32")
    held = [[tensor.held(*cut)] for cut in ((0, 4), (0, 12), (8, 16), (10, 16))]
    _, shards = _stored(held)
    spec, content = tensor.held(0, 16)
    assert [(move.source.rank, move.start, move.stop) for move in cover(shards.manifests, [spec])] == [
        (1, 0, 12),
        (2, 12, 16),
    ]
    state = _blank([(spec, content)])
    restore_resharded(shards, state)
    assert _bytes(state) == [content]


def test_replicas_that_differ_are_refused_with_both_ranks() -> None:
    whole = [tensor.held(0, 8) for tensor in _WEIGHTS]
    other = [*whole[:4], (whole[4][0], bytes(32)), *whole[5:]]
    _, shards = _stored([whole, whole, other])
    with pytest.raises(ShardCorrupt, match=r"'w4/master' of rank 2, version 7.* that of its replica at rank 0"):
        restore_resharded(shards, _blank(whole))
    restore_resharded(shards, _blank(whole[:4]))  # what nobody asks for is nobody's business


# -- what cannot be put together ---------------------------------------------------------------------------------------


def _one(**changes: object) -> tuple[StorageShards, RankState]:
    spec, content = _WEIGHTS[0].held(0, 8)
    _, shards = _stored([[(spec, content)]])
    return shards, _blank([(replace(spec, **changes), content)])


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (2, 4)},
        {"dtype": "bfloat16"},
        {"quantization": Quantization(_BLOCK, "dynamic-signed", "w0/absmax")},
    ],
)
def test_a_slice_of_another_tensor_is_refused(changes: dict[str, object]) -> None:
    shards, state = _one(**changes)
    before = _bytes(state)
    with pytest.raises(ManifestMismatch, match=r"slice 'w0/master' is .* at rank 0 and .* here"):
        restore_resharded(shards, state)
    assert _bytes(state) == before


def test_a_slice_with_bytes_that_make_no_whole_elements_is_refused() -> None:
    spec, content = _WEIGHTS[0].held(0, 8)
    _, shards = _stored([[(spec, content[:-1])]])
    with pytest.raises(ManifestMismatch, match="has 31 bytes for 8 elements"):
        restore_resharded(shards, _blank([(spec, content)]))


def test_ranks_that_have_stored_different_states_are_refused() -> None:
    held = [[tensor.held(0, 8)] for tensor in _WEIGHTS[:2]]
    storage, _ = _stored(held)
    folder, path = checkpoint.directory(_STEP), checkpoint.manifest_file(1)
    manifest = Manifest.from_bytes(storage.read(f"{folder}/{path}"))
    shards = StorageShards(storage, folder)
    shards.manifests = {**shards.manifests, 1: replace(manifest, scalars={**_SCALARS, "tokens": 99})}
    with pytest.raises(ManifestMismatch, match=r"ranks 0 and 1 have stored different states.*1234.*99"):
        restore_resharded(shards, _blank(held[0]))


def test_a_state_of_nobody_is_refused() -> None:
    shards, state = _one()
    shards.manifests = {}
    with pytest.raises(ManifestMismatch, match="no rank has stored anything"):
        restore_resharded(shards, state)


def test_bytes_that_change_between_the_two_readings_are_noticed() -> None:
    class Fickle(StorageShards):
        reads = 0

        def read(self, rank: int, start: int, stop: int) -> bytes:
            found = super().read(rank, start, stop)
            self.reads += 1
            return found if self.reads == 1 else bytes(len(found))

    whole = [_WEIGHTS[0].held(0, 8)]
    storage, _ = _stored([whole])
    with pytest.raises(ShardCorrupt, match="'w0/master' of rank 0"):
        restore_resharded(Fickle(storage, checkpoint.directory(_STEP)), _blank(whole))


# -- random states -----------------------------------------------------------------------------------------------------


def _random(rank: int, seed: int) -> Held:
    state = torch.Generator().manual_seed(seed).get_state()
    return SliceSpec(f"rng/rank{rank}/cpu", (state.numel(),), 0, state.numel(), "uint8"), state.numpy().tobytes()


def _restored_random(stored: Sequence[Sequence[Held]], rank: int, step: int = _STEP) -> bytes:
    storage = MemoryStorage()
    shards = StorageShards(storage, write_checkpoint(storage, step, stored, scalars=_SCALARS))
    state = _blank([_random(rank, 0)])
    restore_resharded(shards, state)
    return _bytes(state)[0]


def test_ranks_keep_their_random_state_and_new_ones_get_one_of_their_own() -> None:
    stored = [[_random(0, 10)], [_random(1, 11)], [_random(2, 12)]]
    assert [_restored_random(stored, rank) for rank in range(3)] == [content for [(_, content)] in stored]
    new = [_restored_random(stored, rank) for rank in (3, 4)]
    assert new == [_restored_random(stored, rank) for rank in (3, 4)]
    elsewhere = [_restored_random(stored, 3, step=8), _restored_random([*stored[:2], [_random(2, 13)]], 3)]
    assert len({*new, *elsewhere, *(content for [(_, content)] in stored)}) == 7
    for state in new:  # one that a generator takes
        torch.Generator().set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


# -- over a checkpoint -------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_restored_by_its_step_if_it_belongs_to_the_run() -> None:
    whole = [_WEIGHTS[0].held(0, 8)]
    storage, _ = _stored([whole])
    state = _blank(whole)
    assert StoredCheckpoint(storage, config_digest="cfg").restore_into(state, _STEP) == _SCALARS
    assert _bytes(state) == [content for _, content in whole]
    with pytest.raises(ManifestMismatch, match="was taken of cfg, this is other: another model, data or optimizer"):
        StoredCheckpoint(storage, config_digest="other").restore_into(state, _STEP)
    with pytest.raises(SnapshotError):
        StoredCheckpoint(storage, config_digest="cfg").restore_into(state, _STEP + 1)


def test_a_rank_under_anothers_name_is_refused() -> None:
    storage, _ = _stored([[_WEIGHTS[0].held(0, 8)], []])
    folder = checkpoint.directory(_STEP)
    swapped = storage.read(f"{folder}/{checkpoint.manifest_file(0)}")
    record = json.loads(storage.read(f"{folder}/{checkpoint.COMMIT_FILE}"))
    storage.delete(f"{folder}/{checkpoint.COMMIT_FILE}")
    receipts = {}
    for rank in range(record["world"]):
        data = [storage.read(f"{folder}/{checkpoint.data_file(rank)}")]
        receipts[rank] = checkpoint.write_rank(storage, folder, rank, data=data, manifest=swapped)
    checkpoint.commit(storage, _STEP, receipts=receipts, config_digest="cfg")
    with pytest.raises(ManifestMismatch, match="holds version 7 of rank 0 under the name of version 7 of rank 1"):
        StorageShards(storage, folder)


def test_a_folder_that_is_no_checkpoint_is_refused() -> None:
    with pytest.raises(ManifestMismatch, match="'elsewhere' is no directory of a checkpoint"):
        StorageShards(MemoryStorage(), "elsewhere")
