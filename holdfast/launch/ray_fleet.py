"""A fleet of Ray actors; the only door to ray.

Starts a private Ray on this host or joins a running cluster. Virtual node *i* lives on Ray node *i mod n*; its keeper
and its workers are pinned there, because they share memory. Keepers are detached actors with a lease, so
they outlive a driver that dies; workers die with their driver.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from holdfast import knobs
from holdfast.configs.schema import LaunchConfig
from holdfast.errors import ConfigurationError
from holdfast.launch.fleet import Address, Completion, Lost, Report, Role
from holdfast.launch.hosts import make_host
from holdfast.launch.protocol import CONTROL_METHODS, STORAGE_METHODS, describe_error

os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray
    import ray._private.worker as ray_worker
    from ray.actor import ActorHandle, ActorMethod
    from ray.exceptions import GetTimeoutError, RayActorError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

__all__ = ["RayFleet"]

logger = logging.getLogger(__name__)

_STOP_DEADLINE_S = 5.0


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


@dataclass(slots=True)
class _Call:
    number: int
    target: Address


class RayFleet:
    """See :class:`holdfast.launch.fleet.Fleet`."""

    def __init__(self, config: LaunchConfig, run_tag: str) -> None:
        self._config, self._run_tag = config, run_tag
        self._temp_dir: str | None = None
        self._connect(config.address or knobs.ray_address() or "")
        self._nodes = sorted((n for n in ray.nodes() if n["Alive"]), key=lambda n: str(n["NodeID"]))
        self._handles: dict[Address, ActorHandle] = {}
        self._calls: dict[ray.ObjectRef, _Call] = {}
        self._next_call = 0

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

    def hosts(self, nodes: int) -> Sequence[str]:
        return [str(self._nodes[i % len(self._nodes)]["NodeID"]) for i in range(nodes)]

    def zones(self, nodes: int) -> Sequence[str]:
        return [str(self._nodes[i % len(self._nodes)].get("Labels", {}).get("zone", "")) for i in range(nodes)]

    def start(self, target: Address, node: int, spec: Mapping[str, object]) -> int:
        self._handles[target] = self._create(target, node, spec)
        return self.call(target, "ready")

    def _create(self, target: Address, node: int, spec: Mapping[str, object]) -> ActorHandle:
        is_keeper = target.role is Role.KEEPER
        options: dict[str, object] = {
            "num_cpus": 0,
            "num_gpus": 0 if is_keeper else self._config.gpus_per_worker,
            "max_restarts": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(self.hosts(node + 1)[node], soft=True),
            "runtime_env": {"env_vars": self._environment()},
        }
        if is_keeper:
            options |= {"name": f"keeper-{self._run_tag}-{node}", "lifetime": "detached", "get_if_exists": True}
        actor = ray.remote(concurrency_groups={"control": 2, "storage": 1})(_Actor)
        return actor.options(**options).remote(target.role.value, json.dumps(dict(spec)))

    def _environment(self) -> dict[str, str]:
        threads = {"OMP_NUM_THREADS": str(self._config.threads_per_worker)}
        return threads if self._config.gpus_per_worker else {**threads, "CUDA_VISIBLE_DEVICES": ""}

    def call(self, target: Address, method: str, *args: object) -> int:
        self._next_call += 1
        handle = self._handles.get(target)
        if handle is not None:  # otherwise it is reported as lost already and the call never completes
            self._calls[_lane(handle, method).remote(method, json.dumps(args))] = _Call(self._next_call, target)
        return self._next_call

    def poll(self, timeout_s: float) -> list[Report]:
        if not self._calls:
            time.sleep(timeout_s)
            return []
        done, _ = ray.wait(list(self._calls), num_returns=1, timeout=timeout_s)
        if done:  # take along whatever else has ended in the meantime
            done, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        return [report for ref in done if (report := self._collect(ref)) is not None]

    def _collect(self, ref: ray.ObjectRef) -> Report | None:
        call = self._calls.pop(ref)
        try:
            result, error = json.loads(ray.get(ref))
        except RayActorError as lost:
            return self._lost(call.target, _cause(lost))
        except RayError as broken:
            return self._lost(call.target, f"{type(broken).__name__}: {broken}")
        if call.target not in self._handles:
            return None
        return Completion(call.number, call.target, result, error)

    def _lost(self, target: Address, cause: str) -> Report | None:
        known = self._handles.pop(target, None) is not None
        self._calls = {ref: call for ref, call in self._calls.items() if call.target != target}
        return Lost(target, cause) if known else None

    def kill(self, target: Address) -> None:
        handle = self._handles.get(target)
        if handle is not None:
            self._lost(target, "")
            ray.kill(handle, no_restart=True)

    def release(self, target: Address) -> None:
        handle = self._handles.get(target)
        if handle is not None:
            self._lost(target, "")
            handle.leave.remote()

    def close(self) -> None:
        self._leave_all()
        ray.shutdown()
        if self._temp_dir is not None:
            _remove(Path(self._temp_dir), time.monotonic() + _STOP_DEADLINE_S)

    def _leave_all(self) -> None:
        leaving = [handle.leave.remote() for handle in self._handles.values()]
        if leaving:
            _, rest = ray.wait(leaving, num_returns=len(leaving), timeout=_STOP_DEADLINE_S)
            slow = dict(zip(leaving, self._handles.values(), strict=True))
            for ref in rest:
                with contextlib.suppress(RayError, GetTimeoutError):
                    ray.kill(slow[ref], no_restart=True)
        self._handles.clear()
        self._calls.clear()


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
    for marker in ("Worker exit detail:", "The actor died unexpectedly before finishing this task.", "cause:"):
        text = text.partition(marker)[2].strip() or text
    return text.partition(" Some common causes")[0][:300]
