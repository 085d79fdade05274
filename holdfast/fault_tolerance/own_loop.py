"""``holdfast.Snapshotter``: the state of your own torch loop, in memory that outlives it and on disk.

::

    snapshots = holdfast.Snapshotter("checkpoints", model=model, optimizer=optimizer, scheduler=scheduler)
    step = snapshots.restore()               # 0 where nothing is stored
    while step < 1000:
        loss = loss_of(model, batch_of(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        step += 1
        snapshots.take(step)
    snapshots.close()

The state after each step is copied beside the next one into the memory of a keeper, a process of this host: a loop
that is killed at any instant and started again goes on from its last finished copy, with the same bits. From there the
keeper writes durable checkpoints, which serve where the keeper is gone, too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType

import psutil
import torch
import xxhash

from holdfast import knobs
from holdfast.clock import Clock, SystemClock
from holdfast.errors import ConfigurationError, ManifestMismatch, SnapshotError
from holdfast.fault_tolerance import loop_checkpoints as checkpoints
from holdfast.fault_tolerance.buffer import Bytes
from holdfast.fault_tolerance.loop_keeper import Spec
from holdfast.fault_tolerance.loop_memory import LoopMemory
from holdfast.fault_tolerance.loop_state import LoopState, Stateful
from holdfast.fault_tolerance.manifest import Manifest
from holdfast.fault_tolerance.storage import open_storage
from holdfast.fault_tolerance.versions import Held

__all__ = ["Snapshotter"]

logger = logging.getLogger(__name__)

_Read = Callable[[], tuple[Manifest, Bytes]]


class Snapshotter:
    """Keeps the state of a training loop in one process. Not for several threads.

    ``where`` is a directory or a URI (``s3://``, ``gs://``, ``hdfs://``), for one loop. ``parts`` are whatever the loop
    changes and must not lose, by names of your own: anything with ``state_dict`` and ``load_state_dict``. Random states
    of Python, NumPy and torch are kept, too.

    A durable checkpoint is written every ``save_every_s`` seconds, and every ``save_every_steps`` steps if that is not
    0; the newest ``keep_last`` stay. The keeper ends with :meth:`close`, or when no process has used it for ``lease_s``
    seconds; it makes its newest version durable before. It may use ``memory_limit_gb``, 10^9 bytes; 0 means half of
    what is free. Three copies of the state have to fit.

    As a context manager it is closed at the end of the block, or, after an exception, left to the keeper.

    Raises: ConfigurationError for parts that cannot be kept, for a place that another loop uses, and in a process of a
    group; SnapshotError for a place that cannot be written to.
    """

    def __init__(
        self,
        where: str | os.PathLike[str],
        *,
        save_every_s: float = 300.0,
        save_every_steps: int = 0,
        keep_last: int = 2,
        lease_s: float = 600.0,
        memory_limit_gb: float = 0.0,
        clock: Clock | None = None,
        **parts: Stateful,
    ) -> None:
        _refuse(save_every_s=save_every_s, save_every_steps=save_every_steps, keep_last=keep_last, lease_s=lease_s)
        self._uri = _absolute(where)
        self._state = LoopState(parts)
        self._save_every_s, self._save_every_steps = save_every_s, save_every_steps
        self._clock = clock or SystemClock()
        self._storage = open_storage(self._uri)
        identity = checkpoints.identify(self._storage)
        name = f"holdfast-loop-{xxhash.xxh3_128_hexdigest(f'{self._uri} {identity}'.encode())}"
        limit = int(memory_limit_gb * 1e9) or psutil.virtual_memory().available // 2
        self._memory = LoopMemory(Spec(name, identity, self._uri, limit, keep_last, lease_s))
        self._due_s = self._clock.now() + save_every_s
        self._step = -1
        """Of the newest version that was taken or restored; -1 before :meth:`restore`."""
        self._is_due = self._is_closed = False
        self.source = "nothing"
        """Where :meth:`restore` found the state, in words."""
        self._hooks = [part.register_step_pre_hook(lambda *_: self.fence()) for part in self._state.optimizers]

    @property
    def keeper_pid(self) -> int:
        """The process that holds the memory, on this host."""
        return self._memory.keeper_pid

    # -- the loop -------------------------------------------------------------------------------------------------

    def restore(self) -> int:
        """Load the newest state that is intact, from the keeper's memory or else from a checkpoint, into the parts and
        the random generators. Returns the number of finished steps; 0, and nothing has changed, if there is none.

        Every digest is verified before the first byte of live state changes; what is damaged is passed over with a
        warning, and the one before it is tried. Raises: ManifestMismatch when the state is of other parts.
        """
        if self._step >= 0:
            raise ConfigurationError("restore() was called before; it begins a loop, once")
        for source, read in self._candidates():
            try:
                manifest, data = read()
            except ManifestMismatch as error:
                raise ManifestMismatch(f"{source}: {error}") from error
            except SnapshotError as error:
                logger.warning("%s is not used: %s", source, error)
                continue
            return self._adopt(source, manifest, data)
        self._step = 0
        return 0

    def take(self, step: int) -> None:
        """``step`` steps are finished: begin to copy the state as it is now. Returns at once.

        Until the next ``step()`` of the optimizer, which waits for the copy, nothing may write to parameters and to the
        optimizer's state; all else may change. If no memory can be spared the step is passed over with a warning.
        """
        if self._step < 0 or self._is_closed:
            raise ConfigurationError("take() comes between restore(), which says where the loop begins, and close()")
        if step <= self._step:
            raise ConfigurationError(f"take({step}) comes after step {self._step}; the number of finished steps grows")
        self.fence()
        self._is_due = self._is_due or self._falls_due(step)
        self._memory.offer(self._state.capture(step), step)
        self._step = step

    def fence(self) -> None:
        """Wait until the state is copied. Optimizers do it by themselves; who changes parameters otherwise has to."""
        report = self._memory.fence()
        if report.is_complete and self._is_due and self._memory.save(report.version):
            self._is_due, self._due_s = False, self._clock.now() + self._save_every_s

    def close(self) -> None:
        """Make the newest state durable and end the keeper. If that fails there is a warning, and the keeper stays as
        long as its lease. May be repeated."""
        if self._let_go():
            self._memory.fence()
            self._memory.end()

    def __enter__(self) -> Snapshotter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
        elif self._let_go():  # whoever starts the loop again finds the newest state in memory
            self._memory.leave()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _candidates(self) -> Iterator[tuple[str, _Read]]:
        """What could be restored, newest first, and of one step what is in memory first."""
        held = [(v.slot.version, 1, partial(_read_memory, v)) for v in self._memory.versions()]
        stored = [
            (step, 0, partial(checkpoints.read, self._storage, step))
            for step in checkpoints.stored_steps(self._storage)
        ]
        for step, is_held, read in sorted([*held, *stored], key=lambda found: found[:2], reverse=True):
            yield (
                f"step {step} in the keeper's memory" if is_held else f"checkpoint of step {step} in {self._uri}",
                read,
            )

    def _adopt(self, source: str, manifest: Manifest, data: Bytes) -> int:
        try:
            self._step = self._state.adopt(manifest, data)
        except ManifestMismatch as error:
            raise ManifestMismatch(f"{source} does not fit this loop: {error}") from error
        self._memory.begin_at(self._step)
        self.source = source
        return self._step

    def _falls_due(self, step: int) -> bool:
        by_step = self._save_every_steps > 0 and step % self._save_every_steps == 0
        return by_step or self._clock.now() >= self._due_s

    def _let_go(self) -> bool:
        """False if that was done before."""
        for hook in self._hooks:
            hook.remove()
        is_first, self._hooks, self._is_closed = not self._is_closed, [], True
        return is_first


def _read_memory(held: Held) -> tuple[Manifest, Bytes]:
    damage = next(held.damage(), None)
    if damage is not None:
        held.buffer.release()
        raise damage
    return held.manifest, held.data


def _absolute(where: str | os.PathLike[str]) -> str:
    text = os.fspath(where)
    return text if "://" in text else str(Path(text).expanduser().absolute())


def _refuse(**numbers: float) -> None:
    """Raises: ConfigurationError with everything that is wrong."""
    problems = [f"{name}={value} must not be negative" for name, value in numbers.items() if value < 0]
    if numbers["keep_last"] < 2:
        problems.append(f"keep_last={numbers['keep_last']} must be at least 2, so that a bad write leaves a good one")
    world = knobs.world_size()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world = torch.distributed.get_world_size()
    if world > 1:
        problems.append(
            f"a Snapshotter keeps a loop of one process, and this is one of {world}; holdfast train keeps groups"
        )
    if problems:
        raise ConfigurationError(problems)
