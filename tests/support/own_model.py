"""A module such as a user might bring, without a line of Holdfast in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["build"]


class _Recurrent(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.table = nn.Embedding(259, width)
        self.cells = nn.GRU(width, width, depth, batch_first=True)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, 259)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.cells(self.table(tokens))
        logits: Tensor = self.head(self.drop(torch.tanh(hidden)))
        return logits


def build(width: int = 16, depth: int = 1) -> nn.Module:
    return _Recurrent(width, depth)
