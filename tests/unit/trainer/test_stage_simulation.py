"""The simulated pipeline trains like a plain loop, loses stages for good, and rebuilds them by the formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from holdfast import optim
from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.stage_policy import EndPairs, MomentRepair, RateMode, Repair
from holdfast.fault_tolerance.stage_repair import CODE_WEIGHTING, Weighting
from holdfast.optim.config import OptimConfig, OptimName
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.model import Decoder, initialise
from holdfast.trainer.stage_simulation import Batch, HealingPlan, Method, StageSimulation, draw_failures

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
    assert (rebuilt.stage, rebuilt.sources, rebuilt.healing) == (2, (1, 3), None)
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
    (rebuilt,) = simulation.fail([2])
    assert rebuilt.healing is not None and rebuilt.healing.is_kept
    assert rebuilt.healing.after < 0.5 * rebuilt.healing.before
    assert all(len(log) == 8 for both in simulation._logs for log in both)


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
