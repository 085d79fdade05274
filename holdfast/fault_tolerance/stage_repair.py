"""The algebra of rebuilding a lost pipeline stage: weights and moments of other stages in, its own out.

Weights are named relative to their stage (``0.attention.wq.weight``), so that the k-th layers of two stages match. What
is left of the lost stage itself is asked for names, shapes and dtypes only, never for a value: it may hold NaN, or be
on meta. Who reads what is planned in :mod:`holdfast.fault_tolerance.stage_policy`, and how the tensors get here is the
caller's business: a simulation has them in one process, ranks send them.

Source: CheckFree and CheckFree+, arXiv 2506.15461, sections 4.2 and 4.3 with algorithm 1; code at gensyn-ai/CheckFree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError, Fault, ManifestMismatch
from holdfast.fault_tolerance.stage_policy import MomentRepair, Repair

__all__ = [
    "CODE_WEIGHTING",
    "PAPER_WEIGHTING",
    "GradientNorms",
    "Weighting",
    "average",
    "previous_share",
    "rebuild",
    "rebuild_moments",
    "share_across",
]

Weights = Mapping[str, Tensor]
Initialiser = Callable[[str, Sequence[int]], Tensor]
"""A fresh tensor for this name and shape."""
ParamState = Mapping[str, Any]
"""What an Adam-like optimizer keeps for a parameter: ``step``, a number or a 0-d tensor, and tensors."""

_SOURCES = {
    Repair.CHECKFREE: (2,),
    Repair.UNIFORM: (2,),
    Repair.COPY_PREVIOUS: (1,),
    Repair.COPY_NEXT: (1,),
    Repair.EXACT: (1,),
    Repair.IDENTITY: (0, 1),
    Repair.RANDOM: (0,),
}
"""How many stages each repair reads."""


@dataclass(frozen=True, slots=True)
class Weighting:
    """How a gradient norm becomes a neighbour's weight in the average: ``(norm + offset) ** exponent``."""

    exponent: int = 2
    """1 or 2. The text of section 4.2 can be read either way; secondary sources read a square."""
    is_clipped: bool = False
    """Take the norm after clipping. Clipping brings the norms of most steps to one value, and the average near to a
    plain one."""
    offset: float = 0.0
    """Added to each norm before it is raised."""

    def __post_init__(self) -> None:
        problems = []
        if self.exponent not in (1, 2):
            problems.append(f"exponent={self.exponent} of the gradient norms must be 1 or 2")
        if not (self.offset >= 0 and math.isfinite(self.offset)):
            problems.append(f"offset={self.offset} of the gradient norms must be finite and not negative")
        if problems:
            raise ConfigurationError(problems)


PAPER_WEIGHTING = Weighting()
"""Section 4.2: squared norms of the gradients as they are."""
CODE_WEIGHTING = Weighting(exponent=1, is_clipped=True, offset=1e-4)
"""The released code: plain norms after clipping each stage to 1."""


def previous_share(previous_norm: float, next_norm: float, weighting: Weighting = PAPER_WEIGHTING) -> float:
    """The weight of the stage before in the average, in [0, 1]; the stage behind has the rest.

    The stage with the larger gradient weighs more: it has converged less, and changes faster. Two weights of zero say
    nothing, and give 0.5.

    Raises: Fault for norms that are negative or not finite: a plain average, or another source, may still do.
    Source: arXiv 2506.15461, section 4.2 and algorithm 1, which prints the index of the second weight wrongly.
    """
    if not all(math.isfinite(norm) and norm >= 0 for norm in (previous_norm, next_norm)):
        raise Fault(
            f"gradient norms {previous_norm} and {next_norm} of the neighbours cannot weigh them; they must be finite "
            f"and not negative; use {Repair.UNIFORM.name} or another source"
        )
    bases = [norm + weighting.offset for norm in (previous_norm, next_norm)]
    largest = max(bases)
    if largest == 0:
        return 0.5
    before, behind = ((base / largest) ** weighting.exponent for base in bases)  # a square itself might overflow
    return before / (before + behind)


def share_across(share: float, stage: int, sources: tuple[int, int]) -> float:
    """``share`` of the first source where the two sources are not the neighbours: each weighs by nearness too.

    Weights of a lost stage at ``d`` from the one before and ``e`` from the one behind are in the ratio of ``share / d``
    to ``(1 - share) / e``: equal shares of two lost stages' outer neighbours become 2/3 and 1/3, and a single lost
    stage keeps its share. Shares of 0 and 1 stay. In neither the paper nor its code.
    """
    before, behind = share * (sources[1] - stage), (1.0 - share) * (stage - sources[0])
    return before / (before + behind)


def average(previous: Weights, following: Weights, share: float) -> dict[str, Tensor]:
    """``share * previous + (1 - share) * following`` of each tensor, which have equal names and shapes.

    Sums are made in fp32, of fp64 tensors in fp64, and rounded once to the dtype of ``previous``; results are new
    tensors on its device. Integers, which have no average, must be equal.

    Raises: ConfigurationError for integers that differ.
    """
    return {name: _blend(name, tensor, following[name], share) for name, tensor in previous.items()}


def _blend(name: str, previous: Tensor, following: Tensor, share: float) -> Tensor:
    following = following.detach().to(previous.device)
    if not previous.is_floating_point():
        if not torch.equal(previous, following):
            raise ConfigurationError(f"{name} holds {previous.dtype} that differ between the neighbours: no average")
        return previous.detach().clone()
    wide = torch.promote_types(previous.dtype, torch.float32)
    # Two products and a sum rather than torch.lerp, whose difference can make an average of second moments negative.
    return (previous.detach().to(wide) * share + following.to(wide) * (1.0 - share)).to(previous.dtype)


def rebuild(
    repair: Repair,
    like: Weights,
    sources: Sequence[Weights],
    *,
    share: float = 0.5,
    initial: Initialiser | None = None,
    output_suffixes: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The weights of the lost stage, tensor by tensor.

    ``like`` has its names, shapes and dtypes; values are never read. ``sources`` are the weights of
    ``StageRepair.sources`` in their order. ``share`` of the first source is for CHECKFREE, see :func:`previous_share`,
    and UNIFORM, where it is 0.5 but for stages lost together, see :func:`share_across`.
    ``initial`` makes fresh tensors for RANDOM, and for IDENTITY without a source. ``output_suffixes`` end the names
    of the matrices that IDENTITY zeroes: all that write to the residual stream.

    Returns new tensors in the dtypes of ``like``, on the devices of the first source or of the initialiser.
    Raises: ConfigurationError for sources or options that do not fit; Fault when what came out is not finite, as
    when a neighbour is damaged itself (EXACT copies whatever is there).
    Source: arXiv 2506.15461, section 4.2; COPY_PREVIOUS, UNIFORM and RANDOM are its figure 2. IDENTITY is the idea of
    the released code's ``ours-zero`` for the whole residual block, of which that zeroes the feed-forward part.
    """
    if problems := _problems(repair, like, sources, share, initial, output_suffixes):
        raise ConfigurationError(problems)
    made = _make(repair, like, sources, share, initial, output_suffixes)
    rebuilt = {name: made[name].to(like[name].dtype) for name in like}
    if repair is not Repair.EXACT and (bad := [name for name, tensor in rebuilt.items() if not _is_finite(tensor)]):
        raise Fault(f"{repair.name} does not give finite weights for {', '.join(bad)}: a source is damaged itself")
    return rebuilt


def _make(
    repair: Repair,
    like: Weights,
    sources: Sequence[Weights],
    share: float,
    initial: Initialiser | None,
    output_suffixes: Sequence[str],
) -> dict[str, Tensor]:
    if repair in (Repair.CHECKFREE, Repair.UNIFORM):
        return average(sources[0], sources[1], share)
    made = _copies(sources[0]) if sources else _fresh(like, initial)
    if repair is Repair.IDENTITY:
        made.update({name: torch.zeros_like(made[name]) for name in like if name.endswith(tuple(output_suffixes))})
    return made


def _copies(source: Weights) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in source.items()}


def _fresh(like: Weights, initial: Initialiser | None) -> dict[str, Tensor]:
    if initial is None:
        raise ConfigurationError("fresh weights need an initialiser: pass initial=")
    made = {name: initial(name, tuple(tensor.shape)).detach() for name, tensor in like.items()}
    if problems := _misfits(like, made, "the initialiser"):
        raise ConfigurationError(problems)
    return made


def _problems(
    repair: Repair,
    like: Weights,
    sources: Sequence[Weights],
    share: float,
    initial: Initialiser | None,
    output_suffixes: Sequence[str],
) -> list[str]:
    if repair not in _SOURCES:
        return [f"{repair.name} is a plan for a whole pipeline; rebuild what plan_repair makes of it"]
    found = []
    if len(sources) not in _SOURCES[repair]:
        wanted = " or ".join(map(str, _SOURCES[repair]))
        found.append(f"{repair.name} reads {wanted} other stages; {len(sources)} were given")
    if repair in (Repair.CHECKFREE, Repair.UNIFORM) and not 0.0 <= share <= 1.0:
        found.append(f"share={share} of the stage before must be from 0 to 1")
    if repair in (Repair.RANDOM, Repair.IDENTITY) and not sources and initial is None:
        found.append(f"{repair.name} without a source needs an initialiser: pass initial=")
    if repair is Repair.IDENTITY:
        found += _suffix_problems(like, output_suffixes)
    for number, source in enumerate(sources):
        found += _misfits(like, source, f"source {number}")
    return found


def _suffix_problems(like: Weights, suffixes: Sequence[str]) -> list[str]:
    if not suffixes:
        return [f"{Repair.IDENTITY.name} zeroes nothing: pass the suffixes of the output projections"]
    unused = [suffix for suffix in suffixes if not any(name.endswith(suffix) for name in like)]
    return [f"no tensor of the stage ends in {suffix!r}, so it would not be an identity" for suffix in unused]


def _misfits(like: Weights, source: Weights, whose: str) -> list[str]:
    found = [f"{whose} has no {name}" for name in like if name not in source]
    found += [f"{whose} has {name}, which the lost stage has not" for name in source if name not in like]
    for name in like.keys() & source.keys():
        have, want = tuple(source[name].shape), tuple(like[name].shape)
        if have != want:
            found.append(f"{name} of {whose} has the shape {list(have)}; the lost stage has {list(want)}")
    return sorted(found)


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def rebuild_moments(
    how: MomentRepair, sources: Sequence[Mapping[str, ParamState]], *, share: float = 0.5
) -> dict[str, dict[str, Any]]:
    """The optimizer state of the rebuilt stage, by parameter; empty for RESET, so that the optimizer starts anew.

    AVERAGED gives moments of both ``sources`` the weights ``share`` and ``1 - share``; ``step`` becomes the lower one,
    since fewer steps mean more bias correction and so smaller updates. Second moments stay non-negative. 8-bit
    moments are refused: their codes have no average, and this package does not know their code book. A caller that
    does can hand them over in fp32 and quantise the result.

    Raises: ConfigurationError for sources that do not fit each other or the wish, and for moments of 8 bits.
    """
    wanted = {MomentRepair.RESET: None, MomentRepair.AVERAGED: 2, MomentRepair.EXACT: 1}[how]
    if wanted is None:
        return {}
    if len(sources) != wanted:
        raise ConfigurationError(f"{how.name} moments need {wanted} source(s); {len(sources)} were given")
    if how is MomentRepair.EXACT:
        return {name: {key: _copy(value) for key, value in state.items()} for name, state in sources[0].items()}
    previous, following = sources
    if problems := _moment_problems(previous, following, share):
        raise ConfigurationError(problems)
    return {name: _averaged(name, state, following[name], share) for name, state in previous.items()}


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _averaged(name: str, previous: ParamState, following: ParamState, share: float) -> dict[str, Any]:
    made = {key: _blend(f"{name}/{key}", previous[key], following[key], share) for key in previous if key != "step"}
    if "step" in previous:
        made["step"] = _copy(min(previous["step"], following["step"], key=float))
    return made


def _moment_problems(
    previous: Mapping[str, ParamState], following: Mapping[str, ParamState], share: float
) -> list[str]:
    found = [] if 0.0 <= share <= 1.0 else [f"share={share} of the stage before must be from 0 to 1"]
    if previous.keys() != following.keys():
        return [
            *found,
            f"the neighbours' states are of different parameters: {sorted(previous.keys() ^ following.keys())}",
        ]
    for name, state in previous.items():
        found += _state_problems(name, state, following[name])
    return found


def _state_problems(name: str, previous: ParamState, following: ParamState) -> list[str]:
    if previous.keys() != following.keys():
        return [f"the neighbours' states of {name} have the keys {sorted(previous)} and {sorted(following)}"]
    found = []
    for key in (key for key in previous if key != "step"):
        one, other = previous[key], following[key]
        if not (_is_average_able(one) and _is_average_able(other)):
            found.append(
                f"{name}/{key} is not a tensor of 16 bits or more per number, so it has no average; "
                f"dequantise 8-bit state first, or use {MomentRepair.RESET.name}"
            )
        elif one.shape != other.shape:
            found.append(f"{name}/{key} has the shapes {list(one.shape)} and {list(other.shape)}")
        elif key.endswith("_sq") and bool((one < 0).any() or (other < 0).any()):
            found.append(f"{name}/{key} is negative somewhere, which second moments never are")
    return found


def _is_average_able(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.element_size() >= 2


class GradientNorms:
    """The last gradient norm of each stage, before and after clipping.

    The training loop feeds one norm per stage and applied step. A norm that is not finite belongs to a step that is
    not applied: the one before it stays. A stage that has not been fed counts 1, as in the released code. The state
    is for a snapshot's scalars; ranks that only know their own stage's norm have to tell each other first.
    """

    def __init__(self, max_norm: float = 0.0) -> None:
        """``max_norm`` is the bound that gradients are clipped to, 0 for none."""
        if not (max_norm >= 0 and math.isfinite(max_norm)):
            raise ConfigurationError(f"max_norm={max_norm} must be finite and not negative; 0 turns clipping off")
        self._max_norm = max_norm
        self._last: dict[int, tuple[float, float]] = {}

    def record(self, stage: int, norm: float, *, clipped_by: float | None = None) -> None:
        """Note the norm of a stage's whole gradient, averaged over the data-parallel ranks, before clipping.

        ``clipped_by`` is the norm that clipping compares with the bound where it is not the stage's own, as in the
        released code, but that of the whole model.
        """
        compared = norm if clipped_by is None else clipped_by
        if not (math.isfinite(norm) and math.isfinite(compared)):
            return
        is_clipped = self._max_norm > 0 and compared > self._max_norm
        self._last[stage] = norm, norm / compared * self._max_norm if is_clipped else norm

    def get(self, stage: int, weighting: Weighting = PAPER_WEIGHTING) -> float:
        """The norm that ``weighting`` asks for."""
        before, after = self._last.get(stage, (1.0, 1.0))
        return after if weighting.is_clipped else before

    def state(self) -> dict[str, list[float]]:
        """JSON values: stage -> norm before and after clipping."""
        return {str(stage): list(norms) for stage, norms in sorted(self._last.items())}

    def load(self, state: Mapping[str, Sequence[float]]) -> None:
        """Put back what ``state`` returned. Raises: ManifestMismatch for anything else."""
        try:
            self._last = {int(stage): (float(before), float(after)) for stage, (before, after) in state.items()}
        except (AttributeError, TypeError, ValueError) as cause:
            raise ManifestMismatch(f"gradient norms {state!r} are not stage -> [norm, clipped norm]") from cause
