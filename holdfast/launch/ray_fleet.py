"""A fleet of Ray actors; the door to Ray clusters, as ``ray_jobs`` is that to their job server.

Starts a private Ray on this host or joins a running cluster. The keeper and the workers of a virtual node are pinned to
one Ray node, because they share memory, and move together when it no longer answers: Ray's own verdict comes too late.
Keepers are detached actors with a lease, so they outlive a driver that dies; workers die with their driver.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from holdfast import __version__, knobs
from holdfast.configs.schema import LaunchConfig
from holdfast.errors import ConfigurationError
from holdfast.launch.drain_watch import DrainWatch, seconds_left
from holdfast.launch.fleet import Address, Completion, Draining, Lost, Report, Role
from holdfast.launch.hosts import make_host
from holdfast.launch.protocol import CONTROL_METHODS, STORAGE_METHODS, describe_error
from holdfast.launch.ray_nodes import RayNode, RayNodes
from holdfast.launch.run_metrics import Meter, Metric

os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray
    import ray._private.state as ray_state
    import ray._private.worker as ray_worker
    from ray.actor import ActorHandle, ActorMethod
    from ray.exceptions import GetTimeoutError, RayActorError, RayError
    from ray.util.metrics import Counter, Gauge
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

__all__ = ["NodeReport", "RayFleet"]

logger = logging.getLogger(__name__)

_STOP_DEADLINE_S = 5.0
_LOOK_DEADLINE_S = 60.0
"""For a process to start on every node and look for a file."""
_STALE_S = 5.0
"""How long a network file system may go on saying that a new file does not exist."""
_LOOK_AGAIN_S = 5.0
"""Between two looks for a Ray node that a virtual node could move to."""


class _Actor:
    """A Ray actor around a host. Control methods run beside a long call, in their own thread."""

    def __init__(self, role: str, spec: str) -> None:
        self._host = make_host(Role(role), json.loads(spec))
        if Role(role) is Role.KEEPER:
            threading.Thread(target=self._watch_lease, name="lease", daemon=True).start()

    def _watch_lease(self) -> None:
        while not self._host.expired(time.monotonic()):  # type: ignore[attr-defined]  # keepers only
            time.sleep(1.0)
        self._host.hang_up()
        os._exit(0)

    def _run(self, method: str, args: str) -> str:
        try:
            return json.dumps([getattr(self._host, method)(*json.loads(args)), None])
        except Exception as error:  # a process boundary: the caller learns of it as Completion.error
            return json.dumps([None, describe_error(error)])

    def run(self, method: str, args: str) -> str:
        return self._run(method, args)

    @ray.method(concurrency_group="control")
    def control(self, method: str, args: str) -> str:
        return self._run(method, args)

    @ray.method(concurrency_group="storage")
    def store(self, method: str, args: str) -> str:
        return self._run(method, args)

    @ray.method(concurrency_group="control")
    def leave(self) -> None:
        self._host.hang_up()
        os._exit(0)


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What a Ray node says of itself."""

    node: str
    broken: str = ""
    """Why it cannot run Holdfast."""
    version: str = ""
    read: str | None = None
    """The content of the marker; None if the node does not see it."""
    ahead_s: float = 0.0
    """By how much its clock is ahead of ours at least, negative if it is behind; 0 if they may agree."""

    def problems(self, marker: Path, word: str) -> list[str]:
        """What keeps it from taking part in a run whose driver has written ``word``."""
        if self.broken:
            return [f"{self.node} cannot run Holdfast: {self.broken}; install the same there as here"]
        problems = []
        if self.version != __version__:
            problems.append(
                f"{self.node} has Holdfast {self.version}, the driver {__version__}; install one version everywhere"
            )
        if self.read != word:
            problems.append(
                f"root={marker.parents[3]} must be one directory for all nodes, and {self.node} does not see what the "
                "driver has written there; set root to storage that is mounted on every node"
            )
        return problems


@dataclass(frozen=True, slots=True)
class _Start:
    node: int
    spec: str
    call: int


@dataclass(frozen=True, slots=True)
class _Process:
    handle: ActorHandle
    node: int
    """Virtual."""
    home: RayNode


@dataclass(slots=True)
class _Call:
    number: int
    target: Address
    due_s: float
    """When it is strange that there is no answer yet."""


class RayFleet:
    """See :class:`holdfast.launch.fleet.Fleet`.

    ``doubt_s``: a process that is to answer at once and has not for so long makes its Ray node suspect. If that does
    not answer either, everything on it is lost.
    """

    def __init__(self, config: LaunchConfig, run_tag: str, *, doubt_s: float = 5.0) -> None:
        self._config, self._run_tag, self._doubt_s = config, run_tag, doubt_s
        self._temp_dir: str | None = None
        self._connect(config.address or knobs.ray_address() or "")
        self._processes: dict[Address, _Process] = {}
        gpus = config.gpus_per_worker * config.workers_per_node
        self._drains = DrainWatch(ray_state.state.get_draining_nodes)
        doomed = self._drains.deadlines()
        self._nodes = RayNodes(config.nodes, _living, crowd=self._count_on, gpus=gpus, doomed=doomed)
        self._notices: dict[int, Draining] = {}
        self._waiting: dict[Address, _Start] = {}
        """To be started as soon as there is a Ray node for them."""
        self._look_s = 0.0
        self._drained: Collection[str] = frozenset()
        self._shun_s = 0.0
        self._calls: dict[ray.ObjectRef, _Call] = {}
        self._abandoned: list[Lost] = []
        """Processes on Ray nodes that do not answer; not reported yet."""
        self._next_call = self._next_name = 0

    def _connect(self, address: str) -> None:
        # raylet's own words about dead workers would appear between the lines of the console, colours included.
        ray_worker.print_to_stdstream = _to_our_log
        common = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": "holdfast"}
        if address:
            try:
                ray.init(address=address, **common)
            except (ConnectionError, RuntimeError) as error:
                raise ConfigurationError(
                    f"launch.address={address!r} (or RAY_ADDRESS): no Ray cluster answers there ({error}); "
                    "start one with `ray start --head`, or leave launch.address empty to start a private one"
                ) from error
            return
        # Ray leaves its session directory behind; a private one can be removed. The path must stay short:
        # Ray puts Unix sockets below it, and those have at most 107 characters.
        self._temp_dir = tempfile.mkdtemp(prefix=f"hf-ray-{os.getpid()}-", dir="/tmp")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=max(os.cpu_count() or 1, 8),
            object_store_memory=100_000_000,
            include_dashboard=self._config.dashboard,
            _temp_dir=self._temp_dir,
            **common,
        )

    def _count_on(self, name: str) -> int:
        return sum(process.home.name == name for process in self._processes.values())

    def hosts(self, nodes: int) -> Sequence[str]:
        return [home.name for home in self._nodes.homes[:nodes]]

    def host_of(self, target: Address) -> str:
        process = self._processes.get(target)
        return "" if process is None else process.home.name

    def draining(self) -> Mapping[int, Draining]:
        return self._notices

    def _follow_drains(self, now: float) -> None:
        """A node that cannot move yet may as soon as another one has joined."""
        deadlines = self._drains.deadlines()
        if deadlines.keys() == self._drained and (not deadlines or now < self._shun_s):
            return
        self._drained, self._shun_s = frozenset(deadlines), now + _LOOK_AGAIN_S
        homes = list(self._nodes.homes)
        for node, home in enumerate(homes):
            if home.name in deadlines:
                reason = f"Ray drains {home}"
                self._notices[node] = Draining(home.name, seconds_left(deadlines[home.name]), reason)
        for tenant, home in self._nodes.shun(deadlines).items():
            logger.warning("%s will be taken away; node %d moves to %s", home, tenant, self._nodes.homes[tenant])

    def zones(self, nodes: int) -> Sequence[str]:
        return [home.zone for home in self._nodes.homes[:nodes]]

    def metrics_endpoints(self) -> Mapping[str, str]:
        return {
            str(found["NodeID"]): f"http://{found['NodeManagerAddress']}:{found['MetricsExportPort']}/metrics"
            for found in ray.nodes()
            if found["Alive"]
        }

    def meter(self) -> Meter:
        return _RayMeter()

    def unshared(self, marker: Path, word: str) -> list[str]:
        if self._temp_dir is not None:  # a private Ray, all of it on this host
            return []
        return [problem for report in self.survey(marker) for problem in report.problems(marker, word)]

    def survey(self, marker: Path) -> list[NodeReport]:
        """What each Ray node that virtual nodes live on says of itself. One that does not answer in time is left out:
        whether it lives is found out when something is to start there."""
        sent_s, homes = time.time(), {home.name: home for home in self._nodes.homes}
        looks = {_pinned(_look, name).remote(str(marker)): home for name, home in homes.items()}
        seen, late = ray.wait(list(looks), num_returns=len(looks), timeout=_LOOK_DEADLINE_S)
        for ref in late:
            logger.warning("%s has not told within %g s whether it sees %s", looks[ref], _LOOK_DEADLINE_S, marker)
        return [_report(ref, str(looks[ref]), sent_s) for ref in seen]

    def adopt(self, run_tag: str) -> Sequence[Address]:
        if self._temp_dir is not None:  # nobody else has ever been here
            return ()
        for name in sorted(ray.util.list_named_actors(), key=_order_of_keeper):
            found = re.fullmatch(rf"keeper-(\d+)-{re.escape(run_tag)}-\d+", name)
            if found is None:
                continue
            with contextlib.suppress(ValueError):  # it has left meanwhile
                node = min(int(found[1]), self._config.nodes - 1)
                home = self._nodes.homes[node]
                self._processes[Address(Role.KEEPER, int(found[1]))] = _Process(ray.get_actor(name), node, home)
        return tuple(self._processes)

    def start(self, target: Address, node: int, spec: Mapping[str, object]) -> int:
        self._next_call += 1
        self._waiting[target] = _Start(node, json.dumps(dict(spec)), self._next_call)
        self._place(target)
        return self._next_call

    def _place(self, target: Address) -> None:
        start = self._waiting[target]
        self._leave_if_silent(start.node)
        if self._nodes.is_stranded(start.node):
            return
        home = self._nodes.homes[start.node]
        handle = self._create(target, home, start.spec)
        self._processes[target] = _Process(handle, start.node, home)
        self._calls[handle.run.remote("ready", "[]")] = _Call(start.call, target, math.inf)
        del self._waiting[target]

    def _place_stranded(self, now: float) -> None:
        if self._waiting and now >= self._look_s:
            self._look_s = now + _LOOK_AGAIN_S
            self._nodes.look_again()
            for target in list(self._waiting):
                self._place(target)

    def _create(self, target: Address, home: RayNode, spec: str) -> ActorHandle:
        is_keeper = target.role is Role.KEEPER
        options: dict[str, object] = {
            "num_cpus": 0,
            "num_gpus": 0 if is_keeper else self._config.gpus_per_worker,
            "max_restarts": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(home.name, soft=False),
            "runtime_env": {"env_vars": self._environment()},
        }
        if is_keeper:  # the name is never used again: its owner may be a process that nobody can reach
            self._next_name += 1
            options |= {"name": f"keeper-{target.number}-{self._run_tag}-{self._next_name}", "lifetime": "detached"}
        actor = ray.remote(concurrency_groups={"control": 2, "storage": 1})(_Actor)
        return actor.options(**options).remote(target.role.value, spec)

    def _environment(self) -> dict[str, str]:
        threads = {"OMP_NUM_THREADS": str(self._config.threads_per_worker)}
        return threads if self._config.gpus_per_worker else {**threads, "CUDA_VISIBLE_DEVICES": ""}

    def call(self, target: Address, method: str, *args: object) -> int:
        self._next_call += 1
        process = self._processes.get(target)
        if process is not None:  # otherwise it is reported as lost already and the call never completes
            lane = _lane(process.handle, method)
            due_s = time.monotonic() + self._doubt_s if method in CONTROL_METHODS else math.inf
            self._calls[lane.remote(method, json.dumps(args))] = _Call(self._next_call, target, due_s)
        return self._next_call

    def poll(self, timeout_s: float) -> list[Report]:
        reports: list[Report] = []
        if self._calls:
            done, _ = ray.wait(list(self._calls), num_returns=1, timeout=0 if self._abandoned else timeout_s)
            if done:  # take along whatever else has ended in the meantime
                done, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
            reports += [report for ref in done if (report := self._collect(ref)) is not None]
        elif not self._abandoned:
            time.sleep(timeout_s)
        now = time.monotonic()
        self._doubt_silent(now)
        self._follow_drains(now)
        self._place_stranded(now)
        abandoned, self._abandoned = self._abandoned, []
        return reports + abandoned

    def _collect(self, ref: ray.ObjectRef) -> Report | None:
        call = self._calls.pop(ref, None)
        if call is None:  # another call has told that the process is lost
            return None
        try:
            result, error = json.loads(ray.get(ref))
        except RayActorError as lost:
            return self._lost(call.target, _cause(lost))
        except RayError as broken:
            return self._lost(call.target, f"{type(broken).__name__}: {broken}")
        return Completion(call.number, call.target, result, error)

    def _lost(self, target: Address, cause: str) -> Report | None:
        """Nothing if its whole node does not answer and is left: that is told of all its processes together."""
        self._leave_if_silent(self._processes[target].node)
        return Lost(target, cause) if self._forget(target) else None

    def _doubt_silent(self, now: float) -> None:
        late = [call for call in self._calls.values() if call.due_s <= now]
        for call in late:
            call.due_s = now + self._doubt_s
        for node in {self._processes[call.target].node for call in late}:
            self._leave_if_silent(node)

    def _leave_if_silent(self, node: int) -> None:
        """Whatever is placed on the same Ray node is out of reach. Should it only have been frozen, it must not go on
        when it wakes up; Ray passes that on as soon as it can."""
        moved = self._nodes.leave_silent(node)
        for tenant, home in moved.items():
            cause = f"{home}, the home of node {tenant}, does not answer"
            logger.warning("%s; it moves to %s", cause, self._nodes.homes[tenant])
            out_of_reach = [t for t, p in self._processes.items() if (p.node, p.home) == (tenant, home)]
            for target in sorted(out_of_reach, key=lambda t: t.role is Role.KEEPER):  # ranks say more than nodes
                self.kill(target)
                self._abandoned.append(Lost(target, cause))

    def _forget(self, target: Address) -> _Process | None:
        """Nothing that it still says counts."""
        self._waiting.pop(target, None)
        self._calls = {ref: call for ref, call in self._calls.items() if call.target != target}
        return self._processes.pop(target, None)

    def kill(self, target: Address) -> None:
        self._abandoned = [lost for lost in self._abandoned if lost.target != target]
        process = self._forget(target)
        if process is not None:
            ray.kill(process.handle, no_restart=True)

    def release(self, target: Address) -> None:
        process = self._forget(target)
        if process is not None:
            process.handle.leave.remote()

    def close(self) -> None:
        self._drains.close()
        self._leave_all()
        ray.shutdown()
        if self._temp_dir is not None:
            _remove(Path(self._temp_dir), time.monotonic() + _STOP_DEADLINE_S)

    def _leave_all(self) -> None:
        leaving = {process.handle.leave.remote(): process.handle for process in self._processes.values()}
        if leaving:
            _, rest = ray.wait(list(leaving), num_returns=len(leaving), timeout=_STOP_DEADLINE_S)
            for ref in rest:
                with contextlib.suppress(RayError, GetTimeoutError):
                    ray.kill(leaving[ref], no_restart=True)
        self._processes.clear()
        self._calls.clear()


class _RayMeter:
    """See :class:`holdfast.launch.run_metrics.Meter`. Ray exports from the node of this process every ten seconds."""

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}

    def set(self, metric: Metric, tags: Mapping[str, str], value: float) -> None:
        if metric.name not in self._gauges:
            self._gauges[metric.name] = Gauge(metric.name, metric.description, metric.tags)
        self._gauges[metric.name].set(value, dict(tags))

    def add(self, metric: Metric, tags: Mapping[str, str], amount: float) -> None:
        if metric.name not in self._counters:
            self._counters[metric.name] = Counter(metric.name, metric.description, metric.tags)
        self._counters[metric.name].inc(amount, dict(tags))


@ray.remote(num_cpus=0, max_retries=0)
def _look(marker: str) -> tuple[str, str | None, float]:
    """The version of Holdfast on this node, what it reads in a file (None if there is none), and its time."""
    end = time.monotonic() + _STALE_S
    while True:
        try:
            return __version__, Path(marker).read_text(), time.time()
        except OSError:
            if time.monotonic() >= end:
                return __version__, None, time.time()
            time.sleep(0.2)


def _pinned(task: Any, node: str) -> Any:  # of Ray, which is not typed
    return task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))


def _report(look: ray.ObjectRef, node: str, sent_s: float) -> NodeReport:
    try:
        version, read, now_s = ray.get(look)
    except RayActorError as error:
        return NodeReport(node, broken=_cause(error))
    except RayError as error:
        return NodeReport(node, broken=str(error).strip().splitlines()[-1])
    ahead_s = max(0.0, now_s - time.time()) - max(0.0, sent_s - now_s)
    return NodeReport(node, version=version, read=read, ahead_s=ahead_s)


def _order_of_keeper(name: str) -> int:
    """The last one that a node had is the one that counts."""
    last = name.rpartition("-")[2]
    return int(last) if last.isdecimal() else -1


def _living() -> list[RayNode]:
    """What Ray believes alive."""
    return [_ray_node(found) for found in ray.nodes() if found["Alive"]]


def _ray_node(found: Mapping[str, Any]) -> RayNode:
    return RayNode(
        name=str(found["NodeID"]),
        address=str(found["NodeManagerAddress"]),
        port=int(found["NodeManagerPort"]),
        gpus=float(found["Resources"].get("GPU", 0.0)),
        zone=str(found["Labels"].get("zone", "")),
    )


def _lane(handle: ActorHandle, method: str) -> ActorMethod:
    if method in CONTROL_METHODS:
        return handle.control
    return handle.store if method in STORAGE_METHODS else handle.run


def _remove(directory: Path, deadline_s: float) -> None:
    """Ray's processes write their last words after ``shutdown`` has returned."""
    while directory.exists() and time.monotonic() < deadline_s:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.05)


def _to_our_log(message: Mapping[str, object], **_: object) -> None:
    for line in cast(Sequence[object], message.get("lines", ())):
        logger.info("ray: %s", line)


def _cause(error: RayActorError) -> str:
    """Ray's first sentence about an actor's death; the rest is guesswork and advice on its own logs."""
    text = " ".join(str(error).split())
    if "creation task" in text:  # a traceback, whose last line says what was raised
        return str(error).strip().splitlines()[-1]
    for marker in ("Worker exit detail:", "The actor died unexpectedly before finishing this task.", "cause:"):
        text = text.partition(marker)[2].strip() or text
    return text.partition(" Some common causes")[0][:300]
