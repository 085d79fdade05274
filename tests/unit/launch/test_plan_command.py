"""``holdfast plan``: where its numbers come from, what it prints, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from holdfast.configs.plain import to_plain
from holdfast.configs.schema import LaunchConfig, RunConfig
from holdfast.configs.validate import refuse_bad
from holdfast.errors import ConfigurationError
from holdfast.events import CheckpointWritten, Event, FaultDetected, FaultInjected, RecoveryDone, RecoveryPlanned
from holdfast.fault_tolerance.config import SnapshotConfig
from holdfast.fault_tolerance.interval import (
    GroupLayout,
    daly_interval_s,
    optimal_interval_s,
    survival_of_losses,
    unrecoverable_rate,
    young_interval_s,
)
from holdfast.launch.cli import main
from holdfast.launch.plan_command import plan
from holdfast.launch.records import JsonlEvents
from holdfast.launch.run_dir import RunDir
from holdfast.trainer.metrics import MetricsFile
from holdfast.types import StepReport

_HOUR_S = 3600.0


def _report(
    step: int, *, step_s: float = 0.5, stall_s: float = 0.0, copy_bytes: int = 0, lag: int = 1, copy_s: float = 0.0
) -> StepReport:
    return StepReport(
        step=step,
        epoch=1,
        loss=1.0,
        bits_per_byte=1.0,
        learning_rate=1e-3,
        grad_norm=1.0,
        tokens=step,
        step_s=step_s,
        stall_s=stall_s,
        copy_bytes=copy_bytes,
        committed=step - lag,
        copy_s=copy_s,
    )


def _fault(number: int, *, ranks: tuple[int, ...] = (1,), after_s: float = 0.2) -> FaultDetected:
    return FaultDetected(number, ranks, 1, 1234, "killed", "update", 10, detected_after_s=after_s)


def _recovery(number: int, source: str, repaired_in_s: float) -> list[Event]:
    done = RecoveryDone(number, 2, 11, repaired_in_s, 0, 0, number, 10, {"detect": 0.2})
    return [RecoveryPlanned(number, source, 10, "because"), done]


class Recorded:
    """A run on disk, written by what writes real ones, with a clock of its own."""

    def __init__(self, root: Path, run_id: str = "r1", *, nodes: int = 4) -> None:
        self.now = 1e9
        self.dir = RunDir.create(str(root), "p", run_id, config_digest="d")
        self._nodes = nodes

    def attempt(self, number: int, steps: Sequence[StepReport], *, hours: float) -> None:
        """Steps evenly over this much wall time; a night passes before the next attempt."""
        config = RunConfig(
            launch=LaunchConfig(nodes=self._nodes),
            snapshot=SnapshotConfig(every_steps=2, persist_every_steps=50, parity=1, group_size=2),
        )
        self.dir.begin_attempt(config=to_plain(config), overrides=[], command=[])
        metrics = MetricsFile(self.dir.metrics_file, attempt=number, clock=lambda: self.now)
        for report in steps:
            metrics.write(report)
            self.now += hours * _HOUR_S / (len(steps) - 1)
        self.now += 12 * _HOUR_S

    def happened(self, *events: Event) -> None:
        sink = JsonlEvents(self.dir.events_file, clock=lambda: self.now)
        for event in events:
            sink.emit(event)


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def ask(*words: str) -> dict[str, Any]:
        assert plan([*words, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return ask


def _text(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert plan(words) == 0
    return capsys.readouterr().out


# -- values -----------------------------------------------------------------------------------------------------------


def test_steps_of_a_run_are_measured(tmp_path: Path, answer: Callable[..., dict[str, Any]]) -> None:
    run = Recorded(tmp_path)
    steps = [_report(1, step_s=9.0)]
    steps += [
        _report(n, stall_s=0.03 if n % 2 else 0.01, copy_bytes=100 * (n % 2), copy_s=0.1 * (n % 2), lag=2 - n % 2)
        for n in range(2, 12)
    ]
    run.attempt(1, steps, hours=1.0)
    values = answer(str(run.dir.path))["values"]
    assert values["step_s"] == {"value": 0.5, "origin": "measured: median of 11 steps"}
    # Five snapshots; the wait for one may fall into the step after it.
    assert values["stall_s"] == {
        "value": pytest.approx((5 * 0.03 + 5 * 0.01) / 5),
        "origin": "measured: mean of 5 snapshots",
    }
    assert values["commit_s"] == {"value": 0.5, "origin": "measured: committed 1 step(s) later"}
    assert values["copy_s"] == {"value": 0.1, "origin": "measured: median of 5 snapshots"}


@pytest.mark.parametrize(("nodes", "groups"), [(4, (2, 1)), (3, (2, 0)), (1, (2, 0))])
def test_groups_are_those_of_the_run(
    nodes: int, groups: tuple[int, int], tmp_path: Path, answer: Callable[..., dict[str, Any]]
) -> None:
    """Three nodes in groups of two leave one alone, and that one has no parity."""
    run = Recorded(tmp_path, nodes=nodes)
    run.attempt(1, [_report(n) for n in range(1, 6)], hours=1.0)
    values = answer(str(run.dir.path))["values"]
    expected = dict(zip(("nodes", "group", "parity"), (nodes, *groups), strict=True))
    assert {name: values[name]["value"] for name in expected} == expected
    assert {values[name]["origin"] for name in expected} == {"configuration of the run"}


def test_recoveries_of_a_run_are_measured_by_source(tmp_path: Path, answer: Callable[..., dict[str, Any]]) -> None:
    run = Recorded(tmp_path)
    run.attempt(1, [_report(n) for n in range(1, 6)], hours=1.0)
    run.happened(_fault(1, after_s=0.1), *_recovery(1, "keeper memory", 1.5))
    run.happened(_fault(2, after_s=0.4), *_recovery(2, "keeper memory", 2.5), _fault(3, after_s=0.2))
    run.happened(_fault(4), *_recovery(4, "parity", 9.5))
    run.happened(*_recovery(3, "disk", 20.5), CheckpointWritten(50, "x", 1, 3.0), CheckpointWritten(100, "y", 1, 5.0))
    values = answer(str(run.dir.path))["values"]
    assert values["detect_s"] == {"value": 0.2, "origin": "measured: median of 4 faults"}
    # The step that ends a repair is training.
    assert values["restore_s"] == {"value": 1.5, "origin": "measured: median of 2 recoveries from keeper memory"}
    assert values["rebuild_s"] == {"value": 9.0, "origin": "measured: median of 1 recoveries from parity"}
    assert values["reload_s"] == {"value": 20.0, "origin": "measured: median of 1 recoveries from disk"}
    assert values["persist_s"] == {"value": 4.0, "origin": "measured: median of 2 checkpoints"}


def test_failure_rates_are_a_prior_and_what_the_run_has_seen(
    tmp_path: Path, answer: Callable[..., dict[str, Any]]
) -> None:
    """Two attempts of 30 and 20 hours on four nodes; the night between them is not counted, nor are injected faults."""
    run = Recorded(tmp_path)
    run.happened(FaultInjected("clock_jump", "worker", 1, 3, "step.begin", ""))  # long before, and not the cause
    run.attempt(1, [_report(n) for n in range(1, 6)], hours=30.0)
    run.attempt(2, [_report(n) for n in range(6, 12)], hours=20.0)
    run.happened(*(_fault(n) for n in range(1, 3)), _fault(4, ranks=()))
    run.now += 3600
    run.happened(FaultInjected("sigkill", "worker", 2, 3, "step.begin", ""), _fault(3, ranks=(2,)))
    run.happened(FaultInjected("node_sigkill", "node", 1, 3, "", ""), _fault(5, ranks=()))
    values = answer(str(run.dir.path))["values"]
    assert values["process_mtbf_h"]["value"] == pytest.approx((720 + 200) / (1 + 3 - 1))
    assert values["node_mtbf_h"]["value"] == pytest.approx((8760 + 200) / (1 + 2 - 1))
    assert "measured: 2 in 200 node-hours (1 injected left out)" in values["process_mtbf_h"]["origin"]
    assert "90 % between" in values["process_mtbf_h"]["origin"]
    assert values["rack_mtbf_h"]["origin"] == "assumed default"


def test_options_override_what_was_measured(tmp_path: Path, answer: Callable[..., dict[str, Any]]) -> None:
    run = Recorded(tmp_path)
    run.attempt(1, [_report(n) for n in range(1, 6)], hours=1.0)
    values = answer(str(run.dir.path), "--step-s", "0.8", "--nodes", "16", "--process-mtbf-h", "inf")["values"]
    assert values["step_s"] == {"value": 0.8, "origin": "given"}
    assert values["nodes"] == {"value": 16, "origin": "given"}
    assert values["process_mtbf_h"] == {"value": None, "origin": "given"}


def test_what_nobody_knows_is_assumed_from_what_is_known(answer: Callable[..., dict[str, Any]]) -> None:
    found = answer("--step-s", "3", "--restore-s", "7", "--persist-s", "20", "--nodes", "2")
    assert {
        name: found["values"][name]["value"]
        for name in ("commit_s", "copy_s", "encode_s", "rebuild_s", "reload_s", "group", "parity")
    } == {
        "commit_s": 3.0,
        "copy_s": 3.0,
        "encode_s": 3.0,
        "rebuild_s": 10.0,
        "reload_s": 27.0,
        "group": 2,
        "parity": 1,
    }
    assert {value["origin"] for value in found["values"].values()} == {"given", "assumed default"}
    assert found["run"] is None


def test_a_run_without_steps_and_torn_lines_tells_what_it_can(
    tmp_path: Path, answer: Callable[..., dict[str, Any]]
) -> None:
    run = Recorded(tmp_path)
    assert answer(str(run.dir.path))["values"]["step_s"]["origin"] == "assumed default"
    run.attempt(1, [_report(1), _report(2, step_s=math.nan), _report(3)], hours=1.0)
    with run.dir.metrics_file.open("ab") as file:
        file.write(b'{"time": 1, "step": 4, "step_s": 77.0}\n[1]\n"x"\n\xff\n{"time": 2, "step"')
    run.happened(CheckpointWritten(50, "x", 1, 3.0))
    values = answer(str(run.dir.path))["values"]
    assert values["step_s"] == {"value": 0.5, "origin": "measured: median of 3 steps"}
    assert values["persist_s"]["value"] == 3.0


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_is_found_by_id_and_by_directory(tmp_path: Path, answer: Callable[..., dict[str, Any]]) -> None:
    run = Recorded(tmp_path, "mine")
    Recorded(tmp_path, "other")
    for words in (["mine", "--root", str(tmp_path)], [str(run.dir.path)]):
        assert answer(*words)["run"] == str(run.dir.path)


# -- input ------------------------------------------------------------------------------------------------------------


def test_all_problems_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["x", "--step-s=0", "--stall-s=-1", "--slowdown=1.5", "--detect-s=inf", "--restore-s=nan", "--persist-s=y"]
    assert main(["plan", *words, "--nodes=2", "--group=2", "--parity=2", "--root", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert [line.split()[1].partition("=")[0] for line in told.err.splitlines()] == [
        "--step-s",
        "--stall-s",
        "--persist-s",
        "--slowdown",
        "--detect-s",
        "--restore-s",
        "run",
        "parity",
    ]
    assert "--slowdown=1.5 must be a number from 0 to 1: share of its speed" in told.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "2.5"], "--nodes=2.5 must be a whole number of at least 1"),
        (["--nodes", "0"], "--nodes=0 must be a whole number"),
        (["--rack-mtbf-h", "0"], "of at least 0.001, or inf"),
        (["--mtbf", "3"], "unrecognized arguments: --mtbf.*see holdfast plan --help"),
        (["--step", "3"], "unrecognized arguments: --step"),
        (["--process-mtbf-h=inf", "--node-mtbf-h=inf", "--rack-mtbf-h=inf"], "nothing ever fails"),
        (["--process-mtbf-h", "0.001"], r"memory snapshot: one failure in 450 ms .* leave no time for training"),
        (["--rack-mtbf-h", "0.001"], r"durable checkpoint: one failure in 3.6 s"),
    ],
)
def test_impossible_input_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        plan(words)


def test_help_explains_every_option_with_its_unit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    listed = told.partition("options:")[2]
    for flag in "step stall commit copy encode persist detect restore rebuild reload reprotect".split():
        assert f"--{flag}-s S" in listed
    for flag in "process node rack".split():
        assert f"--{flag}-mtbf-h H mean hours between" in listed
    assert listed.count("(assumed: ") == 18


# -- advice -----------------------------------------------------------------------------------------------------------


def test_the_advice_is_that_of_the_formulas(answer: Callable[..., dict[str, Any]]) -> None:
    words = (
        "--step-s 2 --stall-s 0.1 --commit-s 4 --copy-s 3.5 --encode-s 3 --persist-s 40 --slowdown 0.05 "
        "--nodes 64 --group 8 --process-mtbf-h 500 --node-mtbf-h 4000 --rack-mtbf-h 20000"
    )
    found = answer(*words.split())
    layout = GroupLayout.of(64, 8, 1)
    beyond = unrecoverable_rate(layout, 4000, 0.25)
    expected = {
        "memory snapshot": (500 / 64, 0.1 + 0.05 * 3.5),
        "parity": (1 / (64 / 4000 - beyond), 0.05 * 3),
        "durable checkpoint": (1 / (beyond + 1 / 20000), 0.05 * 40),
    }
    assert [tier["name"] for tier in found["tiers"]] == list(expected)
    for tier, (mtbf_h, cost_s) in zip(found["tiers"], expected.values(), strict=True):
        assert tier["mtbf_h"] == pytest.approx(mtbf_h)
        assert tier["cost_s"] == pytest.approx(cost_s)
        for name, formula in (("young", young_interval_s), ("daly", daly_interval_s), ("exact", optimal_interval_s)):
            assert tier[f"{name}_s"] == pytest.approx(formula(cost_s, mtbf_h * _HOUR_S), rel=1e-6)
        assert tier["interval_s"] == tier["steps"] * 2
        assert tier["steps"] == pytest.approx(tier["exact_s"] / 2, rel=0.3)
    assert found["groups"]["unrecoverable_mtbf_h"] == pytest.approx(1 / beyond)
    assert found["groups"]["survival_of_losses"] == {str(k): survival_of_losses(layout, k) for k in (1, 2, 3)}
    assert found["groups"]["survival_of_a_month"] == pytest.approx(math.exp(-beyond * 730.5))
    assert sum(found["goodput"].values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "words", ["", "--nodes 1", "--parity 0", "--step-s 90 --nodes 512", "--stall-s 0 --slowdown 0"]
)
def test_the_settings_are_accepted_by_a_run(words: str, answer: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    found = answer(*words.split())["set"]
    snapshot = {key.removeprefix("snapshot."): steps for key, steps in found.items()}
    refuse_bad(RunConfig(root=str(tmp_path), snapshot=SnapshotConfig(**snapshot)))
    assert snapshot["persist_every_steps"] > 0


def test_free_saves_are_made_as_often_as_they_can_be(answer: Callable[..., dict[str, Any]]) -> None:
    words = "--stall-s 0 --slowdown 0 --step-s 1 --commit-s 2.5 --encode-s 4 --persist-s 31"
    assert [tier["steps"] for tier in answer(*words.split())["tiers"]] == [3, 6, 36]


def test_tiers_that_nothing_needs_are_left_out(answer: Callable[..., dict[str, Any]]) -> None:
    assert [tier["name"] for tier in answer("--parity", "0")["tiers"]] == ["memory snapshot", "durable checkpoint"]
    found = answer("--node-mtbf-h=inf", "--rack-mtbf-h=inf")
    assert [tier["name"] for tier in found["tiers"]] == ["memory snapshot"]
    assert found["set"]["snapshot.persist_every_steps"] == 0
    assert found["groups"]["unrecoverable_mtbf_h"] is None
    only_parity = answer("--process-mtbf-h=inf", "--rack-mtbf-h=inf")
    assert [tier["mtbf_h"] is None for tier in only_parity["tiers"]] == [True, False, False]


# -- output -----------------------------------------------------------------------------------------------------------


def test_the_table_names_every_value_and_what_to_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Recorded(tmp_path)
    run.attempt(1, [_report(n, copy_bytes=1, stall_s=0.002) for n in range(1, 413)], hours=1.0)
    told = _text(capsys, str(run.dir.path), "--slowdown", "0.1")
    heads = [line for line in told.splitlines() if line and not line.startswith("  ")]
    assert [head.split()[0] for head in heads] == ["plan", "values", "saves", "memory", "expected", "set"]
    lines = [" ".join(line.split()) for line in told.splitlines()]
    assert lines[0] == f"plan for run r1 ({run.dir.path})"
    assert "--step-s 500 ms measured: median of 412 steps" in lines
    assert "--slowdown 0.1 given" in lines
    assert "--persist-s 30 s assumed default" in lines
    assert "memory of 4 node(s) in 2 group(s) of 2, each survives the loss of 1" in lines
    assert any(line.startswith("random nodes lost at once survived with 1: 100 %, 2: 66.7 %, 3: 0 %") for line in lines)
    assert any(line.startswith("expected goodput 9") for line in lines)
    assert lines[-3].startswith("snapshot.every_steps=")
    assert lines[-2] == "the run has snapshot.every_steps=2 snapshot.persist_every_steps=50,"
    # A save costs 5 % of the interval it has now and 10 % of the time a checkpoint of 30 s is written.
    assert lines[-1].startswith("with which its expected goodput is ")
    now, advised = float(lines[-1].split()[-2]), float(next(x for x in lines if "goodput" in x).split()[-2])
    assert 80 < now < advised


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [("0", "0 s"), ("0.00002", "0.02 ms"), ("0.5", "500 ms"), ("59.4", "59.4 s"), ("90", "1.5 min"), ("3e5", "3.47 d")],
)
def test_times_are_readable(seconds: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f" --detect-s {shown} given" in " ".join(_text(capsys, "--detect-s", seconds, "--rack-mtbf-h=inf").split())


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Infinity" not in _text(capsys, "--json", "--node-mtbf-h=inf", "--process-mtbf-h=inf")


def test_nothing_heavy_is_loaded() -> None:
    code = "import sys; from holdfast.launch.cli import main; assert main(['plan']) == 0; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.splitlines()[-1].split())
    assert "holdfast.launch.plan_command" in loaded
    assert loaded & {"torch", "ray", "numpy", "pyarrow", "hydra", "omegaconf", "deepspeed", "wandb"} == set()
