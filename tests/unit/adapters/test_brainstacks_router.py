"""Which stacks an input gets: searched by outcome, predicted by a router, measured by regret."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from holdfast.adapters import finish_task, inject, start_task, trainable_parameters, using_tasks
from holdfast.adapters.methods.brainstacks import (
    Brainstacks,
    Curriculum,
    Examples,
    MetaRouter,
    RouterPlan,
    base_features,
    choose,
    exhaustive,
    greedy,
    oracle,
    outcome_loss,
    prefix,
    regret,
    routed,
    router_loss,
    targets,
    train_router,
    validate,
)
from holdfast.errors import ConfigurationError
from holdfast.trainer.model import Decoder, initialise
from tests.support.stacks import PLAN, domain, inputs, stacked
from tests.support.tiny_training import TINY

_NAMES = ("a", "b", "c", "d")


class _Table:
    """A loss by table, and how often it was asked."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        sizes = range(len(_NAMES) + 1)
        self.values = {
            choice: float(torch.rand((), generator=draw)) for size in sizes for choice in combinations(_NAMES, size)
        }
        self.asked = list[tuple[str, ...]]()

    def __call__(self, weights: Mapping[str, float]) -> float:
        assert set(weights.values()) <= {1.0}
        self.asked.append(tuple(sorted(weights)))
        return self.values[self.asked[-1]]


@given(seed=st.integers(0, 10_000), gain=st.sampled_from([0.0, 0.01, 0.3]))
def test_searches_are_their_definitions(seed: int, gain: float) -> None:
    loss = _Table(seed)
    best = min(loss.values.values())
    found = exhaustive(loss, _NAMES)
    assert found.loss == best == loss.values[found.domains] and sorted(loss.asked) == sorted(loss.values)
    assert found.losses == loss.values
    # Greedy, step by step.
    want: tuple[str, ...] = ()
    while len(want) < len(_NAMES):
        more = min((tuple(sorted((*want, d))) for d in _NAMES if d not in want), key=loss.values.__getitem__)
        if not loss.values[more] < loss.values[want] - (gain if want else 0):
            break
        want = more
    loss.asked.clear()
    hasty = greedy(loss, _NAMES, least_gain=gain)
    assert (hasty.domains, hasty.loss) == (want, loss.values[want])
    assert len(loss.asked) == len(set(loss.asked)) <= 1 + 4 * 5 / 2
    assert regret(loss, dict.fromkeys(want, 1.0), _NAMES) == hasty.loss - best >= 0
    assert regret(loss, dict.fromkeys(found.domains, 1.0), _NAMES) == 0


def test_greedy_misses_a_pair_that_helps_only_together_and_regret_says_so() -> None:
    def loss(weights: Mapping[str, float]) -> float:
        return 1.0 if set(weights) == {"a", "b"} else 2.0 + 0.1 * len(weights)

    assert greedy(loss, _NAMES).domains == () and exhaustive(loss, _NAMES).domains == ("a", "b")
    assert regret(loss, {}, _NAMES) == 1.0
    with pytest.raises(ConfigurationError, match=r"2\^17 choices"):
        exhaustive(loss, [str(n) for n in range(17)])


def test_targets_are_outcomes_labels_or_a_mixture() -> None:
    found = exhaustive(lambda weights: 0.0 if set(weights) == {"b", "c"} else 1.0, _NAMES)
    assert targets(found, _NAMES).tolist() == [0, 1, 1, 0]
    assert targets(found, _NAMES, label="a", label_share=1.0).tolist() == [1, 0, 0, 0]
    assert targets(found, _NAMES, label="b", label_share=0.2).tolist() == pytest.approx([0, 1, 0.8, 0])
    with pytest.raises(ConfigurationError, match="label_share=2"):
        targets(found, _NAMES, label_share=2)


# -- the network ------------------------------------------------------------------------------------------------------


def _reference(router: MetaRouter, h_TH: Tensor) -> Tensor:
    """Logits [Q] of one input, a query at a time."""
    weights = router.state_dict()
    tokens = [
        F.layer_norm(weights["tokens.0.weight"] @ h + weights["tokens.0.bias"], (8,)) * weights["tokens.1.weight"]
        + weights["tokens.1.bias"]
        for h in h_TH
    ]

    def attend(query: Tensor) -> Tensor:
        mass = [math.exp(float(query @ token) / math.sqrt(8)) for token in tokens]
        return sum((m / sum(mass) * token for m, token in zip(mass, tokens, strict=True)), query)

    common, *own = (attend(query) for query in weights["queries"])
    scale = min(3.0, max(0.3, float(weights["temperature"])))
    logits = []
    for context in own:
        z = torch.cat([context, common])
        for layer in ("0", "3"):
            z = F.gelu(weights[f"head.{layer}.weight"] @ z + weights[f"head.{layer}.bias"])
        logits.append(weights["head.5.weight"] @ z + weights["head.5.bias"])
    return torch.cat(logits) / scale


@pytest.mark.parametrize("temperature", [0.1, 0.7, 9.0])
def test_the_router_is_its_formula_and_padding_counts_for_nothing(temperature: float) -> None:
    torch.manual_seed(0)
    router = MetaRouter(5, _NAMES, width=8).double().eval()
    with torch.no_grad():
        router.temperature.fill_(temperature)
        for parameter in router.tokens.parameters():
            parameter.normal_()
    h = torch.randn(3, 6, 5, dtype=torch.float64)
    is_token = torch.arange(6) < torch.tensor([[6], [4], [1]])
    got = router(h, is_token)
    for row, length in enumerate((6, 4, 1)):
        torch.testing.assert_close(got[row], _reference(router, h[row, :length]), rtol=0, atol=1e-10)
    torch.testing.assert_close(router(h)[0], got[0])


def test_the_papers_router_has_2_76_million_parameters() -> None:
    router = MetaRouter(3840, ["chat", "code", "math", "medical", "reasoning"])
    assert sum(p.numel() for p in router.parameters()) / 1e6 == pytest.approx(2.76, abs=0.005)


def test_the_loss_is_cross_entropy_and_a_price_for_being_undecided() -> None:
    logits = torch.tensor([[0.0, 3.0, -0.5]], dtype=torch.float64, requires_grad=True)
    wanted = torch.tensor([[1.0, 1.0, 0.2]], dtype=torch.float64)
    p = [1 / (1 + math.exp(-float(x))) for x in logits[0].detach()]
    entropy = -sum(t * math.log(q) + (1 - t) * math.log(1 - q) for q, t in zip(p, wanted[0].tolist(), strict=True)) / 3
    price = sum(max(0.0, 0.3 - abs(q - 0.5)) for q in p) / 3
    assert router_loss(logits, wanted).item() == pytest.approx(entropy + 0.05 * price, rel=1e-12)
    shifted = logits.detach() + torch.tensor([0.1, 0.0, 0.0])  # away from the kink at 0.5
    assert torch.autograd.gradcheck(lambda x: router_loss(x, wanted), (shifted.requires_grad_(),))


def test_features_are_those_of_the_base_whatever_acts_and_no_longer_than_asked() -> None:
    model = Decoder(TINY)
    initialise(model, 0)
    tokens = torch.arange(32).view(2, 16)
    states = dict[str, Tensor]()
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: states.__setitem__(name, out))
        for name in ("blocks.0", "blocks.1")
    ]
    with torch.no_grad():
        model.eval()(tokens)
    for handle in handles:
        handle.remove()
    want = 0.45 * states["blocks.0"] + 0.55 * states["blocks.1"]
    inject(model, Brainstacks(rank=2), ["wq", "w_up"])
    names = {"middle": "blocks.0", "last": "blocks.1"}
    start_task(model, "a/1")
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.normal_()
    finish_task(model)
    with torch.no_grad():
        assert not torch.equal(model(tokens), model.head(states["blocks.1"]))
    assert torch.equal(base_features(model, lambda: model(tokens), **names), want)
    assert torch.equal(base_features(model, lambda: model(tokens), max_tokens=5, **names), want[:, :5])
    with pytest.raises(ConfigurationError, match=r"no modules \['blocks.7'\]"):
        base_features(model, lambda: model(tokens), middle="blocks.7", last="blocks.1")
    with pytest.raises(ConfigurationError, match="did not run"):
        base_features(model, lambda: None, **names)


def _clusters(count: int, seed: int) -> Examples:
    """Features of four kinds: two domains, both of them, and neither."""
    draw = torch.Generator().manual_seed(seed)
    kind = torch.randint(4, (count,), generator=draw)
    wanted = torch.stack([kind % 2, kind // 2], 1).float()
    signs = torch.cat([2 * wanted - 1, torch.zeros(count, 2)], 1)
    return Examples(signs[:, None] + 0.5 * torch.randn(count, 3, 4, generator=draw), wanted)


def test_training_finds_the_outcomes_abstains_and_keeps_the_best_epoch() -> None:
    torch.manual_seed(0)
    router = MetaRouter(4, ("a", "b"), width=16)
    train, held_out, fresh = (_clusters(count, seed) for seed, count in enumerate((160, 64, 64)))
    history = train_router(router, train, held_out, RouterPlan(epochs=6, lr=5e-3))
    assert len(history) == 7 and history[-1] < 0.3 < history[0]
    with torch.no_grad():
        kept = float(F.binary_cross_entropy_with_logits(router(held_out.features), held_out.targets))
    assert kept == min(history)
    chosen = choose(router, fresh.features)
    want = [{name: 1.0 for name, on in zip(("a", "b"), row, strict=True) if on} for row in fresh.targets.tolist()]
    assert sum(a == b for a, b in zip(chosen, want, strict=True)) >= 60
    assert {} in chosen and {"a": 1.0, "b": 1.0} in chosen
    soft = choose(router, fresh.features, threshold=0.12, is_soft=True)
    assert all(0.12 < p < 1 for row in soft for p in row.values()) and any(p != 1 for row in soft for p in row.values())
    # An epoch that makes it worse is not kept.
    opposite = 1 - held_out.targets
    history = train_router(router, train, Examples(held_out.features, opposite), RouterPlan(epochs=3))
    assert history.index(min(history)) < 2
    with torch.no_grad():
        assert float(F.binary_cross_entropy_with_logits(router(held_out.features), opposite)) == min(history)


# -- a whole model ----------------------------------------------------------------------------------------------------


def test_a_router_trained_on_outcomes_has_little_regret_and_leaves_strange_inputs_to_the_base() -> None:
    domains = [domain("sums"), domain("turns")]
    model = stacked()
    stacks = Curriculum(plan=PLAN, directions=1).learn(model, domains).stacks
    names = ["sums", "turns"]

    def prompt(kind: str, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and answers; of a kind that nobody has learned, what the base says is right."""
        if kind == "strange":
            x = inputs("bends", 4, 50 + seed)
            with using_tasks(model, weights={}), torch.no_grad():
                return x, model(x)
        source = domains[names.index(kind)]
        x, y = next(source.batches(1))
        pick = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:4]
        return x[pick], y[pick]

    prompts = [(kind, *prompt(kind, seed)) for seed in range(30) for kind in (*names, "strange")]
    losses = [outcome_loss(model.eval(), stacks, lambda x=x, y=y: F.mse_loss(model(x), y)) for _, x, y in prompts]
    found = [exhaustive(loss, names) for loss in losses]
    assert all(
        f.domains == () and f.loss == 0 for f, (kind, *_) in zip(found, prompts, strict=True) if kind == "strange"
    )
    features = torch.cat(
        [base_features(model, lambda x=x: model(x[None]), middle="1", last="1") for _, x, _ in prompts]
    )
    wanted = torch.stack([targets(f, names) for f in found])
    torch.manual_seed(0)
    router = MetaRouter(16, names, width=16)
    plan = RouterPlan(epochs=30, lr=5e-3)
    train_router(router, Examples(features[:60], wanted[:60]), Examples(features[60:75], wanted[60:75]), plan)
    chosen = choose(router, features[75:])
    mine = [regret(loss, choice, names) for loss, choice in zip(losses[75:], chosen, strict=True)]
    all_on = [regret(loss, dict.fromkeys(names, 1.0), names) for loss in losses[75:]]
    base = [regret(loss, {}, names) for loss in losses[75:]]
    assert min(mine) >= 0
    assert sum(mine) < 0.2 * sum(all_on) and sum(mine) < 0.2 * sum(base)
    strange = [choice for choice, (kind, *_) in zip(chosen, prompts[75:], strict=True) if kind == "strange"]
    assert strange.count({}) >= len(strange) - 1


def test_the_oracle_subset_is_never_worse_than_base_prefix_or_all() -> None:
    domains = [domain("sums"), domain("turns")]
    model = stacked()
    progress = Curriculum(plan=PLAN, directions=1).learn(model, domains)
    for one in domains:
        loss = outcome_loss(model, progress.stacks, lambda one=one: validate(model, one))
        best = exhaustive(loss, ["sums", "turns"])
        others = [{}, {"sums": 1.0}, {"turns": 1.0}, {"sums": 1.0, "turns": 1.0}]
        assert best.loss == min(validate(model, one, routed(progress.stacks, choice)) for choice in others)
        assert best.loss <= validate(model, one, prefix(progress.stacks, one.name))
        assert validate(model, one, oracle(progress.stacks, loss)) == best.loss
