"""A decoder trained by the sharded engine learns what one plain process learns, and can be given other weights."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import cast

import pytest
import torch
from torch import Tensor

from holdfast.errors import InvariantViolation
from holdfast.optim.config import OptimName
from holdfast.trainer.model import Decoder, initialise
from holdfast.types import Precision, SliceSpec
from tests.support.local_cluster import LocalCluster, Member
from tests.support.zero_engines import Plain, Setup, copy_of, join, text, whole_state

_CLUSTER = LocalCluster(deadline_s=50.0)
_STEPS, _BATCH, _CLIP = 6, 12, 0.5

each_layout = pytest.mark.parametrize(
    ("stage", "precision", "world"),
    [
        (0, Precision.FP32, 2),
        (1, Precision.FP32, 3),
        (2, Precision.FP32, 2),
        (3, Precision.FP32, 3),
        (0, Precision.BF16, 3),
        (1, Precision.BF16, 2),
        (2, Precision.BF16, 3),
        (3, Precision.BF16, 2),
    ],
)


def _setup(stage: int, precision: Precision, accumulation: int) -> Setup:
    return Setup(
        stage,
        precision,
        OptimName.ADAMW,
        is_ragged=False,
        lr=1e-3,
        accumulation=accumulation,
        grad_clip=_CLIP,
        bucket_elements=5000,
    )


@dataclass(frozen=True)
class _Lesson:
    steps: list[tuple[float, float]]
    """This rank's mean loss, and the norm, of each step."""
    state: list[tuple[SliceSpec, Tensor]]
    weights: dict[str, Tensor]
    loss_of_others: float
    others: dict[str, Tensor]
    """Gathered after other masters were put in."""


def _learn(member: Member, setup: Setup, others: dict[str, Tensor]) -> _Lesson:
    comm = join(member)
    engine = setup.build()
    share, steps = _BATCH // member.world, []
    for step in range(_STEPS):
        tokens, targets = (drawn[share * member.rank :][:share] for drawn in text(step, batch=_BATCH))
        losses = []
        for micro in range(setup.accumulation):
            if micro < setup.accumulation - 1:
                with pytest.raises(InvariantViolation, match=f"needs {setup.accumulation} microbatches"):
                    engine.update(setup.lr)
            size = share // setup.accumulation
            loss = engine.loss(tokens[micro * size :][:size], targets[micro * size :][:size])
            losses.append(float(loss.detach()))
            engine.backward(loss)
        steps.append((sum(losses) / len(losses), engine.update(setup.lr)))
    state, weights = copy_of(engine.slices()), engine.full_weights()

    for held in engine.slices():
        name, _, key = held.spec.name.rpartition("/")
        if key == "master":
            held.tensor.copy_(others[name].view(-1)[held.spec.start : held.spec.stop])
    engine.refresh()
    with engine.evaluating():
        loss_of_others = float(engine.loss(*text(99)))
    lesson = _Lesson(steps, state, weights, loss_of_others, engine.full_weights())
    engine.close()
    comm.close()
    return lesson


def _other_weights() -> dict[str, Tensor]:
    """So large that their loss is that of no other model."""
    decoder = cast(Decoder, _setup(0, Precision.FP32, 1).model())
    initialise(decoder, 1)
    return {name: 8 * weight.detach() for name, weight in decoder.named_parameters()}


@functools.cache
def _lessons(stage: int, precision: Precision, world: int) -> list[_Lesson]:
    return _CLUSTER.run(_learn, world, _setup(stage, precision, _BATCH // world // 2), _other_weights())


def _tolerance(precision: Precision) -> float:
    """Five digits in fp32, hardly three in bf16, where gradients are rounded in another order."""
    return 1e-5 if precision is Precision.FP32 else 2e-3


@each_layout
def test_training_equals_one_plain_process(stage: int, precision: Precision, world: int) -> None:
    """Losses, and norms before clipping as torch computes them; accumulated gradients against one big batch."""
    plain = Plain(_setup(stage, precision, 1))
    want = [plain.step([text(step, batch=_BATCH)]) for step in range(_STEPS)]
    assert all(norm > _CLIP for _, norm in want), "nothing was clipped: this test shows less than it says"
    lessons, tolerance = _lessons(stage, precision, world), _tolerance(precision)
    for step, (loss, norm) in enumerate(want):
        mean = sum(lesson.steps[step][0] for lesson in lessons) / world
        assert mean == pytest.approx(loss, rel=tolerance)
        norms = {lesson.steps[step][1] for lesson in lessons}
        assert len(norms) == 1 and norms.pop() == pytest.approx(norm, rel=tolerance)
    # Adam hardly notices the scale of gradients; its first moment shows whether they were clipped.
    have, state = whole_state([lesson.state for lesson in lessons]), plain.state()
    for name in (name for name in state if name.endswith("/exp_avg")):
        assert float((have[name] - state[name]).norm() / state[name].norm()) < 25 * tolerance, name


@each_layout
def test_other_masters_become_the_weights_that_train_on_every_rank(
    stage: int, precision: Precision, world: int
) -> None:
    lessons, others = _lessons(stage, precision, world), _other_weights()
    model = _setup(stage, precision, 1).model()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(others[name])
        loss = float(model.to(torch.float32 if precision is Precision.FP32 else torch.bfloat16)(*text(99)))
    assert [lesson.loss_of_others for lesson in lessons] == [pytest.approx(loss, rel=_tolerance(precision))] * world
    assert lessons[0].others.keys() == others.keys()
    assert all(torch.equal(lessons[0].others[name], others[name]) for name in others)


def _with_one_step_out(member: Member, setup: Setup, factor: float | None) -> list[tuple[SliceSpec, Tensor]]:
    """Step 2 is made with a loss times ``factor`` and taken back; None: nobody tries to make it."""
    comm = join(member)
    engine = setup.build()
    share = _BATCH // member.world
    for step in range(4):
        saved, scalars = copy_of(engine.slices()), engine.scalars()
        for micro in range(setup.accumulation) if step != 2 or factor is not None else ():
            size = share // setup.accumulation
            tokens, targets = (
                drawn[share * member.rank :][micro * size :][:size] for drawn in text(step, batch=_BATCH)
            )
            loss = engine.loss(tokens, targets)
            engine.backward(loss * factor if step == 2 and factor is not None else loss)
        if step != 2:
            assert math.isfinite(engine.update(setup.lr))
        elif factor is not None:
            assert not math.isfinite(engine.update(0.0))
            for held, (_, before) in zip(engine.slices(), saved, strict=True):
                held.tensor.copy_(before)
            engine.load_scalars(scalars)
            engine.refresh()
    found = copy_of(engine.slices())
    engine.close()
    comm.close()
    return found


@each_layout
def test_a_step_that_was_not_finite_leaves_nothing_behind_in_an_engine_that_is_put_back(
    stage: int, precision: Precision, world: int
) -> None:
    setup = _setup(stage, precision, 2)
    spoilt = _CLUSTER.run(_with_one_step_out, world, setup, math.nan if world == 2 else math.inf)
    untried = _CLUSTER.run(_with_one_step_out, world, setup, None)
    for mine, theirs in zip(spoilt, untried, strict=True):
        for (spec, ours), (_, wanted) in zip(mine, theirs, strict=True):
            assert torch.equal(ours, wanted), spec.name
