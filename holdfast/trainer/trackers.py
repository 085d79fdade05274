"""Experiment trackers, which only show what ``metrics.jsonl`` and ``events.jsonl`` hold. The only door to wandb.

W&B runs in a helper process of its own, fed by a thread through a bounded queue. So whatever it does (hang, crash,
patch ``sys.exit``, ask for a login), the run neither waits nor ends for it, and it can be killed. A second
``init`` for the same id in one process would be refused, too: falling back to offline needs a fresh one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Protocol, cast

from holdfast import knobs
from holdfast.events import (
    Evaluated,
    Event,
    FaultDetected,
    RecoveryDone,
    RunEnded,
    StageRebuilt,
    StopRequested,
    WorldChanged,
)
from holdfast.trainer.config import TrackerConfig, TrackerName, WandbMode
from holdfast.types import StepReport

__all__ = ["MemoryTracker", "NullTracker", "Tracker", "WandbPlan", "WandbTracker", "build_tracker", "serve"]

logger = logging.getLogger(__name__)

_QUEUE = 4096
_POLL_S = 0.2
_START_GRACE_S = 30.0
"""For starting the helper and importing wandb, on top of the time W&B gets to answer."""
_FINISH_GRACE_S = 3.0
_OFFLINE = "offline"


class Tracker(Protocol):
    """Follows a run from the driver's thread; an event sink. Only ``finish`` may block, and not for long."""

    def start(self) -> None:
        """Once the processes of the run are up."""
        ...

    def log_step(self, report: StepReport) -> None: ...

    def emit(self, event: Event) -> None: ...

    def finish(self) -> None:
        """Bring what was logged home, as far as the configured seconds allow. May be called again."""
        ...


class NullTracker:
    """Follows nothing."""

    def start(self) -> None:
        return

    def log_step(self, report: StepReport) -> None:
        return

    def emit(self, event: Event) -> None:
        return

    def finish(self) -> None:
        return


class MemoryTracker:
    """Keeps everything, for tests and notebooks."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.events: list[Event] = []
        self.is_started = self.is_finished = False

    def start(self) -> None:
        self.is_started = True

    def log_step(self, report: StepReport) -> None:
        self.reports.append(report)

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def finish(self) -> None:
        self.is_finished = True


def build_tracker(
    config: TrackerConfig,
    *,
    run_id: str,
    project: str,
    directory: Path,
    plain_config: Mapping[str, object],
    attempt: int,
    on_stop: Callable[[str], None] | None = None,
) -> Tracker:
    """The tracker that the configuration names, not started.

    ``directory`` is the run's; W&B writes into its ``wandb`` folder. ``on_stop`` is called, in some thread, when
    somebody stops the run in W&B's user interface.
    """
    if config.name is TrackerName.NONE:
        return NullTracker()
    plan = WandbPlan(
        run_id=run_id,
        project=project,
        entity=config.entity or None,
        directory=str(directory),
        config=dict(plain_config),
        mode=_mode(config.mode, has_key=knobs.wandb_key() is not None),
        init_timeout_s=config.init_timeout_s,
        finish_timeout_s=config.finish_timeout_s,
    )
    return WandbTracker(plan, attempt=attempt, on_stop=on_stop)


def _mode(mode: WandbMode, *, has_key: bool) -> str | None:
    """What to tell W&B; None leaves it to W&B's own settings, which are online unless the user has said otherwise."""
    if mode is WandbMode.AUTO:
        return None if has_key else _OFFLINE
    return str(mode.value)


# -- what W&B is told -------------------------------------------------------------------------------------------------


def _messages(item: StepReport | Event) -> Iterator[dict[str, object]]:
    """Messages to the helper. Never a ``step``: W&B drops the steps that a run repeats after a rollback, while
    with ``train/step`` as the axis they overlay."""
    if isinstance(item, StepReport):
        values = asdict(item)
        step = values.pop("step")
        yield _log(step, {f"train/{name}": value for name, value in values.items()})
    elif isinstance(item, Evaluated):
        yield _log(item.step, {"eval/bits_per_byte": item.bits_per_byte})
    elif isinstance(item, FaultDetected):
        text = f"{item.cause}\n\nin {item.phase}, last step {item.last_step:,}"
        yield _alert(f"fault {item.number}", text, "WARN")
    elif isinstance(item, RecoveryDone):
        names = ("repaired_in_s", "steps_lost", "failures")
        yield _log(item.step, {f"recovery/{name}": getattr(item, name) for name in names})
        text = f"resumed at step {item.step:,}, {item.repaired_in_s:.1f} s, {item.steps_lost} step(s) lost"
        yield _alert(f"recovered from fault {item.number}", text, "INFO")
    elif isinstance(item, StageRebuilt):
        yield _log(item.version, {"recovery/approximate": 1})
        text = (
            f"by {item.repair} of stages {item.sources} at step {item.version:,}; the run is approximate from here on"
        )
        yield _alert(f"stage {item.stage} was rebuilt", text, "WARN")
    elif isinstance(item, WorldChanged):
        yield _alert(f"{item.world} ranks instead of {item.world_before}", item.reason, "WARN")
    elif isinstance(item, StopRequested):
        yield {"do": "preempting"}
    elif isinstance(item, RunEnded) and item.outcome == "failed":
        yield _alert("the run has failed", item.reason, "ERROR")


def _log(step: int, values: Mapping[str, object]) -> dict[str, object]:
    return {"do": "log", "values": {"train/step": step, **values}}


def _alert(title: str, text: str, level: str) -> dict[str, object]:
    return {"do": "alert", "title": title, "text": text, "level": level}


# -- the driver's side ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WandbPlan:
    """What W&B needs to know about the run; JSON values."""

    run_id: str
    project: str
    directory: str
    mode: str | None
    init_timeout_s: float
    finish_timeout_s: float
    entity: str | None = None
    config: Mapping[str, object] = field(default_factory=dict)

    def init(self) -> dict[str, object]:
        """Arguments of ``wandb.init``."""
        return {
            "id": self.run_id,
            "name": self.run_id,
            "project": self.project,
            "entity": self.entity,
            "dir": self.directory,
            "config": self.config,
            "job_type": "train",
            "resume": "allow",
            "allow_val_change": True,
        }

    def settings(self) -> dict[str, object]:
        """Settings of wandb; those that the installed version does not have are left out."""
        return {
            "init_timeout": self.init_timeout_s,
            "finish_timeout": self.finish_timeout_s,
            "console": "off",
            "silent": True,
            "save_code": False,
            "disable_code": True,
            "label_disable": True,
            # The driver's host says little about the ranks', and looking around takes its processors.
            "x_disable_stats": True,
            "x_save_requirements": False,
        }


class WandbTracker:
    """Feeds a helper process that runs W&B. What it cannot take in time is dropped and counted."""

    def __init__(
        self,
        plan: WandbPlan,
        *,
        attempt: int,
        on_stop: Callable[[str], None] | None = None,
        capacity: int = _QUEUE,
        start_grace_s: float = _START_GRACE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._plan, self._attempt, self._on_stop, self._clock = plan, attempt, on_stop, clock
        self._start_grace_s = start_grace_s
        self._items: queue.Queue[tuple[float, StepReport | Event]] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._run, name="holdfast-wandb", daemon=True)
        self._helper: _Helper | None = None
        self._closing_s = math.inf  # when ``finish`` began, in monotonic seconds
        self._is_over = self._is_off = False
        self._exit_code = 1  # until the run tells how it has ended
        self.dropped = 0

    def start(self) -> None:
        self._thread.start()

    def log_step(self, report: StepReport) -> None:
        self._put(report)

    def emit(self, event: Event) -> None:
        if isinstance(event, RunEnded):
            self._exit_code = event.exit_code
        self._put(event)

    def _put(self, item: StepReport | Event) -> None:
        if self._is_off or self._is_closing:
            return
        try:
            self._items.put_nowait((self._clock(), item))
        except queue.Full:
            self.dropped += 1

    def finish(self) -> None:
        if self._is_closing or self._thread.ident is None:
            return
        self._closing_s = time.monotonic()
        self._thread.join(self._plan.finish_timeout_s + _FINISH_GRACE_S)
        self._is_over = True  # before the kill, so that no helper can be started behind its back
        if self._thread.is_alive():
            logger.warning("W&B was not done after %.0f s and is ended", self._plan.finish_timeout_s)
        if self._helper is not None:
            self._helper.kill()
        if self.dropped:
            logger.warning("W&B lacks %d records it was too slow for; metrics.jsonl has them", self.dropped)

    @property
    def _is_closing(self) -> bool:
        return self._closing_s < math.inf

    # -- in the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._helper = self._open()
            if self._helper is not None:
                self._feed(self._helper)
        except Exception as error:  # a thread's boundary: the driver's log learns of it, the run goes on
            if not self._is_over:
                logger.warning("W&B is off from here on: %s: %s", type(error).__name__, error)
        finally:
            self._is_off = True

    def _open(self) -> _Helper | None:
        """A helper with a running W&B: as configured, else offline, else none."""
        problems: list[str] = []
        for mode in dict.fromkeys((self._plan.mode, _OFFLINE)):
            self._helper = helper = _Helper()  # known to ``finish`` while it starts
            problem = None if self._is_over else helper.open(self._plan, mode, is_late=self._lateness(mode))
            if self._is_over:
                break
            if problem is None:
                self._say_how(problems, "offline, for `wandb sync`")
                return helper
            problems.append(problem)
            helper.kill()
        helper.kill()
        self._say_how(problems, "without it")
        return None

    def _lateness(self, mode: str | None) -> Callable[[], bool]:
        """Says when a start takes too long: once the run has ended sooner, so that there is time left for offline."""
        limit_s = time.monotonic() + self._plan.init_timeout_s + self._start_grace_s
        left_s = self._plan.finish_timeout_s / (1 if mode == _OFFLINE else 2)
        return lambda: time.monotonic() > min(limit_s, self._closing_s + left_s)

    def _say_how(self, problems: Sequence[str], instead: str) -> None:
        if problems:
            why = "; ".join(dict.fromkeys(problems))
            logger.warning("W&B could not be started as configured (%s); this attempt is recorded %s", why, instead)

    def _feed(self, helper: _Helper) -> None:
        while True:
            self._listen(helper)
            try:
                time_s, item = self._items.get(timeout=_POLL_S)
            except queue.Empty:
                if self._is_closing:
                    break
                continue
            for message in _messages(item):
                if message["do"] == "log":
                    stamp = {"attempt": self._attempt, "wall_time": time_s}
                    message["values"] = {**cast(dict[str, object], message["values"]), **stamp}
                helper.send(message)
        helper.send({"do": "finish", "exit_code": self._exit_code})
        helper.wait(self._plan.finish_timeout_s + _FINISH_GRACE_S)
        self._listen(helper)

    def _listen(self, helper: _Helper) -> None:
        for said in helper.said():
            if said.get("stop") and self._on_stop is not None:
                self._on_stop("somebody stopped the run in W&B")
            if "trouble" in said:
                logger.warning("W&B refused a record, and maybe more: %s", said["trouble"])


class _Helper:
    """The helper process and the channel to it. ``kill`` may be called from any thread."""

    _COMMAND = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
        "from holdfast.trainer.trackers import serve; serve(int(sys.argv[1]))"
    )

    def __init__(self) -> None:
        self._channel, theirs = Pipe()
        with contextlib.closing(theirs):
            self._process = subprocess.Popen(
                [sys.executable, "-c", self._COMMAND, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                # Without a terminal nobody can be asked for a login.
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,
            )
        self.pid = self._process.pid

    def open(self, plan: WandbPlan, mode: str | None, *, is_late: Callable[[], bool]) -> str | None:
        """Start W&B; returns why that failed."""
        patience_s = plan.finish_timeout_s + _FINISH_GRACE_S
        init, settings = {**plan.init(), "mode": mode}, plan.settings()
        try:
            self.send({"init": init, "settings": settings, "parent": os.getpid(), "patience_s": patience_s})
            while not self._channel.poll(_POLL_S):
                if is_late():
                    return "no answer in time"
            problem = json.loads(self._channel.recv_bytes())["failed"]
        except (OSError, EOFError):
            return "its process has died"
        if problem is not None:
            self.wait(_FINISH_GRACE_S)  # it leaves by itself, and then takes W&B's own processes along
        return cast("str | None", problem)

    def send(self, message: Mapping[str, object]) -> None:
        """Blocks while W&B is behind. Raises: OSError when the helper is gone."""
        self._channel.send_bytes(json.dumps(message).encode())

    def said(self) -> Iterator[dict[str, object]]:
        with contextlib.suppress(OSError, EOFError):  # gone: sending will tell
            while self._channel.poll():
                yield json.loads(self._channel.recv_bytes())

    def wait(self, timeout_s: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)

    def kill(self) -> None:
        """End it at once; W&B's own processes follow by themselves. No effect on one that has ended."""
        self._process.kill()
        self._process.wait()


def _environment() -> dict[str, str]:
    """A service that somebody else has started in this process is not ours to use; telemetry stays off."""
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return {**inherited, "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}


# -- the helper's side ------------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Body of the helper process: W&B, told what to do by the driver until that finishes or dies."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the driver decides when it is over, and must get through first
        signal.signal(number, signal.SIG_IGN)
    os.set_inheritable(descriptor, False)
    channel = Connection(descriptor)
    plan = json.loads(channel.recv_bytes())
    threading.Thread(target=_watch, args=(plan["parent"], plan["patience_s"]), daemon=True).start()
    try:
        run = _start(plan, channel)
    except BaseException as error:  # a process boundary: the driver learns of it; wandb even raises SystemExit
        _say(channel, failed=f"{type(error).__name__}: {error}")
        return
    _say(channel, failed=None)
    run.finish(exit_code=_follow(run, channel))


def _start(plan: Mapping[str, Any], channel: Connection) -> Any:  # wandb's objects are not typed here
    import wandb

    wanted = {**plan["settings"], "stop_fn": lambda: _say(channel, stop=True)}
    known = getattr(wandb.Settings, "model_fields", wanted)
    settings = wandb.Settings(**{name: value for name, value in wanted.items() if name in known})
    run = wandb.init(**plan["init"], settings=settings)
    run.define_metric("train/step")
    run.define_metric("*", step_metric="train/step")
    return run


def _follow(run: Any, channel: Connection) -> int:
    """Do what the driver says until it says how the run has ended; 1 if it dies before."""
    has_complained = False
    while True:
        try:
            message = json.loads(channel.recv_bytes())
        except (OSError, EOFError):
            return 1
        if message["do"] == "finish":
            return int(message["exit_code"])
        try:
            _obey(run, message)
        except Exception as error:  # a record that W&B refuses costs that record; the driver's log learns of the first
            if not has_complained:
                has_complained = True
                _say(channel, trouble=f"{type(error).__name__}: {error}")


def _obey(run: Any, message: Mapping[str, Any]) -> None:
    if message["do"] == "log":
        run.log(message["values"])
    elif message["do"] == "alert":
        run.alert(message["title"], message["text"], level=message["level"])
    elif message["do"] == "preempting":
        run.mark_preempting()


def _say(channel: Connection, **words: object) -> None:
    with contextlib.suppress(OSError):  # the driver is gone; reading will tell
        channel.send_bytes(json.dumps(words).encode())


def _watch(parent: int, patience_s: float) -> None:
    """A helper whose driver has died may bring home what it has, but must not stay."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(patience_s)
    os._exit(1)
