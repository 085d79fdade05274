"""What Prometheus learns: every number against a run told by hand, and every name in the dashboard and the alerts."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # comes with ray, wandb and hydra; only the tests read yaml

from holdfast.errors import ConfigurationError
from holdfast.events import FaultDetected, Protection, RecoveryDone, RunStarted, StopRequested
from holdfast.launch.dashboards_command import FILES, dashboards
from holdfast.launch.metrics_export import MetricsExport
from holdfast.launch.run_metrics import METRICS, Metric, RunMetrics
from holdfast.types import StepReport

_FAULT = FaultDetected(1, (1,), 1, 4242, "killed by SIGKILL", "update", 3, 0.04)


def _report(step: int, *, committed: int, step_s: float = 0.5, copy_s: float = 0.2) -> StepReport:
    return StepReport(step, 1, 2.0, 3.0, 1e-3, 0.5, step * 64, step_s, 0.1, 10, committed, copy_s)


def _metrics() -> RunMetrics:
    return RunMetrics(run_id="r", attempt=2, max_failures=3)


def _values(metrics: RunMetrics, now_s: float, parity_s: float = 0.0) -> dict[str, float]:
    return {
        sample.metric.name.removeprefix("holdfast_") + sample.tags.get("kind", ""): sample.value
        for sample in metrics.samples(now_s, parity_s=parity_s)
    }


def test_a_step_tells_progress_and_speed() -> None:
    metrics = _metrics()
    metrics.step(_report(3, committed=1), 100.0)
    values = _values(metrics, 101.0, parity_s=0.3)
    assert (values["step"], values["loss"], values["last_step_timestamp_seconds"]) == (3, 2.0, 100.0)
    assert values["tokens_per_s"] == 64 / 0.5
    assert (values["snapshot_seconds"], values["parity_seconds"]) == (0.2, 0.3)


def test_a_snapshot_is_as_old_as_the_step_whose_state_it_holds() -> None:
    metrics = _metrics()
    metrics.step(_report(1, committed=-1), 10.0)
    assert "snapshot_age_seconds" not in _values(metrics, 11.0)
    metrics.step(_report(2, committed=1), 20.0)
    metrics.step(_report(3, committed=1), 30.0)
    assert _values(metrics, 35.0)["snapshot_age_seconds"] == 25.0
    metrics.step(_report(2, committed=1), 40.0)  # rolled back: the first step 2 is gone
    metrics.step(_report(3, committed=2), 50.0)
    assert _values(metrics, 55.0)["snapshot_age_seconds"] == 15.0
    metrics.step(_report(4, committed=3), 60.0)
    assert _values(metrics, 65.0)["snapshot_age_seconds"] == 15.0


def test_goodput_counts_a_step_once_and_waiting_for_snapshots_never() -> None:
    metrics = _metrics()
    assert "goodput_ratio" not in _values(metrics, 0.0)
    metrics.event(RunStarted("r", 2, 3, ""), 0.0)
    for step in (1, 2, 2, 3):
        metrics.step(_report(step, committed=0), 1.0)
    assert _values(metrics, 4.0)["goodput_ratio"] == pytest.approx(3 * 0.4 / 4.0)


def test_faults_use_the_budget_and_only_a_schedulers_notice_is_a_preemption() -> None:
    metrics = _metrics()
    assert _values(metrics, 0.0)["failure_budget_left"] == 3
    metrics.event(_FAULT, 1.0)
    metrics.event(Protection("degraded", ""), 1.0)
    metrics.event(FaultDetected(2, (), 1, 7, "keeper", "update", 3, 0.1), 2.0)
    metrics.event(RecoveryDone(2, 2, 4, 1.25, 3, 0, 2, 3, {}), 3.0)
    metrics.event(replace(_FAULT, is_preemption=True), 3.5)  # costs nothing of the budget
    for reason in ("SIGTERM received", "SIGINT received", "somebody stopped the run in W&B"):
        metrics.event(StopRequested(reason), 4.0)
    values = _values(metrics, 5.0)
    assert (values["failures_totalworker"], values["failures_totalkeeper"], values["failure_budget_left"]) == (1, 1, 1)
    assert (values["recovery_seconds"], values["lost_steps_total"], values["preemptions_total"]) == (1.25, 3, 1)
    assert values["protection_level"] == 0


class _Memory:
    def __init__(self) -> None:
        self.gauges: dict[str, float] = {}
        self.counters: dict[str, float] = {}
        self.tags: set[tuple[tuple[str, str], ...]] = set()

    def set(self, metric: Metric, tags: Mapping[str, str], value: float) -> None:
        assert tuple(tags) == metric.tags
        self.gauges[metric.name] = value
        self.tags.add(tuple(tags.items()))

    def add(self, metric: Metric, tags: Mapping[str, str], amount: float) -> None:
        assert tuple(tags) == metric.tags
        assert amount > 0, "Ray refuses anything else"
        self.counters[metric.name] = self.counters.get(metric.name, 0.0) + amount


def test_counters_are_told_by_how_much_they_have_grown() -> None:
    export, meter = MetricsExport(_metrics()), _Memory()
    export.emit(_FAULT)
    for _ in range(3):
        export.export(meter, 0.0)
    export.emit(_FAULT)
    export.export(meter, 0.0)
    assert meter.counters == {"holdfast_failures_total": 2}
    assert meter.gauges["holdfast_failure_budget_left"] == 1
    assert meter.tags == {(("run_id", "r"), ("attempt", "2"))}


def test_everything_that_has_a_name_is_exported_by_a_run_that_has_seen_it_all() -> None:
    export, meter = MetricsExport(_metrics()), _Memory()
    for event in (
        RunStarted("r", 2, 3, ""),
        _FAULT,
        RecoveryDone(1, 2, 4, 1.25, 3, 0, 2, 3, {}),
        StopRequested("SIGUSR1 received"),
    ):
        export.emit(event)
    export.step(_report(1, committed=1))
    export.export(meter, 0.3)
    assert meter.gauges.keys() | meter.counters.keys() == METRICS.keys()


class _Broken(_Memory):
    def set(self, metric: Metric, tags: Mapping[str, str], value: float) -> None:
        raise RuntimeError("no agent")


class _Hanging(_Memory):
    def set(self, metric: Metric, tags: Mapping[str, str], value: float) -> None:
        threading.Event().wait()


@pytest.mark.parametrize("meter", [_Broken(), _Hanging()])
def test_a_meter_that_cannot_be_used_costs_at_most_one_warning(
    meter: _Memory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("holdfast.launch.metrics_export._INTERVAL_S", 0.01)
    monkeypatch.setattr("holdfast.launch.metrics_export._FAREWELL_S", 0.1)
    export = MetricsExport(_metrics())
    with export.to(meter, parity_s=lambda: 0.0):
        time.sleep(0.1)
        began_s = time.perf_counter()
        for step in range(1, 101):
            export.step(_report(step, committed=0))
        assert time.perf_counter() - began_s < 0.5
    assert len(caplog.records) == (1 if isinstance(meter, _Broken) else 0)


# -- the dashboard and the alerts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("boards") / "new"
    assert dashboards(["--to", str(folder)]) == 0
    return folder


def _names(text: str) -> set[str]:
    return set(re.findall(r"ray_(holdfast_\w+)", text))


def test_the_command_writes_both_files_and_never_over_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "new"
    assert dashboards(["--to", str(written)]) == 0
    assert sorted(path.name for path in written.iterdir()) == sorted(FILES)
    assert dashboards(["--to", str(written)]) == 0, "the same again is no harm"
    assert str(written / "grafana.json") in capsys.readouterr().out
    (written / "alerts.yaml").write_text((written / "alerts.yaml").read_text() + "# mine\n")
    with pytest.raises(ConfigurationError, match="exists already and is different"):
        dashboards(["--to", str(written)])


def test_the_dashboard_is_one_that_grafana_reads_and_shows_what_is_exported(written: Path) -> None:
    text = (written / "grafana.json").read_text()
    board: dict[str, Any] = json.loads(text)
    assert board["schemaVersion"] >= 36
    assert {"title", "uid", "panels", "templating", "time"} <= board.keys()
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "run_id"}
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["type"] in ("stat", "timeseries")
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert _names(target["expr"])
            assert 'run_id=~"$run_id"' in target["expr"]
    assert _overlaps(panels) == []
    assert _names(text) == METRICS.keys(), "shown and exported are the same"


def _overlaps(panels: list[dict[str, Any]]) -> list[tuple[str, str]]:
    cells: dict[tuple[int, int], str] = {}
    found = []
    for panel in panels:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                if (x, y) in cells:
                    found.append((cells[x, y], panel["title"]))
                cells[x, y] = panel["title"]
    return found


def test_the_alerts_are_rules_of_prometheus_about_what_is_exported(written: Path) -> None:
    rules = yaml.safe_load((written / "alerts.yaml").read_text())
    (group,) = rules["groups"]
    assert [rule["alert"] for rule in group["rules"]] == [
        "HoldfastNoStep",
        "HoldfastSnapshotOld",
        "HoldfastFailureBudgetLow",
    ]
    for rule in group["rules"]:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "description"} <= rule["annotations"].keys()
        names = _names(rule["expr"])
        assert names
        assert names <= METRICS.keys()
        assert re.search(r"(<=|>) \d+$", rule["expr"])
