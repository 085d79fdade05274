"""A loop of one's own that is killed at any instant goes on with the same bits: from memory, else from disk."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import holdfast
from holdfast.errors import ConfigurationError, ManifestMismatch
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.own_loop import Snapshotter
from holdfast.fault_tolerance.storage import DirectoryStorage
from holdfast.launch.cli import main

pytestmark = pytest.mark.timeout(170)

_LOOP = str(Path(__file__).parents[2] / "examples" / "own_loop.py")
_STEPS = 120
_DEADLINE_S = 120.0


def _start(where: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, _LOOP, str(where), str(_STEPS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _finish(loop: subprocess.Popen[str]) -> str:
    output, errors = loop.communicate(timeout=_DEADLINE_S)
    assert loop.returncode == 0, errors
    return output


def _kill_at(loop: subprocess.Popen[str], step: int) -> str:
    """SIGKILL once the step is printed; what the loop has said until then."""
    assert loop.stdout is not None
    lines = []
    for line in loop.stdout:
        lines.append(line)
        if line.startswith(f"step {step} "):
            break
    loop.kill()
    rest, _ = loop.communicate(timeout=_DEADLINE_S)
    return "".join(lines) + rest


def _losses(output: str) -> dict[int, str]:
    return {int(step): loss for step, loss in re.findall(r"^step (\d+) loss (\S+)$", output, re.MULTILINE)}


def _weights(output: str) -> str:
    return output.splitlines()[-1]


def _keeper(output: str) -> int:
    return int(re.findall(r"keeper (\d+)", output)[-1])


def _await(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.02)


def _end_keeper(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    _await(lambda: not _is_running(pid))


def _is_running(pid: int) -> bool:
    """Not even as a process that nobody has waited for."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    output = _finish(_start(tmp_path_factory.mktemp("undisturbed")))
    _await(lambda: not _is_running(_keeper(output)))
    return output


def test_a_killed_loop_goes_on_from_the_memory_of_its_keeper(undisturbed: str, tmp_path: Path) -> None:
    before = _kill_at(_start(tmp_path), 50)
    again = _finish(_start(tmp_path))
    first = min(_losses(again))
    assert f"begins after step {first - 1}, from step {first - 1} in the keeper's memory" in again
    assert max(_losses(before)) - 1 <= first <= max(_losses(before)) + 1  # no step is lost that was copied
    assert _losses(before) | _losses(again) == _losses(undisturbed)
    assert _weights(again) == _weights(undisturbed)
    _await(lambda: not _is_running(_keeper(again)))


@pytest.mark.slow
def test_with_the_keeper_killed_too_it_goes_on_from_disk_and_passes_over_what_is_damaged(
    undisturbed: str, tmp_path: Path
) -> None:
    before = _kill_at(_start(tmp_path), 75)
    _end_keeper(_keeper(before))
    steps = sorted(int(path.name[5:]) for path in tmp_path.glob("step-*") if (path / "commit.json").exists())
    assert len(steps) == 2 and steps[-1] <= 60
    data = tmp_path / checkpoint.directory(steps[-1]) / checkpoint.data_file(0)
    damaged = bytearray(data.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    data.write_bytes(damaged)
    again = _finish(_start(tmp_path))
    assert f"begins after step {steps[0]}, from checkpoint of step {steps[0]}" in again
    assert _losses(before) | _losses(again) == _losses(undisturbed)
    assert _weights(again) == _weights(undisturbed)
    assert (tmp_path / f"rejected-{checkpoint.directory(steps[-1])}" / "reason.txt").exists()


# -- in this process --------------------------------------------------------------------------------------------------


class _Parts:
    """A model with state that changes in forward, an optimizer and random numbers."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = _optimizer(self.model)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4])

    def step(self) -> float:
        loss = self.model(torch.randn(8, 4) + float(np.random.rand())).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def snapshots(self, where: Path, **options: float) -> Snapshotter:
        return Snapshotter(where, model=self.model, optimizer=self.optimizer, schedule=self.schedule, **options)  # type: ignore[arg-type]


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    from holdfast.optim import AdamW8bit

    return AdamW8bit(model.parameters(), lr=0.1, min_8bit_size=16)


def _bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def _undisturbed(steps: int) -> tuple[list[float], dict[str, bytes]]:
    np.random.seed(2)
    parts = _Parts()
    return [parts.step() for _ in range(steps)], _bits(parts.model)


def test_every_kind_of_state_comes_back_in_the_same_process(tmp_path: Path) -> None:
    losses, bits = _undisturbed(6)
    np.random.seed(2)
    first = _Parts()
    with suppress(RuntimeError), first.snapshots(tmp_path) as snapshots:
        assert snapshots.restore() == 0
        for step in range(1, 4):
            first.step()
            snapshots.take(step)
        raise RuntimeError
    np.random.seed(77)
    second = _Parts()
    snapshots = second.snapshots(tmp_path)
    assert snapshots.restore() == 3 and "memory" in snapshots.source
    assert [second.step() for _ in range(3)] == losses[3:]
    assert _bits(second.model) == bits
    snapshots.close()
    snapshots.close()
    assert not list(tmp_path.glob("**/*.tmp-*"))


def test_the_checkpoints_are_those_that_the_command_line_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = _Parts()
    with parts.snapshots(tmp_path, save_every_steps=1) as snapshots:
        snapshots.restore()
        parts.step()
        snapshots.take(1)
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    assert "step-00000001" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_put_aside_for_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = _Parts()
    for end in (2, 3):
        with parts.snapshots(tmp_path) as snapshots:
            step = snapshots.restore()
            while step < end:
                parts.step()
                step += 1
                snapshots.take(step)
    data = tmp_path / checkpoint.directory(3) / checkpoint.data_file(0)
    damaged = bytearray(data.read_bytes())
    damaged[100] ^= 1
    data.write_bytes(damaged)
    with _Parts().snapshots(tmp_path) as snapshots:
        assert snapshots.restore() == 2
    assert "checkpoint of step 3" in caplog.text and "does not match" in caplog.text
    assert (tmp_path / f"rejected-{checkpoint.directory(3)}" / "reason.txt").exists()


def test_a_storage_that_takes_nothing_is_a_warning_and_the_keeper_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = _Parts()
    snapshots = parts.snapshots(tmp_path, save_every_steps=1, lease_s=30.0)
    pid = snapshots.keeper_pid
    snapshots.restore()
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    for step in range(1, 4):
        parts.step()
        snapshots.take(step)
    snapshots.close()
    assert "is not durable, the loop goes on" in caplog.text
    assert "stays for 30 s" in caplog.text and _is_running(pid)
    assert checkpoint.list_checkpoints(DirectoryStorage(tmp_path)) == ((), ())
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    again = _Parts().snapshots(tmp_path)
    assert again.restore() == 3
    again.close()
    assert [found.step for found in checkpoint.list_checkpoints(DirectoryStorage(tmp_path))[0]] == [3]


def test_a_keeper_that_is_killed_beside_the_loop_is_replaced_with_what_it_held(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = _Parts()
    with suppress(RuntimeError), parts.snapshots(tmp_path, save_every_s=1e9) as snapshots:
        snapshots.restore()
        parts.step()
        snapshots.take(1)
        snapshots.fence()
        _end_keeper(snapshots.keeper_pid)
        step = 1
        while "another one takes over what it held" not in caplog.text:  # its socket may close a moment later
            parts.step()
            step += 1
            snapshots.take(step)
            snapshots.fence()
        raise RuntimeError
    snapshots = _Parts().snapshots(tmp_path)
    assert snapshots.restore() == step
    snapshots.close()


def test_a_keeper_that_nobody_owns_makes_the_newest_step_durable_and_ends(tmp_path: Path) -> None:
    parts = _Parts()
    with suppress(RuntimeError), parts.snapshots(tmp_path, save_every_s=1e9, lease_s=0.5) as snapshots:
        snapshots.restore()
        parts.step()
        snapshots.take(1)
        raise RuntimeError
    _await(lambda: not _is_running(snapshots.keeper_pid))
    assert [found.step for found in checkpoint.list_checkpoints(DirectoryStorage(tmp_path))[0]] == [1]


def test_a_place_that_was_deleted_begins_anew_although_its_keeper_lives(tmp_path: Path) -> None:
    where = tmp_path / "here"
    parts = _Parts()
    with suppress(RuntimeError), parts.snapshots(where, lease_s=0.5) as snapshots:
        snapshots.restore()
        parts.step()
        snapshots.take(1)
        raise RuntimeError
    old = snapshots.keeper_pid
    os.rename(where, tmp_path / "gone")
    fresh = _Parts().snapshots(where)
    assert fresh.restore() == 0
    fresh.close()
    _await(lambda: not _is_running(old))
    assert not list(where.glob("step-*"))  # what was held belongs to the place that is gone


def test_a_state_that_grows_gets_the_room(tmp_path: Path) -> None:
    class Notes:
        held: Tensor = torch.zeros(1)

        def state_dict(self) -> dict[str, Tensor]:
            return {"held": self.held}

        def load_state_dict(self, state: dict[str, Tensor]) -> None:
            self.held = state["held"]

    notes = Notes()
    snapshots = Snapshotter(tmp_path, notes=notes)
    snapshots.restore()
    for step, size in enumerate([10, 100_000, 1_000_000], start=1):
        notes.held = torch.full((size,), float(step))
        snapshots.take(step)
    snapshots.close()
    other = Notes()
    snapshots = Snapshotter(tmp_path, notes=other)
    assert snapshots.restore() == 3 and other.held.equal(torch.full((1_000_000,), 3.0))
    snapshots.close()


def test_mistakes_are_named_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError) as caught:
        Snapshotter(tmp_path, keep_last=1, save_every_s=-1, model=model)
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigurationError, match="step=int must have state_dict"):
        Snapshotter(tmp_path, step=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="needs something to keep"):
        Snapshotter(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="one of 2"):
        Snapshotter(tmp_path, model=model)
    assert not list(tmp_path.iterdir())


def test_calls_in_another_order_and_another_model_are_refused(tmp_path: Path) -> None:
    snapshots = holdfast.Snapshotter(tmp_path, model=nn.Linear(2, 2))
    with pytest.raises(ConfigurationError, match="comes between restore"):
        snapshots.take(1)
    with pytest.raises(ConfigurationError, match=f"in use by process {os.getpid()}"):
        Snapshotter(tmp_path, model=nn.Linear(2, 2))
    snapshots.restore()
    snapshots.take(2)
    with pytest.raises(ConfigurationError, match="comes after step 2"):
        snapshots.take(2)
    with pytest.raises(ConfigurationError, match="called before"):
        snapshots.restore()
    snapshots.close()
    other = Snapshotter(tmp_path, model=nn.Linear(3, 2))
    with pytest.raises(ManifestMismatch, match="does not fit this loop: model does not take"):
        other.restore()
    other.close()
