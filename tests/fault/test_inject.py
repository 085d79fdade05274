"""Faults on purpose in real runs: each action strikes once, is recorded once, and costs what is documented."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from safetensors.torch import load_file

from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance import chaos
from holdfast.fault_tolerance.policy import DISK, LIVE, PARITY
from holdfast.launch.inject_command import inject
from holdfast.launch.run import train
from tests.support.drivers import Driver, records, run_dirs
from tests.support.runs import Outcome, events_of, outcome_of, tiny_config, write_corpus

pytestmark = pytest.mark.timeout(180)

_STEPS = 24


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Outcome:
    result = train(tiny_config(tmp_path_factory.mktemp("undisturbed"), corpus, steps=_STEPS, spares=0))
    assert result.exit_code == 0
    assert events_of(result.run_dir, "fault_injected") == []
    return outcome_of(result.run_dir)


def _config(root: Path, corpus: Path, *faults: str, persist_every: int = 0, **recovery: float) -> RunConfig:
    config = tiny_config(root, corpus, steps=_STEPS, faults=faults, **{"max_failures": 30, **recovery})
    config.snapshot.persist_every_steps = persist_every
    return config


def _differences(expected: Outcome, run_dir: Path) -> list[str]:
    """In losses and exported weights. The last checkpoint may be of an earlier step: after a strike near the end the
    keepers may not have agreed on the last version yet."""
    weights = load_file(run_dir / "export" / "model.safetensors")
    found = Outcome(_losses(run_dir), {}, {name: tensor.numpy().tobytes() for name, tensor in weights.items()})
    return replace(expected, state={}).differences(found)


def _losses(run_dir: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(run_dir / "metrics.jsonl") if "loss" in record}


def _injected(run_dir: Path) -> list[tuple[str, int]]:
    return [(e["action"], e["number"]) for e in events_of(run_dir, "fault_injected")]


def _scheduled(config: RunConfig) -> Counter[tuple[str, int]]:
    return Counter((fault.action.value, fault.number) for fault in chaos.parse_all(config.chaos.faults))


def _survived(config: RunConfig, undisturbed: Outcome) -> Path:
    """Run to the end: everything on the schedule has struck, once, and the result is that of a run without."""
    result = train(config)
    assert result.exit_code == 0
    assert Counter(_injected(result.run_dir)) == _scheduled(config)
    assert _differences(undisturbed, result.run_dir) == []
    return result.run_dir


def test_a_node_killed_with_keeper_and_worker_at_once_is_rebuilt_from_parity(
    tmp_path: Path, corpus: Path, undisturbed: Outcome
) -> None:
    config = _config(tmp_path, corpus, "node_sigkill node=1 step=4")
    assert config.snapshot.parity == 1
    run_dir = _survived(config, undisturbed)
    assert PARITY in [plan["source"] for plan in events_of(run_dir, "recovery_planned")]


@pytest.mark.flips
def test_whatever_happens_to_workers_leaves_no_trace_in_the_result(
    tmp_path: Path, corpus: Path, undisturbed: Outcome
) -> None:
    config = _config(
        tmp_path,
        corpus,
        "segv rank=0 step=2",
        "oom rank=1 step=4 at=step.after_backward",
        "clock_jump rank=2 step=5 by=-86400",
        "no_heartbeat rank=0 step=5 for=1",
        "flip rank=1 step=6",
        "sigkill rank=1 step=6",
        "flip rank=2 step=8 what=manifest",
        "abort rank=2 step=8",
        "sigterm rank=0 step=9",
    )
    run_dir = _survived(config, undisturbed)
    causes = [fault["cause"] for fault in events_of(run_dir, "fault_detected")]
    killed = [cause.split()[2] for cause in causes if cause.startswith("killed by")]
    assert killed == ["SIGSEGV", "SIGKILL", "SIGKILL", "SIGABRT", "SIGTERM"]
    assert all("is damaged" in cause for cause in causes if not cause.startswith("killed by"))
    assert "Out of memory: Killed process" in (run_dir / "logs" / "rank00001.attempt1.log").read_text()


def test_whatever_happens_to_keepers_leaves_no_trace_in_the_result(
    tmp_path: Path, corpus: Path, undisturbed: Outcome
) -> None:
    config = _config(
        tmp_path,
        corpus,
        "keeper_segv node=0 step=2",
        "keeper_sigkill node=1 step=4 at=keeper.before_vote",
        "keeper_exception node=2 step=5",
        "flip rank=1 step=6 what=parity",
        "slow_link step=6 mb_per_s=20 for=1",
        "keeper_sigstop node=2 step=7",
        suspect_after_s=2.0,  # all steps that are left take little longer, and nothing is committed meanwhile
    )
    _survived(config, undisturbed)


def test_a_fault_that_no_rank_died_of_costs_no_step_although_few_are_kept(
    tmp_path: Path, corpus: Path, undisturbed: Outcome
) -> None:
    config = _config(tmp_path, corpus, "keeper_sigkill node=1 step=10", "keeper_segv node=2 step=15")
    config.snapshot.every_steps = 8
    run_dir = _survived(config, undisturbed)
    plans, done = events_of(run_dir, "recovery_planned"), events_of(run_dir, "recovery_done")
    lost = [one["steps_lost"] for plan, one in zip(plans, done, strict=True) if plan["source"] == LIVE]
    assert lost in ([0], [0, 0])  # now and then a rank is not woken from its collective, and replaced


def test_a_frozen_node_is_replaced(tmp_path: Path, corpus: Path, undisturbed: Outcome) -> None:
    config = _config(tmp_path, corpus, "node_sigstop node=1 step=4", suspect_after_s=2.0, abort_after_s=2.0)
    _survived(config, undisturbed)


def test_a_full_disk_costs_checkpoints_and_a_damaged_one_is_not_believed(
    tmp_path: Path, corpus: Path, undisturbed: Outcome
) -> None:
    """Two nodes are more than the parity restores: what is on disk counts, and the newest there is damaged."""
    config = _config(
        tmp_path,
        corpus,
        "slow_disk step=1 mb_per_s=50 for=1",
        "flip_file rank=1 step=18 bit=4000",
        "disk_full step=18 for=600",
        "node_sigkill node=0 step=20",
        "node_sigkill node=1 step=20",
        persist_every=2,
    )
    result = train(config)
    assert Counter(_injected(result.run_dir)) == _scheduled(config)
    rejected = [event["reason"] for event in events_of(result.run_dir, "checkpoint_rejected")]
    assert any("no space left" in reason for reason in rejected)
    assert any("ShardCorrupt" in reason for reason in rejected)
    last, *_ = [plan for plan in reversed(events_of(result.run_dir, "recovery_planned")) if plan["source"] == DISK]
    assert any("ShardCorrupt" in reason for reason in last["rejected"])
    assert _losses(result.run_dir) == undisturbed.losses


@pytest.mark.slow
def test_a_driver_that_dies_on_purpose_is_continued_and_not_struck_again(
    tmp_path: Path, corpus: Path, undisturbed: Outcome
) -> None:
    config = _config(tmp_path, corpus, "driver_sigkill step=4", "driver_sigterm step=12", persist_every=2)
    first = Driver(config)
    try:
        assert first.await_end()[0] == -signal.SIGKILL
    finally:
        first.close()
    (run_dir,) = run_dirs(tmp_path)
    config.resume = run_dir.name
    assert train(config).exit_code == 75
    assert train(config).exit_code == 0
    assert _injected(run_dir) == [("driver_sigkill", 0), ("driver_sigterm", 0)]
    assert _differences(undisturbed, run_dir) == []


def test_a_storm_strikes_where_its_seed_says(tmp_path: Path, corpus: Path, undisturbed: Outcome) -> None:
    entry = "sigkill rate=0.05 seed=5 from=4 to=19"
    result = train(_config(tmp_path, corpus, entry))
    assert result.exit_code == 0
    rate = chaos.parse(entry).rate
    assert rate is not None
    told = {(e["number"], e["step"]) for e in events_of(result.run_dir, "fault_injected")}
    planned = {(rank, step) for rank in range(3) for step in range(_STEPS) if rate.strikes(rank, step)}
    assert told == planned == {(2, 6), (2, 16)}
    assert _differences(undisturbed, result.run_dir) == []


# -- holdfast inject --------------------------------------------------------------------------------------------------


@contextmanager
def _running(config: RunConfig) -> Iterator[tuple[Driver, Path]]:
    driver = Driver(config)
    try:
        driver.await_step(2)
        yield driver, run_dirs(Path(config.root))[0]
    finally:
        driver.close()


def _said(*words: str) -> tuple[int, str]:
    with redirect_stdout(StringIO()) as said:
        code = inject(words)
    return code, said.getvalue()


def test_faults_are_injected_into_a_run_that_is_going_on(tmp_path: Path, corpus: Path) -> None:
    config = _config(tmp_path, corpus)
    config.trainer.max_steps = 100_000
    with _running(config) as (driver, run_dir):
        where = str(run_dir)
        code, said = _said(where, "exception", "rank=1", "keeper_sigkill", "node=0")
        assert code == 0
        assert [line.split()[0] for line in said.splitlines()] == ["struck", "struck"]
        with pytest.raises(ConfigurationError, match="rank=9 does not exist"):
            inject([where, "sigkill rank=9"])
        with pytest.raises(ConfigurationError, match="step=0 has passed"):
            inject([where, "sigkill rank=0 step=0"])
        assert _said(where, "--no-wait", "driver_sigterm")[0] == 0
        assert driver.await_end()[0] == 75
    assert sorted(_injected(run_dir)) == [("driver_sigterm", 0), ("exception", 1), ("keeper_sigkill", 0)]
    assert all(e["source"].startswith("holdfast inject 00") for e in events_of(run_dir, "fault_injected"))
    with pytest.raises(ConfigurationError, match="is not being driven"):
        inject([where, "sigkill rank=1"])
