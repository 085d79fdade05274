"""Numbers read from a matrix of losses, against matrices worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from holdfast.adapters import LossMatrix, bits_per_byte, mean_loss
from holdfast.errors import ConfigurationError

_BY_HAND = LossMatrix(
    ["a", "b", "c"],
    [
        [4.0, 3.0, 2.0],
        [2.0, 3.5, 2.5],
        [2.5, 1.5, 2.25],
        [3.0, 1.25, 1.0],
    ],
    [5.0, 5.5, 5.25, 6.0],
)


def test_a_matrix_worked_out_by_hand() -> None:
    assert _BY_HAND.learned == [2.0, 1.5, 1.0]
    assert _BY_HAND.changes == [1.0, -0.25]
    assert _BY_HAND.forgetting == 0.375
    assert _BY_HAND.clipped_forgetting == pytest.approx(1 / 3)  # 1.0 and 0 and 0, of three
    assert _BY_HAND.final == 1.75
    assert (_BY_HAND.diagonal, _BY_HAND.base, _BY_HAND.drift) == (1.5, 3.0, 1.0)


def test_losses_by_name_are_put_in_the_order_of_learning() -> None:
    rows = [{"b": 3.0, "a": 4.0, "x": 5.0}, {"b": 3.5, "a": 2.0, "x": 5.5}, {"b": 1.5, "a": 2.5, "x": 6.0}]
    matrix = LossMatrix.of(["a", "b"], rows, "x")
    assert matrix.rows == [[4.0, 3.0], [2.0, 3.5], [2.5, 1.5]] and matrix.elsewhere == [5.0, 5.5, 6.0]
    assert matrix.forgetting == 0.5
    assert math.isnan(LossMatrix.of(["a", "b"], rows).drift)


@given(st.integers(1, 5), st.data())
def test_what_is_forgotten_is_what_is_missing_in_the_end(size: int, data: st.DataObject) -> None:
    """final = diagonal + (T - 1) / T forgetting; clipping never makes it less than that share."""
    rows = [[data.draw(st.floats(0, 10)) for _ in range(size)] for _ in range(size + 1)]
    matrix = LossMatrix([str(number) for number in range(size)], rows)
    share = (size - 1) / size
    assert matrix.final == pytest.approx(matrix.diagonal + share * matrix.forgetting, abs=1e-9)
    assert matrix.clipped_forgetting >= share * matrix.forgetting - 1e-9
    assert matrix.clipped_forgetting >= 0


@pytest.mark.parametrize("rows", [[], [[1.0, 2.0]] * 2, [[1.0], [1.0], [1.0]]])
def test_a_matrix_of_another_shape_is_refused(rows: list[list[float]]) -> None:
    with pytest.raises(ConfigurationError, match="2 domains need 3 rows of 2 losses"):
        LossMatrix(["a", "b"], rows)
    with pytest.raises(ConfigurationError, match="elsewhere needs 2 losses"):
        LossMatrix(["a"], [[1.0], [1.0]], [1.0])


def test_the_mean_is_taken_in_evaluation_mode_and_leaves_the_modes() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Dropout(0.9)).train()
    model[1].eval()

    def loss(model: nn.Module, value: float) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        return model(torch.tensor(value))

    assert mean_loss(model, [1.0, 2.0, 6.0], loss) == 3.0
    assert [module.training for module in model.modules()] == [True, True, False]
    with pytest.raises(ConfigurationError, match="no batches"):
        mean_loss(model, [], loss)


def test_bits_per_byte() -> None:
    assert bits_per_byte(math.log(2) * 3, tokens=10, size_bytes=15) == pytest.approx(2.0)


def test_losses_that_were_not_measured_are_no_numbers() -> None:
    rows = [{"a": 2.0}, {"a": 2.5, "b": 1.0}, {"a": 2.75, "b": 1.5, "c": 0.5}]
    matrix = LossMatrix.so_far(rows)
    assert (matrix.changes, matrix.forgetting, matrix.diagonal) == ([0.75, 0.5], 0.625, 3.5 / 3)
    assert math.isnan(matrix.base) and math.isnan(matrix.rows[1][2])
    assert LossMatrix.so_far(rows, {"a": 3.0, "b": 3.0, "c": 3.0}).base == 3.0
