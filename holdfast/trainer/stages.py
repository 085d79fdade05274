"""The layers of a decoder that one pipeline process holds, under the names that they have in the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from holdfast.errors import InvariantViolation
from holdfast.parallel.partition import Partition
from holdfast.parallel.schedule import Layout
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.model import Block, Embedding, Head, Layers

__all__ = ["Piece", "Stage", "layouts_of", "piece_of"]


class Piece(Layers):
    """Some layers of a :class:`~holdfast.trainer.model.Decoder`. Matrices are NaN until ``initialise``."""

    def __init__(
        self, config: ModelConfig, blocks: Iterable[int], *, has_embedding: bool, has_head: bool, meta: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta" if meta else "cpu"):
            if has_embedding or (has_head and config.tie_embeddings):
                self.embedding = Embedding(config)
            self.blocks = nn.ModuleDict({str(number): Block(config) for number in blocks})
            if has_head:
                self.head = Head(config)
                if config.tie_embeddings:
                    self.head.output.weight = self.embedding.weight


class Stage:
    """One stage of a piece: see :class:`holdfast.parallel.pipeline.Part`."""

    def __init__(self, piece: Piece, blocks: Sequence[int]) -> None:
        self._piece, self._blocks = piece, [piece.blocks[str(number)] for number in blocks]

    def embed(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self._piece.embedding(tokens)
        return hidden

    def __call__(self, hidden: Tensor) -> Tensor:
        for block in self._blocks:
            if self._piece.config.activation_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, use_reentrant=False)
            else:
                hidden = block(hidden)
        return hidden

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits: Tensor = self._piece.head(hidden)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def piece_of(
    config: ModelConfig, partition: Partition, layout: Layout, process: int, *, meta: bool = False
) -> tuple[Piece, list[Stage]]:
    """What a process of the pipeline holds, and its stages, first chunk first.

    Stages that are first or last on some route hold the embedding, or the head, whole.
    """
    stages = range(process, layout.stages, layout.processes)
    if len(partition.stages) != layout.stages:
        raise InvariantViolation(f"{len(partition.stages)} stages are not the {layout.stages} of the schedule")
    runs = [partition.stages[stage].blocks for stage in stages]
    piece = Piece(
        config,
        [block for run in runs for block in run],
        has_embedding=not layout.first_stages.isdisjoint(stages),
        has_head=not layout.last_stages.isdisjoint(stages),
        meta=meta,
    )
    return piece, [Stage(piece, run) for run in runs]


def layouts_of(config: ModelConfig, partition: Partition, layout: Layout) -> list[Mapping[str, tuple[int, ...]]]:
    """Names and shapes of every process's parameters."""
    found = list[Mapping[str, tuple[int, ...]]]()
    for process in range(layout.processes):
        piece, _ = piece_of(config, partition, layout, process, meta=True)
        found.append({name: tuple(param.shape) for name, param in piece.named_parameters()})
    return found
