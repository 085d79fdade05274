"""The oracle: whatever dies, the run ends with the same bits as a run that nothing happened to."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.launch.run import train
from holdfast.types import Precision
from tests.support.runs import Outcome, events_of, outcome_of, tiny_config, write_corpus

pytestmark = pytest.mark.timeout(180)

_STEPS = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


class Reference:
    """Undisturbed runs, one per (stage, precision), made when first asked for."""

    def __init__(self, root: Path, corpus: Path) -> None:
        self._root, self._corpus = root, corpus
        self._known: dict[tuple[int, Precision], Outcome] = {}

    def of(self, stage: int, precision: Precision) -> Outcome:
        key = (stage, precision)
        if key not in self._known:
            config = tiny_config(self._root, self._corpus, stage=stage, precision=precision, steps=_STEPS, spares=0)
            result = train(config)
            assert result.exit_code == 0
            assert not events_of(result.run_dir, "fault_detected")
            self._known[key] = outcome_of(result.run_dir)
        return self._known[key]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference"), corpus)


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (0, Precision.FP32),
        *(pytest.param(stage, Precision.BF16, marks=pytest.mark.slow) for stage in range(3)),
        (3, Precision.BF16),
    ],
)  # the sweep has the others
def test_each_rank_killed_in_turn_leaves_no_trace_in_the_result(
    stage: int, precision: Precision, tmp_path: Path, corpus: Path, reference: Reference
) -> None:
    faults = ["sigkill rank=0 step=2", "sigkill rank=1 step=4 at=step.after_backward", "sigkill rank=2 step=6"]
    result = train(tiny_config(tmp_path, corpus, stage=stage, precision=precision, steps=_STEPS, faults=faults))
    assert result.exit_code == 0
    assert [e["ranks"] for e in events_of(result.run_dir, "fault_detected")] == [[0], [1], [2]]
    assert all(e["steps_lost"] <= 1 for e in events_of(result.run_dir, "recovery_done"))
    assert reference.of(stage, precision).differences(outcome_of(result.run_dir)) == []


@pytest.mark.parametrize(
    "fault",
    ["sigkill rank=0 step=0 at=step.after_backward", "exception rank=2 step=4"],
    ids=["in the first step of all", "an exception instead of a kill"],
)
def test_a_fault_that_no_sweep_has_leaves_no_trace(
    fault: str, tmp_path: Path, corpus: Path, reference: Reference
) -> None:
    """Kills at every other moment are in ``test_sweep.py``."""
    result = train(tiny_config(tmp_path, corpus, steps=_STEPS, faults=[fault]))
    assert result.exit_code == 0
    assert events_of(result.run_dir, "recovery_done")
    assert reference.of(2, Precision.FP32).differences(outcome_of(result.run_dir)) == []


def test_a_torn_version_is_refused_and_the_one_before_is_used(tmp_path: Path, corpus: Path) -> None:
    config = tiny_config(tmp_path, corpus, faults=["sigkill rank=1 step=4 at=snapshot.mid_capture"])
    config.snapshot.persist_every_steps = 4  # so that it is not skipped, however slow the keepers are
    result = train(config)
    (plan,) = events_of(result.run_dir, "recovery_planned")
    assert plan["version"] <= 3  # 3, unless the keepers had no room for it
    assert any("4" in reason and "1" in reason for reason in plan["rejected"])


def test_a_frozen_rank_is_named_and_replaced(tmp_path: Path, corpus: Path, reference: Reference) -> None:
    config = tiny_config(tmp_path, corpus, steps=_STEPS, faults=["sigstop rank=1 step=4"], suspect_after_s=4.0)
    result = train(config)
    (fault,) = events_of(result.run_dir, "fault_detected")
    assert fault["ranks"] == [1]
    assert "heartbeat" in fault["cause"]
    assert fault["detected_after_s"] < 15
    assert reference.of(2, Precision.FP32).differences(outcome_of(result.run_dir)) == []


def test_a_keeper_killed_beside_living_workers_costs_no_step(
    tmp_path: Path, corpus: Path, reference: Reference
) -> None:
    result = train(tiny_config(tmp_path, corpus, steps=_STEPS, faults=["keeper_sigkill node=1 step=4"]))
    assert result.exit_code == 0
    (fault,) = events_of(result.run_dir, "fault_detected")
    assert (fault["node"], fault["ranks"]) == (1, [])
    assert all(e["steps_lost"] <= 1 for e in events_of(result.run_dir, "recovery_done"))
    assert reference.of(2, Precision.FP32).differences(outcome_of(result.run_dir)) == []
