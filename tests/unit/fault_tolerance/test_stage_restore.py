"""A lost stage from what the others have stored, against the paper's formula in float64; and the policy of when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from holdfast.errors import Fault, ManifestMismatch, ShardCorrupt
from holdfast.fault_tolerance.lanes import Recorded, Roster
from holdfast.fault_tolerance.manifest import Entry, Manifest, digest, lay_out
from holdfast.fault_tolerance.messages import HeldVersion, InventoryTaken
from holdfast.fault_tolerance.policy import DISK, FRESH, MEMORY, NEIGHBOURS, REPLICAS, Decision, View, decide
from holdfast.fault_tolerance.sources import Sources
from holdfast.fault_tolerance.stage_policy import MomentRepair, Repair, StageFacts, StageRepair
from holdfast.fault_tolerance.stage_repair import Weighting
from holdfast.fault_tolerance.stage_restore import REBUILT, Remade, rebuild_stage
from holdfast.types import RankState, SliceSpec, StateSlice

_SHAPE = (3, 4)
_NAMES = "attention.wo.weight", "norm.weight"
_OUTPUTS = ("attention.wo.weight",)
_NORMS = [0.5, 2.0, 1.0, 3.0]


def _tensors(stage: int, blocks: tuple[int, ...], extra: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(stage)
    names = [f"blocks.{block}.{name}" for block in blocks for name in _NAMES]
    return {
        f"{name}/{key}": rng.standard_normal(_SHAPE).astype(np.float32)
        for name in [*names, *extra]
        for key in ("master", "exp_avg")
    }


class _Stored:
    """Ranks' parts in this process; whoever is asked for a part that nobody has stored finds out."""

    def __init__(self, parts: Mapping[int, Mapping[str, np.ndarray]], norms: list[float] | None = None) -> None:
        self.parts, self.manifests, self.data = parts, dict[int, Manifest](), dict[int, bytearray]()
        scalars = {"step": 7, "tokens": 70, "owner": {"stage_norms": _NORMS if norms is None else norms}}
        for rank, tensors in parts.items():
            offsets, total = lay_out([tensor.nbytes for tensor in tensors.values()])
            data, entries = bytearray(total), []
            for at, (name, tensor) in zip(offsets, tensors.items(), strict=True):
                content = tensor.tobytes()
                data[at : at + len(content)] = content
                spec = SliceSpec(name, tensor.shape, 0, tensor.size, "float32")
                entries.append(Entry(spec, at, len(content), digest(content)))
            self.manifests[rank] = Manifest(7, 1, rank, 4, scalars, tuple(entries))
            self.data[rank] = data

    def read(self, rank: int, start: int, stop: int) -> bytearray:
        return self.data[rank][start:stop]


def _fresh(names: Mapping[str, np.ndarray]) -> RankState:
    """The state of an engine that has just been made: weights of its own, which nothing may be read from."""
    slices = [
        StateSlice(SliceSpec(name, tensor.shape, 0, tensor.size, "float32"), torch.full((tensor.size,), torch.nan))
        for name, tensor in names.items()
    ]
    return RankState(slices, {})


def _values(state: RankState) -> dict[str, np.ndarray]:
    return {piece.spec.name: piece.tensor.view(_SHAPE).numpy() for piece in state.slices}


def _repair(stage: int, repair: Repair, *sources: int) -> StageRepair:
    return StageRepair(stage, repair, sources, True, "lost")


_LOST, _BEFORE, _BEHIND = (2, 3), (0, 1), (4, 5)


def _three() -> tuple[_Stored, dict[str, np.ndarray]]:
    return _Stored({0: _tensors(0, _BEFORE), 2: _tensors(2, _BEHIND)}), _tensors(1, _LOST)


@pytest.mark.parametrize("exponent", [1, 2])
@pytest.mark.parametrize("moments", [MomentRepair.RESET, MomentRepair.AVERAGED])
def test_the_average_is_that_of_the_paper(exponent: int, moments: MomentRepair) -> None:
    stored, names = _three()
    state = _fresh(names)
    repair = _repair(1, Repair.CHECKFREE, 0, 2)
    scalars, share, size = rebuild_stage(stored, state, repair, Weighting(exponent=exponent), moments)
    before, behind = _NORMS[0] ** exponent, _NORMS[2] ** exponent
    assert share == pytest.approx(before / (before + behind))
    for name, found in _values(state).items():
        _, block, rest = name.split(".", 2)
        a, b = (
            stored.parts[rank][f"blocks.{blocks[_LOST.index(int(block))]}.{rest}"].astype(np.float64)
            for rank, blocks in ((0, _BEFORE), (2, _BEHIND))
        )
        if name.endswith("/master") or moments is MomentRepair.AVERAGED:
            np.testing.assert_allclose(found, (before * a + behind * b) / (before + behind), rtol=1e-6, atol=1e-7)
        else:
            assert np.isnan(found).all()  # as the engine made it
    kinds = 1 if moments is MomentRepair.RESET else 2
    assert size == kinds * 2 * len(_LOST) * len(_NAMES) * 4 * 12  # two neighbours' weights, and nothing else
    assert scalars["step"] == 7


def test_before_the_first_step_has_measured_anything_the_average_is_plain() -> None:
    stored, names = _Stored({0: _tensors(0, _BEFORE), 2: _tensors(2, _BEHIND)}, norms=[]), _tensors(1, _LOST)
    _, share, _ = rebuild_stage(
        stored, _fresh(names), _repair(1, Repair.CHECKFREE, 0, 2), Weighting(), MomentRepair.RESET
    )
    assert share == 0.5


def test_what_is_in_no_block_comes_back_exactly_with_its_moments() -> None:
    neighbour, names = _tensors(1, (1,), ("embedding.weight",)), _tensors(0, (0,), ("embedding.weight",))
    state = _fresh(names)
    rebuild_stage(_Stored({1: neighbour}), state, _repair(0, Repair.COPY_NEXT, 1), Weighting(), MomentRepair.RESET)
    found = _values(state)
    for key in ("master", "exp_avg"):
        assert np.array_equal(found[f"embedding.weight/{key}"], neighbour[f"embedding.weight/{key}"])
    assert np.array_equal(found["blocks.0.norm.weight/master"], neighbour["blocks.1.norm.weight/master"])
    assert np.isnan(found["blocks.0.norm.weight/exp_avg"]).all()


def test_an_identity_zeroes_what_writes_to_the_residual_stream_only() -> None:
    stored, names = _three()
    state = _fresh(names)
    repair = _repair(1, Repair.IDENTITY, 0)
    rebuild_stage(stored, state, repair, Weighting(), MomentRepair.RESET, _OUTPUTS)
    found = _values(state)
    assert not found["blocks.2.attention.wo.weight/master"].any()
    assert np.array_equal(found["blocks.2.norm.weight/master"], stored.parts[0]["blocks.0.norm.weight/master"])


@pytest.mark.parametrize("what", ["an end that nobody holds", "another shape", "a damaged source", "a source of NaN"])
def test_nothing_is_written_when_a_stage_cannot_be_made(what: str) -> None:
    stored, names = _three()
    error: type[Exception] = ManifestMismatch
    if what == "an end that nobody holds":
        names = _tensors(1, _LOST, ("head.output.weight",))
    elif what == "another shape":
        names = {name: np.zeros((5, 4), np.float32) for name in names}
    elif what == "a damaged source":
        stored.data[2][3] ^= 1
        error = ShardCorrupt
    else:
        parts = {
            rank: {name: np.full_like(t, np.nan) for name, t in part.items()} for rank, part in stored.parts.items()
        }
        stored, error = _Stored(parts), Fault
    state = _fresh(names)
    with pytest.raises(error):
        rebuild_stage(stored, state, _repair(1, Repair.CHECKFREE, 0, 2), Weighting(), MomentRepair.RESET)
    assert all(piece.tensor.isnan().all() for piece in state.slices)


class _Exact:
    def __init__(self, owner: dict[str, Any]) -> None:
        self._owner = owner

    def restore_into(self, state: RankState, version: int) -> Mapping[str, object]:
        return {"step": version, "tokens": 0, "owner": self._owner}


def test_every_rank_learns_which_stages_are_new_how_often_and_since_when() -> None:
    before: dict[str, Any] = {"0": {"step": 7}, REBUILT: {"1/4": {"times": 1, "at": 3, "steps": 3}}}
    repairs = [_repair(1, Repair.COPY_NEXT, 2), _repair(3, Repair.CHECKFREE, 2, 4)]
    remade = Remade(_Exact(before), repairs, 4, MomentRepair.AVERAGED)
    owner = remade.restore_into(RankState((), {}), 7)["owner"]
    assert owner == {
        "0": {"step": 7},
        REBUILT: {"1/4": {"times": 2, "at": 7, "steps": 7}, "3/4": {"times": 1, "at": 7, "steps": 0}},
    }


# -- when -------------------------------------------------------------------------------------------------------------


def _view(held: Mapping[int, tuple[int, ...]], **rest: Any) -> View:
    roster = Roster(0, (0, 1, 2, 3), 1)
    wish, ends = rest.pop("wish", Repair.CHECKFREE), rest.pop("ends", False)
    versions = {rank: tuple(HeldVersion(v, 1, 4) for v in held.get(rank, ())) for rank in range(4)}
    return View(roster, versions, rosters={0: roster}, stages=StageFacts((1, 1, 1, 1), wish, ends), **rest)


def _sources(decision: Decision) -> dict[int, tuple[int, ...]]:
    assert decision.rebuild is not None
    return {repair.stage: repair.sources for repair in decision.rebuild.repairs}


def test_neighbours_are_a_source_when_no_memory_is_exact() -> None:
    decision = decide(_view({0: (8, 7), 2: (8,), 3: (7, 8)}, durable=(5,)))
    assert (decision.source, decision.version, decision.writer_epoch) == (NEIGHBOURS, 8, 1)
    assert _sources(decision) == {1: (0, 2)}
    assert decision.rebuild is not None
    assert decision.rebuild.held == Recorded(8, 1)


def test_any_exact_memory_comes_before_neighbours_and_so_does_a_checkpoint_that_is_as_new() -> None:
    assert decide(_view({0: (8, 7), 1: (7,), 2: (8, 7), 3: (8, 7)})).source == MEMORY
    assert decide(_view({0: (8,), 2: (8,), 3: (8,)}, durable=(8,))).source == DISK


@pytest.mark.parametrize(
    ("held", "rest", "reason"),
    [
        ({0: (8,), 3: (8,)}, {}, "lost with it"),
        ({1: (8,), 2: (8,), 3: (8,)}, {}, "no stage before"),
        ({1: (8,), 2: (8,), 3: (8,)}, {"wish": Repair.COPY_NEXT}, "the embedding of stage 0 is in no other memory"),
        ({2: (8,), 3: (8,)}, {"wish": Repair.IDENTITY, "ends": True}, "the embedding of stage 0"),
        ({0: (8,), 2: (8,), 3: (8,)}, {"spoilt": {(8, 1): "damaged"}}, ""),
    ],
)
def test_what_neighbours_cannot_do_is_refused_with_the_reason_and_the_next_source_taken(
    held: dict[int, tuple[int, ...]], rest: dict[str, Any], reason: str
) -> None:
    for durable, source in (((5,), DISK), ((), FRESH)):
        decision = decide(_view(held, durable=durable, **rest))
        assert decision.source == source
        assert not reason or any(NEIGHBOURS in why and reason in why for why in decision.rejected)


def test_a_run_that_wants_exact_state_never_asks_neighbours() -> None:
    view = _view({0: (8,), 2: (8,), 3: (8,)}, wish=Repair.EXACT, durable=(5,))
    assert decide(view).source == DISK


def test_what_a_lost_stage_did_is_told_as_far_as_it_was_measured() -> None:
    sources = Sources(Roster(0, (0, 1, 2, 3), 1), StageFacts((1, 1, 1, 1), Repair.CHECKFREE, False))
    held = {rank: (HeldVersion(8, 1, 4),) for rank in (0, 2, 3)}
    sources.take(InventoryTaken(2, held))
    assert "turned" not in sources.decide().reason
    sources.measured(4, {1: 0.0625, 2: 0.5})
    assert "stage 0 and stage 2 (at step 4 it turned what passes it by 0.062 of a half turn)" in sources.decide().reason


# -- replicas ---------------------------------------------------------------------------------------------------------


def test_a_rank_whose_replica_holds_the_version_is_copied_exactly() -> None:
    """Two pipelines of two: ranks 0 and 2 hold the same, and so do 1 and 3."""
    decision = decide(_view({0: (8,), 3: (8,)}, wish=Repair.EXACT, durable=(5,), replicas_every=2))
    assert (decision.source, decision.version, decision.writer_epoch) == (REPLICAS, 8, 1)
    assert _sources(decision) == {1: (3,), 2: (0,)}
    assert decision.rebuild is not None
    assert not decision.rebuild.is_approximate
    assert decision.rebuild.ranks == (1, 2)
    assert "is that of ranks 0, 3; its random numbers begin anew" in decision.reason


def test_where_all_ranks_are_replicas_one_is_enough() -> None:
    decision = decide(_view({3: (8,)}, wish=Repair.EXACT, replicas_every=1))
    assert (decision.source, _sources(decision)) == (REPLICAS, {0: (3,), 1: (3,), 2: (3,)})


@pytest.mark.parametrize(
    ("held", "every", "source", "version"),
    [
        ({0: (8,), 2: (8,)}, 2, DISK, 5),  # nobody has the state of ranks 1 and 3
        ({0: (8, 7), 1: (7,), 2: (8, 7), 3: (7,)}, 2, MEMORY, 7),
        ({0: (8, 7), 1: (8, 7), 2: (7,), 3: (7,)}, 2, MEMORY, 7),  # with the random numbers
        ({0: (8, 7), 1: (8, 7), 2: (7,)}, 2, REPLICAS, 8),
        ({0: (8,), 1: (8,), 2: (8,)}, 0, DISK, 5),  # shares of one state
        ({}, 1, DISK, 5),
    ],
)
def test_the_newest_version_that_every_kind_of_rank_has_is_taken(
    held: dict[int, tuple[int, ...]], every: int, source: str, version: int
) -> None:
    decision = decide(_view(held, wish=Repair.EXACT, durable=(5,), replicas_every=every))
    assert (decision.source, decision.version) == (source, version)
