"""Entries of any kind survive being written down; schedules by rate depend on seed, rank and step alone."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast import failpoints
from holdfast.fault_tolerance.chaos import ACTIONS, Action, Rate, Target, parse

_NUMBERS = st.integers(0, 10**6)
_POSITIVE = st.floats(1e-3, 1e6, allow_nan=False)
_KEEPER_PLACES = [name for name in failpoints.NAMES if name.startswith("keeper.")]
_WORKER_PLACES = [name for name in failpoints.NAMES if not name.startswith("keeper.")]


@st.composite
def _entries(draw: st.DrawFn) -> str:
    """Keys in any order, those that may be left out sometimes left out."""
    action = draw(st.sampled_from(list(Action)))
    kind = ACTIONS[action]
    values = {
        "at": st.sampled_from(_KEEPER_PLACES if kind.target is Target.KEEPER else _WORKER_PLACES),
        "what": st.sampled_from(kind.what or ("",)),
        "bit": _NUMBERS,
        "seed": _NUMBERS,
        "by": st.floats(-1e9, 1e9),
        "for": _POSITIVE,
        "mb_per_s": _POSITIVE,
    }
    pairs = {key: draw(values[key]) for key in kind.takes if key in kind.needs or draw(st.booleans())}
    if pairs.get("what") == "parity":
        pairs.pop("at", None)
    if draw(st.booleans()):
        pairs |= {
            key: draw(_NUMBERS) for key in kind.single_keys if key not in kind.optional_keys or draw(st.booleans())
        }
    else:
        first, last = sorted(draw(st.tuples(_NUMBERS, _NUMBERS)))
        pairs |= {"rate": draw(st.floats(1e-6, 1.0)), "seed": draw(_NUMBERS), "from": first, "to": last}
        if kind.number_key:
            pairs[f"{kind.number_key}s"] = f"{first}-{last}"
    shown = [f"{key}={value}" for key, value in pairs.items()]
    return " ".join([action.value, *draw(st.permutations(shown))])


@given(_entries())
def test_every_entry_is_read_back_from_what_is_written(entry: str) -> None:
    fault = parse(entry)
    assert parse(str(fault)) == fault
    if fault.rate is not None:
        struck = fault.due(fault.rate.first if fault.kind.number_key else 0, fault.rate.first)  # by chance
        assert struck is None or parse(str(struck)) == struck
    assert str(parse(str(fault))) == str(fault)
    assert {*str(fault).split()} >= {word for word in entry.split() if word.startswith(("at=", "rate="))}


@given(st.integers(0, 2**32), st.floats(0.01, 0.5), st.integers(0, 63), st.randoms(use_true_random=False))
def test_what_is_struck_depends_on_nothing_but_seed_rank_and_step(
    seed: int, share: float, rank: int, order: random.Random
) -> None:
    """Asked in any order, again and again, by a rate object of its own each time, as after a recovery."""
    steps = list(range(200))
    first = {step for step in steps if Rate(share, seed).strikes(rank, step)}
    order.shuffle(steps)
    assert {step for step in steps + steps if Rate(share, seed).strikes(rank, step)} == first


@given(st.integers(0, 2**32), st.floats(0.01, 0.4), st.integers(0, 63))
def test_a_higher_rate_strikes_wherever_a_lower_one_does(seed: int, share: float, rank: int) -> None:
    low, high = Rate(share, seed), Rate(2 * share, seed)
    assert all(high.strikes(rank, step) for step in range(300) if low.strikes(rank, step))


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.floats(0.05, 0.95))
def test_the_share_of_struck_places_is_the_rate(seed: int, share: float) -> None:
    """Of 20,000 draws: six standard deviations, which one run in 10^9 leaves by chance."""
    struck = sum(Rate(share, seed).strikes(rank, step) for rank in range(20) for step in range(1000))
    assert abs(struck - 20_000 * share) < 6 * (20_000 * share * (1 - share)) ** 0.5


@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_ranks_and_seeds_are_struck_at_different_steps(seed: int, other: int) -> None:
    def struck(seed: int, rank: int) -> list[int]:
        return [step for step in range(256) if Rate(0.5, seed).strikes(rank, step)]

    assert struck(seed, 0) != struck(seed, 1)
    assert seed == other or struck(seed, 0) != struck(other, 0)
