"""How layers become stages, against every possible division of few blocks."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import ConfigurationError
from holdfast.parallel.partition import (
    LayerCosts,
    Partition,
    balanced,
    equal,
    estimate_costs,
    from_block_counts,
)
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.sizing import flops_per_token

_cost = st.one_of(st.integers(1, 9).map(float), st.floats(1e-3, 1e3))
_end_cost = st.one_of(st.just(0.0), _cost)


def _stage_costs(costs: LayerCosts, counts: tuple[int, ...]) -> list[float]:
    stops = list(itertools.accumulate(counts))
    sums = [math.fsum(costs.blocks[stop - count : stop]) for stop, count in zip(stops, counts, strict=True)]
    sums[0] += costs.embedding
    sums[-1] += costs.head
    return sums


def _divisions(blocks: int, stages: int) -> list[tuple[int, ...]]:
    """Every way to write ``blocks`` as a sum of ``stages`` positive numbers."""
    return [counts for counts in itertools.product(range(1, blocks + 1), repeat=stages) if sum(counts) == blocks]


@given(st.lists(_cost, min_size=1, max_size=7), _end_cost, _end_cost, st.data())
def test_no_division_is_better(blocks: list[float], embedding: float, head: float, data: st.DataObject) -> None:
    costs = LayerCosts(tuple(blocks), embedding, head)
    stages = data.draw(st.integers(1, min(len(blocks), 4)))
    counts = balanced(costs, processes=stages).block_counts
    assert sum(counts) == len(blocks) and min(counts) >= 1 and len(counts) == stages
    every = [_stage_costs(costs, other) for other in _divisions(len(blocks), stages)]
    least = min(max(sums) for sums in every)
    chosen = _stage_costs(costs, counts)
    assert max(chosen) == pytest.approx(least, rel=1e-12)
    evenest = min(math.fsum(c * c for c in sums) for sums in every if max(sums) <= least * (1 + 1e-12))
    assert math.fsum(c * c for c in chosen) <= evenest * (1 + 1e-9)


def test_what_does_not_divide_goes_to_the_later_stages() -> None:
    assert balanced(LayerCosts((1.0,) * 10), processes=4).block_counts == (2, 2, 3, 3)
    assert balanced(LayerCosts((0.1,) * 10), processes=4).block_counts == (2, 2, 3, 3)


def test_evenness_comes_second() -> None:
    """Sums 1, 5, 5, although 6, 2, 3 have smaller squares."""
    assert balanced(LayerCosts((1.0, 5.0, 2.0, 3.0)), processes=3).block_counts == (1, 1, 2)


def test_an_expensive_head_takes_blocks_from_the_last_stage() -> None:
    assert balanced(LayerCosts((1.0,) * 9, head=3.0), processes=3).block_counts == (4, 4, 1)


@pytest.mark.parametrize(
    "partition",
    [
        balanced(LayerCosts((1.0,) * 7), processes=3, chunks=2),
        from_block_counts([1, 1, 2, 1, 1, 1], n_layers=7, processes=3, chunks=2),
    ],
)
def test_every_layer_is_in_one_stage_and_a_process_holds_every_pth(partition: Partition) -> None:
    stages = partition.stages
    assert [block for stage in stages for block in stage.blocks] == list(range(7))
    assert [stage.has_embedding for stage in stages] == [True] + [False] * 5
    assert [stage.has_head for stage in stages] == [False] * 5 + [True]
    assert [partition.of_process(p) for p in range(3)] == [(stages[p], stages[3 + p]) for p in range(3)]


def test_the_estimate_is_a_third_of_what_the_trainer_counts_for_forward_and_backward() -> None:
    config = ModelConfig(d_model=64, n_layers=5, n_heads=8, n_kv_heads=2, d_ff=160, vocab_size=300)
    costs = estimate_costs(
        n_layers=5, d_model=64, n_heads=8, n_kv_heads=2, d_ff=160, vocab_size=config.vocab_size, seq_len=48
    )
    assert len(costs.blocks) == 5
    assert 3 * (costs.embedding + sum(costs.blocks) + costs.head) == flops_per_token(config, 48)
    assert costs.head == 2 * 300 * 64


def _problems(**changed: object) -> str:
    arguments: dict[str, object] = {"costs": LayerCosts((1.0, 2.0, 3.0)), "processes": 2, "chunks": 1, **changed}
    with pytest.raises(ConfigurationError) as caught:
        balanced(**arguments)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize("cost", [0.0, -1.0, math.nan, math.inf])
def test_a_block_must_cost_something_finite(cost: float) -> None:
    problem = _problems(costs=LayerCosts((1.0, cost, 3.0)))
    assert problem == f"cost {cost} of block 1 must be positive and finite"


@pytest.mark.parametrize("cost", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("layer", ["embedding", "head"])
def test_the_ends_may_cost_nothing_but_not_less(layer: str, cost: float) -> None:
    problem = _problems(costs=LayerCosts((1.0, 2.0), **{layer: cost}))
    assert problem == f"cost {cost} of the {layer} must be zero or more, and finite"


def test_costs_whose_sum_is_infinite_are_refused() -> None:
    assert "add up to infinity" in _problems(costs=LayerCosts((1e308, 1e308)))


def test_more_stages_than_blocks_are_refused() -> None:
    assert "2 processes x 2 chunks make 4 pipeline stages for 3 blocks" in _problems(chunks=2)
    with pytest.raises(ConfigurationError, match="5 pipeline stages for 4 blocks"):
        equal(4, processes=5)


def test_sizes_below_one_are_refused_together() -> None:
    problem = _problems(processes=0, chunks=-1)
    assert problem == "processes=0 must be at least 1\nchunks=-1 must be at least 1"


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        ([2, 2], "add up to 4, the model has 5 blocks"),
        ([2, 3, 0], "are 3 numbers for 2 stages"),
        ([5, 0], "stage 1 is given 0 blocks"),
        ([6, -1], "stage 1 is given -1 blocks"),
    ],
)
def test_block_counts_must_fit(counts: list[int], problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        from_block_counts(counts, n_layers=5, processes=2)


def test_equal_stages_or_what_would_be_possible() -> None:
    assert equal(12, processes=3, chunks=2).block_counts == (2,) * 6
    with pytest.raises(ConfigurationError, match=r"use 1, 2, 5, 10 stages, or 8 or 12 blocks"):
        equal(10, processes=4)
