"""What a report tells of a run, section by section."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields

from holdfast import events as e
from holdfast.launch.curriculum_matrix import curriculum_rows
from holdfast.launch.fault_stories import last_words
from holdfast.launch.report_charts import PARTS, Charts
from holdfast.launch.report_faults import fault_sections
from holdfast.launch.report_parts import Block, Facts, Quote, Said, Section, Table, Tiles
from holdfast.launch.run_state import state_of
from holdfast.launch.run_view import RunView
from holdfast.launch.wording import duration, percent, size
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.sizing import parameter_count

__all__ = ["sections", "title"]


def title(view: RunView) -> str:
    return f"Run {view.run_id}"


def sections(view: RunView) -> Iterator[Section]:
    """From top to bottom. What a run has nothing to tell of is left out."""
    charts = Charts(view)
    yield Section("", [Tiles(_tiles(view, charts)), Facts(_head(view, charts))])
    if charts.kept:
        yield Section("Loss", [charts.loss_by_step(), charts.loss_by_time(), _losses(charts)])
        yield Section("Throughput", [charts.throughput()])
    yield Section("Where the time went", list(_time(charts)))
    yield from fault_sections(charts.stories, last_words(view, list(charts.stories)))
    yield Section("Protection over time", list(_tiers(view, charts)))
    yield from _stages(view)
    yield from _adapters(view)
    yield from _evaluations(view)
    yield from _texts(view)


# -- the head ---------------------------------------------------------------------------------------------------------


def _tiles(view: RunView, charts: Charts) -> dict[str, str]:
    step = charts.kept[-1].report.step if charts.kept else 0
    quality = [event.bits_per_byte for _, event in view.of(e.Evaluated)]
    lost = sum(done.steps_lost for _, done in view.of(e.RecoveryDone))
    return {
        "state": state_of(view).word,
        "step": f"{step:,} of {view.goal:,}" if view.goal else f"{step:,}",
        "goodput": percent(charts.goodput.ratio),
        **({"bits per byte": f"{quality[-1]:.3f}"} if quality else {}),
        "faults": f"{len(charts.stories):,}",
        "steps lost": f"{lost:,}",
    }


def _head(view: RunView, charts: Charts) -> dict[str, str]:
    newest = view.record["attempts"][-1] if view.record["attempts"] else {}
    found = {
        "outcome": _outcome(view),
        "model": _model(view.config),
        "data": _named(view.config, "data.source", "data.path", "data.seq_len"),
        "trained as": _layout(view.config),
        "protected by": _named(
            view.config,
            "snapshot.every_steps",
            "snapshot.parity",
            "snapshot.persist_every_steps",
            "recovery.max_failures",
        ),
        "attempts": "\n".join(_attempt(view, n) for n in range(len(view.record["attempts"]))),
        "driven": _driven(charts),
        "command": shlex.join(map(str, newest.get("command") or ())),
        "overrides": shlex.join(map(str, newest.get("overrides") or ())),
        "versions": ", ".join(f"{name} {version}" for name, version in (newest.get("versions") or {}).items()),
        "git": str(newest.get("git") or ""),
        "configuration": str(view.record.get("config_digest") or ""),
        "directory": str(view.path),
    }
    return {name: value for name, value in found.items() if value}


def _outcome(view: RunView) -> str:
    state = state_of(view)
    code = (view.ended or {}).get("exit_code")
    ended = "" if code is None else f", exit code {code}"
    return f"{(view.ended or {}).get('outcome', state.word)}{ended}: {state.why}"


def _model(config: Mapping[str, object]) -> str:
    kind = config.get("model.kind", "DECODER")
    if kind != "DECODER":
        return f"{str(kind).lower()}: {_named(config, 'model.path', 'model.init', 'model.options')}"
    named = {name: config[f"model.{name}"] for name in _MODEL_FIELDS if f"model.{name}" in config}
    try:
        count = f"{parameter_count(ModelConfig(**named)) / 1e6:.2f} M parameters; "  # type: ignore[arg-type]  # from yaml
    except (TypeError, ValueError):  # written by another version, or edited
        count = ""
    name = named.pop("name", "unknown")
    return f"{name}: {count}{', '.join(f'{key} {value}' for key, value in named.items())}"


_MODEL_FIELDS = tuple(f.name for f in fields(ModelConfig) if f.name not in ("kind", "path", "init", "options"))
"""What describes the built-in decoder."""


def _layout(config: Mapping[str, object]) -> str:
    return _named(
        config,
        "launch.nodes",
        "launch.workers_per_node",
        "launch.spares",
        "parallel.zero_stage",
        "parallel.pipeline",
        "parallel.precision",
        "optim.name",
        "trainer.global_batch",
        "seed",
    )


def _named(config: Mapping[str, object], *keys: str) -> str:
    """Options as one would give them."""
    return ", ".join(f"{key}={config[key]}" for key in keys if config.get(key) not in (None, "", {}))


def _attempt(view: RunView, index: int) -> str:
    told = view.record["attempts"][index]
    when = _at(told["started"]) if isinstance(told.get("started"), (int, float)) else "unknown"
    ended = told.get("ended") or {}
    how = (
        f"{ended.get('outcome')} at step {ended.get('step')}: {ended.get('reason')}"
        if ended
        else "did not say how it ended"
    )
    if not ended and index == len(view.record["attempts"]) - 1 and view.driver is not None:
        how = f"goes on, driven by {view.driver}"
    return f"{index + 1}: {when}, {how}"


def _driven(charts: Charts) -> str:
    idle_s = charts.goodput.idle_s
    between = f", and {duration(idle_s)} between attempts, which count nowhere" if idle_s else ""
    return f"{duration(charts.goodput.wall_s)}{between}"


def _at(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))


def _losses(charts: Charts) -> Table:
    rows = [
        [
            f"{one.step:,}",
            f"{one.loss:.4f}",
            f"{one.bits_per_byte:.3f}",
            f"{one.learning_rate:.1e}",
            f"{one.grad_norm:.2f}",
        ]
        for one in (line.report for line in charts.sample())
    ]
    return Table(("step", "loss", "bits per byte", "learning rate", "gradient norm"), rows, frozenset(range(5)))


# -- time and tiers ---------------------------------------------------------------------------------------------------


def _time(charts: Charts) -> Iterator[Block]:
    split = charts.goodput
    yield charts.split()
    rows = [[name, f"{split.seconds[part]:,.2f}", percent(split.share(part))] for part, name in PARTS.items()]
    keys = [part.value for part in PARTS]
    total = ["all the time that drivers have worked", f"{split.wall_s:,.2f}", percent(1.0 if split.wall_s else 0.0)]
    yield Table(("part", "seconds", "share"), [*rows, total], frozenset({1, 2}), [*keys, ""])


def _tiers(view: RunView, charts: Charts) -> Iterator[Block]:
    yield charts.tiers()
    if any(line.report.committed >= 0 for line in view.steps):
        yield charts.snapshot_age()
    for _, cost in list(view.of(e.SnapshotCost))[-1:]:
        slower = "" if cost.slowdown is None else f"; steps beside a copy took {cost.slowdown:+.1%}"
        yield Said(
            f"Snapshots blocked {1000 * cost.stall_s:.1f} ms or {cost.stall_share:.2%} of a step in the median of "
            f"{cost.steps:,} steps, copied {1000 * cost.copy_s:.1f} ms beside it{slower}."
        )
    written = [
        [f"{one.step:,}", _at(when), size(one.bytes), duration(one.seconds), one.path]
        for when, one in view.of(e.CheckpointWritten)
    ]
    if written:
        yield Table(("checkpoint of step", "written", "size", "took", "directory"), written, frozenset({0, 2, 3}))
    refused = [[_at(when), one.path, one.reason] for when, one in view.of(e.CheckpointRejected)]
    if refused:
        yield Table(("time", "checkpoint refused", "why"), refused)


# -- what the run found -----------------------------------------------------------------------------------------------


def _stages(view: RunView) -> Iterator[Section]:
    """How much each stage of a pipeline changes what passes it, and which were made from others."""
    blocks: list[Block] = []
    for _, measured in list(view.of(e.StagesMeasured))[-1:]:
        said = (
            f"At step {measured.step:,}. The nearer to 0, the more easily a stage is replaced (arXiv 2403.17887, 3.2)."
        )
        rows = [[stage, f"{angle:.3f}"] for stage, angle in measured.angular_distance.items()]
        blocks += [Said(said), Table(("stage", "angular distance, half turns"), rows, frozenset({1}))]
    rebuilt = [
        [str(one.stage), f"{one.version:,}", one.repair, ", ".join(map(str, one.sources)), size(one.bytes)]
        for _, one in view.of(e.StageRebuilt)
    ]
    if rebuilt:
        said = "Stages made from others: from there on the run is not the one that it would have been."
        blocks += [Said(said), Table(("stage", "at version", "repair", "from stages", "read"), rebuilt)]
    if blocks:
        yield Section("Stages of the pipeline", blocks)


def _adapters(view: RunView) -> Iterator[Section]:
    found = curriculum_rows(view.path)
    if found is not None:
        name, (head, *rows) = found
        said = f"Curriculum {name}: bits per byte of each domain's held-out text after every task."
        yield Section("Adapters", [Said(said), Table(head, rows, frozenset(range(1, len(head))))])


def _evaluations(view: RunView) -> Iterator[Section]:
    rows = [
        [f"{one.step:,}", _at(when), f"{one.bits_per_byte:.3f}", f"{one.windows:,}"]
        for when, one in view.of(e.Evaluated)
    ]
    if rows:
        head = ("step", "time", "bits per byte", "windows")
        yield Section("Evaluations", [Table(head, rows, frozenset({0, 2, 3}))])


def _texts(view: RunView) -> Iterator[Section]:
    blocks: list[Block] = []
    for _, one in view.of(e.Generated):
        blocks += [Said(f"At step {one.step:,}:"), Quote(one.text)]
    if blocks:
        yield Section("Written by the model", blocks)
