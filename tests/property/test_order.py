"""Laws of the sample order: every pass is a permutation, any place is reached directly, on any number of ranks."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import ConfigurationError
from holdfast.trainer.order import window_of

SEEDS = st.integers(-(2**70), 2**70)
SMALL = st.integers(1, 300)


def one_pass(seed: int, number: int, n: int) -> list[int]:
    return [window_of(seed, index, n) for index in range(number * n, (number + 1) * n)]


@given(seed=SEEDS, number=st.integers(0, 10**6), n=SMALL)
def test_a_pass_shows_every_window_once(seed: int, number: int, n: int) -> None:
    assert sorted(one_pass(seed, number, n)) == list(range(n))


@given(seed=SEEDS, world=st.integers(1, 8), micro=st.integers(1, 4), steps=st.integers(1, 6), n=SMALL)
def test_ranks_together_see_each_sample_of_a_step_once(seed: int, world: int, micro: int, steps: int, n: int) -> None:
    batch = world * micro
    alone = [window_of(seed, i, n) for i in range(steps * batch)]
    together = []
    for step in range(steps):
        for rank in range(world):
            first = step * batch + rank * micro
            together += [window_of(seed, first + j, n) for j in range(micro)]
    assert together == alone
    for start in range(0, len(together) - n + 1, n):
        assert sorted(together[start : start + n]) == list(range(n))


@given(seed=SEEDS, n=SMALL, data=st.data())
def test_a_place_does_not_depend_on_how_it_was_reached(seed: int, n: int, data: st.DataObject) -> None:
    visited = data.draw(st.lists(st.integers(0, 3 * n - 1), min_size=1, max_size=20))
    sequential = [*one_pass(seed, 0, n), *one_pass(seed, 1, n), *one_pass(seed, 2, n)]
    assert [window_of(seed, index, n) for index in visited] == [sequential[index] for index in visited]


@given(seed=SEEDS, number=st.integers(0, 10**6), n=st.integers(40, 300))
def test_another_seed_or_pass_is_another_order(seed: int, number: int, n: int) -> None:
    order = one_pass(seed, number, n)
    assert order != one_pass(seed + 1, number, n)
    assert order != one_pass(seed, number + 1, n)
    assert order != list(range(n))


@given(seed=SEEDS, index=st.integers(0, 2**62), n=st.integers(1, 2**48))
def test_the_far_end_of_a_huge_corpus_is_reached_too(seed: int, index: int, n: int) -> None:
    assert 0 <= window_of(seed, index, n) < n


@pytest.mark.parametrize("n", [2, 3, 5, 16, 17])
def test_every_window_is_equally_likely_at_every_place(n: int) -> None:
    trials = 4000
    for place in (0, n - 1):
        counts = [0] * n
        for seed in range(trials):
            counts[window_of(seed, place, n)] += 1
        chi_squared = sum((count - trials / n) ** 2 / (trials / n) for count in counts)
        assert chi_squared < 45  # exceeded once in ten thousand times at 16 degrees of freedom, less often below


def test_neighbours_do_not_stay_neighbours() -> None:
    order = one_pass(0, 0, 10_000)
    steps = sum(abs(after - before) == 1 for before, after in pairwise(order))
    assert steps < 15  # 2 are expected of a random order


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    assert one_pass(0, 0, 12) == [7, 9, 8, 3, 5, 2, 4, 6, 11, 0, 1, 10]
    assert [window_of(1234, index, 10**9 + 7) for index in (0, 1, 10**9 + 7, 10**12)] == [
        935723808,
        42974092,
        332469644,
        237933620,
    ]


@pytest.mark.parametrize(("index", "n"), [(0, 0), (-1, 5)])
def test_a_sample_that_does_not_exist_is_refused(index: int, n: int) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        window_of(0, index, n)
