"""From which other stages a lost pipeline stage is rebuilt. Pure: the pipeline goes in, a reasoned plan comes out.

A stage is lost when no rank holds its weights any more; while one data-parallel replica lives, the stage is copied from
it, exactly, whatever was wished. Everything else is approximate: training goes on from weights that no undisturbed run
would have had. A stage that is lost itself is never a source, not even after it has been rebuilt, so adjacent stages
lost together need another source (arXiv 2506.15461 leaves them to future work), unless :class:`GapRepair` says what
of the stages around them they become.

Stages and layers count from 0, where the paper counts from 1: its S1 is stage 0, its Ss stage s - 1.

Source: CheckFree and CheckFree+, arXiv 2506.15461, sections 4.2 and 4.3 with algorithm 1; code at gensyn-ai/CheckFree.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.lanes import Recorded

__all__ = [
    "EndPairs",
    "GapRepair",
    "MomentRepair",
    "RateMode",
    "Refusal",
    "Repair",
    "RepairPlan",
    "StageFacts",
    "StageRebuild",
    "StageRepair",
    "exact_copy",
    "plan_repair",
    "rate_factor",
]

_FEWEST_FOR_PLUS = 4
"""Stages of two end pairs that have nothing in common."""


class Repair(Enum):
    """How a lost stage gets its weights."""

    CHECKFREE = "checkfree"
    """The average of both neighbours, weighted by their gradient norms. The first and the last stage have one each."""
    CHECKFREE_PLUS = "checkfree_plus"
    """As CHECKFREE inside; the ends are copies of what was trained in their place, see :class:`EndPairs`. A wish only:
    a plan names the CHECKFREE, COPY_NEXT or COPY_PREVIOUS that it comes to."""
    COPY_PREVIOUS = "copy_previous"
    """The stage before it."""
    COPY_NEXT = "copy_next"
    """The stage behind it."""
    UNIFORM = "uniform"
    """The plain average of both neighbours."""
    RANDOM = "random"
    """Fresh weights."""
    IDENTITY = "identity"
    """Output projections of zero, so that residual blocks pass on their input; the rest from a neighbour, or fresh."""
    EXACT = "exact"
    """The same stage in a live data-parallel replica."""


class MomentRepair(Enum):
    """What the optimizer knows of a rebuilt stage. The paper does not say."""

    RESET = "reset"
    """Nothing: moments of zero and step 0, without a warm-up, as in the released code."""
    AVERAGED = "averaged"
    """The neighbours' moments, averaged like their weights: in neither the paper nor the code."""
    EXACT = "exact"
    """What a live replica has, to the bit, in whatever precision."""


class EndPairs(Enum):
    """Which stages CHECKFREE_PLUS copies. It swaps the first two and the last two stages in half of the microbatches,
    so that each has learned to stand in for the other."""

    PAPER = "paper"
    """The first stage from the second, the last from the last but one; these two are averaged (section 4.3)."""
    CODE = "code"
    """All four from their partner, as the released code does: of six stages only two are ever averaged."""


class GapRepair(Enum):
    """What becomes of a stage whose neighbour, that it would be rebuilt from, is lost with it. In neither the paper nor
    its code."""

    REFUSED = "refused"
    """It is refused."""
    INTERPOLATED = "interpolated"
    """In the place of each lost neighbour the nearest stage that is left in its direction is read. An average weighs
    both by nearness too, see :func:`holdfast.fault_tolerance.stage_repair.share_across`."""
    COPIED = "copied"
    """A copy of the nearest stage that is left, of the one before where two are as near: of two lost stages each
    becomes its one neighbour that is left."""


@dataclass(frozen=True, slots=True)
class StageRepair:
    """What is done for one lost stage."""

    stage: int
    repair: Repair
    """Never CHECKFREE_PLUS."""
    sources: tuple[int, ...]
    """Stages whose weights are read, in the order of the pipeline; none for fresh weights, itself for EXACT."""
    is_approximate: bool
    reason: str

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "repair": self.repair.value, "sources": list(self.sources)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StageRepair:
        return cls(**{**value, "repair": Repair(value["repair"]), "sources": tuple(value["sources"])})


@dataclass(frozen=True, slots=True)
class Refusal:
    """A lost stage that the wished repair cannot rebuild."""

    stage: int
    reason: str


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """One entry per lost stage, in the order of the pipeline, among either ``repairs`` or ``refusals``."""

    repairs: tuple[StageRepair, ...]
    refusals: tuple[Refusal, ...]

    @property
    def is_complete(self) -> bool:
        """Nothing was refused. Otherwise the run needs another source, and the repairs are of no use."""
        return not self.refusals

    @property
    def is_approximate(self) -> bool:
        return any(each.is_approximate for each in self.repairs)


def plan_repair(
    layers: Sequence[int],
    lost: Collection[int],
    *,
    wish: Repair,
    replicated: Collection[int] = (),
    end_pairs: EndPairs = EndPairs.PAPER,
    gaps: GapRepair = GapRepair.REFUSED,
) -> RepairPlan:
    """What is to be done for each of the ``lost`` stages of a pipeline, or why it cannot be done.

    ``layers`` holds the number of layers of each stage, and thereby the number of stages. ``replicated`` are the
    stages that a live data-parallel replica still holds; each of them can be rebuilt, and be a source for others.
    ``gaps`` is for adjacent stages lost together.

    Raises: ConfigurationError for stages that do not exist, or without layers.
    """
    if problems := _problems(layers, lost, replicated):
        raise ConfigurationError(problems)
    gone = frozenset(lost) - frozenset(replicated)
    pipeline = _Pipeline(layers, gone, gaps)
    answers = [_exact(s) if s not in gone else _answer(s, pipeline, wish, end_pairs) for s in sorted(set(lost))]
    return RepairPlan(
        tuple(each for each in answers if isinstance(each, StageRepair)),
        tuple(each for each in answers if isinstance(each, Refusal)),
    )


def _problems(layers: Sequence[int], lost: Collection[int], replicated: Collection[int]) -> list[str]:
    found = [f"stage {s} has {n} layers; every stage needs at least 1" for s, n in enumerate(layers) if n < 1]
    for stage in sorted({*lost, *replicated} - set(range(len(layers)))):
        found.append(f"stage {stage} does not exist; {len(layers)} stages are numbered from 0")
    return found


@dataclass(frozen=True, slots=True)
class _Pipeline:
    layers: Sequence[int]
    gone: Collection[int]
    """Stages that no replica holds."""
    gaps: GapRepair

    def beside(self, stage: int, direction: int) -> int:
        """The next stage before (-1) or behind (1) that is left; -1 or the number of stages where there is none."""
        found = stage + direction
        while found in self.gone:
            found += direction
        return found

    def nearest(self, stage: int) -> int:
        inside = [s for s in (self.beside(stage, -1), self.beside(stage, 1)) if 0 <= s < len(self.layers)]
        return min(inside, key=lambda source: abs(source - stage), default=-1)

    def against(self, stage: int, sources: Sequence[int]) -> str:
        """Why these cannot be the sources, empty if they can."""
        outside = [source for source in sources if not 0 <= source < len(self.layers)]
        if outside:
            return f"there is no stage {'before' if outside[0] < 0 else 'behind'} it"
        if also_lost := [source for source in sources if source in self.gone]:
            return f"stage {also_lost[0]}, which it would be rebuilt from, is lost with it"
        own = self.layers[stage]
        if unequal := [source for source in sources if self.layers[source] != own]:
            return f"it has {own} layers and stage {unequal[0]} has {self.layers[unequal[0]]}; they must be equal"
        return ""


def _exact(stage: int) -> StageRepair:
    return StageRepair(stage, Repair.EXACT, (stage,), False, f"a data-parallel replica of stage {stage} is alive")


def exact_copy(rank: int, source: int) -> StageRepair:
    """For a rank whose state another one holds too; here ``stage`` and ``sources`` are ranks."""
    return StageRepair(rank, Repair.EXACT, (source,), False, f"rank {source} holds the state of rank {rank} too")


def _answer(stage: int, pipeline: _Pipeline, wish: Repair, end_pairs: EndPairs) -> StageRepair | Refusal:
    if wish is Repair.EXACT:
        return Refusal(stage, f"no data-parallel replica of stage {stage} is alive")
    if wish is Repair.RANDOM:
        return StageRepair(stage, wish, (), True, f"stage {stage} starts from fresh weights, as wished")
    if wish is Repair.IDENTITY:
        return _identity(stage, pipeline)
    if wish is Repair.CHECKFREE_PLUS:
        stages = len(pipeline.layers)
        if stages < _FEWEST_FOR_PLUS:
            return Refusal(
                stage,
                f"{wish.name} swaps the first two and the last two stages; {stages} stages are too few, "
                f"{_FEWEST_FOR_PLUS} are needed",
            )
        wish = _meaning_of_plus(stage, stages, end_pairs)
    return _from_neighbours(stage, pipeline, wish)


def _meaning_of_plus(stage: int, stages: int, end_pairs: EndPairs) -> Repair:
    if stage == 0 or (stage == stages - 2 and end_pairs is EndPairs.CODE):
        return Repair.COPY_NEXT
    if stage == stages - 1 or (stage == 1 and end_pairs is EndPairs.CODE):
        return Repair.COPY_PREVIOUS
    return Repair.CHECKFREE


_DIRECTIONS = {
    Repair.CHECKFREE: (-1, 1),
    Repair.UNIFORM: (-1, 1),
    Repair.COPY_PREVIOUS: (-1,),
    Repair.COPY_NEXT: (1,),
}
_WORDS = {
    Repair.CHECKFREE: "the average, weighted by gradient norms, of",
    Repair.UNIFORM: "the plain average of",
    Repair.COPY_PREVIOUS: "a copy of",
    Repair.COPY_NEXT: "a copy of",
}


def _from_neighbours(stage: int, pipeline: _Pipeline, repair: Repair) -> StageRepair | Refusal:
    sources = tuple(stage + direction for direction in _DIRECTIONS[repair])
    words = _WORDS[repair]
    if any(source in pipeline.gone for source in sources) and pipeline.gaps is not GapRepair.REFUSED:
        repair, sources = _across(stage, pipeline, repair)
        words = "the average, by nearness too, of" if len(sources) > 1 else "a copy of the nearest that is left,"
    if against := pipeline.against(stage, sources):
        return Refusal(stage, f"{repair.name} of stage {stage}: {against}")
    named = " and ".join(f"stage {source}" for source in sources)
    return StageRepair(stage, repair, sources, True, f"stage {stage} becomes {words} {named}")


def _across(stage: int, pipeline: _Pipeline, repair: Repair) -> tuple[Repair, tuple[int, ...]]:
    if pipeline.gaps is GapRepair.COPIED:
        source = pipeline.nearest(stage)
        return Repair.COPY_NEXT if source > stage else Repair.COPY_PREVIOUS, (source,)
    return repair, tuple(pipeline.beside(stage, direction) for direction in _DIRECTIONS[repair])


def _identity(stage: int, pipeline: _Pipeline) -> StageRepair:
    """Needs no neighbour, but takes one where there is one: norms and inner matrices of a trained stage."""
    near = [(source,) for source in (stage - 1, stage + 1) if not pipeline.against(stage, (source,))]
    sources = near[0] if near else ()
    inside = f"those of stage {sources[0]}" if sources else "fresh"
    reason = f"stage {stage} passes on its input; its other weights are {inside}"
    return StageRepair(stage, Repair.IDENTITY, sources, True, reason)


@dataclass(frozen=True, slots=True)
class StageFacts:
    """The pipeline of a run in which every stage has one process, whose rank is its number."""

    layers: tuple[int, ...]
    """Blocks of each stage."""
    wish: Repair
    has_end_copies: bool
    """The first two stages both hold the embedding, the last two the head: with swapped routes."""
    angular_distance: Mapping[int, float] = field(default_factory=dict)
    """By stage, what it turned its input by when this was measured last, in half turns; see ``boundary_log``."""
    measured_at: int = -1
    """Steps that were finished then."""

    def plan(self, lost: Collection[int]) -> RepairPlan:
        """What is to be done for lost stages of which no memory is left, with what is not in blocks in mind too; and
        how much each of them did, as far as that is known."""
        plan = plan_repair(self.layers, lost, wish=self.wish)
        plan = replace(plan, repairs=tuple(self._with_redundancy(repair) for repair in plan.repairs))
        against = [(each.stage, self._against_end(each, lost)) for each in plan.repairs]
        refusals = [Refusal(stage, why) for stage, why in against if why]
        return RepairPlan(plan.repairs, plan.refusals + tuple(refusals))

    def _with_redundancy(self, repair: StageRepair) -> StageRepair:
        angle = self.angular_distance.get(repair.stage)
        if angle is None:
            return repair
        did = f"at step {self.measured_at:,} it turned what passes it by {angle:.3f} of a half turn"
        return replace(repair, reason=f"{repair.reason} ({did})")

    def _against_end(self, repair: StageRepair, lost: Collection[int]) -> str:
        if repair.repair is Repair.RANDOM:
            return ""
        last = len(self.layers) - 1
        for what, end, partner in (("embedding", 0, 1), ("head", last, last - 1)):
            holders = {end, partner} if self.has_end_copies else {end}
            if repair.stage in holders and holders <= set(lost):
                return (
                    f"the {what} of stage {repair.stage} is in no other memory; parallel.swapped=true keeps a copy "
                    f"with stage {partner}"
                )
        return ""


@dataclass(frozen=True, slots=True)
class StageRebuild:
    """A version that is complete but for some ranks, and what their stages become."""

    held: Recorded
    repairs: tuple[StageRepair, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those that are rebuilt: a stage that is made from others has one process, whose rank is its number."""
        return tuple(repair.stage for repair in self.repairs)

    @property
    def is_approximate(self) -> bool:
        return any(repair.is_approximate for repair in self.repairs)


class RateMode(Enum):
    """What becomes of a recovered stage's learning rate."""

    ONCE = "once"
    """The base factor from its first recovery on, however many follow: the released code."""
    COMPOUNDING = "compounding"
    """Multiplied by the base factor at each recovery: algorithm 1 of the paper, read literally."""
    DECAYING = "decaying"
    """The base factor at each recovery, falling linearly to 1: in neither."""


def rate_factor(base: float, mode: RateMode, recoveries: int, *, steps_since: int = 0, decay_steps: int = 0) -> float:
    """By what the learning rate of one stage is multiplied, after the schedule; 1 for a stage never recovered.

    Units: ``recoveries`` is how often this stage was rebuilt approximately, ``steps_since`` the optimizer steps it has
    made since the last time. Only DECAYING asks for that and for ``decay_steps``, after which the factor is 1.
    Raises: ConfigurationError for values outside of their range, and for a factor too large for a float.
    Source: arXiv 2506.15461, algorithm 1 (base 1.1); released code: 1.1, for the medium model and so table 2: 1.2.
    """
    if problems := _rate_problems(base, mode, recoveries, steps_since, decay_steps):
        raise ConfigurationError(problems)
    if recoveries == 0:
        return 1.0
    if mode is RateMode.ONCE:
        return base
    if mode is RateMode.DECAYING:
        return 1.0 + (base - 1.0) * max(0.0, 1.0 - steps_since / decay_steps)
    if recoveries * math.log(base) > math.log(2.0**1000):
        raise ConfigurationError(
            f"factor {base} compounded over {recoveries} recoveries is too large to train with; use another mode"
        )
    return float(base**recoveries)


def _rate_problems(base: float, mode: RateMode, recoveries: int, steps_since: int, decay_steps: int) -> list[str]:
    found = []
    if not (base > 0 and math.isfinite(base)):
        found.append(f"learning rate factor {base} must be positive and finite, for example 1.1")
    if recoveries < 0 or steps_since < 0:
        found.append(f"recoveries={recoveries} and steps_since={steps_since} must not be negative")
    if mode is RateMode.DECAYING and decay_steps < 1:
        found.append(f"{mode.name} falls over decay_steps={decay_steps}; it must be at least 1")
    return found
