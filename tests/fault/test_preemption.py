"""Signals that reach the driver while the run does something that lasts longer than there is time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.configs.schema import RunConfig
from holdfast.launch.run import train
from holdfast.trainer import corpus as corpus_module
from tests.support.drivers import run_dirs, sound_record, until
from tests.support.runs import Outcome, events_of, outcome_of, tiny_config, write_corpus

pytestmark = pytest.mark.timeout(400)

_STEPS, _GRACE_S = 12, 8.0
_LAST_WORDS_S, _DEADLINE_S = 10.0, 150.0
"""For a loaded machine: to end processes and write down how the run ended, and to get as far as the signal."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Outcome:
    result = train(_config(tmp_path_factory.mktemp("reference"), corpus))
    assert result.exit_code == 0
    return outcome_of(result.run_dir)


def _config(root: Path, corpus: Path, **options: Any) -> RunConfig:
    config = tiny_config(
        root, corpus, **{"steps": _STEPS, "nodes": 2, "spares": 0, "stop_grace_s": _GRACE_S, **options}
    )
    config.resume, config.trainer.eval_every = "auto", 4
    config.data.cache = str(corpus.with_name("cache"))
    return config


class _Sender:
    """Sends a signal to this process once something has happened, and knows when that was."""

    def __init__(self, number: signal.Signals, when: Callable[[], object]) -> None:
        self.sent_s = 0.0
        self._number, self._when = number, when
        self._thread = threading.Thread(target=self._send)

    def _send(self) -> None:
        self._when()
        self.sent_s = time.monotonic()
        os.kill(os.getpid(), self._number)

    def __enter__(self) -> _Sender:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        assert time.monotonic() - self.sent_s < 1.1 * _GRACE_S + _LAST_WORDS_S, "the grace was not kept to"


def _once(root: Path, kind: str) -> Callable[[], object]:
    """Until the run below a root has told of something."""
    return lambda: until(lambda: any(_tells(d, kind) for d in run_dirs(root)), kind, _DEADLINE_S)


def _tells(run_dir: Path, kind: str) -> bool:
    events = run_dir / "events.jsonl"
    return events.exists() and f'"event": "{kind}"' in events.read_text()


@pytest.mark.parametrize(
    ("number", "faults", "saved"),
    [
        (signal.SIGUSR1, ["hang rank=1 step=5 at=step.after_backward"], 5),
        (signal.SIGTERM, ["hang rank=1 step=5 at=snapshot.before_commit"], 4),
        (signal.SIGTERM, ["hang rank=0 step=4 at=evaluate.begin"], 4),
    ],
    ids=["forward and backward", "vote", "evaluation"],
)
def test_a_step_that_lasts_longer_than_the_grace_does_not_matter(
    number: signal.Signals, faults: list[str], saved: int, tmp_path: Path, corpus: Path, reference: Outcome
) -> None:
    """What all ranks have finished before it is on disk while it still lasts."""
    config = _config(tmp_path, corpus, faults=faults)
    with _Sender(number, _once(tmp_path, "fault_injected")):
        stopped = train(config)
    assert (stopped.outcome, stopped.exit_code) == ("stopped", 75)
    assert stopped.step >= saved - 1
    (asked,) = events_of(stopped.run_dir, "stop_requested")
    written = events_of(stopped.run_dir, "checkpoint_written")
    assert written[0]["time"] - asked["time"] < _GRACE_S / 2, "before the ranks were given up"
    assert f"{number.name} received" in sound_record(stopped.run_dir)["ended"]["reason"]
    _continue(config, stopped.run_dir, reference)


@pytest.mark.slow
def test_a_signal_while_a_checkpoint_is_written_loses_neither_it_nor_what_came_later(
    tmp_path: Path, corpus: Path, reference: Outcome
) -> None:
    config = _config(tmp_path, corpus, faults=["hang rank=1 step=9"])
    config.snapshot.persist_every_steps, config.snapshot.persist_mb_per_s = 6, 0.6
    with _Sender(signal.SIGTERM, _once(tmp_path, "fault_injected")):
        stopped = train(config)
    assert (stopped.outcome, stopped.exit_code) == ("stopped", 75)
    steps = [event["step"] for event in events_of(stopped.run_dir, "checkpoint_written")]
    assert steps[0] >= 6, "on a busy machine a later one"
    assert steps[-1] == stopped.step >= 8
    _continue(config, stopped.run_dir, reference)


def test_a_signal_during_a_recovery_saves_what_parity_can_restore(
    tmp_path: Path, corpus: Path, reference: Outcome
) -> None:
    """A node is lost with its memory, and nothing is on disk."""
    config = _config(tmp_path, corpus, faults=["node_sigkill node=1 step=5"], stop_grace_s=60.0)
    with _Sender(signal.SIGTERM, _once(tmp_path, "fault_detected")):
        stopped = train(config)
    assert (stopped.outcome, stopped.exit_code) == ("stopped", 75)
    assert stopped.step >= 3
    assert not [event for event in events_of(stopped.run_dir, "epoch_started") if event["epoch"] > 1], "nobody trains"
    _continue(config, stopped.run_dir, reference)


def test_a_signal_before_anything_has_started_starts_nothing(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = corpus_module.prepare

    def interrupted(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return prepare(*args)

    monkeypatch.setattr(corpus_module, "prepare", interrupted)
    stopped = train(_config(tmp_path, corpus))
    assert (stopped.outcome, stopped.exit_code, stopped.step) == ("stopped", 143, -1)
    assert "SIGUSR1 received, before anything had started" in sound_record(stopped.run_dir)["ended"]["reason"]
    assert not list((stopped.run_dir / "logs").glob("rank*"))


def _continue(config: RunConfig, run_dir: Path, reference: Outcome) -> None:
    """The same words, and the bits of the run that nothing has happened to."""
    config.chaos.faults, config.snapshot.persist_mb_per_s = [], 0.0
    resumed = train(config)
    assert (resumed.run_dir, resumed.exit_code) == (run_dir, 0)
    assert reference.differences(outcome_of(run_dir)) == []
