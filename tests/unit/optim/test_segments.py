"""Rows and norms of whole parameters that share flat tensors, here and on other ranks."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from holdfast.errors import InvariantViolation
from holdfast.optim import LAMB8bit, set_segments
from holdfast.optim.coefficients import Coefficients
from holdfast.optim.rows import Row, Settings
from holdfast.optim.rules import RULES, Norms
from holdfast.optim.segments import Part, Segments, over_ranks, rows_with_norms, segments_of, split
from holdfast.optim.torch_engine import TorchEngine

_BLOCK, _SETTINGS = 64, Settings(64)
_SIZES = (130, 64, 1, 200)
"""Elements of parameters 0 to 3, padded to 192, 64, 64 and 256."""


def _row(n: int, seed: int, *, is_8bit: bool = True) -> Row:
    draw = torch.Generator().manual_seed(seed)
    param, grad = torch.randn(2, n, generator=draw)
    by = Coefficients(step_size=0.1, beta1=0.9, blend1=0.1, beta2=0.99, blend2=0.01, eps=1e-8, weight_decay=0.1)
    if not is_8bit:
        return Row(param, grad, list(torch.randn(2, n, generator=draw).abs()), (), by, 5)
    codes = list(torch.randint(0, 256, (2, n), generator=draw, dtype=torch.uint8))
    absmax = list(torch.rand(2, -(-n // _BLOCK), generator=draw))
    return Row(param, grad, codes, absmax, by, 5)


def _tensors(row: Row) -> list[Tensor]:
    return [row.param, row.grad, *row.moments, *row.absmax]


def _measure(rows: list[Row]) -> list[tuple[float, float]]:
    return TorchEngine().norms(Norms.PARAM_AND_LAMB_DIRECTION, rows, _SETTINGS)


@pytest.mark.parametrize("is_8bit", [True, False])
def test_a_split_row_is_made_of_views_of_its_parts(is_8bit: bool) -> None:
    row = _row(576, 1, is_8bit=is_8bit)
    first, second = split(row, [(0, 130, 3), (192, 256, 0)], _BLOCK)
    assert (first.by, second.by, first.first, second.first) == (row.by, row.by, 5, 197)
    for have, whole in zip(_tensors(first), _tensors(row), strict=True):
        elements = 130 if len(whole) == 576 else 3
        assert torch.equal(have, whole[:elements]) and have.data_ptr() == whole.data_ptr()
    for have, whole in zip(_tensors(second), _tensors(row), strict=True):
        elements, at = (64, 192) if len(whole) == 576 else (1, 3)
        assert torch.equal(have, whole[at : at + elements])
        assert have.data_ptr() == whole[at:].data_ptr()


def test_a_part_inside_a_block_is_refused_where_there_are_blocks() -> None:
    with pytest.raises(InvariantViolation, match="begins at element 65 of a flat tensor, inside a block of 64"):
        split(_row(576, 1), [(0, 65, 0), (65, 70, 1)], _BLOCK)
    assert len(split(_row(576, 1, is_8bit=False), [(0, 65, 0), (65, 70, 1)], _BLOCK)) == 2


@pytest.mark.parametrize("rule", ["lamb", "sgd"])
def test_updating_the_parts_is_updating_the_whole(rule: str) -> None:
    whole, parts = _row(576, 1), _row(576, 1)
    if rule == "sgd":
        for row in (whole, parts):
            row.moments, row.absmax = row.moments[:1], row.absmax[:1]
    TorchEngine().update(RULES[rule], [whole], _SETTINGS)
    TorchEngine().update(RULES[rule], split(parts, [(0, 192, 0), (192, 256, 1), (256, 576, 2)], _BLOCK), _SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(_tensors(whole), _tensors(parts), strict=True))


def _flat() -> tuple[Row, list[tuple[int, int]]]:
    """Parameters of ``_SIZES`` one behind the other, with zeros between them; and where each lies."""
    row, places, at = _row(576, 7), [], 0
    for size in _SIZES:
        places.append((at, at + size))
        at += -(-size // _BLOCK) * _BLOCK
        for tensor in (row.param, row.grad):
            tensor[places[-1][1] : at] = 0.0
    return row, places


def _share(row: Row, places: Sequence[tuple[int, int]], low: int, high: int) -> tuple[Row, list[Part]]:
    """What a rank has that holds elements ``low`` to ``high``."""
    (mine,) = split(row, [(low, high, 0)], _BLOCK)
    cuts = [(max(a, low) - low, min(b, high) - low, number) for number, (a, b) in enumerate(places)]
    return mine, [(a, b, number) for a, b, number in cuts if a < b]


def _at_once(world: int, body: Callable[[int, Callable[[Tensor], Tensor]], object]) -> list[object]:
    """``body(rank, total)`` in threads that meet in ``total``."""
    barrier, posted, found = threading.Barrier(world, timeout=10.0), dict[int, Tensor](), dict[int, object]()

    def run(rank: int) -> None:
        def total(vector: Tensor) -> Tensor:
            posted[rank] = vector
            barrier.wait()
            summed = torch.stack([posted[r] for r in range(world)]).sum(0)
            barrier.wait()
            return summed

        found[rank] = body(rank, total)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_norms_are_those_of_whole_parameters_whoever_holds_them(world: int) -> None:
    row, places = _flat()
    want = [
        (math.sqrt(first), math.sqrt(second))
        for first, second in _measure(split(row, [(a, b, n) for n, (a, b) in enumerate(places)], _BLOCK))
    ]
    length = -(-9 // world) * _BLOCK

    def body(rank: int, total: Callable[[Tensor], Tensor]) -> object:
        mine, parts = _share(row, places, length * rank, min(length * (rank + 1), 576))
        segments = Segments({mine.param: parts}, len(_SIZES), total)
        found = rows_with_norms(segments, [(mine.param, mine)], _measure, _BLOCK)
        return [(part, norms) for part, (_, norms) in zip(parts, found, strict=True)]

    seen = set()
    for found in _at_once(world, body):
        assert isinstance(found, list)
        for (_, _, number), norms in found:
            assert norms == pytest.approx(want[number], rel=1e-14)
            seen.add(number)
    assert seen == {0, 1, 2, 3}


def test_a_rank_that_holds_nothing_but_padding_takes_part() -> None:
    asked = list[Tensor]()

    def total(vector: Tensor) -> Tensor:
        asked.append(vector)
        return vector + 1

    row = _row(64, 1)
    assert rows_with_norms(Segments({row.param: []}, 3, total), [(row.param, row)], _measure, _BLOCK) == []
    assert [(t.dtype, t.tolist()) for t in asked] == [(torch.float64, [0.0] * 6)]


def test_sums_of_several_tensors_are_added_in_one_collective() -> None:
    calls = list[int]()

    def total(vector: Tensor) -> Tensor:
        calls.append(vector.numel())
        return 2 * vector

    parts = [(0, 64, 1), (64, 70, 0), (0, 64, 1)]
    sums = over_ranks([(1.0, 10.0), (2.0, 20.0), (4.0, 40.0)], parts, Segments({}, 2, total), torch.device("cpu"))
    assert sums == [(10.0, 100.0), (4.0, 40.0), (10.0, 100.0)] and calls == [4]


def test_without_segments_every_row_is_a_parameter() -> None:
    rows = [_row(130, 1), _row(64, 2)]
    found = rows_with_norms(None, [(row.param, row) for row in rows], _measure, _BLOCK)
    assert [row for row, _ in found] == rows
    assert [norms for _, norms in found] == [(math.sqrt(a), math.sqrt(b)) for a, b in _measure(rows)]


def test_segments_are_no_state() -> None:
    param = nn.Parameter(torch.ones(128))
    optimizer = LAMB8bit([param])
    assert segments_of(optimizer) is None
    set_segments(optimizer, {param: [(0, 128, 0)]}, 1, lambda vector: vector)
    kept = segments_of(optimizer)
    assert kept is not None and list(kept.parts[param]) == [(0, 128, 0)]
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    assert segments_of(copy.deepcopy(optimizer)) is None
