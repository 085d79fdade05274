"""Which layers belong to which pipeline stage: the embedding, contiguous runs of blocks, the head. Pure.

Stages are numbered along the model. A process holds one of them, or with interleaving several, its *chunks*: chunk c
of process p is stage c P + p, P being the number of processes (arXiv 2104.04473, section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from holdfast.errors import ConfigurationError

__all__ = [
    "LayerCosts",
    "Partition",
    "StageLayers",
    "balanced",
    "equal",
    "estimate_costs",
    "from_block_counts",
]


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """What each layer costs, in any one unit: seconds that were measured, or operations."""

    blocks: tuple[float, ...]
    embedding: float = 0.0
    head: float = 0.0


@dataclass(frozen=True, slots=True)
class StageLayers:
    """The layers of one stage."""

    blocks: range
    """Indices of its blocks in the model; never empty."""
    has_embedding: bool
    """Whether the embedding comes before its blocks. With swapped routes (``schedule``) other stages need it too."""
    has_head: bool
    """Whether the head comes after them; likewise."""


@dataclass(frozen=True, slots=True)
class Partition:
    """Every layer in exactly one stage, every stage with at least one block."""

    stages: tuple[StageLayers, ...]
    processes: int

    @property
    def block_counts(self) -> tuple[int, ...]:
        """Number of blocks of every stage."""
        return tuple(len(stage.blocks) for stage in self.stages)

    def of_process(self, process: int) -> tuple[StageLayers, ...]:
        """The chunks of one process, first chunk first."""
        return self.stages[process :: self.processes]


def estimate_costs(
    *, n_layers: int, d_model: int, n_heads: int, n_kv_heads: int, d_ff: int, vocab_size: int, seq_len: int
) -> LayerCosts:
    """Floating-point operations of a forward pass per token, a multiply-add counted as two; a look-up costs nothing.

    Counted as in arXiv 2204.02311 (PaLM), appendix B: 2 per weight of a matrix and 4 D T for the attention scores. The
    backward pass costs twice as much everywhere, so it does not move a cut.
    """
    attention = 2 * d_model * d_model + 2 * d_model * (d_model // n_heads * n_kv_heads)
    block = 2 * (attention + 3 * d_model * d_ff) + 4 * d_model * seq_len
    return LayerCosts((float(block),) * n_layers, embedding=0.0, head=2.0 * vocab_size * d_model)


def balanced(costs: LayerCosts, *, processes: int, chunks: int = 1) -> Partition:
    """The division whose most expensive stage is as cheap as possible.

    Among those, the one with the smallest sum of squared costs; where even that leaves a choice, the later stages get
    more, because earlier ones keep more microbatches in memory.

    Raises: ConfigurationError for fewer blocks than stages, and for costs that are NaN, infinite, negative, or zero
    for a block.
    """
    blocks = len(costs.blocks)
    if problems := _problems_of_sizes(blocks, processes, chunks) + _problems_of_costs(costs):
        raise ConfigurationError(problems)
    stages = processes * chunks
    table = _Table(costs, stages)
    return _partition(table.cuts_of_least_squares(table.least_maximum()), processes)


def from_block_counts(counts: Sequence[int], *, n_layers: int, processes: int, chunks: int = 1) -> Partition:
    """The division that the user asks for: ``counts[i]`` blocks for stage i.

    Raises: ConfigurationError when they are not one positive number per stage that add up to ``n_layers``.
    """
    problems = _problems_of_sizes(n_layers, processes, chunks)
    stages = processes * chunks
    if len(counts) != stages:
        problems.append(
            f"block counts {list(counts)} are {len(counts)} numbers for {stages} stages "
            f"({processes} processes x {chunks} chunks); give one for each stage"
        )
    for stage, count in enumerate(counts):
        if count < 1:
            problems.append(f"stage {stage} is given {count} blocks; every stage needs at least 1")
    if sum(counts) != n_layers:
        problems.append(
            f"block counts {list(counts)} add up to {sum(counts)}, the model has {n_layers} blocks; "
            "each block belongs to exactly one stage"
        )
    if problems:
        raise ConfigurationError(problems)
    return _partition(_ends(counts), processes)


def equal(n_layers: int, *, processes: int, chunks: int = 1) -> Partition:
    """The same number of blocks for every stage, as averaging neighbours needs it.

    Raises: ConfigurationError when the stages do not divide the blocks.
    """
    if problems := _problems_of_sizes(n_layers, processes, chunks):
        raise ConfigurationError(problems)
    stages = processes * chunks
    if n_layers % stages:
        fitting = ", ".join(str(n) for n in range(1, n_layers + 1) if n_layers % n == 0)
        raise ConfigurationError(
            f"{n_layers} blocks cannot be divided into {stages} equal stages ({processes} processes x {chunks} "
            f"chunks); use {fitting} stages, or {n_layers - n_layers % stages} or "
            f"{n_layers + -n_layers % stages} blocks"
        )
    return _partition(_ends([n_layers // stages] * stages), processes)


class _Table:
    """The dynamic programmes. A state is (stage, end): stages 0 .. stage hold blocks 0 .. end - 1."""

    def __init__(self, costs: LayerCosts, stages: int) -> None:
        self._costs, self._stages, self._blocks = costs, stages, len(costs.blocks)
        # Every sum is built from its first block on, so that equal runs of blocks cost the same to the last bit.
        self._spans = [list(_running_sums(costs.blocks[start:])) for start in range(self._blocks)]

    def least_maximum(self) -> float:
        """The smallest possible cost of the most expensive stage."""
        best = {0: 0.0}
        for stage in range(self._stages):
            best = {
                end: min(max(best[start], self._cost(stage, start, end)) for start in self._starts(stage, end))
                for end in self._reach(stage)
            }
        return best[self._blocks]

    def cuts_of_least_squares(self, limit: float) -> list[int]:
        """The end of every stage, such that no stage costs more than ``limit`` and the squares are least."""
        best, origins = {0: 0.0}, list[dict[int, int]]()
        for stage in range(self._stages):
            # Of equals, min takes the earliest start: more blocks for the later stage.
            scores = {
                end: min(
                    (best[start] + self._square(stage, start, end, limit), start) for start in self._starts(stage, end)
                )
                for end in self._reach(stage)
            }
            best = {end: score for end, (score, _) in scores.items()}
            origins.append({end: start for end, (_, start) in scores.items()})
        ends = [self._blocks]
        for origin in reversed(origins):
            ends.append(origin[ends[-1]])
        return ends[-2::-1]

    def _reach(self, stage: int) -> range:
        """Where a stage can end: every stage before it and after it has a block."""
        last = stage == self._stages - 1
        return range(self._blocks if last else stage + 1, self._blocks - (self._stages - 1 - stage) + 1)

    def _starts(self, stage: int, end: int) -> range:
        return range(stage, end) if stage else range(1)

    def _square(self, stage: int, start: int, end: int, limit: float) -> float:
        cost = self._cost(stage, start, end)
        return (cost / limit) ** 2 if cost <= limit else math.inf

    def _cost(self, stage: int, start: int, end: int) -> float:
        embedding = self._costs.embedding if stage == 0 else 0.0
        head = self._costs.head if stage == self._stages - 1 else 0.0
        return embedding + self._spans[start][end - start - 1] + head


def _running_sums(values: Sequence[float]) -> Iterator[float]:
    total = 0.0
    for value in values:
        total += value
        yield total


def _ends(counts: Sequence[int]) -> list[int]:
    return [sum(counts[: stage + 1]) for stage in range(len(counts))]


def _partition(ends: Sequence[int], processes: int) -> Partition:
    starts = [0, *ends[:-1]]
    stages = tuple(
        StageLayers(range(start, end), has_embedding=stage == 0, has_head=stage == len(ends) - 1)
        for stage, (start, end) in enumerate(zip(starts, ends, strict=True))
    )
    return Partition(stages, processes)


def _problems_of_sizes(blocks: int, processes: int, chunks: int) -> list[str]:
    problems = [f"{name}={n} must be at least 1" for name, n in (("processes", processes), ("chunks", chunks)) if n < 1]
    if not problems and processes * chunks > blocks:
        problems.append(
            f"{processes} processes x {chunks} chunks make {processes * chunks} pipeline stages for {blocks} blocks; "
            "every stage needs at least one: use fewer stages or a deeper model"
        )
    return problems


def _problems_of_costs(costs: LayerCosts) -> list[str]:
    problems = [
        f"cost {cost} of block {block} must be positive and finite"
        for block, cost in enumerate(costs.blocks)
        if not 0 < cost < math.inf  # also refuses NaN
    ]
    for name, cost in (("embedding", costs.embedding), ("head", costs.head)):
        if not 0 <= cost < math.inf:
            problems.append(f"cost {cost} of the {name} must be zero or more, and finite")
    if not problems and math.isinf(sum(costs.blocks) + costs.embedding + costs.head):
        problems.append("the costs add up to infinity; use a larger unit")
    return problems
