"""The simulated pipeline trains like a plain loop, loses stages for good, and rebuilds them by the formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from holdfast import optim
from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.stage_policy import EndPairs, GapRepair, MomentRepair, RateMode, Repair
from holdfast.fault_tolerance.stage_repair import CODE_WEIGHTING, Weighting
from holdfast.optim.config import OptimConfig, OptimName
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.model import Decoder, initialise
from holdfast.trainer.stage_method import HealingPlan, Method, OwnCopy
from holdfast.trainer.stage_simulation import Batch, StageSimulation, draw_failures

_STAGES, _MICROBATCHES = 6, 4
_MODEL = ModelConfig(name="tiny", d_model=16, n_layers=6, n_heads=2, n_kv_heads=1, d_ff=24, max_seq_len=8)


def _batch(step: int) -> Batch:
    draw = torch.Generator().manual_seed(step)
    text = torch.randint(0, 259, (_MICROBATCHES, 2, 9), generator=draw)
    return [(one[:, :-1].contiguous(), one[:, 1:].contiguous()) for one in text]


def _optimizer(**options: object) -> OptimConfig:
    return OptimConfig(name=OptimName.ADAMW, lr=1e-2, grad_clip=0.0, **options)  # type: ignore[arg-type]


def _simulation(method: Method, *, steps: int = 3, config: OptimConfig | None = None, seed: int = 0) -> StageSimulation:
    made = StageSimulation(
        _MODEL,
        config or _optimizer(),
        method,
        stages=_STAGES,
        microbatches=_MICROBATCHES,
        batch_of=_batch,
        learning_rate=lambda step: 1e-2,
        seed=seed,
    )
    for _ in range(steps):
        made.train_step()
    return made


def _weights(simulation: StageSimulation) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in simulation.model.named_parameters()}


def _stage(weights: dict[str, Tensor], stage: int) -> dict[str, Tensor]:
    prefix = f"blocks.{stage}."
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


@pytest.mark.parametrize("swapped", [False, True])
def test_without_failures_it_is_a_plain_loop_to_the_bit(swapped: bool) -> None:
    model = Decoder(_MODEL)
    initialise(model, seed=0)
    optimizer = optim.build_optimizer(_optimizer(), optim.parameter_groups(model, _optimizer()))
    for step in range(3):
        for number, (tokens, targets) in enumerate(_batch(step)):
            order = [1, 0, 2, 3, 5, 4] if swapped and number % 2 else range(6)
            hidden = model.embedding(tokens)
            for block in order:
                hidden = model.blocks[block](hidden)
            logits = model.head(hidden).float().flatten(0, 1)
            (torch.nn.functional.cross_entropy(logits, targets.flatten()) / _MICROBATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = _weights(_simulation(Method(Repair.EXACT, swapped=swapped)))
    assert [name for name, param in model.named_parameters() if not torch.equal(param, found[name])] == []


@pytest.mark.parametrize(
    ("weighting", "norm"),
    [(Weighting(1), lambda n: n), (Weighting(2), lambda n: n**2), (CODE_WEIGHTING, lambda n: min(n, 1.0) + 1e-4)],
)
def test_a_lost_stage_becomes_the_weighted_average_of_its_neighbours(weighting, norm) -> None:  # type: ignore[no-untyped-def]
    simulation = _simulation(Method(Repair.CHECKFREE, weighting=weighting))
    before = _weights(simulation)
    norms = [simulation.norms.get(stage, weighting) for stage in (1, 3)]
    raw = [simulation.norms.get(stage) for stage in (1, 3)]
    (rebuilt,) = simulation.fail([2])
    assert (rebuilt.stage, rebuilt.sources, rebuilt.gain, rebuilt.healing) == (2, (1, 3), None, None)
    a, b = (norm(n) if weighting is not CODE_WEIGHTING else m + 1e-4 for n, m in zip(raw, norms, strict=True))
    found = _weights(simulation)
    previous, following = _stage(before, 1), _stage(before, 3)
    for name, tensor in _stage(found, 2).items():
        want = (a * previous[name].double() + b * following[name].double()) / (a + b)
        torch.testing.assert_close(tensor.double(), want, rtol=1e-6, atol=1e-7)
    others = [n for n in before if not n.startswith("blocks.2.") and not torch.equal(before[n], found[n])]
    assert others == []
    assert math.isfinite(simulation.train_step())


@pytest.mark.parametrize("repair", [Repair.RANDOM, Repair.IDENTITY, Repair.COPY_PREVIOUS, Repair.COPY_NEXT])
def test_no_value_of_the_dead_stage_is_ever_read(repair: Repair) -> None:
    simulation = _simulation(Method(repair))
    dead = _stage(_weights(simulation), 2)
    simulation.fail([2])
    alive = _stage(_weights(simulation), 2)
    assert all(torch.isfinite(tensor).all() for tensor in alive.values())
    assert not any(torch.equal(dead[name], tensor) for name, tensor in alive.items() if tensor.ndim == 2)
    assert all(math.isfinite(simulation.train_step()) for _ in range(3))
    assert math.isfinite(simulation.validate(_batch(99)))


def test_an_identity_passes_its_input_on() -> None:
    simulation = _simulation(Method(Repair.IDENTITY))
    simulation.fail([3])
    assert simulation.redundancy(_batch(7))[3] == pytest.approx(0.0, abs=1e-6)
    assert all(0.0 < distance < 1.0 for stage, distance in enumerate(simulation.redundancy(_batch(7))) if stage != 3)


def test_stages_at_the_ends_and_next_to_each_other_are_refused_with_the_reason() -> None:
    for lost, reason in (([0], "no stage before it"), ([5], "no stage behind it"), ([2, 3], "is lost with it")):
        simulation = _simulation(Method(Repair.CHECKFREE), steps=1)
        with pytest.raises(ConfigurationError, match=reason):
            simulation.fail(lost)
    healed = _simulation(Method(Repair.UNIFORM, healing=HealingPlan(1)), steps=1)
    with pytest.raises(ConfigurationError, match="is lost with it"):
        healed.fail([2, 3])


@pytest.mark.parametrize(
    ("pairs", "sources"), [(EndPairs.PAPER, [(1,), (0, 2), (4,)]), (EndPairs.CODE, [(1,), (0,), (4,)])]
)
def test_the_plus_variant_copies_the_ends(pairs: EndPairs, sources: list[tuple[int, ...]]) -> None:
    simulation = _simulation(Method(Repair.CHECKFREE_PLUS, swapped=True, end_pairs=pairs))
    assert [simulation.fail([stage])[0].sources for stage in (0, 1, 5)] == sources


def test_two_that_are_not_adjacent_are_rebuilt_together() -> None:
    simulation = _simulation(Method(Repair.UNIFORM))
    assert [rebuilt.stage for rebuilt in simulation.fail([1, 3])] == [1, 3]


def test_a_rollback_trains_the_lost_steps_again_and_ends_with_the_bits_of_no_failure() -> None:
    undisturbed = _simulation(Method(Repair.EXACT), steps=7)
    simulation = _simulation(Method(Repair.RANDOM, rollback_every=3), steps=5)
    simulation.fail([2])
    assert simulation.step == 3
    for _ in range(4):
        simulation.train_step()
    assert (simulation.step, simulation.executed) == (7, 9)
    want, found = _weights(undisturbed), _weights(simulation)
    assert [name for name in want if not torch.equal(want[name], found[name])] == []


def test_moments_are_new_or_averaged_and_the_rate_is_raised() -> None:
    fresh = _simulation(Method(Repair.CHECKFREE))
    fresh.fail([2])
    assert not any(state for state in fresh._state_of(2).values() if state)
    averaged = _simulation(Method(Repair.UNIFORM, moments=MomentRepair.AVERAGED))
    first, second = (averaged._state_of(stage) for stage in (1, 3))
    averaged.fail([2])
    for name, state in averaged._state_of(2).items():
        want = (first[name]["exp_avg"].double() + second[name]["exp_avg"].double()) / 2
        torch.testing.assert_close(state["exp_avg"].double(), want, rtol=1e-6, atol=1e-9)
    raised = _simulation(Method(Repair.UNIFORM, rate=1.1, rate_mode=RateMode.COMPOUNDING))
    raised.fail([2])
    raised.fail([2])
    assert [raised._rate_factor(stage) for stage in (1, 2)] == [1.0, pytest.approx(1.21)]


def test_healing_brings_a_fresh_stage_near_to_what_it_answered() -> None:
    method = Method(Repair.RANDOM, healing=HealingPlan(60, lr=3e-3, logged=8))
    simulation = _simulation(method, steps=4)
    assert all(len(simulation._logs.pairs([stage])) == 8 for stage in range(_STAGES))
    (rebuilt,) = simulation.fail([2])
    assert rebuilt.healing is not None and rebuilt.healing.is_kept
    assert rebuilt.healing.after < 0.5 * rebuilt.healing.before


def test_what_a_lost_stage_has_logged_of_its_neighbours_is_gone_and_its_own_answers_are_over() -> None:
    simulation = _simulation(Method(Repair.RANDOM, healing=HealingPlan(2)), steps=4)
    simulation.fail([2])
    assert [len(simulation._logs.pairs([stage])) for stage in range(_STAGES)] == [8, 0, 0, 0, 8, 8]
    assert [rebuilt.healing is None for rebuilt in simulation.fail([1, 4])] == [True, False]
    simulation.train_step()
    assert [len(simulation._logs.pairs([stage])) for stage in range(_STAGES)] == [4, 4, 4, 4, 4, 4]


@pytest.mark.parametrize("repair", [Repair.CHECKFREE, Repair.UNIFORM])
def test_two_adjacent_stages_are_interpolated_from_the_outer_neighbours(repair: Repair) -> None:
    method = Method(repair, gaps=GapRepair.INTERPOLATED, healing=HealingPlan(0))
    simulation = _simulation(method)
    before = _weights(simulation)
    a, b = (simulation.norms.get(stage) ** 2 if repair is Repair.CHECKFREE else 1.0 for stage in (1, 4))
    assert [(rebuilt.sources, rebuilt.healing) for rebuilt in simulation.fail([3, 2])] == [((1, 4), None)] * 2
    found, first, last = _weights(simulation), _stage(before, 1), _stage(before, 4)
    for stage, near, far in ((2, 2 * a, b), (3, a, 2 * b)):
        for name, tensor in _stage(found, stage).items():
            want = (near * first[name].double() + far * last[name].double()) / (near + far)
            torch.testing.assert_close(tensor.double(), want, rtol=1e-6, atol=1e-7)
    assert math.isfinite(simulation.train_step())


def test_each_of_two_adjacent_stages_becomes_its_one_neighbour_that_is_left() -> None:
    simulation = _simulation(Method(Repair.UNIFORM, gaps=GapRepair.COPIED, healing=HealingPlan(0)))
    before = _weights(simulation)
    simulation.fail([2, 3])
    found = _weights(simulation)
    for stage, source in ((2, 1), (3, 4)):
        assert all(torch.equal(tensor, _stage(before, source)[name]) for name, tensor in _stage(found, stage).items())


def test_a_gap_is_fitted_as_one_chain_to_its_outer_boundaries_alone() -> None:
    method = Method(Repair.RANDOM, healing=HealingPlan(80, lr=3e-3))
    made = []
    for is_poisoned in (False, True):
        simulation = _simulation(method, steps=4)
        if is_poisoned:  # what crossed between the two, which they alone held
            for log in (simulation._logs._outputs[2], simulation._logs._inputs[3]):
                for key in log:
                    log.record(*key, torch.full((2, 8, 16), math.nan))
        inputs, outputs = zip(*((pair.inputs, pair.outputs) for pair in simulation._logs.pairs([2, 3])), strict=True)
        first, second = simulation.fail([2, 3])
        assert first.healing is not None and first.healing is second.healing and first.healing.is_kept
        assert first.healing.after < 0.5 * first.healing.before
        made.append(_weights(simulation))
        unhealed = _simulation(Method(Repair.RANDOM), steps=4)
        unhealed.fail([2, 3])
        errors = [_error(each, inputs, outputs) for each in (unhealed, simulation)]
        assert errors[1] < 0.5 * errors[0]
        for stage in (2, 3):
            assert not torch.equal(_flat(_weights(unhealed), stage), _flat(made[-1], stage))
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())


@torch.no_grad()
def _error(simulation: StageSimulation, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    blocks = simulation.model.blocks
    return sum(float((blocks[3](blocks[2](x)) - y).square().mean()) for x, y in zip(inputs, outputs, strict=True))


def _flat(weights: dict[str, Tensor], stage: int) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in _stage(weights, stage).values()])


def test_swapped_routes_have_no_one_chain_to_fit() -> None:
    simulation = _simulation(Method(Repair.RANDOM, swapped=True, healing=HealingPlan(2)))
    assert [rebuilt.healing for rebuilt in simulation.fail([4, 5])] == [None, None]
    simulation.train_step()
    assert simulation.fail([4])[0].healing is not None


def test_a_gain_scales_what_a_rebuilt_stage_adds() -> None:
    """Nothing else: of a copy of a neighbour, the output matrices are in one proportion to the neighbour's."""
    simulation = _simulation(Method(Repair.COPY_PREVIOUS, healing=HealingPlan(0, has_gain=True)), steps=30)
    before = _stage(_weights(simulation), 1)
    (rebuilt,) = simulation.fail([2])
    assert rebuilt.healing is None and rebuilt.gain is not None and rebuilt.gain.is_kept
    assert rebuilt.gain.after < rebuilt.gain.before
    ratios = {name: tensor / before[name] for name, tensor in _stage(_weights(simulation), 2).items()}
    gain = ratios["attention.wo.weight"].flatten()[0].item()
    assert gain != 1.0
    for name, ratio in ratios.items():
        is_output = name in ("attention.wo.weight", "feed_forward.w_down.weight")
        torch.testing.assert_close(ratio, torch.full_like(ratio, gain if is_output else 1.0))


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_an_own_copy_is_of_the_last_step_that_was_due_and_is_mixed_in(share: float) -> None:
    old = _stage(_weights(_simulation(Method(Repair.EXACT), steps=4)), 2)
    simulation = _simulation(Method(Repair.UNIFORM, own_copy=OwnCopy(2, share)), steps=5)
    for attempt in range(2):  # a loss leaves the copy as it is, and so does what is made of it
        now = _weights(simulation)
        simulation.fail([2])
        previous, following = _stage(now, 1), _stage(now, 3)
        for name, tensor in _stage(_weights(simulation), 2).items():
            mean = (previous[name].double() + following[name].double()) / 2
            want = share * old[name].double() + (1 - share) * mean
            torch.testing.assert_close(tensor.double(), want, rtol=1e-6, atol=1e-7)
            assert attempt or share < 1 or torch.equal(tensor, old[name])


def test_a_fork_keeps_the_copies_that_it_has_and_takes_the_first_where_there_are_none() -> None:
    simulation = _simulation(Method(Repair.EXACT, own_copy=OwnCopy(100)), steps=3)
    start = _stage(_weights(_simulation(Method(Repair.EXACT), steps=0)), 2)
    now = _stage(_weights(simulation), 2)
    fresh = _simulation(Method(Repair.EXACT), steps=3)
    for base, want in ((simulation, start), (fresh, now)):
        fork = base.fork(Method(Repair.UNIFORM, own_copy=OwnCopy(100, share=1.0)))
        fork.train_step()
        fork.fail([2])
        assert all(torch.equal(tensor, want[name]) for name, tensor in _stage(_weights(fork), 2).items())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Method(gaps=GapRepair.INTERPOLATED), "gaps=INTERPOLATED: adjacent .* pass healing=HealingPlan"),
        (lambda: Method(gaps=GapRepair.COPIED, healing=HealingPlan(1), swapped=True), "with swapped=True"),
        (lambda: Method(own_copy=OwnCopy(5), rollback_every=5), "own_copy and rollback_every=5 exclude each other"),
        (lambda: HealingPlan(-1), "steps=-1"),
        (lambda: HealingPlan(1, lr=math.inf), "lr=inf"),
        (lambda: HealingPlan(1, logged=1), "logged=1"),
        (lambda: OwnCopy(0), "every=0"),
        (lambda: OwnCopy(5, share=1.5), "share=1.5"),
    ],
)
def test_methods_that_contradict_themselves_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make()


def test_failures_are_the_same_for_every_method_and_as_frequent_as_asked() -> None:
    every = draw_failures(0.05, steps=4000, stages=6, seed=3)
    inner = draw_failures(0.05, steps=4000, stages=6, seed=3, immune=(0, 5))
    assert {(f.step, s) for f in inner for s in f.stages} == {
        (f.step, s) for f in every for s in f.stages if s not in (0, 5)
    }
    assert sum(len(failure.stages) for failure in every) == pytest.approx(0.05 * 4000 * 6, rel=0.1)
    assert draw_failures(0.0, steps=50, stages=6, seed=0) == []


@pytest.mark.parametrize("is_alone", [False, True], ids=["the whole gradient", "each stage"])
def test_gradients_are_clipped_together_or_stage_by_stage(is_alone: bool) -> None:
    """By plain SGD the change of the weights is the clipped gradient itself."""
    limit, rate = 0.05, 1e-2
    config = OptimConfig(name=OptimName.SGD, lr=rate, momentum=0.0, weight_decay=0.0, grad_clip=limit)
    simulation = _simulation(Method(Repair.EXACT, clips_each_stage=is_alone), steps=0, config=config)
    before = _weights(simulation)
    simulation.train_step()
    moved = {name: (tensor - before[name]) / rate for name, tensor in _weights(simulation).items()}
    norms = [math.sqrt(sum(float(t.square().sum()) for t in _stage(moved, stage).values())) for stage in range(_STAGES)]
    whole = math.sqrt(sum(float(t.square().sum()) for t in moved.values()))
    if is_alone:
        assert norms == pytest.approx([limit] * _STAGES, rel=1e-3)
    else:
        assert whole == pytest.approx(limit, rel=1e-3)
        assert max(norms) < limit
