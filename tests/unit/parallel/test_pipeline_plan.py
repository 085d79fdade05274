"""From options to a pipeline; what cannot be is told in ``unit/configs/test_validate.py``."""

from __future__ import annotations

import pytest

from holdfast.errors import ConfigurationError
from holdfast.parallel.config import ParallelConfig, ScheduleKind
from holdfast.parallel.partition import LayerCosts
from holdfast.parallel.pipeline_plan import plan_pipeline, replicas

_EVEN = LayerCosts((1.0,) * 8)


@pytest.mark.parametrize(
    ("options", "bubble"),
    [
        ({"schedule": ScheduleKind.GPIPE}, 3 / 11),
        ({"schedule": ScheduleKind.ONE_F_ONE_B}, 3 / 11),
        ({"chunks": 2}, 3 / 19),
    ],
)
def test_the_bubble_is_that_of_the_literature_where_all_layers_cost_the_same(
    options: dict[str, object], bubble: float
) -> None:
    """arXiv 2104.04473, section 2.2: of v m + p - 1 units, p - 1 are spent waiting."""
    config = ParallelConfig(zero_stage=1, pipeline=4, **options)  # type: ignore[arg-type]
    plan = plan_pipeline(config, _EVEN, world=8, microbatches=8)
    assert plan.bubble == pytest.approx(bubble)
    assert replicas(config, 8) == 2


def test_the_work_is_balanced_unless_the_user_divides_it() -> None:
    costs = LayerCosts((1.0,) * 8, head=4.0)
    config = ParallelConfig(zero_stage=1, pipeline=2)
    assert plan_pipeline(config, costs, world=2, microbatches=4).partition.block_counts == (6, 2)
    config.blocks = [4, 4]
    assert plan_pipeline(config, costs, world=2, microbatches=4).partition.block_counts == (4, 4)


def test_everything_that_does_not_fit_is_told_together() -> None:
    config = ParallelConfig(zero_stage=2, pipeline=3, blocks=[1, 1])
    with pytest.raises(ConfigurationError) as refused:
        plan_pipeline(config, _EVEN, world=4, microbatches=4)
    assert len(refused.value.problems) == 4
