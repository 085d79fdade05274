"""Who is told to suffer what when faults on purpose are due, over processes that do what they are told."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from holdfast.configs.schema import LaunchConfig, RunConfig
from holdfast.events import FaultInjected, MemoryEvents
from holdfast.fault_tolerance import chaos
from holdfast.fault_tolerance.config import ChaosConfig
from holdfast.fault_tolerance.impairment import STORAGE
from holdfast.fault_tolerance.lanes import Roster
from holdfast.launch import inject_files
from holdfast.launch.calls import Calls
from holdfast.launch.crew import Crew, ProcessSpecs
from holdfast.launch.durable import DurableTier
from holdfast.launch.fleet import Address, Completion
from holdfast.launch.injection import Injector
from holdfast.launch.protection import Protection
from holdfast.launch.striker import Striker
from holdfast.trainer.config import TrainerConfig
from tests.support.keepers import LocalFleet

_NODES, _PER_NODE = 3, 2


class _Body:
    """Of any process, once it has started."""

    def ready(self) -> dict[str, object]:
        return {"pid": 0, "address": "here"}


class _Fleet(LocalFleet):
    """One that starts processes. What they are told later stays on the way."""

    def start(self, target: Address, node: int, spec: Mapping[str, object]) -> int:
        self.bodies[target] = _Body()
        return super().start(target, node, spec)


class _Struck:
    """A run of three nodes with two ranks each, all of them ready, and a spare worker on the last node."""

    def __init__(self, root: Path, *faults: str) -> None:
        self.root, self.events = root, MemoryEvents()
        config = RunConfig(
            chaos=ChaosConfig(faults=list(faults)),
            launch=LaunchConfig(nodes=_NODES, workers_per_node=_PER_NODE),
            trainer=TrainerConfig(max_steps=100),
        )
        world = _NODES * _PER_NODE
        self.fleet = _Fleet()
        self.calls = Calls(self.fleet)
        self.crew = Crew(self.fleet, self.calls, ProcessSpecs(worker={}, keeper={}))
        self.failed: list[tuple[int, str]] = []
        self._start_all(world)
        uri = str(root / "checkpoints")
        self.striker = Striker(
            Injector(config, root, self.events),
            self.crew,
            self.calls,
            durable=DurableTier(uri, config.snapshot, world=world, config_digest="cfg", events=self.events),
            protection=Protection(Roster(0, tuple(range(_NODES)), _PER_NODE), persist_every=0),
            keeper_fails=lambda node, why: self.failed.append((node, why)),
        )
        self.striker.begin(0)

    def _start_all(self, world: int) -> None:
        for node in range(_NODES):
            self.crew.start_keeper(node, ready=lambda *_: None, failed=pytest.fail)
        for worker in range(world + 1):
            node = min(worker // _PER_NODE, _NODES - 1)
            self.crew.start_worker(worker, node, ready=lambda *_: None, failed=pytest.fail)
        for report in self.crew.poll(0.0):
            assert isinstance(report, Completion)
            self.calls.complete(report)
        self.crew.workers_of_ranks = {rank: rank for rank in range(world)}
        self.fleet.sent.clear()

    def told(self, step: int) -> list[tuple[str, str, tuple[object, ...]]]:
        """To whom, what, and the rest of the call."""
        self.striker.strike_due(step, 0.0)
        return self.sent()

    def sent(self) -> list[tuple[str, str, tuple[object, ...]]]:
        found = [(str(sent.target), sent.method, sent.args) for sent in self.fleet.sent]
        self.fleet.sent.clear()
        return found

    def noted(self) -> list[str]:
        self.striker.report(0.0)
        return [event.action for event in self.events.events if isinstance(event, FaultInjected)]


@pytest.fixture(autouse=True)
def _healthy() -> Iterator[None]:
    yield
    STORAGE.heal()


def _is_disk_full() -> bool:
    try:
        list(STORAGE.passed(memoryview(bytes(8))))
    except OSError:
        return True
    return False


def test_a_node_is_struck_by_its_keeper_which_knows_the_workers_there(tmp_path: Path) -> None:
    run = _Struck(tmp_path, "node_sigkill node=2 step=4")
    assert run.told(3) == []
    assert run.told(4) == [("keeper 2", "strike", ("node_sigkill node=2 step=4", [0, 0, 0]))]
    assert run.told(5) == [] and run.noted() == ["node_sigkill"]


def test_a_keeper_that_is_to_be_killed_is_given_up_at_once_with_the_reason(tmp_path: Path) -> None:
    run = _Struck(tmp_path, "keeper_sigkill node=1 step=4")
    assert run.told(4) == []
    ((node, why),) = run.failed
    assert node == 1 and why.startswith("killed by ") and "keeper_sigkill node=1 step=4" in why


def test_damage_to_a_rank_is_done_by_the_keeper_of_its_node_if_there_is_such_a_rank_still(tmp_path: Path) -> None:
    run = _Struck(tmp_path, "flip rank=3 step=4 what=parity", "flip rank=5 step=6 what=parity")
    ((target, method, (entry, _)),) = run.told(4)
    assert (target, method) == ("keeper 1", "strike") and str(entry).startswith("flip rank=3 step=4")
    run.striker._protection.move_to(Roster(1, (0, 2), _PER_NODE))
    assert run.told(6) == [], "there are four ranks"


def test_a_full_disk_is_that_of_every_keeper_and_of_the_driver(tmp_path: Path) -> None:
    run = _Struck(tmp_path, "disk_full step=4 for=600")
    assert [(target, method) for target, method, _ in run.told(4)] == [(f"keeper {n}", "strike") for n in range(_NODES)]
    assert _is_disk_full()
    _Struck(tmp_path / "next")
    assert not _is_disk_full(), "another run has a disk of its own"


def test_a_full_disk_of_one_node_is_no_business_of_the_driver(tmp_path: Path) -> None:
    run = _Struck(tmp_path, "disk_full node=1 step=4 for=600")
    assert [target for target, _, _ in run.told(4)] == ["keeper 1"]
    assert not _is_disk_full()


def test_a_wish_at_a_failpoint_is_brought_to_everybody_who_may_reach_it(tmp_path: Path) -> None:
    run = _Struck(tmp_path)
    run.striker.arm_workers()
    run.striker.arm_keeper(0)
    assert run.sent() == [], "there is nothing to tell"
    for entry in ("sigkill rank=1 at=step.after_backward", "keeper_sigkill node=1 at=keeper.before_vote"):
        inject_files.ask(tmp_path, entry, "somebody")
    run.striker.listen(3, 1.0)
    told = run.sent()
    ranks = range(_NODES * _PER_NODE)
    assert sorted((target, method) for target, method, _ in told) == sorted(
        [*((f"worker {rank}", "inject") for rank in ranks), *((f"keeper {node}", "arm") for node in range(_NODES))]
    )
    entries = {method: args[-1] for _, method, args in told}
    assert "sigkill rank=1" in json.dumps(entries["inject"]) and "keeper" not in json.dumps(entries["inject"])
    assert "keeper_sigkill node=1" in json.dumps(entries["arm"])
    run.striker.arm_keeper(2)
    assert [target for target, _, _ in run.sent()] == ["keeper 2"], "one that has started again"


def test_a_run_without_a_checkpoint_has_none_to_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = _Struck(tmp_path)
    run.striker._strike(chaos.parse("flip_file rank=0 step=4"))
    assert "but there is no checkpoint" in caplog.text
