"""Which tasks act in each mode, and which method has which modes."""

from __future__ import annotations

import pytest

from holdfast import adapters
from holdfast.adapters.methods.brainstacks.search import Loss
from holdfast.errors import ConfigurationError
from holdfast.launch.adapt_choices import MODES, Choices
from holdfast.launch.adapt_outcomes import search

TASKS = {"a.1": "a", "a.2": "a", "b.1": "b", "c.1": "c"}
ONE_EACH = {"a": "a", "b": "b"}


def _choices(method: str, tasks: dict[str, str] = TASKS) -> Choices:
    return Choices(adapters.create_method(method, {"rank": 2}), tasks)


def test_a_mode_lets_the_tasks_act_that_it_is_named_after() -> None:
    choices = _choices("brainstacks")
    assert choices.mode("ungated", None) == {"first": 4}
    assert choices.mode("own-only", "a") == {"weights": {"a.1": 1.0, "a.2": 1.0}}
    assert [choices.mode("prefix", domain) for domain in "abc"] == [{"first": 2}, {"first": 3}, {"first": 4}]
    assert choices.of({}) == {"first": 0}
    assert choices.of({"c": 0.5, "a": 1.0}) == {"weights": {"a.1": 1.0, "a.2": 1.0, "c.1": 0.5}}
    assert _choices("oracle").mode("own-only", "a") == {"only": "a.2"}
    assert _choices("mora", ONE_EACH).mode("own-only", "b") == {"only": "b"}


@pytest.mark.parametrize(
    ("method", "mode", "domain", "word"),
    [
        ("brainstacks", "own-only", None, "needs a domain"),
        ("brainstacks", "prefix", "d", "of \\['a', 'b', 'c'\\], not 'd'"),
        ("oracle", "ungated", None, "oracle lets one task act at a time"),
        ("oracle", "prefix", "a", "oracle lets one task act at a time"),
        ("mora", "own-only", "a", "mora can let one task act alone, and a has"),
    ],
)
def test_a_mode_that_a_method_does_not_have_is_refused(method: str, mode: str, domain: str | None, word: str) -> None:
    assert mode in MODES
    with pytest.raises(ConfigurationError, match=word):
        _choices(method).mode(mode, domain)


def test_tasks_that_act_together_are_not_routed() -> None:
    with pytest.raises(ConfigurationError, match="mora's tasks act together, so it has no mode routed"):
        _choices("mora").refuse_routing("routed")
    with pytest.raises(ConfigurationError, match="have no weights"):
        _choices("oracle").of({"a": 1.0, "b": 1.0})


def _table(losses: dict[str, float]) -> Loss:
    return lambda weights: losses["".join(weights)]


def test_a_search_finds_the_best_choice_that_can_be_carried_out() -> None:
    losses = {"": 3.0, "a": 2.0, "b": 2.5, "c": 4.0, "ab": 1.0, "ac": 2.2, "bc": 0.5, "abc": 1.5}
    assert search(_choices("brainstacks"), _table(losses)).domains == ("b", "c")  # greedy would stop at a + b
    assert search(_choices("oracle"), _table(losses)).domains == ("a",)
    assert search(_choices("oracle"), _table({**losses, "": 0.1})).domains == ()
