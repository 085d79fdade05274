"""A run from its configuration to its exit code: everything the driver does around the conductor."""

from __future__ import annotations

import logging
import secrets
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from holdfast import knobs
from holdfast.clock import SystemClock
from holdfast.configs import validate
from holdfast.configs.layout import world
from holdfast.configs.plain import to_plain
from holdfast.configs.schema import LaunchKind, RunConfig
from holdfast.errors import ConfigurationError, SnapshotError
from holdfast.events import Evaluated, Generated, RunEnded, RunStarted
from holdfast.launch import farewell, identity
from holdfast.launch.attempt import Attempt, begin
from holdfast.launch.banner import banner, ray_job_facts
from holdfast.launch.conductor import Verdict
from holdfast.launch.console import Console
from holdfast.launch.ending import drive, not_begun, verdict_on
from holdfast.launch.fleet import Fleet
from holdfast.launch.material import material_of, run_digest
from holdfast.launch.metrics_export import MetricsExport
from holdfast.launch.records import last_step
from holdfast.launch.result import Result
from holdfast.launch.resume import Opening, checkpoints_uri, open_run
from holdfast.launch.run_metrics import RunMetrics
from holdfast.launch.salvage import salvage, steps_between
from holdfast.launch.signals import StopSignals
from holdfast.launch.sinks import Sinks, driver_log
from holdfast.trainer.trackers import Tracker, build_tracker

__all__ = ["Result", "run", "train"]

logger = logging.getLogger(__name__)

_OVERTIME = 1.1
"""Of the grace, in which the conductor ends the run if it can; then it is interrupted, whatever it waits for."""


def train(config: RunConfig | Sequence[str] = ()) -> Result:
    """Train as ``holdfast train`` would; from a script or a notebook, in any thread, inside a running event loop too.

    ``config`` is a list of the words that ``holdfast train`` takes, ``["model=10m", "trainer.max_steps=2000"]``, or a
    ``RunConfig``. In the main thread Ctrl-C and SIGTERM stop the run at the next step boundary; in another one they are
    the caller's. A script needs no ``if __name__ == "__main__"``.

    Raises: ConfigurationError with every mistake, before anything has started.
    """
    if isinstance(config, RunConfig):
        return run(config, overrides=(), command=("holdfast.train",))
    if isinstance(config, str):
        raise ConfigurationError(f"holdfast.train({config!r}) takes a list of words: holdfast.train([{config!r}])")
    from holdfast.launch.compose import compose_config  # Hydra, for those who use its words

    words = list(config)
    return run(compose_config(words), overrides=words, command=("holdfast", "train", *words))


def run(config: RunConfig, *, overrides: Sequence[str], command: Sequence[str]) -> Result:
    """Check, find or make the run, drive it to its end. Raises: ConfigurationError before anything has started."""
    config = replace(config, root=config.root or str(knobs.home()))
    validate.refuse_bad(config)
    with StopSignals(_OVERTIME * config.recovery.stop_grace_s) as signals:
        return _run(config, overrides, command, signals)


def _run(config: RunConfig, overrides: Sequence[str], command: Sequence[str], signals: StopSignals) -> Result:
    material = material_of(config)
    digest = run_digest(config, material)
    opening = open_run(config, digest)
    if opening.is_finished:
        return _nothing_to_do(opening)
    with opening.run_dir.lock():
        try:
            attempt = begin(config, opening.run_dir, material, digest, overrides, command)
        except SnapshotError as error:  # nothing has started yet
            raise ConfigurationError(f"run {opening.run_dir.run_id} cannot be driven: {error}") from error
        return _Drive(attempt, opening.how).to_the_end(signals)


def _nothing_to_do(opening: Opening) -> Result:
    ended = opening.run_dir.record()["ended"]
    sys.stdout.write(
        f"run {opening.run_dir.run_id} is finished: step {ended['step']} was its goal; nothing to do.\n"
        f"To go farther: holdfast train run_id={opening.run_dir.run_id} trainer.max_steps={2 * ended['step']} "
        "and the options it was started with\n"
    )
    findings = ended.get("findings", {})
    return Result("finished", 0, int(ended["step"]), "the goal was reached before", opening.run_dir.path, findings)


class _Drive:
    """Drives one attempt of a run."""

    def __init__(self, attempt: Attempt, how: str) -> None:
        self._attempt, self._how = attempt, how
        self._config, self._run_dir = attempt.config, attempt.run_dir
        self._started_s = time.monotonic()
        self._result: Result | None = None

    def to_the_end(self, signals: StopSignals) -> Result:
        """Drive, and note the end, whatever it is."""
        try:
            with driver_log(self._run_dir.driver_log(self._attempt.number)):
                return self._with_console(signals)
        except BaseException as error:
            if self._result is None or isinstance(error, Exception):
                raise
            return self._result  # a second signal, which has only cut the farewell short

    def _with_console(self, signals: StopSignals) -> Result:
        trainer = self._config.trainer
        with Console(total_steps=trainer.max_steps, log_every=trainer.log_every) as console:
            tracker = self._tracker(signals)
            sinks = Sinks(self._run_dir, self._attempt.number, console, tracker, self._export())
            console.banner(self._first_facts())
            try:
                return self._conduct(signals, console, tracker, sinks)
            except BaseException as error:  # not swallowed: only noted where the next attempt and the user look
                logger.error("this attempt ends with an error", exc_info=isinstance(error, Exception))
                if self._result is None:
                    self._conclude(verdict_on(error, signals), console, sinks)
                raise
            finally:
                tracker.finish()

    def _tracker(self, signals: StopSignals) -> Tracker:
        config = self._config
        return build_tracker(
            config.tracker,
            run_id=self._run_dir.run_id,
            project=config.project,
            directory=self._run_dir.path,
            plain_config=to_plain(config),
            attempt=self._attempt.number,
            checkpoints=checkpoints_uri(config, self._run_dir),
            group=identity.experiment(self._attempt.overrides),
            on_stop=signals.ask,
        )

    def _export(self) -> MetricsExport:
        failures = self._config.recovery.max_failures
        return MetricsExport(
            RunMetrics(run_id=self._run_dir.run_id, attempt=self._attempt.number, max_failures=failures)
        )

    def _first_facts(self) -> Mapping[str, str]:
        material = self._attempt.material
        facts = banner(self._config, self._run_dir, self._attempt.number, material.store, self._how, material.bricks)
        return {**facts, **ray_job_facts(knobs.ray_job(), knobs.ray_stop_wait_s())}

    def _conduct(self, signals: StopSignals, console: Console, tracker: Tracker, sinks: Sinks) -> Result:
        if signals.reason is not None:
            return self._conclude(not_begun(self._attempt.durable(sinks), signals), console, sinks)
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, self._run_dir.path / "rendezvous", ignore_errors=True)
            fleet = _make_fleet(self._config, self._attempt.tag)
            stack.callback(fleet.close)
            signals.install()  # again: a library that starts processes may have put its own handlers there
            self._refuse_other_disks(fleet)
            tracker.start(fleet.metrics_endpoints())
            how = self._how + self._salvaged(fleet, sinks)
            conductor = self._attempt.conductor(fleet, sinks)
            stack.enter_context(sinks.export.to(fleet.meter(), parity_s=conductor.parity_s))
            signals.then(conductor.stop)
            sinks.emit(RunStarted(self._run_dir.run_id, self._attempt.number, world(self._config), how))
            return self._conclude(drive(conductor, signals), console, sinks)

    def _refuse_other_disks(self, fleet: Fleet) -> None:
        """Raises: ConfigurationError naming the nodes that do not see the run's directory, or not our version."""
        word, marker = secrets.token_hex(16), self._run_dir.path / "rendezvous" / "marker"
        marker.parent.mkdir(exist_ok=True)
        marker.write_text(word)
        problems = fleet.unshared(marker, word)
        if problems:
            raise ConfigurationError(problems)

    def _salvaged(self, fleet: Fleet, sinks: Sinks) -> str:
        """What the attempt before has left in memory is brought to storage; in words, for the record."""
        attempt = self._attempt
        keepers = fleet.adopt(attempt.tag_before) if attempt.is_after_death else ()
        if not keepers:
            return ""
        deadline_s = self._config.recovery.stop_grace_s
        left = salvage(fleet, keepers, attempt.durable(sinks), clock=SystemClock(), deadline_s=deadline_s)
        for report in steps_between(left.reports, last_step(self._run_dir.metrics_file), left.step):
            sinks.step(report)
        found = f"step {left.step:,} is in storage now" if left.is_written else "what storage has is as new"
        return f"\nkeepers of attempt {attempt.number - 1} have outlived its driver; {found}"

    def _conclude(self, verdict: Verdict, console: Console, sinks: Sinks) -> Result:
        """Tell everybody how it ended, the console last."""
        self._emit_end(verdict, sinks)
        facts = farewell.what_is_saved(verdict) | farewell.world_of(verdict, config=self._config)
        facts |= {"run": str(self._run_dir.path)} | farewell.record(verdict, self._attempt)
        self._result = Result(
            verdict.outcome, verdict.exit_code, verdict.step, verdict.reason, self._run_dir.path, verdict.findings
        )
        next_command = farewell.next_command(verdict, self._attempt)
        console.conclude(facts, next_command=next_command)  # already: a signal may cut the report short
        console.conclude(facts | farewell.report(self._run_dir), next_command=next_command)
        return self._result

    def _emit_end(self, verdict: Verdict, sinks: Sinks) -> None:
        found = verdict.findings
        sinks.conclude()
        if found:
            sinks.emit(Evaluated(verdict.step, float(str(found["bits_per_byte"])), int(str(found["windows"]))))
            sinks.emit(Generated(verdict.step, str(found["text"])))
        sinks.emit(
            RunEnded(
                verdict.outcome,
                verdict.step,
                time.monotonic() - self._started_s,
                verdict.faults,
                verdict.steps_lost,
                verdict.exit_code,
                verdict.reason,
                verdict.preemptions,
            )
        )


def _make_fleet(config: RunConfig, tag: str) -> Fleet:
    if config.launch.kind is LaunchKind.PROCESS:
        from holdfast.launch.process_fleet import ProcessFleet

        return ProcessFleet()
    from holdfast.launch.ray_fleet import RayFleet  # importing ray takes a second

    return RayFleet(config.launch, tag, doubt_s=config.recovery.suspect_after_s / 2)
