"""A run from its configuration to its exit code: everything the driver does around the conductor."""

from __future__ import annotations

import contextlib
import logging
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast import knobs
from holdfast.clock import SystemClock
from holdfast.configs import layout as layouts
from holdfast.configs import validate
from holdfast.configs.memory import keeper_limit_bytes
from holdfast.configs.plain import to_plain
from holdfast.configs.protection import parity_ratio, protection_groups
from holdfast.configs.schema import LaunchKind, RunConfig
from holdfast.errors import ConfigurationError, HoldfastError, SnapshotError
from holdfast.events import Evaluated, Event, EventSink, FaultDetected, Generated, Protection, RunEnded, RunStarted
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.bricks import Brick, BrickFile, deal_bricks, groups_of, held_bytes
from holdfast.fault_tolerance.lanes import make_lanes
from holdfast.fault_tolerance.machine import Layout, Supervisor
from holdfast.fault_tolerance.protection import REDUCED
from holdfast.launch import identity
from holdfast.launch.banner import banner, ray_job_facts
from holdfast.launch.conductor import Conductor, Verdict
from holdfast.launch.console import Console
from holdfast.launch.crew import ProcessSpecs
from holdfast.launch.durable import DurableTier
from holdfast.launch.fleet import Fleet
from holdfast.launch.metrics_export import MetricsExport
from holdfast.launch.records import JsonlEvents, last_step
from holdfast.launch.report_command import write_report
from holdfast.launch.result import Result
from holdfast.launch.resume import Opening, checkpoints_uri, open_run
from holdfast.launch.run_dir import RunDir
from holdfast.launch.run_metrics import RunMetrics
from holdfast.launch.salvage import salvage, steps_between
from holdfast.launch.signals import StopSignals
from holdfast.trainer import corpus
from holdfast.trainer.metrics import MetricsFile
from holdfast.trainer.models import model_of
from holdfast.trainer.snapshot_cost import CostMeter
from holdfast.trainer.token_store import TokenStore
from holdfast.trainer.trackers import Tracker, build_tracker
from holdfast.types import StepReport

if TYPE_CHECKING:
    from holdfast.trainer.adapting import Bricks

__all__ = ["Result", "run", "train"]

logger = logging.getLogger(__name__)

_UNEXPECTED, _BAD_CONFIGURATION, _SAVED, _DO_NOT_RESTART = 1, 2, 75, 93
"""Exit codes, see :mod:`holdfast.launch.cli`. A stop without a checkpoint ends with the signal's own."""
_OVERTIME = 1.1
"""Of the grace, in which the conductor ends the run if it can; then it is interrupted, whatever it waits for."""

_QUICKLY_REPORTED_BYTES = 64 << 20
"""Of metrics, at most, for a run to write its report itself: some seconds, and a few hundred MB of memory."""


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
    material = _material(config)
    plain = {key: value for key, value in to_plain(config).items() if key != "adapter" or config.adapter.method}
    digest = identity.config_digest({**plain, **material.digests, **_choosing(config), **_model_digest(config)})
    opening = open_run(config, digest)
    if opening.is_finished:
        return _nothing_to_do(opening)
    with opening.run_dir.lock():
        try:
            drive = _Drive(config, opening, material, digest, overrides, command)
        except SnapshotError as error:  # nothing has started yet
            raise ConfigurationError(f"run {opening.run_dir.run_id} cannot be driven: {error}") from error
        return drive.to_the_end(signals)


def _model_digest(config: RunConfig) -> dict[str, object]:
    """What the configuration does not say about the model. Weights that it begins with are not in it: a run that is
    continued does not read them."""
    digest = model_of(config.model).digest
    return {"architecture": digest} if digest else {}


@dataclass(frozen=True, slots=True)
class _Material:
    """What a run reads and never writes."""

    store: TokenStore
    seen: Mapping[str, TokenStore]
    bricks: Bricks | None

    @property
    def frozen(self) -> Sequence[BrickFile]:
        return () if self.bricks is None else self.bricks.files

    @property
    def digests(self) -> dict[str, object]:
        """Besides the configuration they decide what is computed."""
        frozen = {} if self.bricks is None else {"bricks": self.bricks.digests}
        return {"text": self.store.digest, **frozen}


def _material(config: RunConfig) -> _Material:
    cache = Path(config.data.cache or Path(config.root, "cache"))
    seen = {
        name: corpus.prepare(replace(config.data, path=str(path)), cache) for name, path in config.adapter.seen.items()
    }
    bricks = None
    if config.adapter.method:
        from holdfast.trainer.adapting import find_bricks  # loads torch

        try:
            bricks = find_bricks(config.adapter)
        except SnapshotError as error:  # damage; nothing has started yet
            raise ConfigurationError(str(error)) from error
    return _Material(corpus.prepare(config.data, cache), seen, bricks)


def _choosing(config: RunConfig) -> dict[str, object]:
    """Evaluations change no state unless they choose it."""
    trainer = config.trainer
    return {"evaluations": [trainer.eval_every, trainer.eval_windows]} if config.adapter.keep_best else {}


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
    """One attempt of a run."""

    def __init__(
        self,
        config: RunConfig,
        opening: Opening,
        material: _Material,
        digest: str,
        overrides: Sequence[str],
        command: Sequence[str],
    ) -> None:
        self._config, self._opening, self._material, self._digest = config, opening, material, digest
        self._run_dir, self._plain = opening.run_dir, to_plain(config)
        self._ray_job, before = knobs.ray_job(), self._run_dir.record()["attempts"]
        self._is_cut_off = bool(before) and before[-1]["ended"] is None
        """The driver before this one has died."""
        self._attempt = self._run_dir.begin_attempt(
            config=self._plain,
            overrides=overrides,
            command=command,
            versions=identity.versions(),
            git=identity.git_commit(Path.cwd()),
            ray_job=self._ray_job.submission_id if self._ray_job else None,
            data=corpus.describe(material.store),
        )
        self._overrides, self._command = overrides, command
        self._started_s = time.monotonic()
        self._result: Result | None = None

    def to_the_end(self, signals: StopSignals) -> Result:
        """Drive, and note the end, whatever it is."""
        try:
            with _driver_log(self._run_dir.driver_log(self._attempt)):
                return self._with_console(signals)
        except BaseException as error:
            if self._result is None or isinstance(error, Exception):
                raise
            return self._result  # a second signal, which has only cut the farewell short

    def _with_console(self, signals: StopSignals) -> Result:
        trainer = self._config.trainer
        with Console(total_steps=trainer.max_steps, log_every=trainer.log_every) as console:
            config = self._config
            tracker = build_tracker(
                config.tracker,
                run_id=self._run_dir.run_id,
                project=config.project,
                directory=self._run_dir.path,
                plain_config=self._plain,
                attempt=self._attempt,
                checkpoints=checkpoints_uri(config, self._run_dir),
                group=identity.experiment(self._overrides),
                on_stop=signals.ask,
            )
            export = MetricsExport(
                RunMetrics(
                    run_id=self._run_dir.run_id, attempt=self._attempt, max_failures=config.recovery.max_failures
                )
            )
            sinks = _Sinks(self._run_dir, self._attempt, console, tracker, export)
            material = self._material
            facts = banner(config, self._run_dir, self._attempt, material.store, self._opening.how, material.bricks)
            facts = {**facts, **ray_job_facts(self._ray_job, knobs.ray_stop_wait_s())}
            console.banner(facts)
            try:
                return self._conduct(signals, console, tracker, sinks)
            except BaseException as error:  # not swallowed: only noted where the next attempt and the user look
                logger.error("this attempt ends with an error", exc_info=isinstance(error, Exception))
                if self._result is None:
                    self._conclude(_verdict_on(error, signals), console, sinks)
                raise
            finally:
                tracker.finish()

    def _conduct(self, signals: StopSignals, console: Console, tracker: Tracker, sinks: _Sinks) -> Result:
        if signals.reason is not None:
            return self._conclude(self._not_begun(signals, sinks), console, sinks)
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, self._run_dir.path / "rendezvous", ignore_errors=True)
            fleet = _make_fleet(self._config, self._tag(self._attempt))
            stack.callback(fleet.close)
            signals.install()  # again: a library that starts processes may have put its own handlers there
            self._refuse_other_disks(fleet)
            tracker.start(fleet.metrics_endpoints())
            how = self._opening.how + self._salvaged(fleet, sinks)
            conductor = self._conductor(fleet, sinks)
            stack.enter_context(sinks.export.to(fleet.meter(), parity_s=conductor.parity_s))
            signals.then(conductor.stop)
            sinks.emit(RunStarted(self._run_dir.run_id, self._attempt, _world(self._config), how))
            return self._conclude(_drive(conductor, signals), console, sinks)

    def _tag(self, attempt: int) -> str:
        return f"{self._run_dir.run_id[-48:]}-a{attempt}"

    def _refuse_other_disks(self, fleet: Fleet) -> None:
        """Raises: ConfigurationError naming the nodes that do not see the run's directory, or not our version."""
        word, marker = secrets.token_hex(16), self._run_dir.path / "rendezvous" / "marker"
        marker.parent.mkdir(exist_ok=True)
        marker.write_text(word)
        problems = fleet.unshared(marker, word)
        if problems:
            raise ConfigurationError(problems)

    def _salvaged(self, fleet: Fleet, sinks: _Sinks) -> str:
        """What the attempt before has left in memory is brought to storage; in words, for the record."""
        before = self._attempt - 1
        keepers = fleet.adopt(self._tag(before)) if self._is_cut_off else ()
        if not keepers:
            return ""
        deadline_s = self._config.recovery.stop_grace_s
        left = salvage(fleet, keepers, self._durable(sinks), clock=SystemClock(), deadline_s=deadline_s)
        for report in steps_between(left.reports, last_step(self._run_dir.metrics_file), left.step):
            sinks.step(report)
        found = f"step {left.step:,} is in storage now" if left.is_written else "what storage has is as new"
        return f"\nkeepers of attempt {before} have outlived its driver; {found}"

    def _not_begun(self, signals: StopSignals, sinks: _Sinks) -> Verdict:
        """Somebody wanted to stop before there was a process to stop; earlier attempts may have left a checkpoint."""
        durable = self._durable(sinks)
        durable.survey()
        step, why = durable.newest_step, f"{signals.reason}, before anything had started"
        code = _SAVED if step >= 0 else signals.exit_code
        return Verdict("stopped", code, why, step=step, faults=0, steps_lost=0, findings={}, saved=step)

    def _durable(self, sinks: _Sinks) -> DurableTier:
        config, world = self._config, _world(self._config)
        return DurableTier(
            checkpoints_uri(config, self._run_dir),
            config.snapshot,
            world=world,
            config_digest=self._digest,
            events=sinks,
            layout=identity.layout(config.parallel, world=world),
        )

    def _conductor(self, fleet: Fleet, sinks: _Sinks) -> Conductor:
        config, clock = self._config, SystemClock()
        layout = self._layout(fleet, sinks)
        bricks = self._bricks(layout)
        return Conductor(
            config,
            fleet=fleet,
            supervisor=Supervisor(layout, config.recovery, now=clock.now()),
            layout=layout,
            specs=self._specs(bricks),
            durable=self._durable(sinks),
            run_dir=self._run_dir.path,
            events=sinks,
            on_step=sinks.step,
            clock=clock,
            bricks=[brick for brick in bricks.values() if brick.nodes],
        )

    def _bricks(self, layout: Layout) -> Mapping[str, Brick]:
        """What is frozen by its digest, and who holds it."""
        files, config = self._material.frozen, self._config
        if not config.adapter.in_memory:
            return {file.digest: Brick(file) for file in files}
        dealt = deal_bricks(files, groups_of(layout.lanes, config.launch.workers_per_node))
        return {brick.file.digest: brick for brick in dealt}

    def _layout(self, fleet: Fleet, sinks: EventSink) -> Layout:
        """Where everything goes; says what nodes that protect each other have in common."""
        config = self._config
        zones = config.launch.zones or fleet.zones(config.launch.nodes)
        grouping = protection_groups(config, zones)
        for warning in grouping.warnings:
            sinks.emit(Protection(REDUCED, warning))
        return Layout(
            nodes=config.launch.nodes,
            workers_per_node=config.launch.workers_per_node,
            spares=config.launch.spares,
            hosts=tuple(fleet.hosts(config.launch.nodes)),
            lanes=make_lanes(grouping.groups, config.launch.workers_per_node, grouping.parity),
            zones=tuple(zones),
            group_size=config.snapshot.group_size,
            parity=config.snapshot.parity,
            stages=layouts.stage_facts(config),
            replicas_every=layouts.replicas_every(config.parallel),
            batch_parts=config.trainer.global_batch // config.trainer.micro_batch,
        )

    def _specs(self, bricks: Mapping[str, Brick]) -> ProcessSpecs:
        config = self._config
        frozen = max(held_bytes(list(bricks.values()), node) for node in range(config.launch.nodes))
        return ProcessSpecs(
            worker={
                "config": self._plain,
                "run_dir": str(self._run_dir.path),
                "attempt": self._attempt,
                "store": str(self._material.store.path),
                "seen": {name: str(store.path) for name, store in self._material.seen.items()},
                "bricks": [asdict(replace(bricks[file.digest], file=file)) for file in self._material.frozen],
                "config_digest": self._digest,
            },
            keeper={
                "run_tag": self._tag(self._attempt),
                "limit_bytes": max(keeper_limit_bytes(config, validate.this_host()) - frozen, 0),
                "buffers": config.snapshot.buffers,
                "lease_s": config.recovery.lease_s,
                "token": secrets.token_hex(16),
                "parity_ratio": parity_ratio(config),
                "persist_mb_per_s": config.snapshot.persist_mb_per_s,
            },
        )

    def _conclude(self, verdict: Verdict, console: Console, sinks: _Sinks) -> Result:
        """Tell everybody how it ended, the console last."""
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
        facts = _what_is_saved(verdict) | _world_of(verdict, config=self._config)
        facts |= {"run": str(self._run_dir.path)} | self._record(verdict)
        self._result = Result(
            verdict.outcome, verdict.exit_code, verdict.step, verdict.reason, self._run_dir.path, found
        )
        console.conclude(facts, next_command=self._next(verdict))  # already: a signal may cut the report short
        console.conclude(facts | self._report(), next_command=self._next(verdict))
        return self._result

    def _report(self) -> dict[str, str]:
        """Where the report is. A run is worth more than its report, so that nothing in here can fail it."""
        try:
            metrics = self._run_dir.metrics_file
            if metrics.exists() and metrics.stat().st_size > _QUICKLY_REPORTED_BYTES:
                return {"report": f"holdfast report {self._run_dir.path}"}
            return {"report": str(write_report(self._run_dir, self._run_dir.path / "report.html")[0])}
        except Exception:  # the log learns of it
            logger.exception("the report was not written; holdfast report %s tries it again", self._run_dir.path)
            return {}

    def _record(self, verdict: Verdict) -> dict[str, str]:
        """What the user must be told if ``run.json`` could not be told."""
        try:
            self._run_dir.end_attempt(
                verdict.outcome,
                verdict.exit_code,
                step=verdict.step,
                reason=verdict.reason,
                world=len(verdict.nodes) * self._config.launch.workers_per_node,
                findings=verdict.findings,
            )
        except HoldfastError as error:  # a full disk; that makes the run no worse than it is
            return {"record": f"run.json does not know how it ended: {error}"}
        return {}

    def _next(self, verdict: Verdict) -> str:
        if verdict.outcome == "finished" and self._command[:2] == ("holdfast", "adapt"):
            return ""  # the next domain follows by itself
        if verdict.outcome == "finished":
            return self._again({"trainer.max_steps": str(2 * self._config.trainer.max_steps)})
        if verdict.exit_code in (_UNEXPECTED, _DO_NOT_RESTART) and "not_exported" not in verdict.findings:
            return f"tail -n 50 {self._run_dir.driver_log(self._attempt)}"
        return self._again({})

    def _again(self, changes: Mapping[str, str]) -> str:
        return _with_changes(self._command, self._overrides, {"run_id": self._run_dir.run_id, **changes})


def _with_changes(command: Sequence[str], overrides: Sequence[str], changes: Mapping[str, str]) -> str:
    """What continues a run: the same options, because others would make another run."""
    if tuple(command[:2]) == ("holdfast", "adapt"):  # which names the run itself
        return shlex.join(command)
    new = [f"{key}={value}" for key, value in changes.items()]
    if tuple(command[:2]) != ("holdfast", "train"):
        return f"the same configuration with {', '.join(new)}"
    # In a sweep the words typed mean several runs, the overrides only this one.
    typed = command[2:] if set(overrides) <= set(command) else overrides
    kept = [word for word in typed if word.partition("=")[0] not in {"resume", *changes}]
    return shlex.join(["holdfast", "train", *kept, *new])


def _drive(conductor: Conductor, signals: StopSignals) -> Verdict:
    try:
        verdict = conductor.run()
    except (KeyboardInterrupt, SystemExit):
        if not signals.is_overdue:
            return conductor.leave(signals.exit_code, "a second signal")
        verdict = conductor.leave(signals.exit_code, f"{signals.reason}; the grace is over")
    if verdict.outcome == "stopped":
        return replace(verdict, exit_code=_SAVED if verdict.step >= 0 else signals.exit_code)
    why = verdict.findings.get("not_exported")
    if why is None:
        return verdict
    reason = f"the goal is reached, but the weights are not exported: {why}; the same command tries it again"
    return replace(verdict, outcome="failed", exit_code=_UNEXPECTED, reason=reason)


def _what_is_saved(verdict: Verdict) -> dict[str, str]:
    facts = {"weights": str(verdict.findings["weights"])} if "weights" in verdict.findings else {}
    if verdict.saved is None:
        return facts
    if verdict.saved < 0:
        return {"saved": "no checkpoint", **facts}
    and_later = ", and nothing later" if verdict.saved < verdict.step else ""
    return {"saved": f"checkpoint of step {verdict.saved:,}, {checkpoint.directory(verdict.saved)}{and_later}", **facts}


def _world_of(verdict: Verdict, *, config: RunConfig) -> dict[str, str]:
    """Worth a line if nodes were missing at the end."""
    launch, nodes = config.launch, verdict.nodes
    if not 0 < len(nodes) < launch.nodes:
        return {}
    missing = ", ".join(str(node) for node in range(launch.nodes) if node not in nodes)
    return {"world": f"{len(nodes) * launch.workers_per_node} of {_world(config)} ranks; node(s) {missing} are missing"}


def _verdict_on(error: BaseException, signals: StopSignals) -> Verdict:
    """How a run ended that the conductor did not bring to its end."""
    outcome, exit_code, reason = "failed", _UNEXPECTED, f"{type(error).__name__}: {error}"
    if isinstance(error, ConfigurationError):
        exit_code, reason = _BAD_CONFIGURATION, "; ".join(error.problems)
    elif not isinstance(error, Exception):
        outcome, exit_code, reason = "stopped", signals.exit_code, "a second signal, before anything had started"
    return Verdict(outcome, exit_code, reason, step=-1, faults=0, steps_lost=0, findings={})


def _world(config: RunConfig) -> int:
    return config.launch.nodes * config.launch.workers_per_node


def _make_fleet(config: RunConfig, tag: str) -> Fleet:
    if config.launch.kind is LaunchKind.PROCESS:
        from holdfast.launch.process_fleet import ProcessFleet

        return ProcessFleet()
    from holdfast.launch.ray_fleet import RayFleet  # importing ray takes a second

    return RayFleet(config.launch, tag, doubt_s=config.recovery.suspect_after_s / 2)


class _Sinks(EventSink):
    """Whoever wants to know what happens: the files first, because they are the truth."""

    def __init__(
        self, run_dir: RunDir, attempt: int, console: Console, tracker: Tracker, export: MetricsExport
    ) -> None:
        self._run_dir, self._attempt, self._console, self._tracker = run_dir, attempt, console, tracker
        self._events = JsonlEvents(run_dir.events_file)
        self._metrics = MetricsFile(run_dir.metrics_file, attempt=attempt)
        self._cost, self.export = CostMeter(), export

    def conclude(self) -> None:
        """What snapshots have cost, once nothing more will come."""
        cost = self._cost.cost()
        if cost is not None:
            self.emit(cost)

    def emit(self, event: Event) -> None:
        self._events.emit(event)
        if isinstance(event, Evaluated):
            self._metrics.note({"step": event.step, "validation_bits_per_byte": event.bits_per_byte})
        if isinstance(event, FaultDetected):
            self._keep_evidence(event)
        self._tracker.emit(event)
        self.export.emit(event)
        self._console.emit(event)

    def step(self, report: StepReport) -> None:
        self._cost.note(report)
        self._metrics.write(report)
        self._tracker.log_step(report)
        self.export.step(report)
        self._console.step(report)

    def _keep_evidence(self, fault: FaultDetected) -> None:
        logs = [self._run_dir.rank_log(rank, self._attempt) for rank in fault.ranks]
        self._run_dir.record_failure(fault.number, asdict(fault), [*logs, self._run_dir.driver_log(self._attempt)])


@contextmanager
def _driver_log(path: Path) -> Iterator[None]:
    """Send the log of this package, and of nothing else, to the attempt's file."""
    package, handler = logging.getLogger("holdfast"), _LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before = package.level, package.propagate
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.level, package.propagate = before
        with contextlib.suppress(OSError):  # what the disk has no room for is lost; the run's end is not
            handler.close()


class _LogFile(logging.FileHandler):
    """Leaves out what cannot be written. Its troubles belong neither on the console nor to the run."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        """Called where ``emit`` has failed."""
