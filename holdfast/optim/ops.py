"""The update as a torch operator, ``torch.ops.holdfast.update``.

Kernels called by pointer are invisible to torch. As an operator the update can be traced by ``torch.compile``, checked
on fake tensors and seen by dispatch modes. Passing a thousand tensors through the dispatcher costs more than updating
them, so that steps call the kernels directly while nobody looks, and the operator when a dispatch mode is active.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

import torch
from torch import Tensor

from holdfast.optim.coefficients import FIELDS, Coefficients
from holdfast.optim.engines import kernels_for
from holdfast.optim.rows import Engine, Row, Settings
from holdfast.optim.rules import RULES, Norms, Rule

__all__ = ["OperatorEngine", "engine_for"]

_SCHEMA = (
    "(str rule, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] moments, Tensor(c!)[] absmax, "
    "float[] coefficients, int[] firsts, int[] keys, "
    "int block_size, bool nonzero_second_moment, bool stochastic_rounding) -> ()"
)


def engine_for(device: torch.device) -> Engine:
    """What carries out the updates of tensors on ``device``."""
    is_watched = torch._C._len_torch_dispatch_stack() > 0
    return OperatorEngine() if is_watched else kernels_for(device)


class OperatorEngine:
    """See ``Engine``: one call of the operator for the rows with codes and one for the others."""

    def update(self, rule: Rule, rows: Sequence[Row], settings: Settings) -> None:
        for some in ([row for row in rows if row.absmax], [row for row in rows if not row.absmax]):
            if some:
                torch.ops.holdfast.update(rule.name, *_flattened(some), *astuple(settings))

    def norms(self, kind: Norms, rows: Sequence[Row], settings: Settings) -> list[tuple[float, float]]:
        """Their results are numbers, which no operator may depend on: directly from the kernels."""
        return kernels_for(rows[0].param.device).norms(kind, rows, settings) if rows else []


def _flattened(
    rows: Sequence[Row],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[float], list[int], list[int]]:
    return (
        [row.param for row in rows],
        [row.grad for row in rows],
        [moment for row in rows for moment in row.moments],
        [scale for row in rows for scale in row.absmax],
        [number for row in rows for number in astuple(row.by)],
        [row.first for row in rows],
        [row.key for row in rows],
    )


@torch.library.custom_op("holdfast::update", mutates_args=("params", "moments", "absmax"), schema=_SCHEMA)
def _update(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Tensor],
    absmax: Sequence[Tensor],
    coefficients: Sequence[float],
    firsts: Sequence[int],
    keys: Sequence[int],
    block_size: int,
    nonzero_second_moment: bool,
    stochastic_rounding: bool,
) -> None:
    """``Engine.update`` of rows that are all on one device and all of 8 or all of 32 bits. Shapes: as ``Row``, one
    behind the other; ``coefficients`` has the fields of ``Coefficients`` for each row.
    """
    known, width = RULES[rule], len(FIELDS)
    count = len(known.moments)
    rows = [
        Row(
            params[i],
            grads[i],
            moments[i * count : (i + 1) * count],
            absmax[i * count : (i + 1) * count],
            Coefficients(*coefficients[i * width : (i + 1) * width]),
            firsts[i],
            keys[i],
        )
        for i in range(len(params))
    ]
    settings = Settings(block_size, nonzero_second_moment, stochastic_rounding)
    kernels_for(params[0].device).update(known, rows, settings)


@_update.register_fake
def _nothing(*args: object) -> None:
    """Everything is written in place."""
