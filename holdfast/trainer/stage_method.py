"""What a simulated pipeline does about a stage that is lost: the choices of the paper, and those that it lacks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.stage_policy import EndPairs, GapRepair, MomentRepair, RateMode, Repair
from holdfast.fault_tolerance.stage_repair import PAPER_WEIGHTING, Weighting

__all__ = ["HealingPlan", "Method", "OwnCopy"]

_FEWEST_PAIRS = 2
"""One to learn from and one to judge by."""


@dataclass(frozen=True, slots=True)
class HealingPlan:
    """How rebuilt stages are fitted to what their neighbours have logged, see ``boundary_log``. Adjacent ones lost
    together are one chain, fitted between its outer boundaries: what crossed the others is lost with them."""

    steps: int
    """Updates of ``boundary_log.heal``; 0 makes none, to see what healing is good for."""
    lr: float = 1e-3
    logged: int = 8
    """Microbatches in the log."""
    has_gain: bool = False
    """Before the updates scale what the stages add to the residual stream, see ``boundary_log.fit_gain``."""

    def __post_init__(self) -> None:
        found = []
        if self.steps < 0:
            found.append(f"steps={self.steps} of healing must not be negative; 0 makes no update")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            found.append(f"lr={self.lr} of healing must be positive and finite, for example 1e-3")
        if self.logged < _FEWEST_PAIRS:
            found.append(f"logged={self.logged} microbatches are too few to learn from and to judge by; log at least 2")
        if found:
            raise ConfigurationError(found)


@dataclass(frozen=True, slots=True)
class OwnCopy:
    """An old copy of each stage's weights, as in a durable checkpoint, that the loss of a stage leaves untouched."""

    every: int
    """Steps made between copies, lost ones included, as by a clock; the first is of the start."""
    share: float = 1.0
    """Of the copy in the rebuilt weights, the rest is what the repair gives. The copy alone, 1, has lost less than half
    of it in the average wherever that could be told (``benchmarks/records/checkfree_quick_*.md``)."""

    def __post_init__(self) -> None:
        found = []
        if self.every < 1:
            found.append(f"every={self.every} steps between copies of a stage must be at least 1")
        if not 0.0 <= self.share <= 1.0:
            found.append(f"share={self.share} of a stage's own copy must be from 0 to 1")
        if found:
            raise ConfigurationError(found)


@dataclass(frozen=True, slots=True)
class Method:
    """What happens to a stage that is lost. The defaults are the paper's.

    Raises: ConfigurationError for choices that contradict each other.
    """

    repair: Repair = Repair.CHECKFREE
    """EXACT means that nothing is lost: a copy existed."""
    swapped: bool = False
    end_pairs: EndPairs = EndPairs.PAPER
    weighting: Weighting = PAPER_WEIGHTING
    moments: MomentRepair = MomentRepair.RESET
    rate: float = 1.0
    rate_mode: RateMode = RateMode.ONCE
    decay_steps: int = 0
    healing: HealingPlan | None = None
    gaps: GapRepair = GapRepair.REFUSED
    """Adjacent stages lost together, where ``repair`` reads a neighbour. Other choices than REFUSED need ``healing``,
    which fits the stages of a gap as one, and routes that are not swapped."""
    own_copy: OwnCopy | None = None
    rollback_every: int = 0
    """Instead of repairing go back to a copy of everything that is taken after every so many steps made, lost ones
    included, as by a clock; 0: never."""
    clips_each_stage: bool = False
    """Clip the gradient of each stage by itself, as the released code does, rather than the whole one."""

    def __post_init__(self) -> None:
        found = []
        if self.gaps is not GapRepair.REFUSED and self.healing is None:
            found.append(
                f"gaps={self.gaps.name}: adjacent stages lost together are only rebuilt to be fitted together; "
                "pass healing=HealingPlan(...), or gaps=REFUSED"
            )
        if self.gaps is not GapRepair.REFUSED and self.swapped:
            found.append(
                f"gaps={self.gaps.name} with swapped=True: stages that are adjacent on one route are not on the other, "
                "so nothing fits them together; use swapped=False, or gaps=REFUSED"
            )
        if self.own_copy and self.rollback_every:
            found.append(
                f"own_copy and rollback_every={self.rollback_every} exclude each other: a rollback leaves no stage to "
                "rebuild; set one of them"
            )
        if found:
            raise ConfigurationError(found)
