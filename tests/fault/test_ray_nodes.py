"""Ray nodes that are killed, frozen or lost two at a time: raylets on this host, each with processes of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from holdfast.configs.schema import LaunchConfig, LaunchKind, RunConfig
from holdfast.fault_tolerance.policy import LIVE, MEMORY, PARITY
from holdfast.launch.fleet import Address, Completion, Lost, Report, Role
from holdfast.launch.ray_fleet import RayFleet
from holdfast.launch.run import train
from tests.support.drivers import Driver, run_dirs, steps_of, until
from tests.support.runs import events_of, outcome_of, tiny_config, write_corpus

pytestmark = pytest.mark.timeout(600)

_STEPS = 60
_DRAINED_STEPS = 400
_STRUCK_AT = 6
_DEADLINE_S = 200.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module", autouse=True)
def ray_folder() -> Iterator[None]:
    """Ray's Unix sockets lie below it, whose paths have at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="hf-", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        Path(folder, "ray").mkdir()
        yield


@pytest.fixture(scope="module")
def ray_nodes() -> Iterator[RayCluster]:
    with closing(RayCluster()) as running:
        yield running


class RayCluster:
    """A head, which is never struck because it is Ray's only memory of everything, and nodes that may be."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()
        self._struck: list[psutil.Process] = []
        self.zones: dict[str, str] = {}
        """By Ray's id of the node."""
        self.add("rack 0")

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, zone: str, *, gpus: int = 0) -> None:
        memory = 80_000_000
        node = self._cluster.add_node(
            num_cpus=4, num_gpus=gpus, object_store_memory=memory, include_dashboard=False, labels={"zone": zone}
        )
        self.zones[node.node_id] = zone

    def grow_to(self, nodes: int) -> None:
        """The head included; those that were struck do not count."""
        while 1 + len(self._cluster.worker_nodes) < nodes:
            self.add("rack 1")

    def occupied(self) -> list[Any]:
        """Nodes other than the head that have a keeper; those with a spare come last."""
        found = [node for node in self._cluster.worker_nodes if _actors_of(_raylet(node))]
        return sorted(found, key=lambda node: len(_actors_of(_raylet(node))))

    def strike(self, node: Any, number: signal.Signals, *, raylet_only: bool = False) -> list[psutil.Process]:
        """A signal for the raylet and, at the same moment, for everything it has started; our processes among these."""
        raylet = _raylet(node)
        family = [raylet] if raylet_only else [raylet, *raylet.children(recursive=True)]
        ours = _actors_of(raylet)
        for process in family:
            process.send_signal(number)
        if number == signal.SIGKILL and not raylet_only:
            raylet.wait(_DEADLINE_S)
        self._struck += [*family, *ours]
        self._cluster.worker_nodes.discard(node)
        return ours

    def actors(self) -> list[psutil.Process]:
        """Our processes on every node that lives."""
        return [actor for node in self._cluster.list_all_nodes() for actor in _actors_of(_raylet(node))]

    def drain(self, node: Any, *, within_s: int) -> Any:
        """Ray's own notice that the node will be taken away."""
        command = ["drain-node", "--address", self.address, "--node-id", node.node_id, "--reason-message", "spot"]
        options = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", str(within_s)]
        ray = str(Path(sys.executable).with_name("ray"))
        subprocess.run([ray, *command, *options], check=True, capture_output=True, timeout=_DEADLINE_S)
        return node

    def wake(self) -> None:
        """Everything that is frozen goes on."""
        for process in self._struck:
            if process.is_running():
                process.resume()

    def remove(self, *nodes: Any) -> None:
        for node in nodes:
            self._cluster.remove_node(node)

    def close(self) -> None:
        for process in self._struck:
            if process.is_running():
                process.kill()
        self._cluster.shutdown()


def _raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def _is_actor(process: psutil.Process) -> bool:
    try:
        return "ray::_Actor" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _actors_of(raylet: psutil.Process) -> list[psutil.Process]:
    return [process for process in raylet.children() if _is_actor(process)]


def _is_left(node: Any) -> bool:
    """A drained node that nobody uses any more may end by itself."""
    try:
        return not _actors_of(_raylet(node))
    except psutil.NoSuchProcess:
        return True


def _is_keeper(actor: psutil.Process) -> bool:
    """It has not loaded torch."""
    return not any("libtorch" in mapped.path for mapped in actor.memory_maps())


def _worker_of(rank: int, actors: list[psutil.Process]) -> psutil.Process:
    """Whoever writes the log of the rank."""
    log = f"rank{rank:05d}.attempt1.log"
    return next(actor for actor in actors if any(Path(file.path).name == log for file in actor.open_files()))


def _gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=_DEADLINE_S)
    return not alive


def _config(root: Path, corpus: Path, *, nodes: int = 3, **options: Any) -> RunConfig:
    config = tiny_config(root, corpus, nodes=nodes, **{"steps": _STEPS, "spares": 0, **options})
    config.data.cache = str(corpus.with_name("cache"))
    return config


def _on(cluster: RayCluster, config: RunConfig) -> RunConfig:
    return replace(config, launch=replace(config.launch, kind=LaunchKind.LOCAL, address=cluster.address))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Callable[[int], Path]:
    """The directory of a run of so many nodes, in forked processes, to which nothing happened."""
    known: dict[int, Path] = {}

    def of(nodes: int) -> Path:
        if nodes not in known:
            known[nodes] = train(_config(tmp_path_factory.mktemp("undisturbed"), corpus, nodes=nodes)).run_dir
        return known[nodes]

    return of


class Story:
    """A run that is struck once it has finished a few steps, and what became of it."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.struck_s = 0.0

    def strike(self, action: Callable[[], Any]) -> Any:
        until(lambda: any(step >= _STRUCK_AT for step in self.steps()), "the first steps", _DEADLINE_S)
        self.struck_s = time.time()
        return action()

    @property
    def run_dir(self) -> Path:
        (found,) = run_dirs(self.driver.root)
        return found

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [] if not run_dirs(self.driver.root) else events_of(self.run_dir, kind)

    def steps(self) -> list[int]:
        return [step for run_dir in run_dirs(self.driver.root) for step in steps_of(run_dir, 1)]

    def await_recovery(self, what: str) -> None:
        """Tells how long it took from the fault to the first step that all ranks have finished after it."""
        until(lambda: self.events("recovery_done"), "a recovery", _DEADLINE_S)
        run_dir = self.run_dir
        done, planned = events_of(run_dir, "recovery_done")[-1], events_of(run_dir, "recovery_planned")[-1]
        seconds = {name: round(lap_s, 1) for name, lap_s in done["split_s"].items()}
        print(f"{what}: a step again after {done['time'] - self.struck_s:.1f} s, from {planned['source']}, {seconds}")

    def finish(self) -> Path:
        code, said = self.driver.await_end()
        assert code == 0, said
        return self.run_dir


Starter = Callable[[RunConfig], Story]


@pytest.fixture
def start(ray_nodes: RayCluster) -> Iterator[Starter]:
    drivers: list[Driver] = []

    def begin(config: RunConfig) -> Story:
        drivers.append(Driver(config))
        return Story(drivers[-1])

    yield begin
    for driver in drivers:
        driver.close()
    assert _gone(ray_nodes.actors())


@pytest.mark.slow
def test_killed_node_is_rebuilt_from_parity_on_another(
    tmp_path: Path, corpus: Path, ray_nodes: RayCluster, undisturbed: Callable[[int], Path], start: Starter
) -> None:
    ray_nodes.grow_to(3)
    story = start(_on(ray_nodes, _config(tmp_path, corpus)))
    story.strike(lambda: ray_nodes.strike(ray_nodes.occupied()[0], signal.SIGKILL))
    story.await_recovery("node killed")
    run_dir = story.finish()
    (fault,) = events_of(run_dir, "fault_detected")
    assert "does not answer" in fault["cause"]
    assert "rack 1" in events_of(run_dir, "protection")[0]["reason"], "two of three nodes are in one zone"
    assert [plan["source"] for plan in events_of(run_dir, "recovery_planned")] == [PARITY]
    assert outcome_of(undisturbed(3)).differences(outcome_of(run_dir)) == []


@pytest.mark.slow
def test_node_that_has_lost_its_raylet_is_left_and_an_orphaned_keeper_disturbs_nobody(
    tmp_path: Path, corpus: Path, ray_nodes: RayCluster, undisturbed: Callable[[int], Path], start: Starter
) -> None:
    ray_nodes.grow_to(3)
    story = start(_on(ray_nodes, _config(tmp_path, corpus)))

    def strike() -> tuple[Any, psutil.Process]:
        node = ray_nodes.occupied()[0]
        raylet = _raylet(node)
        worker, keeper = sorted(ray_nodes.strike(node, signal.SIGKILL, raylet_only=True), key=_is_keeper)
        worker.kill()
        return raylet, keeper

    raylet, keeper = story.strike(strike)
    story.await_recovery("raylet killed, its worker soon after")
    run_dir = story.finish()
    assert keeper.is_running(), "as long as nobody has reaped its parent"
    assert [plan["source"] for plan in events_of(run_dir, "recovery_planned")] == [PARITY]
    assert outcome_of(undisturbed(3)).differences(outcome_of(run_dir)) == []
    raylet.wait(_DEADLINE_S)
    assert _gone([keeper])


@pytest.mark.slow
def test_frozen_node_moves_to_the_host_of_the_spare_and_what_wakes_up_later_is_gone_at_once(
    tmp_path: Path, corpus: Path, ray_nodes: RayCluster, undisturbed: Callable[[int], Path], start: Starter
) -> None:
    ray_nodes.grow_to(3)
    story = start(_on(ray_nodes, _config(tmp_path, corpus, spares=1)))
    frozen = story.strike(lambda: ray_nodes.strike(ray_nodes.occupied()[0], signal.SIGSTOP))
    story.await_recovery("node frozen, with a spare elsewhere")
    (rank,) = story.events("fault_detected")[0]["ranks"]
    assert _worker_of(rank, ray_nodes.actors()).create_time() < story.struck_s, "the spare"
    ray_nodes.wake()
    assert _gone(frozen)
    run_dir = story.finish()
    assert [plan["source"] for plan in events_of(run_dir, "recovery_planned")] == [PARITY]
    assert outcome_of(undisturbed(3)).differences(outcome_of(run_dir)) == []


@pytest.mark.slow
def test_two_nodes_lost_at_once_are_rebuilt_from_double_parity(
    tmp_path: Path, corpus: Path, ray_nodes: RayCluster, undisturbed: Callable[[int], Path], start: Starter
) -> None:
    ray_nodes.grow_to(4)
    config = _on(ray_nodes, _config(tmp_path, corpus, nodes=4))
    config.snapshot.parity = 2
    story = start(config)
    story.strike(lambda: [ray_nodes.strike(node, signal.SIGKILL) for node in ray_nodes.occupied()[:2]])
    story.await_recovery("two nodes killed")
    run_dir = story.finish()
    assert [plan["source"] for plan in events_of(run_dir, "recovery_planned")][-1] == PARITY
    assert outcome_of(undisturbed(4)).differences(outcome_of(run_dir)) == []


@pytest.mark.slow
def test_killed_keeper_is_replaced_where_it_was_and_its_worker_carries_the_memory_over(
    tmp_path: Path, corpus: Path, ray_nodes: RayCluster, undisturbed: Callable[[int], Path], start: Starter
) -> None:
    ray_nodes.grow_to(3)
    story = start(_on(ray_nodes, _config(tmp_path, corpus)))

    def strike() -> Any:
        node = ray_nodes.occupied()[0]
        next(actor for actor in _actors_of(_raylet(node)) if _is_keeper(actor)).kill()
        return node

    node = story.strike(strike)
    story.await_recovery("keeper killed")
    assert [_is_keeper(actor) for actor in _actors_of(_raylet(node))].count(True) == 1
    run_dir = story.finish()
    (plan,) = events_of(run_dir, "recovery_planned")
    assert plan["source"] in (LIVE, MEMORY)  # as the fault finds the ranks before or in the update
    assert outcome_of(undisturbed(3)).differences(outcome_of(run_dir)) == []


@pytest.mark.slow
def test_a_node_that_is_drained_is_left_at_a_step_boundary_and_costs_no_step_and_no_failure(
    tmp_path: Path, corpus: Path, ray_nodes: RayCluster, start: Starter
) -> None:
    """Three of four nodes are used. Ray is told that one of them will be taken away, and later it really is."""
    ray_nodes.grow_to(4)
    undisturbed = train(_config(tmp_path / "undisturbed", corpus, steps=_DRAINED_STEPS)).run_dir
    story = start(_on(ray_nodes, _config(tmp_path / "drained", corpus, steps=_DRAINED_STEPS)))
    node = story.strike(lambda: ray_nodes.drain(ray_nodes.occupied()[0], within_s=60))
    story.await_recovery("node drained")
    until(lambda: _is_left(node), "the end of what was there")
    run_dir = story.finish()
    (notice,) = events_of(run_dir, "preemption_noticed")
    assert (notice["host"], "drains" in notice["reason"]) == (node.node_id, True)
    assert 30 < notice["within_s"] <= 60
    (fault,) = events_of(run_dir, "fault_detected")
    assert (fault["node"], fault["is_preemption"]) == (notice["node"], True)
    (done,) = events_of(run_dir, "recovery_done")
    assert (done["failures"], done["preemptions"], done["steps_lost"]) == (0, 1, 0)
    assert [plan["source"] for plan in events_of(run_dir, "recovery_planned")] == [PARITY]
    assert steps_of(run_dir, 1) == list(range(1, _DRAINED_STEPS + 1)), "no step is made twice"
    assert outcome_of(undisturbed).differences(outcome_of(run_dir)) == []


def test_zones_are_the_labels_of_the_ray_nodes(ray_nodes: RayCluster) -> None:
    ray_nodes.grow_to(3)
    with closing(RayFleet(LaunchConfig(nodes=3, address=ray_nodes.address), "zones")) as fleet:
        zones = dict(zip(fleet.hosts(3), fleet.zones(3), strict=True))
    assert len(zones) == 3
    assert zones.items() <= ray_nodes.zones.items()


@pytest.mark.slow
def test_what_no_ray_node_has_room_for_waits_until_one_is_added(ray_nodes: RayCluster) -> None:
    ray_nodes.add("room", gpus=1)
    keeper, told = Address(Role.KEEPER, 0), list[Report]()
    spec = {"node": 0, "run_tag": "room", "limit_bytes": 1000, "buffers": 3, "lease_s": _DEADLINE_S}

    def hears(kind: type[Report]) -> bool:
        told.extend(fleet.poll(0.1))
        return any(isinstance(report, kind) for report in told)

    with closing(RayFleet(LaunchConfig(gpus_per_worker=1.0, nodes=1, address=ray_nodes.address), "room")) as fleet:
        fleet.start(keeper, 0, spec)
        until(lambda: hears(Completion), "a keeper", _DEADLINE_S)
        (first,) = fleet.hosts(1)
        (node,) = ray_nodes.occupied()
        fleet.call(keeper, "inventory")
        ray_nodes.strike(node, signal.SIGKILL)
        until(lambda: fleet.call(keeper, "inventory") and hears(Lost), "its loss", _DEADLINE_S)
        told.clear()
        again = fleet.start(keeper, 0, spec)
        assert not hears(Completion)
        ray_nodes.add("room", gpus=1)
        until(lambda: hears(Completion), "a keeper on the new node", _DEADLINE_S)
        assert [report.call for report in told if isinstance(report, Completion)] == [again]
        assert fleet.hosts(1) != [first]
        ray_nodes.remove(*ray_nodes.occupied())
