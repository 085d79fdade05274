"""The rules of the options, and that reading them loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import holdfast.optim
from holdfast.optim.config import OptimConfig, check, rule_breaks


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
