"""The answer of ``holdfast plan`` as text and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance import interval as iv
from holdfast.launch.plan_advice import DURABLE, Advice, Row
from holdfast.launch.plan_options import HOUR_S, OPTIONS, Value
from holdfast.launch.records import read_yaml
from holdfast.launch.run_dir import RunDir
from holdfast.launch.wording import aligned, clean, percent, span, table

__all__ = ["as_json", "as_text"]

_MONTH_H = 730.5
_INDENT = "  "


def as_text(run: RunDir | None, values: Mapping[str, Value], advice: Advice) -> str:
    title = "plan without a run" if run is None else f"plan for run {run.run_id} ({run.path})"
    sections = [
        [clean(title)],
        [
            "values",
            *table([[o.flag, _shown(o.name, values[o.name].number), values[o.name].origin] for o in OPTIONS], _INDENT),
        ],
        ["saves", *table([_HEADER, *map(_row_words, advice.rows)], _INDENT)],
        _survival_words(advice, values),
        _goodput_words(advice.split),
        _set_words(run, advice),
    ]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


_HEADER = ["", "serves", "one failure in", "cost C", "Young", "Daly", "exact", "advised"]


def _row_words(row: Row) -> list[str]:
    cost_s, mtbf_s = row.tier.cost_s, row.tier.mtbf_s
    advised = f"{row.steps:,} step{'' if row.steps == 1 else 's'} = {span(row.interval_s)}"
    return [row.name, row.serves, span(mtbf_s), span(cost_s), *map(span, _optima(cost_s, mtbf_s).values()), advised]


def _optima(cost_s: float, mtbf_s: float) -> dict[str, float]:
    """Three answers to the same question; endless if nothing fails."""
    if math.isinf(mtbf_s):
        return dict.fromkeys(("young", "daly", "exact"), math.inf)
    return {
        "young": iv.young_interval_s(cost_s, mtbf_s),
        "daly": iv.daly_interval_s(cost_s, mtbf_s),
        "exact": iv.optimal_interval_s(cost_s, mtbf_s),
    }


def _survival(layout: iv.GroupLayout) -> dict[int, float]:
    return {k: iv.survival_of_losses(layout, k) for k in (1, 2, 3) if k <= layout.nodes}


def _month(per_hour: float) -> float:
    return math.exp(-per_hour * _MONTH_H)


def _survival_words(advice: Advice, values: Mapping[str, Value]) -> list[str]:
    layout = advice.layout
    sizes = " and ".join(dict.fromkeys(str(size) for size in layout.sizes))
    at_once = ", ".join(f"{k}: {percent(p)}" for k, p in _survival(layout).items())
    total = advice.unrecoverable_per_h + advice.correlated_per_h
    window = span(values["reprotect_s"].number)
    facts = {
        "random nodes lost at once": f"survived with {at_once}",
        "a month of single losses": f"survived with {percent(_month(advice.unrecoverable_per_h))}, protected again "
        f"within {window}; without parity {percent(_month(advice.unprotected_per_h))}",
        "a month, racks included": f"survived with {percent(_month(total))}",
        "a loss the groups cannot repair": f"every {span(_every_s(advice.unrecoverable_per_h))}; without parity "
        f"every {span(_every_s(advice.unprotected_per_h))}; racks included every {span(_every_s(total))}",
    }
    head = (
        f"memory of {layout.nodes} node(s) in {len(layout.sizes)} group(s) of {sizes}, "
        f"each survives the loss of {layout.parity}"
    )
    return [head, *table([[key, fact] for key, fact in facts.items()], _INDENT)]


def _goodput_words(split: iv.Split) -> list[str]:
    lost = {name: share for name, share in asdict(split).items() if name != "useful"}
    return [
        f"expected goodput {percent(split.useful)}",
        *aligned({k: f" {percent(s)}" for k, s in lost.items()}, _INDENT),
    ]


def _set_words(run: RunDir | None, advice: Advice) -> list[str]:
    lines = ["set", f"{_INDENT}{_settings_words(advice.settings)}"]
    config = {} if run is None else read_yaml(run.config_file)
    present = {key: steps for key in advice.settings if isinstance(steps := config.get(key), int) and steps > 0}
    if present.keys() == advice.settings.keys():
        lines += [
            f"{_INDENT}the run has {_settings_words(present)},",
            f"{_INDENT}{_goodput_with(advice.rows, present)}",
        ]
    return lines


def _settings_words(settings: Mapping[str, int]) -> str:
    return " ".join(f"{key}={steps}" for key, steps in settings.items())


def _goodput_with(rows: Sequence[Row], settings: Mapping[str, int]) -> str:
    """What the same tiers give with a run's own settings; there, each snapshot gets its parity."""
    every, persist = settings.values()
    step_s = rows[0].interval_s / rows[0].steps
    try:
        split = iv.expected_split([(row.tier, (persist if row.name == DURABLE else every) * step_s) for row in rows])
    except ConfigurationError as error:
        return f"with which it would not get far: {error}"
    return f"with which its expected goodput is {percent(split.useful)}"


def _shown(name: str, number: float) -> str:
    if name.endswith("_s"):
        return span(number)
    return span(number * HOUR_S) if name.endswith("_h") else f"{number:g}"


def _every_s(per_hour: float) -> float:
    return HOUR_S / per_hour if per_hour else math.inf


def as_json(run: RunDir | None, values: Mapping[str, Value], advice: Advice) -> str:
    answer = {
        "run": None if run is None else str(run.path),
        "values": {name: {"value": value.number, "origin": value.origin} for name, value in values.items()},
        "tiers": [_row_facts(row) for row in advice.rows],
        "groups": {
            "sizes": list(advice.layout.sizes),
            "parity": advice.layout.parity,
            "survival_of_losses": {str(k): p for k, p in _survival(advice.layout).items()},
            "survival_of_a_month": _month(advice.unrecoverable_per_h),
            "survival_of_a_month_racks_included": _month(advice.unrecoverable_per_h + advice.correlated_per_h),
            "unrecoverable_mtbf_h": _every_s(advice.unrecoverable_per_h) / HOUR_S,
        },
        "goodput": asdict(advice.split),
        "set": advice.settings,
    }
    return json.dumps(_without_infinity(answer), indent=1) + "\n"


def _row_facts(row: Row) -> dict[str, object]:
    tier = row.tier
    optima = {f"{name}_s": seconds for name, seconds in _optima(tier.cost_s, tier.mtbf_s).items()}
    facts = {"name": row.name, "serves": row.serves, "mtbf_h": tier.mtbf_s / HOUR_S, "cost_s": tier.cost_s}
    return {**facts, **optima, "steps": row.steps, "interval_s": row.interval_s}


def _without_infinity(value: Any) -> Any:
    """JSON values, opaque to the type checker; JSON has no infinity, so what never happens is null."""
    if isinstance(value, dict):
        return {key: _without_infinity(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_infinity(one) for one in value]
    return None if isinstance(value, float) and math.isinf(value) else value
