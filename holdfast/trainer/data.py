"""Which tokens a rank trains on: windows of a token store, in an order that depends on seed and step only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from holdfast.errors import ConfigurationError, DataError
from holdfast.parallel.microbatches import Microbatch
from holdfast.trainer.order import window_of
from holdfast.trainer.split import Split
from holdfast.trainer.token_store import TokenStore
from holdfast.trainer.tokenizer import BOS

__all__ = ["Batches", "Windows", "target_bytes"]


def target_bytes(targets: Tensor) -> int:
    """How many targets are bytes of text, not <bos> or <eos>, where tokens are bytes: for bits per byte."""
    return int((targets < BOS).sum())


class Windows:
    """A stream cut into windows of ``seq_len`` tokens; the targets are the tokens that follow each.

    Windows do not overlap. The last target of one is the first token of the next, so no transition is left out.
    """

    def __init__(
        self,
        stream: npt.NDArray[np.unsignedinteger],
        seq_len: int,
        lengths: npt.NDArray[np.uint32] | None = None,
    ) -> None:
        self._stream, self._seq_len, self._lengths = stream, seq_len, lengths

    def __len__(self) -> int:
        return max(len(self._stream) - 1, 0) // self._seq_len

    def stack(self, numbers: Sequence[int]) -> Microbatch:
        """Tokens and targets of these windows, both int64 [B, T] on the CPU, with memory of their own, and how many
        bytes of text the targets are."""
        rows = np.empty((len(numbers), self._seq_len + 1), np.int64)
        for row, number in zip(rows, numbers, strict=True):
            row[:] = self._stream[number * self._seq_len :][: self._seq_len + 1]
        both = torch.from_numpy(rows)
        tokens, targets = both[:, :-1].contiguous(), both[:, 1:].contiguous()
        return tokens, targets, target_bytes(targets) if self._lengths is None else self._bytes(numbers)

    def _bytes(self, numbers: Sequence[int]) -> int:
        assert self._lengths is not None
        starts = (number * self._seq_len + 1 for number in numbers)
        return sum(int(self._lengths[start : start + self._seq_len].sum()) for start in starts)


class Batches:
    """One rank's share of every batch. Nothing advances: any step may be asked for, at any time, more than once."""

    def __init__(
        self, store: TokenStore, *, seed: int, seq_len: int, global_batch: int, micro_batch: int, rank: int, world: int
    ) -> None:
        _check_batch(global_batch, micro_batch, world)
        self._seed, self._global_batch, self._micro_batch = seed, global_batch, micro_batch
        self._rank, self._world = rank, world
        self._train = _windows(store, Split.TRAIN, seq_len, at_least=1)
        self._held_out = _windows(store, Split.VALIDATION, seq_len, at_least=world)

    @classmethod
    def open(
        cls, store: str | Path, *, seed: int, seq_len: int, global_batch: int, micro_batch: int, rank: int, world: int
    ) -> Batches:
        """Map the token store in directory ``store``.

        Raises: DataError for a damaged store, or one without a window to train on and one per rank to validate on;
        ConfigurationError for a batch that does not divide.
        """
        return cls(
            TokenStore.open(store),
            seed=seed,
            seq_len=seq_len,
            global_batch=global_batch,
            micro_batch=micro_batch,
            rank=rank,
            world=world,
        )

    @property
    def n_windows(self) -> int:
        """Training windows in one pass."""
        return len(self._train)

    def microbatches(self, step: int) -> Iterator[Microbatch]:
        """This rank's microbatches, tokens and targets int64 [B, T], for the step that follows ``step`` finished ones.

        The global batch is the samples from ``step * global_batch`` on. Rank r has the r-th of ``world`` equal parts:
        all ranks together see the same samples whatever their number.
        """
        share = self._global_batch // self._world
        first = step * self._global_batch + self._rank * share
        for start in range(first, first + share, self._micro_batch):
            samples = range(start, start + self._micro_batch)
            yield self._train.stack([window_of(self._seed, sample, len(self._train)) for sample in samples])

    def validation(self, windows: int, micro_batch: int) -> Iterator[Microbatch]:
        """This rank's share of :meth:`n_validation` windows, evenly spaced in the held-out text and always the same.

        Every rank yields equally many batches, of equal shapes; no window is counted twice.
        """
        total = self.n_validation(windows)
        share = total // self._world
        mine = [i * len(self._held_out) // total for i in range(self._rank * share, (self._rank + 1) * share)]
        for start in range(0, share, micro_batch):
            yield self._held_out.stack(mine[start : start + micro_batch])

    def n_validation(self, windows: int) -> int:
        """How many windows all ranks together validate on when ``windows`` are asked for.

        A multiple of the number of ranks, at least one each; rounded down, and never more than there are.
        """
        return max(min(windows, len(self._held_out)) // self._world, 1) * self._world


def _windows(store: TokenStore, split: Split, seq_len: int, *, at_least: int) -> Windows:
    windows = Windows(store.tokens(split), seq_len, store.lengths(split))
    if len(windows) < at_least:  # one to train on; one per rank to validate on, as ranks validate in step
        raise DataError(
            str(store.path),
            f"{store.n_tokens[split]:,} tokens for {split.value} make {len(windows)} windows of "
            f"data.seq_len={seq_len}, at least {at_least} must be there; "
            "add text, shorten data.seq_len or change data.validation_share",
        )
    return windows


def _check_batch(global_batch: int, micro_batch: int, world: int) -> None:
    unit = micro_batch * world
    if min(global_batch, micro_batch, world) < 1 or global_batch % unit:
        near = max(unit, 1) * max(1, round(global_batch / max(unit, 1)))
        raise ConfigurationError(
            f"trainer.global_batch={global_batch} must be a multiple of trainer.micro_batch={micro_batch} x {world} "
            f"ranks, and none of them below one; try trainer.global_batch={near}"
        )
