"""How often to save for which failure, and what is left for training: the numbers of ``holdfast plan``. Pure.

The formulas are those of :mod:`holdfast.fault_tolerance.interval`; here the costs and rates of a run become its tiers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance import interval as iv
from holdfast.launch.plan_options import HOUR_S, Numbers
from holdfast.launch.wording import span

__all__ = ["DURABLE", "SNAPSHOT", "Advice", "Row", "advise", "group_problems"]

SNAPSHOT, _PARITY, DURABLE = "memory snapshot", "parity", "durable checkpoint"
"""Names of the tiers."""
_NOTHING = 1e-3
"""A share of the time that is no plan."""


@dataclass(frozen=True, slots=True)
class Row:
    """One tier and how often to save for it."""

    name: str
    serves: str
    tier: iv.Tier
    steps: int
    interval_s: float


@dataclass(frozen=True, slots=True)
class Advice:
    """How often to save for each tier, and what comes of it."""

    rows: tuple[Row, ...]
    layout: iv.GroupLayout
    unrecoverable_per_h: float
    """Of the groups alone, without racks."""
    unprotected_per_h: float
    correlated_per_h: float
    split: iv.Split

    @property
    def settings(self) -> dict[str, int]:
        by_name = {row.name: row.steps for row in self.rows}
        """Of a run: option -> steps."""
        return {"snapshot.every_steps": by_name[SNAPSHOT], "snapshot.persist_every_steps": by_name.get(DURABLE, 0)}


def advise(v: Numbers) -> Advice:
    """Of a number for every option. Raises: ConfigurationError if nothing fails, or if failures leave no time."""
    layout = _layout(v)
    beyond = iv.unrecoverable_rate(layout, v["node_mtbf_h"], v["reprotect_s"] / HOUR_S)
    named = _tiers(v, beyond)
    if not any(tier.rate_per_s for _, _, tier in named):
        raise ConfigurationError("nothing ever fails with these values, so no save is worth its cost; give an MTBF")
    # Every save is made from a snapshot, so that tier stays even if no failure is its own.
    needed = [named[0], *(entry for entry in named[1:] if entry[2].rate_per_s)]
    tiers = [tier for _, _, tier in needed]
    steps = iv.nested_steps(
        [iv.optimal_interval_s(tier.cost_s, tier.mtbf_s) for tier in tiers],
        [max(tier.background_s, v["commit_s"]) for tier in tiers],
        v["step_s"],
    )
    rows = tuple(
        Row(name, serves, tier, n, n * v["step_s"]) for (name, serves, tier), n in zip(needed, steps, strict=True)
    )
    _refuse_hopeless(rows)
    return Advice(
        rows=rows,
        layout=layout,
        unrecoverable_per_h=beyond,
        unprotected_per_h=layout.nodes / v["node_mtbf_h"],
        correlated_per_h=1.0 / v["rack_mtbf_h"],
        split=iv.expected_split([(row.tier, row.interval_s) for row in rows]),
    )


def _refuse_hopeless(rows: Iterable[Row]) -> None:
    problems = [
        f"{row.name}: one failure in {span(row.tier.mtbf_s)} ({row.serves}), {span(row.interval_s)} between saves "
        f"and {span(row.tier.recovery_s)} to recover leave no time for training; check the MTBF and these seconds"
        for row in rows
        if iv.ettr(row.interval_s, row.tier.cost_s, row.tier.mtbf_s, row.tier.recovery_s) < _NOTHING
    ]
    if problems:
        raise ConfigurationError(problems)


def _tiers(v: Numbers, beyond_per_h: float) -> list[tuple[str, str, iv.Tier]]:
    parity, lost_nodes = int(v["parity"]), v["nodes"] / v["node_mtbf_h"]
    more = f"more than {parity} node(s) of a group" if parity else "a node is lost"
    shared = {"slowdown": v["slowdown"], "detect_s": v["detect_s"]}
    snapshot = iv.Tier(
        rate_per_s=v["nodes"] / v["process_mtbf_h"] / HOUR_S,
        stall_s=v["stall_s"],
        background_s=v["copy_s"],
        lag_s=v["commit_s"],
        restore_s=v["restore_s"],
        **shared,
    )
    code = iv.Tier(
        rate_per_s=max(lost_nodes - beyond_per_h, 0.0) / HOUR_S if parity else 0.0,
        background_s=v["encode_s"],
        lag_s=v["commit_s"] + v["encode_s"],
        restore_s=v["rebuild_s"],
        **shared,
    )
    durable = iv.Tier(
        rate_per_s=(beyond_per_h + 1.0 / v["rack_mtbf_h"]) / HOUR_S,
        background_s=v["persist_s"],
        lag_s=v["commit_s"] + v["persist_s"],
        restore_s=v["reload_s"],
        **shared,
    )
    return [
        (SNAPSHOT, "a process dies", snapshot),
        (_PARITY, f"up to {parity} node(s) of a group", code),
        (DURABLE, f"{more}; a rack", durable),
    ]


def _layout(v: Numbers) -> iv.GroupLayout:
    return iv.GroupLayout.of(int(v["nodes"]), int(v["group"]), int(v["parity"]))


def group_problems(v: Numbers) -> Sequence[str]:
    """What is wrong with the groups that these values describe."""
    try:
        _layout(v)
    except ConfigurationError as error:
        return error.problems
    return ()
