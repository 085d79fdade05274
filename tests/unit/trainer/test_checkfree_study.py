"""The harness of the CheckFree study: the same failures and batches for all, exact forks, and verdicts by the rules."""

from __future__ import annotations

import importlib
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from holdfast import optim
from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.stage_policy import MomentRepair, Repair
from holdfast.trainer.stage_method import HealingPlan, Method

_BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
_MODULES = ("claims", "runs", "compare", "damage", "healing", "remedies", "training", "baselines", "study")


@pytest.fixture(scope="module")
def kit() -> Iterator[SimpleNamespace]:
    """The modules of the study, which import each other as scripts do."""
    sys.path.insert(0, str(_BENCHMARKS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(f"checkfree_{name}") for name in _MODULES})
    finally:
        sys.path.remove(str(_BENCHMARKS))


@pytest.fixture(scope="module")
def text(kit, tmp_path_factory):  # type: ignore[no-untyped-def]
    """Sixty lines of 4 KiB, each of a letter of its own, that are cut in pairs."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    draw = torch.Generator().manual_seed(0)
    lines = []
    for number in range(60):
        letters = torch.randint(97, 123, (255, 2), generator=draw).tolist()
        body = b"".join(bytes(pair) * 8 for pair in letters)  # what comes next is what came before the last one
        lines.append(chr(0x100 + number).encode() + body + b"." * 13 + b"\n")  # 4096 bytes
    path.write_bytes(b"".join(lines))
    return kit.runs.Text(path)


@pytest.fixture(scope="module")
def study(kit, text):  # type: ignore[no-untyped-def]
    scale = replace(
        kit.runs.QUICK, d_model=16, d_ff=24, sequence=8, steps=8, every=2, gaps=(6.0, 4.0, 3.0), points=(2, 3, 4),
        regain=((4, 2),), regain_steps=2, healing_budget=1, ages=(1, 2), copy_every=3, windows=8, seeds=2,
    )  # fmt: skip
    return kit.runs.Study([kit.runs.World(scale, text, seed) for seed in range(2)], kit.runs.Memo())


def _bits(simulation) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    return [parameter.detach().clone() for parameter in simulation.model.parameters()]


def _are_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- batches and failures ---------------------------------------------------------------------------------------------


def test_no_chunk_of_the_text_is_trained_on_and_validated_with(text) -> None:  # type: ignore[no-untyped-def]
    parts = [bytes(part.tolist()).decode(errors="ignore") for part in (text.train, text.validation)]
    trained, validated = ({letter for letter in part if ord(letter) >= 0x100} for part in parts)
    assert trained and validated and not trained & validated


def test_every_method_meets_the_same_weights_batches_and_failures(kit, study) -> None:  # type: ignore[no-untyped-def]
    failures = kit.compare.inside(1.0)
    methods = [Method(kind) for kind in (Repair.EXACT, Repair.RANDOM, Repair.UNIFORM, Repair.CHECKFREE)]
    found = [study.runs(method, failures) for method in methods]
    for of_seed in zip(*found, strict=True):
        assert len({run.batches for run in of_seed}) == 1
        assert len({tuple(run.failures) for run in of_seed}) == 1
        assert len({run.losses[0] for run in of_seed}) == 1
        assert of_seed[0].failures
    assert found[0][0].batches != found[0][1].batches  # another seed, another order
    assert found[0][0].losses[-1] != found[1][0].losses[-1]


def test_schedules_differ_only_in_immune_stages_and_spare_adjacent_ones(kit, text) -> None:  # type: ignore[no-untyped-def]
    world = kit.runs.World(replace(kit.runs.QUICK, steps=500), text, 3)
    every = {(f.step, s) for f in world.schedule(3.0, range(6)) for s in f.stages}
    inner = {(f.step, s) for f in world.schedule(3.0, range(1, 5)) for s in f.stages}
    assert inner == {(step, stage) for step, stage in every if stage not in (0, 5)}
    assert not any((step, stage + 1) in every for step, stage in every)
    assert len(every) == pytest.approx(2000 / 3, rel=0.2)
    moved = world.moved_inside(30.0)
    assert [f.step for f in moved] == [f.step for f in world.schedule(30.0, range(6))]
    assert {s for f in moved for s in f.stages} == {1, 2, 3, 4}


@pytest.mark.parametrize("lost", [()] + [c for n in range(1, 7) for c in itertools.combinations(range(6), n)])
def test_what_is_kept_apart_is_the_greedy_choice(kit, lost: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    kept = kit.runs.apart(lost)
    assert set(kept) <= set(lost)
    assert all(stage in kept or stage - 1 in kept for stage in lost)
    assert not any(stage + 1 in kept for stage in kept)


def test_the_target_is_reached_between_two_validations(kit) -> None:  # type: ignore[no-untyped-def]
    run = kit.runs.Run([4.0, 3.0, 3.5, 2.0], [5, 5, 25], 30, 30, "")
    assert run.reach(3.25, 10) == (7.5, True)
    assert run.reach(2.5, 10) == (pytest.approx(20 + 10 * 1.0 / 1.5), True)
    assert run.reach(4.5, 10) == (0.0, True)
    assert run.reach(1.0, 10) == (30.0, False)
    assert [run.failures_before(steps) for steps in (5, 6, 30)] == [0, 2, 3]


def test_a_memo_outlives_the_process(kit, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path, made = tmp_path / "results", []
    for expected in (1, 1):
        memo = kit.runs.Memo(path)
        assert memo.of("a", lambda: made.append(0) or {"x": [1.5]}) == {"x": [1.5]}
        assert len(made) == expected
    assert memo.reused == 1


# -- what the simulation has for it -----------------------------------------------------------------------------------


def test_joined_microbatches_train_alike(study) -> None:  # type: ignore[no-untyped-def]
    world = study.worlds[0]
    for swapped in (False, True):
        joined, single = (world.simulation(Method(Repair.EXACT, swapped=swapped)) for _ in range(2))
        single._groups = [(route, [n]) for route, members in joined._groups for n in members]
        assert len(joined._groups) == 1 + swapped and len(single._groups) == 4
        losses = [(joined.train_step(), single.train_step()) for _ in range(3)]
        assert all(a == pytest.approx(b, rel=1e-5) for a, b in losses)


def test_a_fork_goes_on_alone(study) -> None:  # type: ignore[no-untyped-def]
    base = study.base(study.worlds[0], point=3)
    before = _bits(base)
    one, other = base.fork(base.method), base.fork(Method(Repair.RANDOM))
    other.fail([2])
    losses = [one.train_step(), other.train_step()]
    assert losses[0] != losses[1] and _are_equal(_bits(base), before)
    assert base.train_step() == losses[0] and _are_equal(_bits(base), _bits(one))
    with pytest.raises(ConfigurationError, match="routes are chosen at the start"):
        base.fork(Method(Repair.EXACT, swapped=True))


def test_a_fork_that_heals_logs_from_then_on(study) -> None:  # type: ignore[no-untyped-def]
    base = study.worlds[0].simulation(Method(Repair.EXACT))
    fork = base.fork(Method(Repair.UNIFORM, healing=HealingPlan(2)))
    assert fork.fail([2])[0].healing is None
    fork.train_step()
    assert fork.fail([2])[0].healing is not None


def test_a_rollback_counts_its_interval_in_steps_made(study) -> None:  # type: ignore[no-untyped-def]
    simulation = study.worlds[0].simulation(Method(Repair.RANDOM, rollback_every=3))
    for _ in range(5):
        simulation.train_step()
    simulation.fail([1])
    simulation.train_step()  # the sixth: saved as step 4
    simulation.train_step()
    simulation.fail([1])
    assert (simulation.step, simulation.executed) == (4, 7)


def test_stages_clipped_alone_have_norms_of_their_own(study) -> None:  # type: ignore[no-untyped-def]
    together, alone = (
        study.worlds[0].simulation(Method(Repair.EXACT, clips_each_stage=alone)) for alone in (False, True)
    )
    for simulation in (together, alone):
        simulation._config.grad_clip = 0.01
        simulation.norms = type(simulation.norms)(0.01)
        simulation.train_step()
    whole = [together.norms.state()[str(stage)] for stage in range(6)]
    own = [alone.norms.state()[str(stage)] for stage in range(6)]
    assert [raw for raw, _ in whole] == [raw for raw, _ in own]
    assert all(clipped == pytest.approx(min(raw, 0.01)) for raw, clipped in own)
    assert len({round(clipped / raw, 9) for raw, clipped in whole}) == 1


def test_exact_moments_stay_and_weights_do_not(study) -> None:  # type: ignore[no-untyped-def]
    base = study.base(study.worlds[0], point=3)
    fork = base.fork(Method(Repair.UNIFORM, moments=MomentRepair.EXACT))
    fork.fail([2])
    kept = [(fork._state_of(2)[name]["exp_avg"], state["exp_avg"]) for name, state in base._state_of(2).items()]
    assert kept and all(torch.equal(a, b) for a, b in kept)
    assert not _are_equal(_bits(base), _bits(fork))
    assert math.isfinite(fork.train_step()) and isinstance(fork._optimizers[2], optim.AdamW)


# -- directions -------------------------------------------------------------------------------------------------------


def test_averages_of_like_neighbours_answer_like_the_lost_stage_and_fresh_ones_do_not(kit, study) -> None:  # type: ignore[no-untyped-def]
    """Stages share their weights for most of the training, as in a looped model, then go apart for a few steps. What
    changes is looked at in the logits, since a loss may fall by chance when a stage is lost."""
    base = study.worlds[0].simulation(Method(Repair.EXACT))
    for step in range(44):
        base.train_step()
        if step < 40:
            _make_alike(base)
    moved = dict.fromkeys(kit.damage.WAYS, 0.0)
    for stage, (way, method) in itertools.product(range(1, 5), kit.damage.WAYS.items()):
        moved[way] += _distance(base, kit.damage._failed(base, method, stage), study.worlds[0].validation)
    print(moved)
    assert moved["exact"] == 0.0
    assert all(0.0 < moved[way] < moved["random"] / 3 for way in kit.damage.AVERAGES)


@torch.no_grad()
def _distance(one, other, batch) -> float:  # type: ignore[no-untyped-def]
    return sum(float((one.model(tokens) - other.model(tokens)).norm()) for tokens, _ in batch)


@torch.no_grad()
def _make_alike(simulation) -> None:  # type: ignore[no-untyped-def]
    for same in zip(*(block.parameters() for block in simulation.model.blocks), strict=True):
        mean = torch.stack([parameter.detach() for parameter in same]).mean(0)
        for parameter in same:
            parameter.copy_(mean)


# -- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1.0, 1.1, 0.9, 1.0, 1.0], "CONFIRMED"),
        ([-1.0, -1.1, -0.9, -1.0, -1.0], "CONTRADICTED"),
        ([0.001, -0.001, 0.0, 0.0005, -0.0005], "NOT_CONFIRMED"),
        ([1.0, -1.0, 0.5, -0.5, 0.1], "NOT_DECIDED"),
        ([-1.0, 0.6, -0.5, 0.3, -0.2], "NOT_DECIDED"),
        ([math.nan, 1.0, 1.0], "NOT_DECIDED"),
        ([1.0], "NOT_DECIDED"),
    ],
)
def test_an_effect_is_judged_by_its_interval(kit, values: list[float], verdict: str) -> None:  # type: ignore[no-untyped-def]
    assert kit.claims.Effect("e", values, 0.01).verdict.name == verdict


def test_the_interval_is_students(kit) -> None:  # type: ignore[no-untyped-def]
    """Standard deviation 1 of five values: 2.776 / sqrt(5)."""
    values = [3.0 + math.sqrt(2) * x for x in (-1.0, 0.0, 0.0, 0.0, 1.0)]
    assert kit.claims.mean_and_half(values) == f"3.000 ± {2.776 / math.sqrt(5):.3f}"


def test_bounds_and_blindness_keep_a_verdict_open(kit) -> None:  # type: ignore[no-untyped-def]
    claims, sure = kit.claims, [1.0, 1.1, 0.9]
    assert claims.Effect("e", sure, 0.01, is_too_high=True).verdict is claims.Verdict.NOT_DECIDED
    assert claims.Effect("e", sure, 0.01, is_too_low=True).verdict is claims.Verdict.CONFIRMED
    against = [-value for value in sure]
    assert claims.Effect("e", against, 0.01, is_too_high=True).verdict is claims.Verdict.CONTRADICTED
    assert claims.Effect("e", against, 0.01, is_too_low=True).verdict is claims.Verdict.NOT_DECIDED
    good, bad = claims.Effect("g", sure, 0.01), claims.Effect("b", against, 0.01)
    assert claims.Claim("c", "s", [good, bad]).verdict is claims.Verdict.CONTRADICTED
    assert claims.Claim("c", "s", []).verdict is claims.Verdict.NOT_DECIDED
    section = claims.Section("t", "text", [claims.Claim("c", "s", [good])])
    seeing, blind = claims.with_control(section, good), claims.with_control(section, bad)
    assert [part.claims[0].verdict.name for part in (seeing, blind)] == ["CONFIRMED", "NOT_DECIDED"]


# -- the whole --------------------------------------------------------------------------------------------------------


def test_experiments_run_end_to_end_and_end_in_verdicts(kit, study) -> None:  # type: ignore[no-untyped-def]
    sections = kit.study.run(study, ["healing", "figure2", "fidelity"])
    assert list(sections) == ["fidelity", "figure2", "healing"]
    assert "Every check holds" in sections["fidelity"].text
    found = kit.study.body(study, sections, "Fast.")
    assert "Not run: instant, rates, swap, edges, rollback, ablations, gaps, own_copy, gain, remedies." in found
    assert all(claim.statement in found for section in sections.values() for claim in section.claims)
    assert len(sections["figure2"].claims) == 4


@pytest.mark.parametrize(("name", "claims"), [("gaps", 4), ("own_copy", 6), ("gain", 4), ("remedies", 8)])
def test_what_the_paper_lacks_is_judged_too(kit, study, name: str, claims: int) -> None:  # type: ignore[no-untyped-def]
    section = kit.study.EXPERIMENTS[name](study)
    assert section.text.startswith("Control: ") and len(section.claims) == claims
    assert all(
        len(effect.values) == 2 and all(map(math.isfinite, effect.values))
        for c in section.claims
        for effect in c.effects
    )


def test_really_trained_rollback_loses_what_it_should(kit, study) -> None:  # type: ignore[no-untyped-def]
    goal, gap = study.scale.target_step, 3.0
    found = kit.baselines._rolled(study, gap, 10)
    for world, ratio in zip(study.worlds, found.ratios, strict=True):
        lost = {failure.step for failure in world.schedule(gap, range(6))}
        made = counted = saved = 0
        while counted < goal and made < 4 * study.scale.steps:
            counted = saved if made in lost else counted
            made, counted = made + 1, counted + 1
            saved = counted if made % 10 == 0 else saved
        assert ratio == made / goal
