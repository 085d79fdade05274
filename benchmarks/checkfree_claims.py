"""How `checkfree_study.py` judges: a claim is a set of effects, each of which has to be above zero.

An effect is one number per seed, positive where the claim holds, with the 95 % interval of its mean (Student's t). The
least effect of interest is fixed beforehand. An effect is

- confirmed, if the whole interval is above zero;
- contradicted, if the whole interval is below zero;
- not confirmed, if it holds zero and ends below the least effect of interest: nothing worth having is left;
- not decided at this scale, otherwise.

A claim of several effects is contradicted if one is, else not confirmed if one is, else not decided if one is, else
confirmed. Where a run did not reach the target its count of steps is too low: an effect that such runs speak against is
as good as stated or better, one that they speak for is not decided. Where even the control of an experiment, the cost
of fresh stages, is not confirmed, the experiment is blind: it decides nothing, neither for a method nor against it.
"""

from __future__ import annotations

from dataclasses import replace

from study import Claim, Effect, Section, Verdict, claims_table, in_words, judge, mean_and_half

__all__ = [
    "Claim",
    "Effect",
    "Section",
    "Verdict",
    "claims_table",
    "in_words",
    "judge",
    "mean_and_half",
    "with_control",
]


def with_control(section: Section, control: Effect) -> Section:
    """The section, its claims judged blind where the control is not confirmed."""
    is_blind = control.verdict is not Verdict.CONFIRMED
    blind = " So this experiment is blind and decides nothing." if is_blind else ""
    claims = [replace(claim, is_blind=is_blind) for claim in section.claims]
    return replace(section, text=f"Control: {in_words(control)}.{blind}\n\n{section.text}", claims=claims)
