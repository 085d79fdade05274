"""The adapter study on a tiny scale: structure and identities, no outcomes."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

_BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
_MODULES = ("text", "runs", "modes", "ways", "frontier", "mora", "stacks", "study")


@pytest.fixture(scope="module")
def kit() -> Iterator[SimpleNamespace]:
    """The modules of the study, which import each other as scripts do."""
    sys.path.insert(0, str(_BENCHMARKS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(f"adapt_{name}") for name in _MODULES})
    finally:
        sys.path.remove(str(_BENCHMARKS))


def _letters(first: int, number: int) -> Tensor:
    draw = torch.Generator().manual_seed(number)
    return (torch.randint(0, 8, (4000,), generator=draw) + first).to(torch.uint8)


@pytest.fixture(scope="module")
def study(kit):  # type: ignore[no-untyped-def]
    scale = replace(
        kit.study.QUICK, d_model=16, layers=2, d_ff=24, sequence=8, sequences=2, seeds=2, base_steps=20, steps=6,
        warm_up=2, rates=(2e-2,), windows=4, router_windows=8, router_width=8, router_epochs=2, boost_steps=4,
        rounds=2, directions=2, orders=(("high", "low"), ("low", "high")),
    )  # fmt: skip
    kinds = {"low": 65, "high": 97, kit.text.ELSEWHERE: 48}
    texts = {kind: kit.text.Text(*(_letters(first, first + n) for n in range(3))) for kind, first in kinds.items()}
    memo = importlib.import_module("study").Memo()
    return kit.runs.Study([kit.runs.World(scale, texts, seed) for seed in range(2)], memo)


@pytest.fixture(scope="module")
def found(kit, study):  # type: ignore[no-untyped-def]
    return kit.ways.find(study)


def _runs(kit, study):  # type: ignore[no-untyped-def]
    ways = kit.ways.ways(study.scale)
    return {name: kit.ways.runs_of(study, way, study.rates(way)[0]) for name, way in ways.items()}


def test_all_methods_meet_the_same_base_and_batches(kit, study) -> None:  # type: ignore[no-untyped-def]
    runs = _runs(kit, study)
    for seed, world in enumerate(study.worlds):
        of_seed = [of_way[seed] for of_way in runs.values()]
        assert len({run.batches for run in of_seed}) == 1
        assert len({tuple(run.matrix(view).rows[0]) for run in of_seed for view in run.views}) == 1
        assert all(tuple(run.order) == tuple(world.order) for run in of_seed)
    assert runs["MoRA"][0].batches != runs["MoRA"][1].batches
    assert study.worlds[0].order == study.worlds[1].order[::-1]


def test_stored_parameters_are_equal_where_it_is_said(kit, study) -> None:  # type: ignore[no-untyped-def]
    stored = {name: {run.stored for run in runs} for name, runs in _runs(kit, study).items()}
    large = stored["LoRA r·T"]
    assert len(large) == 1
    assert all(
        stored[name] == large for name in ("MoRA", "MoRA, equal weights", "freeze and add", "O-LoRA", "LoRA per domain")
    )
    (size,), tasks = large, study.scale.tasks
    assert stored["LoRA r"] == stored["LoRA r, averaged"] == {size // tasks}
    gates = tasks * 4 * sum(in_features for in_features, _ in _shapes(study))
    assert stored["Brainstacks"] == {size + gates}


def _shapes(study) -> list[tuple[int, int]]:  # type: ignore[no-untyped-def]
    blocks = study.worlds[0].base.blocks
    return [(m.in_features, m.out_features) for m in blocks.modules() if isinstance(m, torch.nn.Linear)]


def test_prefixes_and_known_domains_forget_nothing_to_the_bit(found) -> None:  # type: ignore[no-untyped-def]
    for name in ("Brainstacks, prefix", "LoRA per domain"):
        for matrices in found[name].matrices.values():
            assert all(matrix.changes == [0.0] and matrix.drift == 0.0 for matrix in matrices)


def test_views_are_what_their_names_say(found) -> None:  # type: ignore[no-untyped-def]
    views = {name.removeprefix("Brainstacks, "): system.matrices for name, system in found.items()}
    for rate, prefixes in views["prefix"].items():
        for seed, prefix in enumerate(prefixes):
            ungated, own, best = (views[v][rate][seed] for v in ("ungated", "own-only", "oracle subset"))
            assert ungated.learned == prefix.learned  # right after its task, a domain's prefix is everything
            assert own.learned[0] == prefix.learned[0] and own.learned[1] != prefix.learned[1]
            for others in (prefix, ungated, own):
                assert all(
                    a <= b for x, y in zip(best.rows, others.rows, strict=True) for a, b in zip(x, y, strict=True)
                )


def test_a_rate_of_zero_is_the_base(kit, study) -> None:  # type: ignore[no-untyped-def]
    way = kit.ways.ways(study.scale)["full fine-tuning"]
    matrix = kit.runs.learn_all(study.worlds[0], way, 0.0).matrix()
    assert all(row == matrix.rows[0] for row in matrix.rows) and matrix.forgetting == 0.0


def test_averaged_factors_are_the_mean_of_what_tasks_left(kit, study) -> None:  # type: ignore[no-untyped-def]
    """After the first task nothing is averaged; after the second it is half of the way."""
    ways, world = kit.ways.ways(study.scale), study.worlds[0]
    averaged, usual = (kit.runs.Learner(world, ways[name], 1e-2) for name in ("LoRA r, averaged", "LoRA r"))
    sealed = []
    for domain in world.order:
        averaged.learn(domain)
        usual.learn(domain)
        sealed.append([{k: b.clone() for k, b in x.model.named_buffers() if "up" in k} for x in (averaged, usual)])
    (first, same), (second, trained) = sealed
    assert all(torch.equal(rows, same[key]) for key, rows in first.items())
    for key, rows in second.items():
        assert torch.allclose(rows, (first[key] + trained[key]) / 2, atol=1e-7)
        assert not torch.equal(rows, trained[key])


def test_likelihood_chooses_by_first_halves_only(kit) -> None:  # type: ignore[no-untyped-def]
    one = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    other = torch.tensor([[2.0, 2.0], [1.0, 1.0]])
    assert kit.modes.likeliest([one, other]) == 3.0  # 5 and 1


def test_fronts_and_gaps_by_hand(kit) -> None:  # type: ignore[no-untyped-def]
    frontier = kit.frontier
    points = [(4.0, 0.0), (3.0, 0.1), (2.0, 0.3), (2.5, 0.5)]  # the last learned less and forgot more than the third
    assert frontier.front(points) == [(2.0, 0.3), (3.0, 0.1), (4.0, 0.0)]
    assert frontier.at(points, 2.5) == pytest.approx(0.2) and frontier.at(points, 5.0) == 0.0
    assert math.isnan(frontier.at(points, 1.9))
    assert frontier.gap(points, points, 4.0) == 0.0
    higher = [(4.0, 0.05), (3.0, 0.15), (1.0, 0.55)]
    assert frontier.gap(higher, points, 4.0) == pytest.approx(0.05)
    assert frontier.gap(points, higher, 4.0) == pytest.approx(-0.05)
    assert math.isnan(frontier.gap([(4.0, 0.0), (4.5, 0.2)], points, 4.0))


def test_protected_directions_are_left_alone_where_they_are_baked_in(kit, study) -> None:  # type: ignore[no-untyped-def]
    usual = kit.ways.ways(study.scale)["Brainstacks"]
    shares = {}
    for projection in ("output", "input", "train_only"):
        way = replace(usual, options={**usual.options, "projection": projection})
        run = kit.runs.learn_all(
            study.worlds[0],
            way,
            2e-2,
            views=kit.stacks._two_views,
            extras=kit.stacks.leak,
            prepare=kit.stacks.protection,
        )
        shares[projection] = run.extras[-1]
    assert shares["output"] < 1e-6 and shares["input"] < 1e-6 < shares["train_only"]


def test_boosted_rounds_meet_the_batches_of_a_long_run(kit, study) -> None:  # type: ignore[no-untyped-def]
    world, way = study.worlds[0], kit.ways.ways(study.scale)["Brainstacks"]
    boosted, long = (kit.runs.Learner(world, way, 1e-2) for _ in range(2))
    for number in range(2):
        boosted.train("low", f"low/{number}", world.plan(1e-2, 4), after=4 * number)
    long.train("low", "low", world.plan(1e-2, 8))
    assert boosted.batches_digest == long.batches_digest


def test_text_has_no_piece_on_both_sides(kit) -> None:  # type: ignore[no-untyped-def]
    pieces = [f"piece {number} ".encode() * 40 for number in range(200)]
    text = kit.text._divide("pieces", [*pieces, *pieces[:50]])
    parts = [bytes(part.tolist()) for part in (text.base, text.train, text.validation)]
    assert all(sum(piece in part for part in parts) == 1 for piece in pieces)
    with pytest.raises(SystemExit, match="too little of crumbs"):
        kit.text._divide("crumbs", pieces[:3])


def test_the_study_runs_end_to_end_and_draws(kit, study, found, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    sections = kit.study.run(study, list(kit.study.EXPERIMENTS))
    assert list(sections) == list(kit.study.EXPERIMENTS)
    text = kit.study.body(study, sections, "Fast.")
    assert all(claim.statement in text for section in sections.values() for claim in section.claims)
    assert "is bit-identical" in text and all(name in text for name in found)
    for picture in kit.study.plot(study, tmp_path / "adapt.md"):
        assert picture.stat().st_size > 10_000


def test_runs_survive_the_file_of_results(kit, study, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    way = kit.ways.ways(study.scale)["LoRA r"]
    memos = [importlib.import_module("study").Memo(tmp_path / "results") for _ in range(1)]
    first = kit.runs.Study(study.worlds, memos[0]).runs(way, 4e-3)
    again = kit.runs.Study(study.worlds, importlib.import_module("study").Memo(tmp_path / "results"))
    assert [asdict(run) for run in again.runs(way, 4e-3)] == [
        {**asdict(run), "order": list(run.order), "extras": list(run.extras)} for run in first
    ]
    assert again.memo.reused == 2
