"""A conductor and a supervisor over processes that exist in the test's imagination only: what is started, asked,
killed and concluded, in which order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from holdfast.clock import FakeClock
from holdfast.configs.schema import LaunchConfig, RunConfig
from holdfast.events import (
    CheckpointWritten,
    EpochStarted,
    Evaluated,
    FaultDetected,
    MemoryEvents,
    PreemptionNoticed,
    RecoveryPlanned,
    StopRequested,
)
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance import messages as m
from holdfast.fault_tolerance.commit import CommitRecord
from holdfast.fault_tolerance.commit_json import to_json
from holdfast.fault_tolerance.commit_outcome import Report as KeepersReport
from holdfast.fault_tolerance.config import ChaosConfig, RecoveryConfig
from holdfast.fault_tolerance.lanes import make_lanes
from holdfast.fault_tolerance.machine import Layout, Supervisor
from holdfast.fault_tolerance.storage import DirectoryStorage, open_storage
from holdfast.launch import conductor as conductor_module
from holdfast.launch.conductor import Conductor, Verdict
from holdfast.launch.crew import ProcessSpecs
from holdfast.launch.durable import DurableTier
from holdfast.launch.fleet import Address, Completion, Draining, Lost, Report, Role
from holdfast.trainer.config import TrainerConfig
from holdfast.types import Phase, StepReport

_WORLD = 2
_MOST_POLLS = 20_000
_NO_ANSWER_S = 60.0
_EPOCH_METHODS = ("admit", "attach", "inventory", "forget_above", "begin", "run_epoch")
"""What comes before an epoch, in order."""

Story = Iterator[None]
"""What happens to the processes; it goes on by one ``yield`` whenever the conductor looks at its fleet."""


def _worker(number: int) -> Address:
    return Address(Role.WORKER, number)


def _keeper(node: int) -> Address:
    return Address(Role.KEEPER, node)


class _Enough(Exception):
    """Raised by a story that has seen what it wanted to see."""


@dataclass(frozen=True)
class _Sent:
    number: int
    target: Address
    method: str
    args: tuple[Any, ...]


class _Fleet:
    """Processes as entries of a table. Whatever is asked is answered at the next poll, unless it is held back;
    ``run_epoch`` is answered when the story, an abort or a stop ends the epoch. Looking at it lets time pass."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.story: Story = iter(())
        self.log: list[tuple[str, Address]] = []
        """Every call, start, SIGKILL and release, by name and target."""
        self.sent: list[_Sent] = []
        self.kills: list[tuple[Address, float]] = []
        self.held_back: set[tuple[Address, str]] = set()
        self.errors: dict[tuple[Address, str], str] = {}
        """The next answer of a process to a method is this error."""
        self.alive: set[Address] = set()
        self.homes = ["here"] * _WORLD
        self._host_of: dict[Address, str] = {}
        self.notices: dict[int, Draining] = {}
        self.notes: list[dict[str, Any]] = []
        """What rank 0 has to tell besides steps."""
        self.memory: dict[int, dict[int, int]] = {rank: {} for rank in range(_WORLD)}
        """Epoch by version by rank; a worker carries it over when its keeper is replaced."""
        self.records: dict[int, list[CommitRecord]] = {node: [] for node in range(_WORLD)}
        """What the keeper of each node knows to be committed; it goes with the keeper."""
        self.step, self.kept = 0, set[int]()
        self._reports: dict[int, list[StepReport]] = {rank: [] for rank in range(_WORLD)}
        self._admitted: set[int] = set()
        self._open: list[_Sent] = []
        self._news: list[Report] = []
        self._polls = 0

    # -- the fleet ------------------------------------------------------------------------------------------------

    def hosts(self, nodes: int) -> Sequence[str]:
        return tuple(self.homes[:nodes])

    def host_of(self, target: Address) -> str:
        return self._host_of[target] if target in self.alive else ""

    def draining(self) -> Mapping[int, Draining]:
        return self.notices

    def start(self, target: Address, node: int, spec: Mapping[str, object]) -> int:
        assert target not in self.alive, f"{target} is started although it lives"
        json.dumps(dict(spec))
        self.log.append(("start", target))
        self.alive.add(target)
        self._host_of[target] = self.homes[node]
        if target.role is Role.KEEPER:
            self._admitted.discard(node)
            self._reports[node] = []
        return self.call(target, "ready")

    def call(self, target: Address, method: str, *args: object) -> int:
        sent = _Sent(len(self.sent) + 1, target, method, tuple(json.loads(json.dumps(args))))
        self.sent.append(sent)
        if method not in ("pulse", "ready"):
            self.log.append((method, target))
        if target in self.alive:
            self._open.append(sent)
        return sent.number

    def poll(self, timeout_s: float) -> list[Report]:
        self._polls += 1
        assert self._polls < _MOST_POLLS, "the run does not end"
        self.clock.advance(timeout_s)
        next(self.story, None)
        for sent in list(self._open):
            if sent.method != "run_epoch" and (sent.target, sent.method) not in self.held_back:
                self._carry_out(sent)
        news, self._news = self._news, []
        return news

    def kill(self, target: Address) -> None:
        if target in self.alive:
            self.log.append(("SIGKILL", target))
            self.kills.append((target, self.clock.now()))
        self._remove(target)

    def release(self, target: Address) -> None:
        self.log.append(("release", target))
        self._remove(target)

    def close(self) -> None:
        self.alive.clear()

    # -- the processes --------------------------------------------------------------------------------------------

    def _carry_out(self, sent: _Sent) -> None:
        error = self.errors.pop((sent.target, sent.method), None)
        answer = getattr(self, f"_{sent.method}")(sent.target.number, *sent.args) if error is None else None
        self.answer(sent, answer, error)

    def _ready(self, number: int) -> object:
        return {"pid": 1000 + number, "host": "here", "address": f"here:{number}"}

    def _admit(self, node: int, rank: int, roster: int) -> object:
        assert roster == 0
        self._admitted.add(node)
        return {"node": node, "rank": rank}

    def _attach(self, worker: int, rank: int, ref: Mapping[str, int], roster: int) -> None:
        assert (ref, roster) == ({"node": rank, "rank": rank}, 0)

    def _inventory(self, node: int, epoch: int = 0) -> object:
        size = {"bytes": 900, "manifest_bytes": 100}
        held = [
            {"version": v, "epoch": e, "world": _WORLD, "digest": f"{v}-{e}", **size}
            for v, e in self.memory[node].items()
        ]
        report = KeepersReport(node, epoch, tuple(self.records[node]), (), ())
        parity = [record.key for record in self.records[node]]
        told = {"held": {str(node): held}, "former": [], "parity": parity, "report": to_json(report)}
        return {"roster": 0, **told}

    def _begin(self, node: int, plan: Mapping[str, Any], outcome: Mapping[str, Any]) -> None:
        assert plan["addresses"] == {str(each): f"here:{each}" for each in range(_WORLD)}
        assert outcome["fence"] == plan["epoch"]

    def _rebuild(self, node: int, rank: int, record: Mapping[str, Any], plan: object, lost: Sequence[int]) -> int:
        assert rank in lost
        version = int(record["version"])
        self.memory[rank][version] = 1
        return version

    def _forget_above(self, node: int, version: int) -> None:
        self.memory[node] = {v: e for v, e in self.memory[node].items() if v <= version}

    def _load(self, node: int, rank: int, uri: str, directory: str) -> int:
        step = checkpoint.step_of(directory)
        assert step is not None
        self.memory[rank][step] = 1
        return step

    def _persist(self, node: int, rank: int, version: int, uri: str, directory: str) -> object:
        assert version in self.memory[rank]
        return checkpoint.write_rank(open_storage(uri), directory, rank, data=[b"state"], manifest=b"manifest")

    def _fence(self, node: int, epoch: int) -> None: ...

    def _kill(self, node: int, pid: int) -> None: ...

    def _quarantine(self, node: int, rank: int, version: int) -> None:
        self.memory[rank].pop(version, None)

    def _abort(self, worker: int, epoch: int, may_update: bool) -> None:
        self.park(worker, "aborted", epoch=epoch)

    def _stop(self, worker: int, epoch: int) -> None:
        self.park(worker, "stopped", epoch=epoch)

    def _drain(self, worker: int) -> object:
        notes, self.notes = self.notes, []
        return notes

    def _pulse(self, node: int, since: Mapping[str, int]) -> object:
        now, reports = self.clock.now() + 5000.0, self._reports[node]
        beat = {"epoch": self.epoch, "phase": int(Phase.VOTE), "step": self.step, "beat_s": now, "progress_s": now}
        versions = [{"version": v, "epoch": e, "kept": v in self.kept} for v, e in self.memory[node].items()]
        new = [asdict(report) for report in reports[since.get(str(node), 0) :]]
        seen = {"beat": beat, "next_seq": len(reports), "versions": versions, "reports": new}
        ranks = {str(node): seen} if node in self._admitted else {}
        protection = {"epoch": -1, "committed": -1, "aborted": 0, "encode_s": 0.0}
        return {"now": now, "roster": 0, "ranks": ranks, "protection": protection}

    # -- what a story may do --------------------------------------------------------------------------------------

    def answer(self, sent: _Sent, result: object = None, error: str | None = None) -> None:
        self._open.remove(sent)
        self._news.append(Completion(sent.number, sent.target, json.loads(json.dumps(result)), error))

    def report(self, *news: Report) -> None:
        self._news += news

    def die(self, target: Address) -> None:
        """The operating system tells of its death."""
        self._remove(target)
        self._news.append(Lost(target, "killed by SIGKILL"))

    def _remove(self, target: Address) -> None:
        self.alive.discard(target)
        self._open = [sent for sent in self._open if sent.target != target]

    def asked(self, target: Address, method: str) -> _Sent | None:
        """The open question, if there is one."""
        return next((s for s in self._open if (s.target, s.method) == (target, method)), None)

    @property
    def epoch(self) -> int:
        return max((sent.args[0]["epoch"] for sent in self.sent if sent.method == "run_epoch"), default=0)

    def plans(self, epoch: int) -> dict[Address, dict[str, Any]]:
        sent = [s for s in self.sent if s.method == "run_epoch" and s.args[0]["epoch"] == epoch]
        return {s.target: s.args[0] for s in sent}

    def trains(self, epoch: int) -> bool:
        """Every rank is in the epoch."""
        open_plans = [s.args[0]["epoch"] for s in self._open if s.method == "run_epoch"]
        return open_plans == [epoch] * _WORLD

    def train(self, step: int) -> None:
        """Every rank has finished ``step`` and holds its version."""
        self.step = step
        for rank in range(_WORLD):
            self.memory[rank] = {step: self.epoch}
            self._reports[rank].append(StepReport(step, self.epoch, 1.5, 2.5, 1e-3, 0.7, 64, 0.25, 0.0, 9000, step - 1))

    def park(self, worker: int, outcome: str, *, epoch: int | None = None, **facts: object) -> None:
        """The worker leaves its epoch, if it is in one."""
        sent = self.asked(_worker(worker), "run_epoch")
        if sent is not None and epoch in (None, sent.args[0]["epoch"]):
            answer = {"outcome": outcome, "detail": "", "version": self.step, "result": {}, "live": -1, "notes": []}
            self.answer(sent, {**answer, **facts})

    def finish(self, **result: object) -> None:
        """The goal is reached; rank 0 concludes."""
        for target, plan in self.plans(self.epoch).items():
            self.park(target.number, "finished", result=result if plan["rank"] == 0 else {})

    def methods(self, *names: str) -> list[str]:
        return [method for method, _ in self.log if not names or method in names]

    def count(self, name: str, target: Address) -> int:
        return self.log.count((name, target))


class _Run:
    """Two nodes of one rank each."""

    def __init__(
        self,
        root: Path,
        *,
        spares: int = 0,
        faults: Sequence[str] = (),
        eval_every: int = 0,
        recovery: RecoveryConfig | None = None,
    ) -> None:
        self.clock = FakeClock(100.0)
        self.fleet, self.events, self.steps = _Fleet(self.clock), MemoryEvents(), list[int]()
        self.config = RunConfig(
            launch=LaunchConfig(nodes=_WORLD, workers_per_node=1, spares=spares),
            recovery=recovery or RecoveryConfig(),
            chaos=ChaosConfig(faults=list(faults)),
            trainer=TrainerConfig(eval_every=eval_every),
        )
        self.storage = DirectoryStorage(root / "checkpoints")
        hosts = tuple(self.fleet.hosts(_WORLD))
        layout = Layout(
            nodes=_WORLD, workers_per_node=1, spares=spares, hosts=hosts, lanes=make_lanes([range(_WORLD)], 1, 1)
        )
        durable = DurableTier(
            str(root / "checkpoints"), self.config.snapshot, world=_WORLD, config_digest="cfg", events=self.events
        )
        self.supervisor = Supervisor(layout, self.config.recovery, now=self.clock.now())
        self.conductor = Conductor(
            self.config,
            fleet=self.fleet,
            supervisor=self.supervisor,
            layout=layout,
            specs=ProcessSpecs(worker={"for": "workers"}, keeper={"for": "keepers"}),
            durable=durable,
            run_dir=root,
            events=self.events,
            on_step=lambda report: self.steps.append(report.step),
            clock=self.clock,
        )

    def play(self, story: Callable[[], Story]) -> Verdict:
        self.fleet.story = story()
        return self.conductor.run()

    def watch(self, story: Callable[[], Story]) -> None:
        """Up to the end of the story, which is not the end of the run."""

        def told() -> Story:
            yield from story()
            raise _Enough

        with pytest.raises(_Enough):
            self.play(told)

    def until(self, condition: Callable[[], object]) -> Story:
        while not condition():
            yield

    def pause(self, seconds: float) -> Story:
        end = self.clock.now() + seconds
        return self.until(lambda: self.clock.now() >= end)

    def training(self, epoch: int, pause_s: float = 0.5) -> Story:
        """Until every rank is in the epoch and has been seen there."""
        yield from self.until(lambda: self.fleet.trains(epoch))
        yield from self.pause(pause_s)

    def causes(self) -> list[str]:
        return [e.cause for e in self.events.events if isinstance(e, FaultDetected)]

    def on_disk(self) -> list[int]:
        good, _ = checkpoint.list_checkpoints(self.storage)
        return sorted(found.step for found in good)

    def save(self, step: int) -> None:
        """An earlier attempt has left a checkpoint."""
        folder = checkpoint.directory(step)
        parts = {r: checkpoint.write_rank(self.storage, folder, r, data=[b"s"], manifest=b"m") for r in range(_WORLD)}
        checkpoint.commit(self.storage, step, receipts=parts, config_digest="cfg")


@pytest.fixture
def run(tmp_path: Path) -> _Run:
    return _Run(tmp_path)


# -- every action has somebody who carries it out ---------------------------------------------------------------------


def test_every_action_of_the_machine_is_carried_out() -> None:
    kinds = {kind for kind in vars(m).values() if isinstance(kind, type) and issubclass(kind, m.Action)}
    assert set(conductor_module._HANDLERS) == kinds - {m.Action}


# -- the start --------------------------------------------------------------------------------------------------------


def test_a_run_starts_step_by_step(run: _Run) -> None:
    run.watch(lambda: run.training(1))
    in_order = [(name, target.role.value) for name, target in run.fleet.log if name != "drain"]
    assert [(key, len(list(same))) for key, same in groupby(in_order)] == [
        (("start", "keeper"), 2),
        (("start", "worker"), 2),
        (("fence", "keeper"), 2),
        (("admit", "keeper"), 2),
        (("attach", "worker"), 2),
        (("inventory", "keeper"), 2),
        (("forget_above", "keeper"), 2),
        (("begin", "keeper"), 2),
        (("run_epoch", "worker"), 2),
    ]
    assert [e.version for e in run.events.events if isinstance(e, EpochStarted)] == [-1]


def test_every_process_is_told_what_it_is(run: _Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[Address, tuple[int, Mapping[str, object]]] = {}
    start = run.fleet.start

    def spied(target: Address, node: int, spec: Mapping[str, object]) -> int:
        told[target] = (node, spec)
        return start(target, node, spec)

    monkeypatch.setattr(run.fleet, "start", spied)
    run.watch(lambda: run.training(1))
    assert told == {
        **{_keeper(node): (node, {"for": "keepers", "node": node}) for node in range(_WORLD)},
        **{_worker(number): (number, {"for": "workers"}) for number in range(_WORLD)},
    }


@pytest.mark.parametrize(("place", "method"), list(enumerate(_EPOCH_METHODS[:-1])))
def test_no_step_towards_an_epoch_is_taken_before_everybody_has_done_the_last_one(
    run: _Run, place: int, method: str
) -> None:
    late = _worker(1) if method == "attach" else _keeper(1)
    run.fleet.held_back.add((late, method))

    def story() -> Story:
        yield from run.until(lambda: run.fleet.asked(late, method))
        yield from run.pause(5.0)
        assert not set(_EPOCH_METHODS[place + 1 :]) & set(run.fleet.methods())
        run.fleet.held_back.clear()
        yield from run.training(1)

    run.watch(story)


def test_the_plans_of_an_epoch_differ_in_the_rank_alone_and_meet_where_nobody_was_before(
    run: _Run, tmp_path: Path
) -> None:
    rendezvous = tmp_path / "rendezvous"
    rendezvous.mkdir()
    (rendezvous / "epoch-1").write_text("left by an attempt that was killed")
    places = list[str]()

    def story() -> Story:
        for epoch in (1, 2, 3):
            yield from run.training(epoch, pause_s=0.0)
            plans = run.fleet.plans(epoch).values()
            assert sorted(plan["rank"] for plan in plans) == [0, 1]
            (shared,) = {json.dumps({**plan, "rank": None}, sort_keys=True) for plan in plans}
            plan = json.loads(shared)
            assert (plan["epoch"], plan["world"]) == (epoch, _WORLD)
            place = Path(plan["rendezvous"])
            assert place.parent.is_dir() and list(place.parent.iterdir()) == []
            place.write_text("here we are")
            places.append(str(place))
            yield from run.pause(0.5)
            run.fleet.train(epoch)
            yield from run.pause(0.5)
            run.fleet.die(max(run.fleet.plans(epoch), key=lambda target: target.number))

    run.watch(story)
    assert len(set(places)) == 3


def test_a_checkpoint_of_an_earlier_attempt_is_loaded_by_every_keeper_and_continued(run: _Run) -> None:
    run.save(5)
    run.watch(lambda: run.training(1))
    loads = [(s.target, s.args[0], s.args[2]) for s in run.fleet.sent if s.method == "load"]
    assert loads == [(_keeper(rank), rank, "step-00000005") for rank in range(_WORLD)]
    assert {plan["version"] for plan in run.fleet.plans(1).values()} == {5}


def test_a_checkpoint_that_a_keeper_cannot_read_is_refused_and_the_next_one_is_taken(run: _Run) -> None:
    run.save(5)
    run.save(7)
    run.fleet.errors[_keeper(1), "load"] = "ShardCorrupt: slice w of rank 1\nTraceback"
    run.watch(lambda: run.training(1))
    assert {plan["version"] for plan in run.fleet.plans(1).values()} == {5}
    (planned,) = [e for e in run.events.events if isinstance(e, RecoveryPlanned)][-1:]
    assert (planned.source, planned.version) == ("disk", 5)
    assert "checkpoint of step 7: ShardCorrupt: slice w of rank 1" in planned.rejected


# -- workers that are lost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["outcome", "failed call"])
def test_an_error_in_a_worker_is_a_fault_and_a_fresh_process_takes_its_place(run: _Run, form: str) -> None:
    def story() -> Story:
        yield from run.training(1)
        run.fleet.train(3)
        yield from run.pause(0.5)
        if form == "outcome":
            run.fleet.park(1, "error", detail="ValueError: boom\nTraceback")
        else:
            sent = run.fleet.asked(_worker(1), "run_epoch")
            assert sent is not None
            run.fleet.answer(sent, error="ValueError: boom\nTraceback")
        yield from run.training(2)
        run.fleet.train(4)
        yield from run.pause(0.5)
        run.fleet.finish(step=4)

    verdict = run.play(story)
    assert (verdict.outcome, verdict.faults, verdict.steps_lost) == ("finished", 1, 0)
    assert run.causes() == ["ValueError: boom\nTraceback"]
    assert [target for target, _ in run.fleet.kills] == [_worker(1)]
    assert [(s.target, s.args) for s in run.fleet.sent if s.method == "kill"] == [(_keeper(1), (1001,))]
    after = run.fleet.log[run.fleet.log.index(("SIGKILL", _worker(1))) :]
    assert after[:3] == [("SIGKILL", _worker(1)), ("abort", _worker(0)), ("start", _worker(2))]
    fenced = [after.index(("fence", _keeper(node))) for node in (0, 1)]
    assert max(fenced) < after.index(("inventory", _keeper(0)))
    assert {(t, p["rank"], p["version"]) for t, p in run.fleet.plans(2).items()} == {
        (_worker(0), 0, 3),
        (_worker(2), 1, 3),
    }


def test_a_lost_worker_is_told_with_the_age_of_its_last_beat_and_a_spare_takes_its_place(tmp_path: Path) -> None:
    run = _Run(tmp_path, spares=1)

    def story() -> Story:
        yield from run.training(1)
        run.fleet.train(3)
        yield from run.pause(0.5)
        run.fleet.held_back.add((_keeper(1), "pulse"))
        yield from run.pause(2.0)
        run.fleet.die(_worker(1))
        run.fleet.held_back.clear()
        yield from run.training(2)

    run.watch(story)
    (fault,) = [e for e in run.events.events if isinstance(e, FaultDetected)]
    assert (fault.ranks, fault.cause, fault.pid, fault.last_step) == ((1,), "killed by SIGKILL", 1001, 3)
    assert 2.0 <= fault.detected_after_s < 2.5
    assert set(run.fleet.plans(2)) == {_worker(0), _worker(2)}
    assert run.fleet.methods("start") == ["start"] * 5  # a spare in place of the spare only when all train again


def test_a_node_has_moved_before_its_losses_are_told(tmp_path: Path) -> None:
    run = _Run(tmp_path, spares=1)

    def story() -> Story:
        yield from run.training(1)
        run.fleet.homes[1] = "there"
        run.fleet.die(_worker(1))
        yield from run.training(2)

    run.watch(story)
    assert set(run.fleet.plans(2)) == {_worker(0), _worker(3)}, "the spare, worker 2, is still here"


@pytest.mark.parametrize("method", ["ready", "attach"])
@pytest.mark.parametrize("form", ["lost", "error"])
def test_a_worker_that_fails_on_its_way_into_an_epoch_is_replaced(run: _Run, method: str, form: str) -> None:
    run.fleet.held_back.add((_worker(1), method))

    def story() -> Story:
        yield from run.until(lambda: run.fleet.asked(_worker(1), method))
        if form == "lost":
            run.fleet.die(_worker(1))
        else:
            run.fleet.errors[_worker(1), method] = "OSError: no\nTraceback"
            run.fleet.held_back.clear()
        yield from run.until(lambda: run.fleet.trains(run.fleet.epoch))
        run.fleet.finish(step=1)

    assert run.play(story).faults == 1
    assert set(run.fleet.plans(run.fleet.epoch)) == {_worker(0), _worker(2)}
    assert run.fleet.count("SIGKILL", _worker(1)) == (form == "error")


def test_a_damaged_copy_is_quarantined_at_the_keeper_of_its_rank(run: _Run) -> None:
    def story() -> Story:
        yield from run.training(1)
        run.fleet.train(3)
        yield from run.pause(0.5)
        run.fleet.die(_worker(0))
        yield from run.training(2)
        run.fleet.park(1, "corrupt", detail="slice w")
        yield from run.training(3)

    run.watch(story)
    assert [(s.target, s.args) for s in run.fleet.sent if s.method == "quarantine"] == [(_keeper(1), (1, 3))]


# -- keepers that are lost --------------------------------------------------------------------------------------------


def test_after_the_loss_of_a_keeper_its_pulses_are_forgotten(run: _Run) -> None:
    def story() -> Story:
        yield from run.training(1)
        for step in (1, 2, 3):
            run.fleet.train(step)
            yield from run.pause(0.5)
        run.fleet.die(_keeper(1))
        yield from run.training(2)
        run.fleet.train(4)
        yield from run.pause(0.5)

    run.watch(story)
    died = max(i for i, s in enumerate(run.fleet.sent) if s.method == "ready")
    before = [s.args[0] for s in run.fleet.sent[:died] if s.method == "pulse"]
    after = [s.args[0] for s in run.fleet.sent[died:] if s.method == "pulse"]
    assert before[-1] == {"0": 3, "1": 3}
    assert after[0] == {"0": 3}
    assert run.steps == [1, 2, 3, 4]
    assert run.causes() == ["killed by SIGKILL"]


@pytest.mark.parametrize("method", ["ready", "admit", "inventory", "forget_above", "begin", "pulse"])
@pytest.mark.parametrize("form", ["lost", "error"])
def test_a_keeper_that_fails_is_one_fault_and_is_replaced_once_and_no_worker_suffers(
    run: _Run, method: str, form: str
) -> None:
    run.fleet.held_back.add((_keeper(1), method))

    def story() -> Story:
        yield from run.until(lambda: run.fleet.asked(_keeper(1), method))
        if method == "pulse":
            yield from run.training(1)
        if form == "lost":
            run.fleet.die(_keeper(1))
        else:
            run.fleet.errors[_keeper(1), method] = "OSError: no\nTraceback"
        run.fleet.held_back.clear()
        yield from run.until(lambda: run.fleet.count("start", _keeper(1)) == 2)
        yield from run.until(lambda: run.fleet.trains(run.fleet.epoch))
        yield from run.pause(30.0)
        run.fleet.train(1)
        yield from run.pause(0.5)
        run.fleet.finish(step=1)

    verdict = run.play(story)
    assert (verdict.faults, run.fleet.count("start", _keeper(1))) == (1, 2)
    assert [target for target, _ in run.fleet.kills if target.role is Role.WORKER] == []
    (cause,) = run.causes()
    assert ("killed by SIGKILL" if form == "lost" else "OSError: no") in cause


def test_a_keeper_that_is_not_ready_in_time_is_killed_before_another_one_is_started(tmp_path: Path) -> None:
    run = _Run(tmp_path, recovery=RecoveryConfig(start_timeout_s=20.0))
    run.fleet.held_back.add((_keeper(1), "ready"))

    def story() -> Story:
        yield from run.until(lambda: run.fleet.count("start", _keeper(1)) == 2)
        run.fleet.held_back.clear()
        yield from run.until(lambda: run.fleet.trains(run.fleet.epoch))
        run.fleet.finish(step=1)

    assert run.play(story).faults == 1
    assert run.fleet.count("start", _keeper(1)) == 2


def test_old_news_of_a_keeper_is_not_taken_for_news_of_the_one_in_its_place(run: _Run) -> None:
    """A real fleet hands over the last answer of a process together with its death."""
    run.fleet.held_back.add((_keeper(1), "admit"))

    def story() -> Story:
        yield from run.until(lambda: run.fleet.asked(_keeper(1), "admit"))
        sent = run.fleet.asked(_keeper(1), "admit")
        assert sent is not None
        run.fleet.report(
            Completion(sent.number, sent.target, error="OSError: no\nTraceback"), Lost(_keeper(1), "exited")
        )
        run.fleet.held_back.clear()
        yield from run.training(2)
        assert run.fleet.count("start", _keeper(1)) == 2
        run.fleet.die(_keeper(1))  # this, now, is news
        yield from run.training(3)
        assert run.fleet.count("start", _keeper(1)) == 3
        run.fleet.finish(step=1)

    assert run.play(story).faults == 2


# -- deadlines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["admit", "attach", "inventory", "forget_above"])
def test_an_answer_that_never_comes_is_a_loss_at_its_deadline(run: _Run, method: str) -> None:
    late = _worker(1) if method == "attach" else _keeper(1)
    run.fleet.held_back.add((late, method))
    asked = list[float]()

    def story() -> Story:
        yield from run.until(lambda: run.fleet.asked(late, method))
        asked.append(run.clock.now())
        yield from run.until(lambda: run.fleet.kills)
        run.fleet.held_back.clear()
        yield from run.training(2)
        run.fleet.finish(step=1)

    assert run.play(story).faults == 1
    (target, at), *_ = run.fleet.kills
    assert target == late
    assert asked[0] + _NO_ANSWER_S - 0.1 < at < asked[0] + _NO_ANSWER_S + 0.2
    assert "no answer before the deadline" in run.causes()[0]


def test_a_keeper_that_does_not_answer_its_pulse_is_killed(run: _Run) -> None:
    def story() -> Story:
        yield from run.training(1)
        run.fleet.held_back.add((_keeper(1), "pulse"))
        yield from run.until(lambda: run.fleet.kills)
        run.fleet.held_back.clear()
        yield from run.training(2)

    run.watch(story)
    assert [target for target, _ in run.fleet.kills] == [_keeper(1)]
    assert run.causes() == ["keeper of node 1: no answer before the deadline"]


# -- what rank 0 tells besides steps ----------------------------------------------------------------------------------


def _note(step: int) -> dict[str, Any]:
    return {"event": "evaluated", "step": step, "bits_per_byte": 2.5, "windows": 96}


def test_evaluations_become_events_once_whichever_way_they_come(tmp_path: Path) -> None:
    run = _Run(tmp_path, eval_every=10)

    def story() -> Story:
        yield from run.training(1)
        run.fleet.notes = [_note(10), _note(20)]
        yield from run.pause(5.0)
        run.fleet.notes = [_note(30)]
        yield from run.pause(5.0)
        run.fleet.park(0, "finished", result={"step": 40}, notes=[_note(40)])
        run.fleet.park(1, "finished")

    run.play(story)
    assert [e.step for e in run.events.events if isinstance(e, Evaluated)] == [10, 20, 30, 40]
    asked = [target for method, target in run.fleet.log if method == "drain"]
    assert set(asked) == {_worker(0)} and 9 <= len(asked) <= 13  # once per second


def test_evaluations_are_asked_of_the_worker_that_has_rank_0_now(tmp_path: Path) -> None:
    run = _Run(tmp_path, eval_every=10)

    def story() -> Story:
        yield from run.training(1)
        run.fleet.train(1)
        run.fleet.die(_worker(0))
        yield from run.training(2)
        run.fleet.log.clear()
        run.fleet.notes = [_note(10)]
        yield from run.pause(3.0)

    run.watch(story)
    assert {target for method, target in run.fleet.log if method == "drain"} == {_worker(2)}
    assert len(run.events.of(Evaluated)) == 1


def test_rank_0_is_asked_for_news_about_once_per_second(run: _Run) -> None:
    def story() -> Story:
        yield from run.training(1)
        yield from run.pause(5.0)

    run.watch(story)
    assert 4 <= run.fleet.methods().count("drain") <= 7
    assert {target for method, target in run.fleet.log if method == "drain"} == {_worker(0)}


# -- the end ----------------------------------------------------------------------------------------------------------


def test_a_run_that_reaches_its_goal_is_saved_and_tells_what_rank_0_found(run: _Run) -> None:
    def story() -> Story:
        yield from run.training(1)
        run.fleet.train(6)
        yield from run.pause(0.5)
        run.fleet.train(7)  # nobody has heard of this step when the workers leave
        run.fleet.finish(step=7, bits_per_byte=2.5)

    verdict = run.play(story)
    assert (verdict.outcome, verdict.exit_code, verdict.step) == ("finished", 0, 7)
    assert verdict.findings == {"step": 7, "bits_per_byte": 2.5}
    assert (run.on_disk(), run.steps) == ([7], [6, 7])
    released = [target for method, target in run.fleet.log if method == "release"]
    assert set(released) == {_worker(0), _worker(1)} and not run.fleet.kills


def test_a_run_that_is_stopped_leaves_at_a_step_boundary_and_is_saved(run: _Run) -> None:
    def story() -> Story:
        yield from run.training(1)
        run.fleet.train(6)
        yield from run.pause(0.5)
        run.conductor.stop("SIGINT received")

    verdict = run.play(story)
    assert (verdict.outcome, verdict.exit_code, verdict.reason) == ("stopped", 75, "SIGINT received")
    assert (verdict.step, verdict.saved, run.on_disk()) == (6, 6, [6])
    assert [target for method, target in run.fleet.log if method == "stop"] == [_worker(0), _worker(1)]
    assert len(run.events.of(StopRequested)) == 1 and not run.fleet.kills


@pytest.mark.parametrize("method", ["ready", "admit", "attach", "inventory", "forget_above"])
def _hung_step(run: _Run, told: str = "SIGTERM received") -> Story:
    """Step 6 is finished, the next one is not when somebody wants to stop."""
    yield from run.training(1)
    run.fleet.train(6)
    yield from run.pause(0.5)
    run.fleet.held_back |= {(_worker(number), "stop") for number in range(_WORLD)}
    run.conductor.stop(told)


def test_what_is_finished_is_on_disk_long_before_ranks_that_do_not_leave_are_given_up(run: _Run) -> None:
    began, saved_s = run.clock.now(), list[float]()

    def story() -> Story:
        yield from _hung_step(run)
        yield from run.until(lambda: run.on_disk() == [6])
        saved_s.append(run.clock.now() - began)

    verdict = run.play(story)
    grace_s = run.config.recovery.stop_grace_s
    assert (verdict.outcome, verdict.exit_code, verdict.step) == ("stopped", 75, 6)
    assert saved_s[0] < 0.2 * grace_s < 0.4 * grace_s < run.clock.now() - began < 0.6 * grace_s
    assert "had not left the step with" in verdict.reason
    assert len(run.events.of(CheckpointWritten)) == 1, "nothing newer came"


def test_a_checkpoint_that_is_being_written_when_ranks_are_given_up_is_finished(run: _Run) -> None:
    grace_s = run.config.recovery.stop_grace_s
    run.fleet.held_back.add((_keeper(1), "persist"))

    def story() -> Story:
        yield from _hung_step(run)
        yield from run.until(lambda: any(method == "SIGKILL" or method == "fence" for method, _ in run.fleet.log[-4:]))
        yield from run.pause(0.1 * grace_s)
        run.fleet.held_back.clear()

    verdict = run.play(story)
    assert (verdict.outcome, verdict.step, run.on_disk()) == ("stopped", 6, [6])
    assert [method for method, target in run.fleet.log if target == _keeper(0)].count("persist") == 1


def test_a_notice_is_told_before_the_move_that_it_causes_and_the_newest_version_goes_to_disk(
    run: _Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, handle = list[m.Message](), run.supervisor.handle

    def noted(message: m.Message, now: float) -> list[m.Action]:
        told.append(message)
        return handle(message, now)

    monkeypatch.setattr(run.supervisor, "handle", noted)

    def story() -> Story:
        yield from run.training(1)
        run.fleet.train(4)
        run.fleet.notices, run.fleet.homes[1] = {1: Draining("here", 30.0, "spot")}, "there"
        yield from run.until(lambda: run.on_disk() == [4])
        yield

    run.watch(story)
    news = [message for message in told if isinstance(message, m.NodeDraining | m.NodeMoved | m.Persisted)]
    assert news == [m.NodeDraining(1, "here", 30.0, "spot"), m.NodeMoved(1, "there"), m.Persisted(4)]
    assert [event.node for event in run.events.of(PreemptionNoticed)] == [1]


@pytest.mark.parametrize("method", ["attach", "inventory"])
def test_a_run_that_is_stopped_while_it_starts_has_nothing_to_save(run: _Run, method: str) -> None:
    late = _worker(1) if method == "attach" else _keeper(1)
    run.fleet.held_back.add((late, method))

    def story() -> Story:
        yield from run.until(lambda: run.fleet.asked(late, method))
        yield
        run.conductor.stop("SIGTERM received")

    verdict = run.play(story)
    assert (verdict.outcome, verdict.step, verdict.saved, run.on_disk()) == ("stopped", -1, -1, [])
    assert run.clock.now() < 100.0 + 1.5 * run.config.recovery.stop_grace_s


def test_a_run_that_is_stopped_before_it_has_resumed_still_has_its_checkpoint(run: _Run) -> None:
    run.save(5)
    run.fleet.held_back.add((_keeper(1), "ready"))

    def story() -> Story:
        yield
        run.conductor.stop("SIGTERM received")

    assert run.play(story).step == 5


def test_a_run_that_is_stopped_during_a_recovery_is_saved_as_it_is(run: _Run) -> None:
    def story() -> Story:
        yield from run.training(1)
        run.fleet.train(6)
        yield from run.pause(0.5)
        run.fleet.held_back.add((_worker(2), "ready"))
        run.fleet.die(_worker(1))
        yield from run.until(lambda: run.fleet.asked(_worker(2), "ready"))
        run.conductor.stop("SIGINT received")

    verdict = run.play(story)
    assert (verdict.outcome, verdict.exit_code, verdict.step, run.on_disk()) == ("stopped", 75, 6, [6])
    assert "stop" not in run.fleet.methods()


def test_a_stop_without_a_place_to_save_to_ends_within_its_grace(run: _Run) -> None:
    def story() -> Story:
        yield from run.training(1)
        run.fleet.train(6)
        yield from run.pause(0.5)
        run.fleet.held_back.add((_keeper(1), "persist"))
        run.conductor.stop("SIGINT received")

    began = run.clock.now()
    verdict = run.play(story)
    assert (verdict.outcome, verdict.step, run.on_disk()) == ("stopped", -1, [])
    assert run.config.recovery.stop_grace_s - 1 < run.clock.now() - began < run.config.recovery.stop_grace_s + 10


@pytest.mark.parametrize(("failures", "saved"), [(1, [6]), (2, [6]), (3, [])])
def test_the_last_checkpoint_is_tried_again_because_nothing_comes_after_it(
    run: _Run, failures: int, saved: list[int]
) -> None:
    def story() -> Story:
        yield from run.training(1)
        run.fleet.train(6)
        run.fleet.finish(step=6)
        for _ in range(failures):
            run.fleet.errors[_keeper(1), "persist"] = "SnapshotError: the connection broke"
            yield from run.until(lambda: not run.fleet.errors)

    verdict = run.play(story)
    assert (verdict.outcome, run.on_disk()) == ("finished", saved)


def test_a_wish_to_stop_shortens_the_last_save_of_a_finished_run(run: _Run) -> None:
    def story() -> Story:
        yield from run.training(1)
        run.fleet.train(6)
        run.fleet.held_back.add((_keeper(1), "persist"))
        run.fleet.finish(step=6)
        yield from run.until(lambda: run.fleet.asked(_keeper(1), "persist"))
        run.conductor.stop("SIGINT received")

    began = run.clock.now()
    assert run.play(story).outcome == "finished"
    assert run.clock.now() - began < run.config.recovery.stop_grace_s + 10 < run.config.recovery.step_timeout_s


def test_a_run_whose_budget_is_used_up_is_saved_because_its_state_is_good(tmp_path: Path) -> None:
    run = _Run(tmp_path, recovery=RecoveryConfig(max_failures=0))

    def story() -> Story:
        yield from run.training(1)
        run.fleet.train(6)
        yield from run.pause(0.5)
        run.fleet.die(_worker(1))

    verdict = run.play(story)
    assert (verdict.outcome, verdict.exit_code, verdict.step, verdict.faults) == ("failed", 1, 6, 1)
    assert run.on_disk() == [6]
    assert [target for method, target in run.fleet.log if method == "release"] == [_worker(0)]


def test_without_one_keeper_nothing_is_saved_at_the_end(tmp_path: Path) -> None:
    run = _Run(tmp_path, recovery=RecoveryConfig(max_failures=0))

    def story() -> Story:
        yield from run.training(1)
        run.fleet.train(6)
        yield from run.pause(0.5)
        run.fleet.die(_keeper(1))

    verdict = run.play(story)
    assert (verdict.outcome, verdict.exit_code, verdict.step, verdict.saved) == ("failed", 1, 6, -1)
    assert run.on_disk() == [] and "persist" not in run.fleet.methods()
    assert len(run.fleet.methods("inventory")) == _WORLD  # at the start only


def test_the_last_steps_are_heard_although_nothing_is_saved(tmp_path: Path) -> None:
    run = _Run(tmp_path, recovery=RecoveryConfig(max_failures=0))

    def story() -> Story:
        yield from run.training(1)
        run.fleet.train(6)
        yield from run.pause(0.5)
        run.fleet.held_back.add((_keeper(0), "pulse"))
        yield from run.pause(0.5)
        run.fleet.train(7)
        run.fleet.die(_keeper(1))
        yield
        run.fleet.held_back.clear()

    assert run.play(story).step == 7
    assert run.steps == [6, 7]


def test_a_state_that_restarting_does_not_help_is_not_saved(tmp_path: Path) -> None:
    run = _Run(tmp_path, recovery=RecoveryConfig(max_no_progress=1))

    def story() -> Story:
        yield from run.training(1)
        run.fleet.train(6)
        yield from run.pause(0.5)
        run.fleet.die(_worker(1))
        yield from run.training(2)
        run.fleet.die(_worker(2))

    verdict = run.play(story)
    assert (verdict.outcome, verdict.exit_code, verdict.step, verdict.faults) == ("failed", 93, 6, 2)
    assert run.on_disk() == [] and "persist" not in run.fleet.methods()


def test_whoever_leaves_at_once_has_what_is_on_disk_already(run: _Run) -> None:
    def story() -> Story:
        yield from run.training(1)
        run.fleet.train(4)
        run.fleet.kept = {4}
        yield from run.until(lambda: run.on_disk() == [4])
        run.fleet.train(6)
        yield from run.pause(0.5)

    run.watch(story)
    verdict = run.conductor.leave(130, "a second signal")
    assert (verdict.outcome, verdict.exit_code, verdict.step, run.on_disk()) == ("stopped", 130, 4, [4])
    assert len(run.events.of(CheckpointWritten)) == 1


def test_no_checkpoint_is_begun_before_every_rank_trains_again(run: _Run) -> None:
    def story() -> Story:
        yield from run.training(1)
        run.fleet.train(4)
        yield from run.pause(0.5)
        run.fleet.held_back.add((_worker(2), "ready"))
        run.fleet.die(_worker(1))
        yield from run.until(lambda: run.fleet.asked(_worker(2), "ready"))
        run.fleet.kept = {4}
        yield from run.pause(5.0)
        assert "persist" not in run.fleet.methods()
        run.fleet.held_back.clear()
        yield from run.training(2)

    run.watch(story)
    assert run.on_disk() == [4]


# -- faults on purpose ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_asked", [False, True])
def test_a_keeper_is_killed_on_purpose_once_and_not_before_its_step(tmp_path: Path, is_asked: bool) -> None:
    """Also when its pulse is open at that moment: the keeper that is ready soon after is not blamed for its end."""
    run = _Run(tmp_path, faults=["keeper_sigkill node=1 step=3", "sigkill rank=0 step=1"])

    def story() -> Story:
        yield from run.training(1)
        run.fleet.train(2)
        yield from run.pause(0.5)
        assert not run.fleet.kills
        if is_asked:
            run.fleet.held_back.add((_keeper(1), "pulse"))
            yield from run.pause(0.5)
        run.fleet.train(3)
        yield from run.until(lambda: run.fleet.kills)
        run.fleet.held_back.clear()
        yield from run.training(2)
        for step in (4, 5):
            run.fleet.train(step)
            yield from run.pause(0.5)
        run.fleet.finish(step=5)

    verdict = run.play(story)
    assert [target for target, _ in run.fleet.kills] == [_keeper(1)]
    assert (verdict.faults, verdict.outcome) == (1, "finished")
    assert run.causes() == ["keeper of node 1: killed by chaos.faults (keeper_sigkill node=1 step=3)"]


def test_a_fault_on_purpose_that_an_earlier_attempt_has_had_does_not_come_again(tmp_path: Path) -> None:
    run = _Run(tmp_path, faults=["keeper_sigkill node=1 step=3", "keeper_sigkill node=0 step=6"])
    run.save(5)

    def story() -> Story:
        yield from run.until(lambda: run.fleet.trains(1))
        run.fleet.train(5)
        yield from run.pause(1.0)
        assert not run.fleet.kills
        run.fleet.train(6)
        yield from run.training(2)

    run.watch(story)
    assert [target for target, _ in run.fleet.kills] == [_keeper(0)]
