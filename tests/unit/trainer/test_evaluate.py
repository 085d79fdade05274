"""Bits per byte over held-out batches of all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from holdfast import failpoints
from holdfast.parallel.microbatches import Microbatch, OneByOne
from holdfast.trainer.evaluate import evaluate
from tests.support.tiny_training import Alone, Journal, Scripted, Threads, TinyEngine, microbatches


class _Engine(OneByOne):
    """The loss of a batch is its first token."""

    def __init__(self) -> None:
        self.journal: Journal = []

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self.journal.append("begin")
        try:
            yield
        finally:
            self.journal.append("end")

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        self.journal.append("loss")
        return tokens[0, 0].float()

    def backward(self, loss: Tensor) -> None:
        raise AssertionError("an evaluation takes no gradients")


def _batch(loss: int, sequences: int, byte_targets: int) -> Microbatch:
    tokens = torch.full((sequences, 5), loss, dtype=torch.int64)
    return tokens, tokens, byte_targets


def test_bits_per_byte_are_all_nats_over_all_bytes_of_all_ranks() -> None:
    # Here 5 targets at 2 nats and 10 at 3, of which 12 are bytes; elsewhere 100 nats over 28 bytes.
    batches = [_batch(2, 1, 4), _batch(3, 2, 8)]
    bits = evaluate(_Engine(), Scripted(2, [(100.0, 28.0)]), batches, 0)
    assert bits == pytest.approx((10 + 30 + 100) / math.log(2) / 40)


def test_a_model_that_knows_nothing_needs_eight_bits_per_byte() -> None:
    class Uniform(_Engine):
        def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
            return torch.tensor(math.log(256))

    assert evaluate(Uniform(), Alone(), [_batch(0, 3, 15)], 0) == pytest.approx(8.0)


def test_every_rank_gets_the_same_bits() -> None:
    ranks = Threads(3)
    bits = ranks.run(lambda rank: evaluate(_Engine(), ranks, [_batch(rank + 1, 1, 5)], 0))
    assert bits == [pytest.approx(2.0 / math.log(2))] * 3


def test_the_batches_are_read_and_judged_while_the_engine_evaluates() -> None:
    engine = _Engine()

    def batches() -> Iterator[Microbatch]:
        engine.journal.append("batch")
        yield _batch(1, 1, 5)

    evaluate(engine, Scripted(1, [(0.0, 0.0)], engine.journal), batches(), 0)
    assert engine.journal == ["begin", "batch", "loss", "end", "sum"]


def test_nothing_to_evaluate_is_not_a_number_rather_than_zero() -> None:
    assert math.isnan(evaluate(_Engine(), Alone(), [], 0))


def test_a_rank_without_bytes_takes_part_in_the_sum() -> None:
    assert evaluate(_Engine(), Scripted(2, [(7.0, 10.0)]), [], 0) == pytest.approx(0.7 / math.log(2))


def test_a_failing_batch_ends_the_evaluation_mode() -> None:
    engine = _Engine()

    def batches() -> Iterator[Microbatch]:
        yield _batch(1, 1, 5)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk"):
        evaluate(engine, Alone(), batches(), 0)
    assert engine.journal == ["begin", "loss", "end"]


def test_the_failpoint_comes_first_and_tells_the_step() -> None:
    engine = _Engine()
    with failpoints.armed("evaluate.begin", lambda name, step: engine.journal.append(f"{name} {step}")):
        evaluate(engine, Alone(), [_batch(1, 1, 5)], 12)
    assert engine.journal[:2] == ["evaluate.begin 12", "begin"]


def test_it_is_the_loss_of_the_model_in_bits_and_leaves_no_trace() -> None:
    engine, batches = TinyEngine(3), microbatches(0, count=3)
    before, random = engine.bits(), torch.get_rng_state()
    bits = evaluate(engine, Alone(), batches, 0)
    losses = [engine.model(tokens, targets).item() for tokens, targets, _ in batches]
    targets, byte_targets = batches[0][1].numel(), batches[0][2]
    assert bits == pytest.approx(sum(losses) / 3 / math.log(2) * targets / byte_targets, rel=1e-6)
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    assert engine.model.training
    assert engine.bits() == before
    assert torch.equal(torch.get_rng_state(), random)
