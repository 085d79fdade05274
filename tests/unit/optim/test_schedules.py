"""Learning rates at the places where a schedule is usually off by one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.optim.config import OptimConfig
from holdfast.optim.schedules import learning_rate

_CONFIG = OptimConfig(lr=2.0, warmup_steps=4, min_lr_ratio=0.1)


def test_warm_up_rises_in_equal_steps_to_the_full_rate() -> None:
    assert [learning_rate(_CONFIG, step, 100) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]


def test_the_cosine_is_half_way_in_the_middle_and_at_its_floor_with_the_last_step() -> None:
    assert learning_rate(_CONFIG, 51, 100) == pytest.approx((2.0 + 0.2) / 2)  # 48 of 96 updates after the warm-up
    assert learning_rate(_CONFIG, 99, 100) == pytest.approx(0.2)
    assert learning_rate(_CONFIG, 500, 100) == pytest.approx(0.2)


def test_without_warm_up_the_cosine_starts_at_once() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=0, min_lr_ratio=0.0)
    assert learning_rate(config, 0, 1_000_000) == pytest.approx(1.0)
    assert learning_rate(config, 0, 1) == pytest.approx(0.0)


def test_a_run_shorter_than_its_warm_up_only_warms_up() -> None:
    assert [learning_rate(_CONFIG, step, 2) for step in range(2)] == [0.5, 1.0]


@settings(deadline=None)
@given(warmup=st.integers(0, 50), steps=st.integers(1, 200), step=st.integers(0, 300), ratio=st.floats(0, 1))
def test_the_rate_stays_in_range_and_only_falls_after_the_warm_up(
    warmup: int, steps: int, step: int, ratio: float
) -> None:
    config = OptimConfig(lr=3.0, warmup_steps=warmup, min_lr_ratio=ratio)
    now, then = (learning_rate(config, s, steps) for s in (step, step + 1))
    if step + 1 < warmup:
        assert 0 < now < then <= 3.0
    else:
        assert 3.0 * ratio <= then * (1 + 1e-12) and then <= now <= 3.0
