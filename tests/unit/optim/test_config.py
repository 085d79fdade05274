"""The rules of the options, and that reading them loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import holdfast.optim
from holdfast.optim.config import OptimConfig, OptimName, check, constructor_options, rule_breaks


def test_the_defaults_are_sound() -> None:
    assert check(OptimConfig()) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", -0.1),
        ("lr", float("nan")),
        ("betas", [0.9]),
        ("betas", [0.9, 1.0]),
        ("betas", [-0.1, 0.9]),
        ("eps", 0.0),
        ("weight_decay", -1.0),
        ("block_size", 255),
        ("min_8bit_size", -1),
        ("grad_clip", -1.0),
        ("warmup_steps", -1),
        ("min_lr_ratio", 1.5),
    ],
)
def test_a_broken_rule_names_the_key_its_value_and_the_rule(key: str, value: Any) -> None:
    (problem,) = check(OptimConfig(**{key: value}))
    assert problem.startswith(f"optim.{key}={value!r} must be ")


def test_all_broken_rules_are_found_together() -> None:
    config = OptimConfig(lr=-1.0, block_size=3, min_lr_ratio=-1.0)
    assert [problem.split("=")[0] for problem in check(config)] == [
        "optim.lr",
        "optim.block_size",
        "optim.min_lr_ratio",
    ]


@pytest.mark.parametrize(
    ("name", "values", "problem"),
    [
        ("adamw", {"betas": [0.9, 0.99, 0.999]}, "optim.betas=[0.9, 0.99, 0.999] must be 2 numbers for adamw"),
        ("ademamix8bit", {}, "optim.betas=[0.9, 0.95] must be 3 numbers for ademamix8bit"),
        ("sgd", {"momentum": 1.0}, "optim.momentum=1.0 must be a number in [0, 1), for example 0.9"),
        ("sgd8bit", {"momentum": 0.0}, "optim: momentum=0 keeps no state to quantise; set momentum, or take "),
        ("lars8bit", {"momentum": 0.0}, "optim: momentum=0 keeps no state to quantise; set momentum, or take "),
        ("sgd", {"momentum": 0.0, "options": {"nesterov": True}}, "optim: nesterov=True needs momentum > 0 and"),
        ("lars", {"options": {"nesterov": True, "dampening": 0.1}}, "optim: nesterov=True needs momentum > 0 and"),
        ("rmsprop", {"options": {"momentum": -0.5}}, "optim.options.momentum=-0.5 must be a number in [0, 1)"),
        ("ademamix", {"betas": [0, 0, 0], "options": {"t_alpha": 0}}, "optim.options.t_alpha=0 must be None or a "),
        ("lion", {"options": {"eps": 1e-8}}, "optim.options.eps is not an argument of lion; it takes maximize, "),
        ("adam", {"options": {"betas": [0.9, 0.9]}}, "optim.options.betas is an option of its own; write optim.betas"),
        ("sgd", {"options": {"momentum": 0.9}}, "optim.options.momentum is an option of its own; write optim.momentum"),
        ("sgd", {"options": {"bits": 8}}, "optim.options.bits is not an argument of sgd; it takes dampening, nesterov"),
        ("adamw8bit", {"options": {"percentile_clipping": 101}}, "optim.options.percentile_clipping=101 must be a "),
    ],
)
def test_a_rule_of_one_optimizer_is_told_by_its_name(name: str, values: dict[str, Any], problem: str) -> None:
    (found,) = check(OptimConfig(name=OptimName(name), **values))
    assert found.startswith(problem)


def test_options_that_an_optimizer_does_not_have_bind_others_only() -> None:
    for values in ({"betas": [0.9]}, {"momentum": 0.0}):
        assert check(OptimConfig(name=OptimName.RMSPROP8BIT, **values)) == []


def test_an_optimizer_gets_the_arguments_that_it_has() -> None:
    config = OptimConfig(name=OptimName.SGD8BIT, options={"nesterov": True, "maximize": True})
    assert constructor_options(config) == {
        "lr": 1e-3,
        "weight_decay": 0.1,
        "block_size": 256,
        "min_8bit_size": 4096,
        "momentum": 0.9,
        "nesterov": True,
        "maximize": True,
    }


@pytest.mark.parametrize("value", [None, "fast", [1, 2, 3]])
def test_a_value_of_the_wrong_type_breaks_the_rule(value: object) -> None:
    assert len(rule_breaks({"lr": value, "betas": value, "block_size": value})) == 3


@pytest.mark.parametrize("limit", [64, 4096])
def test_the_limits_of_the_block_size_are_allowed(limit: int) -> None:
    assert check(OptimConfig(block_size=limit, lr=0.0, weight_decay=0.0, grad_clip=0.0, warmup_steps=0)) == []


def test_every_public_name_exists_and_an_unknown_one_is_an_attribute_error() -> None:
    for name in holdfast.optim.__all__:
        assert getattr(holdfast.optim, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'AdamW4bit'"):
        getattr(holdfast.optim, "AdamW4bit")  # noqa: B009


def _fresh(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    return done.stdout.strip()


def test_options_and_schedule_are_read_without_torch() -> None:
    program = "import sys, holdfast.optim.config, holdfast.optim.schedules; print('torch' in sys.modules)"
    assert _fresh(program) == "False"


def test_the_optimizer_needs_nothing_but_torch() -> None:
    program = """
import sys, numpy, torch, torch.optim
before = set(sys.modules)
from holdfast.optim import *
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(sorted(new))
"""
    assert _fresh(program) == "['holdfast']"
