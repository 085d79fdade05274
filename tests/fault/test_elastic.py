"""A node does not come back, and later it does: the run goes on with the others, and with all of them again."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast import failpoints
from holdfast.configs.schema import RunConfig
from holdfast.fault_tolerance.held_shards import HeldPart, HeldShards
from holdfast.launch import process_fleet
from holdfast.launch import run as run_module
from holdfast.launch.fleet import Address, Report, Role
from holdfast.launch.process_fleet import ProcessFleet
from holdfast.launch.run import Result, train
from tests.support.drivers import records, sound_record
from tests.support.runs import events_of, tiny_config, write_corpus

pytestmark = pytest.mark.timeout(240)

_STEPS, _BATCH, _NODE = 20, 12, 1
_LOST_AT, _GATE = 4, 9
"""Steps finished when the node is lost; the step before which the others wait until it is back."""
_PATIENCE_S = 120.0

Piece = tuple[str, int, int, int, bytes]
"""Name of a tensor, first and last element, elements of the whole tensor, and what they hold."""


# -- in a worker ------------------------------------------------------------------------------------------------------


def _run(folder: str, role: str, spec: str, environment: Mapping[str, str], pipe: Connection) -> None:
    """Body of a process in place of the fleet's own: it writes down what it has restored, and waits at the gate."""
    if role == Role.WORKER.value:
        _watch(Path(folder))
    process_fleet._run(role, spec, environment, pipe)


def _watch(folder: Path) -> None:
    from holdfast.trainer.state import StateView

    make, hit, views = StateView.__init__, failpoints.hit, list[StateView]()

    def made(self: StateView, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        views[:] = [self]

    def passed(name: str, step: int = -1) -> None:
        if name == "recovery.after_restore" and step >= 0:
            _write_down(views[0], folder / f"restored-{step}-{os.getpid()}.npz")
        if name == "step.begin" and step == _GATE:
            _wait_for(folder / "gate")
        hit(name, step)

    StateView.__init__, failpoints.hit = made, passed  # type: ignore[method-assign]  # of this process only


def _write_down(view: Any, path: Path) -> None:
    pieces = {}
    for piece in view._slices:  # not captured again: that writes the random state, which is being copied
        spec, content = piece.spec, piece.tensor.detach().cpu().numpy().tobytes()
        pieces[f"{spec.name}|{spec.start}|{spec.stop}|{_count(spec.shape)}"] = np.frombuffer(content, np.uint8)
    np.savez(path.with_suffix(".tmp.npz"), **pieces)  # type: ignore[arg-type]  # names are what they are
    path.with_suffix(".tmp.npz").replace(path)


def _wait_for(path: Path) -> None:
    end = time.monotonic() + _PATIENCE_S
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)


# -- whole tensors ----------------------------------------------------------------------------------------------------


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _restored(folder: Path, version: int) -> list[Piece]:
    found = []
    for path in folder.glob(f"restored-{version}-*.npz"):
        for key, content in np.load(path).items():
            name, start, stop, total = key.rsplit("|", 3)
            found.append((name, int(start), int(stop), int(total), content.tobytes()))
    return found


def _held(parts: Mapping[str, Any], version: int, token: str) -> list[Piece]:
    shards = HeldShards(HeldPart.from_json(parts), version, token)
    found = []
    for rank, manifest in shards.manifests.items():
        for entry in manifest.entries:
            spec, content = entry.spec, bytes(shards.read(rank, entry.offset, entry.offset + entry.length))
            found.append((spec.name, spec.start, spec.stop, _count(spec.shape), content))
    shards.close()
    return found


def _whole(pieces: Iterable[Piece]) -> dict[str, bytes]:
    """The model's tensors put together, replicas compared; nothing may be missing."""
    whole, seen = dict[str, Any](), dict[str, Any]()
    for name, start, stop, total, content in pieces:
        if name.startswith("rng/") or stop == start:
            continue
        rows = np.frombuffer(content, np.uint8).reshape(stop - start, -1)
        tensor = whole.setdefault(name, np.zeros((total, rows.shape[1]), np.uint8))
        known = seen.setdefault(name, np.zeros(total, bool))
        assert np.array_equal(tensor[start:stop][known[start:stop]], rows[known[start:stop]]), name
        tensor[start:stop], known[start:stop] = rows, True
    assert all(known.all() for known in seen.values())
    return {name: tensor.tobytes() for name, tensor in whole.items()}


# -- in the driver ----------------------------------------------------------------------------------------------------


class _Fleet(ProcessFleet):
    """Takes a node away after some steps: what lives there dies, and what is started there cannot. Brings it back once
    the others go on without it, and opens the gate when they may take it in."""

    def __init__(self, root: Path, folder: Path, *, second_loss: bool) -> None:
        super().__init__()
        self._root, self._folder, self._second_loss = root, folder, second_loss
        self._homes: dict[Address, int] = {}
        self._is_gone, self._was_lost = False, False
        self._starting: set[int] = set()
        self._returned: set[Role] = set()
        self.moves: list[tuple[int, int, list[Piece]]] = []
        """World before and version of every change, with what the keepers held."""

    def start(self, target: Address, node: int, spec: Mapping[str, object]) -> int:
        self._homes[target] = node
        call = super().start(target, node, {} if self._is_gone and node == _NODE else spec)
        if self.moves and not self._is_gone and node == _NODE:
            self._starting.add(call)
        return call

    def call(self, target: Address, method: str, *args: object) -> int:
        plan: Any = args[0] if method == "run_epoch" else {}
        if plan.get("held") and plan["rank"] == 0:
            self._moved(target, plan)
        return super().call(target, method, *args)

    def _moved(self, target: Address, plan: Mapping[str, Any]) -> None:
        self.moves.append((len(plan["held"]), plan["version"], _held(plan["held"], plan["version"], plan["token"])))
        if self._second_loss:
            self._second_loss = False
            self._members[target].process.kill()
        else:
            self._is_gone = False

    def poll(self, timeout_s: float) -> list[Report]:
        if not self._was_lost and self._steps() >= _LOST_AT:
            self._was_lost = self._is_gone = True
            for target, member in self._members.items():
                if self._homes[target] == _NODE and member.process.pid is not None:
                    os.kill(member.process.pid, signal.SIGKILL)
        reports = super().poll(timeout_s)
        back = [r.target.role for r in reports if getattr(r, "call", None) in self._starting and r.error is None]  # type: ignore[union-attr]
        self._returned.update(back)
        if len(self._returned) == 2:
            (self._folder / "gate").touch()
        return reports

    def _steps(self) -> int:
        found = list(self._root.glob("*/*/metrics.jsonl"))
        return len(found[0].read_text().splitlines()) if found else 0


@contextmanager
def _witnessed(folder: Path) -> Iterator[None]:
    run, process_fleet._run = process_fleet._run, functools.partial(_run, str(folder))  # type: ignore[assignment]
    try:
        yield
    finally:
        process_fleet._run = run


def _config(root: Path, corpus: Path, **recovery: float) -> RunConfig:
    config = tiny_config(root, corpus, stage=2, steps=_STEPS, nodes=3, spares=0, **recovery)
    config.trainer.global_batch, config.trainer.micro_batch, config.trainer.eval_windows = _BATCH, 1, _BATCH
    return config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[int, dict[str, Any]]:
    """Records of the steps of three ranks that nothing happens to."""
    result = train(_config(tmp_path_factory.mktemp("undisturbed"), corpus))
    assert result.exit_code == 0
    return _steps(result.run_dir)


def _steps(run_dir: Path) -> dict[int, dict[str, Any]]:
    """By number, the last telling of each."""
    return {record["step"]: record for record in records(run_dir / "metrics.jsonl") if "loss" in record}


def _train(
    root: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, *, second_loss: bool = False
) -> tuple[Result, _Fleet, Path]:
    folder = root / "witness"
    folder.mkdir(parents=True)
    fleets: list[_Fleet] = []

    def make_fleet(config: RunConfig, tag: str) -> _Fleet:
        fleets.append(_Fleet(root, folder, second_loss=second_loss))
        return fleets[0]

    monkeypatch.setattr(run_module, "_make_fleet", make_fleet)
    with _witnessed(folder):
        result = train(_config(root, corpus, shrink_after_s=1.0, retry_node_s=0.5))
    return result, fleets[0], folder


@pytest.mark.parametrize("second_loss", [False, True], ids=["alone", "and another rank while the state is moved"])
def test_a_lost_node_is_done_without_and_taken_back_when_it_returns(
    tmp_path: Path,
    corpus: Path,
    undisturbed: dict[int, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    second_loss: bool,
) -> None:
    result, fleet, folder = _train(tmp_path, corpus, monkeypatch, second_loss=second_loss)
    assert (result.outcome, result.step) == ("finished", _STEPS)
    worlds = [(event["world_before"], event["world"]) for event in events_of(result.run_dir, "world_changed")]
    grown = [(before, world) for before, world in worlds if world > before]
    assert worlds[0] == (3, 2) and worlds[-1] in grown and worlds[-1][1] == 3
    assert second_loss or len(worlds) == 2, "a replacement that starts slowly may be done without for a while"
    assert len(events_of(result.run_dir, "fault_detected")) == 1 + second_loss
    assert sound_record(result.run_dir)["ended"]["world"] == 3

    sources = [(plan["source"], plan["number"]) for plan in events_of(result.run_dir, "recovery_planned")]
    again = [("keeper memory", 2)] if second_loss else []
    assert sources == [("parity", 1), *again, *[("keeper memory", -1)] * len(grown)], "nothing is read from disk"
    assert [move[0] for move in fleet.moves] == [3] * (1 + second_loss) + [before for before, _ in grown]
    for _, version, held in fleet.moves:
        assert _whole(_restored(folder, version)) == _whole(held), f"version {version} is another one now"

    have = _steps(result.run_dir)
    assert have.keys() == undisturbed.keys() == set(range(1, _STEPS + 1))
    for step, want in undisturbed.items():
        assert have[step]["tokens"] == want["tokens"] == step * _BATCH * 32, "a sample is lost, or trained on twice"
        assert have[step]["learning_rate"] == want["learning_rate"]
        assert have[step]["loss"] == pytest.approx(want["loss"], rel=1e-5)
    steps_lost = sum(event["steps_lost"] for event in events_of(result.run_dir, "recovery_done"))
    assert steps_lost <= 1 + second_loss
    assert json.loads((result.run_dir / "run.json").read_text())["ended"]["exit_code"] == 0
