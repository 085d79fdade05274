"""Fits a rebuilt pipeline stage to what its neighbours have logged of the lost one, between processes.

See :mod:`holdfast.fault_tolerance.boundary_log` for the logs and the fit, and where the idea comes from. Ends are not
healed: tokens go into the first stage, and a loss comes out of the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from holdfast.fault_tolerance.boundary_log import BoundaryLog, Pair, angular_distance, heal, pairs
from holdfast.fault_tolerance.config import StageConfig
from holdfast.fault_tolerance.stage_policy import StageRepair
from holdfast.parallel.pipeline import Mail
from holdfast.parallel.pipeline_engine import PipelineEngine

__all__ = ["Boundaries", "heal_stages"]

_HEAL_TAG = 1 << 27
_FEWEST_PAIRS = 2


class Boundaries:
    """What a process has exchanged lately with the stages before and behind its own; outlives membership epochs."""

    def __init__(self, limit_bytes: int) -> None:
        self.step = -1
        """Of the microbatches that are under way."""
        self.to_next, self.from_previous = BoundaryLog(limit_bytes), BoundaryLog(limit_bytes)

    def sent(self, microbatch: int, hidden: Tensor) -> None:
        self.to_next.record(self.step, microbatch, hidden)

    def received(self, microbatch: int, hidden: Tensor) -> None:
        self.from_previous.record(self.step, microbatch, hidden)

    def redundancy(self) -> float | None:
        """Mean angular distance of what the stage was given and what it answered, over the microbatches of the last
        step that are logged; None for an end of the pipeline, or before the first step."""
        found = pairs(self.from_previous, self.to_next)
        last = [pair for pair in found if pair.key[0] == found[-1].key[0]]
        return sum(angular_distance(pair.inputs, pair.outputs) for pair in last) / len(last) if last else None


def heal_stages(
    engine: PipelineEngine,
    boundaries: Boundaries,
    repairs: Sequence[StageRepair],
    config: StageConfig,
    note: Callable[[dict[str, object]], None],
) -> None:
    """Collective. Each rebuilt stage between two others gets the inputs from the one before it and the outputs from the
    one behind, and is fitted to those that both have. The logs of a stage that was lost are over."""
    with engine.as_modules() as (model, mail, place):
        for repair in repairs:
            stage, last = repair.stage, place.processes - 1
            if not 0 < stage < last:
                continue
            if place.process == stage - 1:
                _send(mail, model, boundaries.to_next, place.pipeline[stage])
            elif place.process == stage + 1:
                _send(mail, model, boundaries.from_previous, place.pipeline[stage])
            elif place.process == stage:
                inputs = _receive(mail, model, place.pipeline[stage - 1])
                outputs = _receive(mail, model, place.pipeline[stage + 1])
                note({"event": "stage_healed", "stage": stage, **_fit(model, inputs, outputs, config)})
        mail.settle()
    for repair in repairs:
        if place.process == repair.stage - 1:
            boundaries.to_next.clear()
        elif place.process == repair.stage + 1:
            boundaries.from_previous.clear()


def _fit(
    model: nn.Module, inputs: dict[tuple[int, int], Tensor], outputs: dict[tuple[int, int], Tensor], config: StageConfig
) -> dict[str, object]:
    found = [Pair(key, inputs[key], outputs[key]) for key in sorted(inputs.keys() & outputs.keys())]
    if len(found) < _FEWEST_PAIRS:
        return {
            "pairs": len(found),
            "steps": 0,
            "before": None,
            "after": None,
            "reason": "the neighbours logged no more",
        }
    blocks = model.get_submodule("blocks")
    healing = heal(nn.Sequential(*blocks.children()), found, steps=config.heal_steps, lr=config.heal_lr)
    losses = {"before": healing.before, "after": healing.after}
    return {"pairs": len(found), "steps": healing.steps, **losses, "reason": healing.reason}


def _send(mail: Mail, model: nn.Module, log: BoundaryLog, to: int) -> None:
    keys, device = list(log), next(model.parameters()).device
    shape = log.get(*keys[0]).shape if keys else (0, 0, 0)
    mail.send(torch.tensor([len(keys), *shape], device=device), to, _HEAL_TAG)
    if keys:
        mail.send(torch.tensor(keys, device=device), to, _HEAL_TAG + 1)
        for number, key in enumerate(keys):
            mail.send(log.get(*key).contiguous(), to, _HEAL_TAG + 2 + number)


def _receive(mail: Mail, model: nn.Module, source: int) -> dict[tuple[int, int], Tensor]:
    """Hidden states by step and microbatch, in the dtype of the weights."""
    weight = next(model.parameters())
    numbers = torch.empty(4, dtype=torch.int64, device=weight.device)
    count, *shape = mail.receive(numbers, source, _HEAL_TAG).tolist()
    if not count:
        return {}
    keys = mail.receive(numbers.new_empty(count, 2), source, _HEAL_TAG + 1).tolist()
    found = {}
    for number, (step, microbatch) in enumerate(keys):
        into = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        found[step, microbatch] = mail.receive(into, source, _HEAL_TAG + 2 + number)
    return found
