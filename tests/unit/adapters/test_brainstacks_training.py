"""Rounds of a domain and domains one after the other: what is kept, what is dropped, what never changes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.adapters import (
    adapters_of,
    base_fingerprint,
    create_method,
    eject,
    inject,
    trainable_parameters,
    use_tasks,
    using_tasks,
)
from holdfast.adapters.methods.brainstacks import (
    BoostPlan,
    Curriculum,
    Progress,
    Stack,
    boost,
    check_frozen,
    curriculum,
    own_only,
    prefix,
    protected_directions,
    read_manifest,
    replay,
    routed,
    stack_digest,
    ungated,
    validate,
)
from holdfast.adapters.methods.brainstacks.plan import plan_optimizer
from holdfast.errors import ConfigurationError, InvariantViolation
from tests.support.stacks import PLAN, domain, inputs, layered, stacked

_DOMAINS = [domain(name) for name in ("sums", "turns", "bends")]


def _learn(model: nn.Module, count: int = 3, **options: Any) -> Progress:
    return Curriculum(plan=PLAN, directions=1, **options).learn(model, _DOMAINS[:count])


def test_every_prefix_replays_its_loss_and_frozen_stacks_and_base_keep_their_bits(tmp_path: Path) -> None:
    model, bare = stacked(), layered()
    digests = list[dict[str, str]]()
    real = curriculum.check_frozen

    def noting(model: nn.Module, stacks: list[Stack]) -> None:
        real(model, stacks)
        digests.append({stack.task: stack_digest(model, stack.task) for stack in stacks})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curriculum, "check_frozen", noting)
        progress = _learn(model, library=tmp_path)
    stacks = progress.stacks
    assert [s.task for s in stacks] == [f"{d.name}/{r}" for d in _DOMAINS for r in (1, 2)] == adapters_of(model).tasks
    assert [list(s.after.items()) for s in stacks] == [[(s.task, s.digest) for s in stacks[:n]] for n in range(6)]
    for at, stack in enumerate(stacks):
        assert stack.loss < stack.before and stack.steps == PLAN.steps and stack.seconds > 0
        assert validate(model, _DOMAINS[at // 2], replay(stacks, stack)) == stack.loss  # to the bit
    for number, found in enumerate(_DOMAINS):
        assert validate(model, found, prefix(stacks, found.name)) == stacks[2 * number + 1].loss
    for earlier, later in pairwise(digests):
        assert all(later[task] == digest for task, digest in earlier.items())
    assert digests[-1] == {stack.task: stack.digest for stack in stacks}
    # Own-only is another function for later domains, and no claim is made for it.
    assert validate(model, _DOMAINS[0], own_only(stacks, "sums")) == stacks[1].loss
    assert validate(model, _DOMAINS[2], own_only(stacks, "bends")) != stacks[5].loss
    assert [list(row) for row in progress.losses] == [["sums"], ["sums", "turns"], ["sums", "turns", "bends"]]
    assert progress.losses[2]["bends"] == stacks[5].loss == validate(model, _DOMAINS[2], ungated(stacks))
    rows = progress.losses
    changes = [rows[2]["sums"] - rows[0]["sums"], rows[2]["turns"] - rows[1]["turns"]]
    assert progress.matrix.changes == changes
    assert progress.matrix.forgetting == sum(changes) / 2
    assert read_manifest(tmp_path).stacks == stacks
    # The base, whatever is on.
    x = inputs("sums", 5, 3)
    with using_tasks(model, weights=routed(stacks, {})):
        assert torch.equal(model(x), bare(x))
    assert base_fingerprint(model) == base_fingerprint(bare)
    eject(model)
    assert torch.equal(model(x), bare(x))


def test_independent_domains_are_exact_on_their_own() -> None:
    model = stacked()
    progress = _learn(model, is_independent=True)
    assert [list(s.after) for s in progress.stacks[2:4]] == [[], ["turns/1"]]
    for number, found in enumerate(_DOMAINS):
        own = own_only(progress.stacks, found.name)
        assert own == prefix(progress.stacks, found.name)
        assert validate(model, found, own) == progress.stacks[2 * number + 1].loss


@pytest.mark.parametrize("projection", ["off", "output", "input"])
def test_projectors_come_from_earlier_domains_training_data(projection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stacked(projection=projection)
    seen = list[tuple[str, list[str], int]]()
    real = curriculum.protected_directions

    def noting(model: nn.Module, samples: dict[str, Any], *, count: int, side: str, seed: int) -> dict[str, Tensor]:
        runs = []
        handle = model.register_forward_pre_hook(lambda _, args: runs.append(args[0]))
        found = real(model, samples, count=count, side=side, seed=seed)
        handle.remove()
        want = [next(d for d in _DOMAINS if d.name == name).batches(1) for name in samples for _ in range(3)]
        assert all(x is next(b)[0] for x, b in zip(runs, want, strict=True))
        seen.append((side, list(samples), len(found)))
        return found

    monkeypatch.setattr(curriculum, "protected_directions", noting)
    progress = _learn(model, samples=3)
    assert len(progress.stacks) >= 5
    side = "input" if projection == "input" else "output"
    assert seen == ([] if projection == "off" else [(side, ["sums"], 2), (side, ["sums", "turns"], 2)])
    if projection == "off":
        return
    layer = adapters_of(model).layers["2"]
    monkeypatch.undo()
    # Against the directions of a model that has learned the first domain only.
    first = stacked(projection=projection)
    _learn(first, count=1)
    batch = next(_DOMAINS[0].batches(1))[0]
    basis = protected_directions(first, {"sums": lambda: first(batch)}, count=1, side=side)["2"]
    rows = layer.task_rows(2)["down" if side == "input" else "up"]
    assert float((rows @ basis.T).square().sum() / rows.square().sum()) < 1e-6


class _Spiking(torch.optim.AdamW):
    """A thousand times the rate for ten steps."""

    def __init__(self, parameters: Any, first: int) -> None:
        super().__init__(parameters, lr=PLAN.lr)
        self._first, self._taken = first, 0

    def step(self, closure: Any = None) -> Any:
        group = self.param_groups[0]
        lr = group["lr"]
        group["lr"] = lr * (1000 if self._first <= self._taken < self._first + 10 else 1)
        super().step(closure)
        group["lr"] = lr
        self._taken += 1


def test_a_spike_leaves_the_best_stack_before_it_and_what_comes_after_as_it_would_be() -> None:
    found = []
    plan = dataclasses.replace(PLAN, rounds=1)
    for spikes in (True, False):
        model = stacked()
        x = inputs("sums", 32, 1)
        one = domain("sums") if spikes else domain("sums", batches=list(islice(domain("sums").batches(1), 20)))
        first = boost(model, one, plan, optimizers=lambda p, s=spikes: _Spiking(p, 20 if s else 99))
        use_tasks(model)
        after = boost(model, domain("turns"), plan, optimizers=plan_optimizer(plan))
        found.append((first[0], after[0], model(x).detach()))
    (spiked, next_one, y), (calm, next_calm, y_calm) = found
    assert "above the best" in spiked.ended and spiked.steps == 30 and calm.steps == 20
    assert (spiked.digest, spiked.loss) == (calm.digest, calm.loss)
    assert (next_one.digest, next_one.loss) == (next_calm.digest, next_calm.loss)
    assert torch.equal(y, y_calm)


def test_a_loss_that_is_not_finite_ends_the_round_before_its_step() -> None:
    x, y = next(domain("sums").batches(1))
    bad = [(x, y)] * 15 + [(x, y * math.nan)] + [(x, y)] * 9
    model = stacked()
    found = boost(model, domain("sums", batches=bad), dataclasses.replace(PLAN, rounds=1))
    assert found[0].steps == 15 and "not finite" in found[0].ended
    assert all(bool(t.isfinite().all()) for t in model.state_dict().values())


def test_rounds_that_gain_little_are_the_last_and_those_that_gain_nothing_are_dropped() -> None:
    plan = dataclasses.replace(PLAN, rounds=5, least_improvement=0.2)
    model = stacked()
    found = boost(model, domain("sums"), plan)
    gains = [stack.before - stack.loss for stack in found]
    assert 1 < len(found) < 5 and all(gain >= 0.2 for gain in gains[:-1]) and 0 < gains[-1] < 0.2
    assert all(later.before == earlier.loss for earlier, later in pairwise(found))
    # A rate of almost nothing cannot lower what rounding hides.
    nothing = boost(stacked(), domain("sums"), dataclasses.replace(PLAN, lr=1e-30))
    assert nothing == []
    model = stacked()
    boost(model, domain("sums"), dataclasses.replace(PLAN, lr=1e-30))
    assert adapters_of(model).tasks == [] and trainable_parameters(model) == []


def test_patience_ends_a_round() -> None:
    plan = dataclasses.replace(PLAN, rounds=1, steps=400, evaluate_every=1, patience=2, spike=1e9, lr=0.5)
    (found,) = boost(stacked(), domain("sums"), plan)
    assert found.ended == "2 evaluations brought no improvement" and found.steps < 400


def test_the_last_step_counts_when_batches_run_out() -> None:
    batches = list(islice(domain("sums").batches(1), 13))
    plan = dataclasses.replace(PLAN, rounds=1, evaluate_every=100)
    (found,) = boost(stacked(), domain("sums", batches=batches), plan)
    assert found.steps == 13 and found.ended == "there were no more batches" and found.loss < found.before


def test_an_interrupted_round_goes_and_the_finished_ones_stay() -> None:
    batch = next(domain("sums").batches(1))

    def breaking(number: int) -> Iterator[Any]:
        yield from [batch] * 40
        if number == 2:
            raise KeyboardInterrupt

    model = stacked()
    broken = dataclasses.replace(domain("sums"), batches=lambda n: islice(breaking(n), 40 if n == 1 else None))
    with pytest.raises(KeyboardInterrupt):
        boost(model, broken, dataclasses.replace(PLAN, steps=41, evaluate_every=40))
    assert adapters_of(model).tasks == ["sums/1"] and trainable_parameters(model) == []
    assert model[0].shown is None


def test_a_changed_stack_is_noticed() -> None:
    model = stacked()
    progress = _learn(model, count=1)
    check_frozen(model, progress.stacks)
    model[2].sealed_gate[0, 0] += 1e-6
    with pytest.raises(InvariantViolation, match=r"\['sums/1'\] have changed"):
        check_frozen(model, progress.stacks)


def test_modes_are_weights_by_domain_and_round() -> None:
    tasks = [f"{name}/{number}" for name in ("sums", "turns", "bends") for number in (1, 2)]
    stacks = [
        Stack(task[:-2], int(task[-1]), dict.fromkeys(tasks[:at], "x"), "x", 1.0, 0.5, steps=1, seconds=0.1, ended="")
        for at, task in enumerate(tasks)
    ]
    assert ungated(stacks) == dict.fromkeys(tasks, 1.0)
    assert own_only(stacks, "turns") == {"turns/1": 1.0, "turns/2": 1.0}
    assert prefix(stacks, "turns") == dict.fromkeys(tasks[:4], 1.0)
    assert routed(stacks, {"bends": 0.3, "turns": 0.0}) == {"bends/1": 0.3, "bends/2": 0.3}
    with pytest.raises(ConfigurationError, match=r"\['poems'\] have no stack"):
        routed(stacks, {"poems": 1.0})
    with pytest.raises(ConfigurationError, match="'poems' has no stack"):
        prefix(stacks, "poems")
    for damaged in (stacks[1:], [dataclasses.replace(stacks[0], digest="y"), *stacks[1:]]):
        with pytest.raises(ConfigurationError, match=r"trained on \['sums/1'\], which have been removed or replaced"):
            prefix(damaged, "turns")
    with pytest.raises(ConfigurationError, match=r"now act as \['sums/2', 'sums/1'\]"):
        prefix([stacks[1], stacks[0]], "sums")


def test_what_cannot_be_learned_is_refused() -> None:
    with pytest.raises(ConfigurationError) as caught:
        BoostPlan(rounds=0, steps=0, lr=0.0, spike=math.nan)
    assert len(caught.value.problems) == 4
    with pytest.raises(ConfigurationError, match="directions=-1"):
        Curriculum(directions=-1)
    with pytest.raises(ConfigurationError, match="must consist of letters"):
        boost(stacked(), dataclasses.replace(domain("sums"), name="a/b"), PLAN)
    other = layered()
    inject(other, create_method("mora"))
    with pytest.raises(ConfigurationError, match="this model has mora"):
        Curriculum().learn(other, _DOMAINS)


def test_the_rate_warms_up_and_decays_to_zero() -> None:
    plan = BoostPlan(steps=100, warmup=10)
    rates = [plan.rate(step) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1 and rates[100] == pytest.approx(0)
    assert rates[55] == pytest.approx(0.5) and all(a >= b for a, b in pairwise(rates[10:]))
