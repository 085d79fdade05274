"""Rows for comparing two engines bit for bit: every dtype and width, tails, and gradients that nobody can use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast.optim.coefficients import Coefficients
from holdfast.optim.quantize import codebook
from holdfast.optim.rows import Engine, Row, Settings
from holdfast.optim.rules import Norms, Rule

__all__ = ["BY", "SHAPES", "Shape", "at_thresholds", "bits", "copied", "differences", "make_row", "norms_of", "spoil"]

BY = Coefficients(
    grad_scale=-0.7, l2=0.01, decay=0.999, step_size=0.01, beta1=0.9, blend1=0.1, beta2=0.99, blend2=0.01, beta3=0.999,
    blend3=0.001, eps=1e-8, root_scale=1.7, correction=1.3, mix=0.4, trust=0.8, weight_decay=0.02,
)  # fmt: skip
"""Every scalar counts."""


@dataclass(frozen=True, slots=True)
class Shape:
    elements: int
    param: torch.dtype = torch.float32
    grad: torch.dtype = torch.float32
    is_8bit: bool = True


SHAPES = (
    Shape(1024),
    Shape(1000),
    Shape(3, torch.float32, torch.bfloat16),
    Shape(1040, torch.bfloat16, torch.bfloat16),
    Shape(513, torch.bfloat16, torch.float32),
    Shape(512, torch.float16, torch.float16),
    Shape(0),
    Shape(130, is_8bit=False),
    Shape(1056, torch.bfloat16, torch.bfloat16, is_8bit=False),
    Shape(77, torch.float16, torch.float32, is_8bit=False),
)


def make_row(rule: Rule, shape: Shape, block_size: int, seed: int, by: Coefficients = BY) -> Row:
    """Values over many orders of magnitude, the smallest of them subnormal. Without an L2 term for even seeds."""
    random = torch.Generator().manual_seed(seed)
    n = shape.elements

    def wide() -> Tensor:
        powers = torch.randint(-3, 2, (n,), generator=random).float() * (30 if seed % 3 == 0 else 2)
        return torch.randn(n, generator=random) * 2**powers

    moments, absmax = [], []
    for signed in rule.moments.values():
        values = wide() if signed else wide().abs()
        codes = torch.randint(256, (n,), generator=random, dtype=torch.uint8)
        moments.append(codes if shape.is_8bit else values)
        if shape.is_8bit:
            absmax.append(torch.rand(-(-n // block_size), generator=random) * 10.0 ** -(seed % 5))
    param = torch.randn(n, generator=random).to(shape.param)
    by = by if seed % 2 else replace(by, l2=0.0)
    return Row(
        param, wide().to(shape.grad), moments, absmax, by, first=seed << 31, key=(seed % 8 << 60) - 0x1E3779B97F4A7C15
    )


def spoil(row: Row, block_size: int) -> Row:
    """Gradients that cannot be used: single ones, one whole block, and the last element."""
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0**64]).to(row.grad.dtype)
    row.grad[5:45:10] = bad[: len(row.grad[5:45:10])]
    row.grad[block_size : 2 * block_size] = torch.nan
    row.grad[-1:] = torch.nan
    return row


def at_thresholds(signed: bool) -> Tensor:
    """Ratios at, just below and just above every border between two codes, in blocks of 64 whose largest is 1.

    For the unsigned codebook, roots of such ratios.
    """
    entries = codebook(signed)
    middle = (entries[1:] + entries[:-1]) / 2
    middle = middle if signed else middle.sqrt()
    nearby = [middle]
    for way in (-torch.inf, torch.inf):
        near = middle
        for _ in range(4):
            near = torch.nextafter(near, torch.full_like(near, way))
            nearby.append(near)
    ratios = torch.cat(nearby)
    rows = torch.nn.functional.pad(ratios, (0, -len(ratios) % 63)).view(-1, 63)
    return torch.cat([torch.ones(len(rows), 1), rows], 1).flatten()


def copied(rows: Iterable[Row], device: str = "cpu") -> list[Row]:
    return [
        replace(
            row,
            param=row.param.to(device, copy=True),
            grad=row.grad.to(device, copy=True),
            moments=[moment.to(device, copy=True) for moment in row.moments],
            absmax=[absmax.to(device, copy=True) for absmax in row.absmax],
        )
        for row in rows
    ]


def bits(tensor: Tensor) -> Tensor:
    """As integers, on the CPU."""
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.cpu().view(widths[tensor.element_size()])


def differences(ours: Sequence[Row], theirs: Sequence[Row]) -> list[str]:
    """Every tensor of which a bit differs, with how many elements do."""
    found = []
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        names = [
            "param",
            *(f"moment {k}" for k in range(len(a.moments))),
            *(f"absmax {k}" for k in range(len(a.absmax))),
        ]
        tensors = zip([a.param, *a.moments, *a.absmax], [b.param, *b.moments, *b.absmax], strict=True)
        counts = [int((bits(x) != bits(y)).sum()) for x, y in tensors]
        found += [f"row {number}: {name}, {count}" for name, count in zip(names, counts, strict=True) if count]
    return found


def norms_of(engine: Engine, rule: Rule, rows: Sequence[Row], settings: Settings) -> list[list[tuple[float, float]]]:
    """Of every kind that the rule's moments allow."""
    kinds = [kind for kind in Norms if kind is not Norms.PARAM_AND_LAMB_DIRECTION or rule.name == "lamb"]
    return [engine.norms(kind, rows, settings) for kind in kinds]
