"""Every error Holdfast raises on purpose.

::

    HoldfastError
    ├─ ConfigurationError          the user can fix it; also a ValueError; exit code 2
    │  └─ DataError                an input file is unreadable or empty; names file and row
    ├─ Fault                       the world broke; recovery may hide it
    │  ├─ RankLost                 a worker process died or froze
    │  ├─ CollectiveBroken         a collective failed because a peer left; this rank is a victim
    │  ├─ NonFiniteStep            the loss or the gradient is NaN or infinite
    │  ├─ PeerError                a keeper got no answer from another one, or an error
    │  └─ SnapshotError
    │     ├─ ShardCorrupt          a digest does not match
    │     ├─ InsufficientShards    no version is held by every rank
    │     ├─ ManifestMismatch      the stored state does not fit the running model
    │     └─ SnapshotMemory        the keeper cannot hold the snapshots
    └─ RecoveryFailed              the policy gave up; carries the history of faults
    InvariantViolation(AssertionError)   we are wrong: crash, do not retry
    Abort(BaseException)                 unblocks a thread; ``except Exception`` cannot eat it
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "Abort",
    "CollectiveBroken",
    "ConfigurationError",
    "DataError",
    "Fault",
    "HoldfastError",
    "InsufficientShards",
    "InvariantViolation",
    "ManifestMismatch",
    "NonFiniteStep",
    "PeerError",
    "RankLost",
    "RecoveryFailed",
    "ShardCorrupt",
    "SnapshotError",
    "SnapshotMemory",
]


class HoldfastError(Exception):
    """Base of every error that Holdfast raises on purpose. A copy, in this or another process, has all its fields."""

    def __reduce__(self) -> tuple[object, ...]:
        # Python's own way would call __init__ with the message alone.
        return _revive, (type(self), self.args, self.__dict__)


def _revive(kind: type[HoldfastError], args: tuple[object, ...], fields: dict[str, object]) -> HoldfastError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class ConfigurationError(HoldfastError, ValueError):
    """The user can fix it. ``problems`` holds one sentence per mistake, all found together."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class DataError(ConfigurationError):
    """An input file cannot be used. Names the file and, where there is one, the row."""

    def __init__(self, path: str, reason: str, *, row: int | None = None) -> None:
        self.path, self.row, self.reason = path, row, reason
        where = path if row is None else f"{path}, row {row}"
        super().__init__(f"{where}: {reason}")


class Fault(HoldfastError):
    """The world broke underneath us; recovery may hide it."""


class RankLost(Fault):
    """The process behind a rank died or froze."""

    def __init__(self, rank: int, cause: str) -> None:
        self.rank, self.cause = rank, cause
        super().__init__(f"rank {rank} lost: {cause}")


class CollectiveBroken(Fault):
    """A collective failed under this rank because a peer left: we are a victim, not the cause."""

    def __init__(self, rank: int, phase: str, detail: str) -> None:
        self.rank, self.phase, self.detail = rank, phase, detail
        super().__init__(f"rank {rank} lost its peers in {phase}: {detail}")


class NonFiniteStep(Fault):
    """The global loss or gradient norm is NaN or infinite; every rank sees the same value."""

    def __init__(self, step: int, value: float, quantity: str = "loss") -> None:
        self.step, self.value, self.quantity = step, value, quantity
        super().__init__(
            f"{quantity}={value} at step {step} is not finite; "
            "lower optim.lr, raise optim.warmup_steps or use parallel.precision=FP32"
        )


class PeerError(Fault):
    """A keeper got no answer from another one. ``kind`` names the exception if the other one answered with an error."""

    def __init__(self, peer: str, method: str, reason: str, *, kind: str = "") -> None:
        self.peer, self.method, self.reason, self.kind = peer, method, reason, kind
        super().__init__(f"{method} of the keeper at {peer}: {kind + ': ' if kind else ''}{reason}")


class SnapshotError(Fault):
    """A snapshot cannot be taken, found or trusted."""


class ShardCorrupt(SnapshotError):
    """Stored bytes do not match the digest taken when they were written."""

    def __init__(self, name: str, *, rank: int, version: int, want: str, have: str) -> None:
        self.name, self.rank, self.version, self.want, self.have = name, rank, version, want, have
        super().__init__(
            f"slice {name!r} of rank {rank}, version {version}: digest {have} does not match {want} "
            "taken when it was written; the copy is damaged and will not be used"
        )


class InsufficientShards(SnapshotError):
    """No version is held completely by every rank."""

    def __init__(self, missing: Sequence[int], reason: str) -> None:
        self.missing, self.reason = tuple(missing), reason
        super().__init__(f"no version is held by every rank; nothing for ranks {list(missing)}: {reason}")


class ManifestMismatch(SnapshotError):
    """The stored state does not fit the running model."""


class SnapshotMemory(SnapshotError, ConfigurationError):
    """The snapshots of one rank need more memory than its keeper may use."""

    def __init__(self, *, need_bytes: int, have_bytes: int, rank: int) -> None:
        self.need_bytes, self.have_bytes, self.rank = need_bytes, have_bytes, rank
        ConfigurationError.__init__(
            self,
            f"snapshots of rank {rank} need {need_bytes:,} bytes of host memory, {have_bytes:,} are allowed; "
            "raise snapshot.memory_limit_gb, lower snapshot.buffers, or shard over more ranks",
        )


class RecoveryFailed(HoldfastError):
    """The policy gave up. ``history`` holds what happened, oldest first."""

    def __init__(self, reason: str, history: Sequence[str] = (), *, exit_code: int = 1) -> None:
        self.reason, self.history, self.exit_code = reason, tuple(history), exit_code
        super().__init__(reason)


class InvariantViolation(AssertionError):
    """We are wrong: crash, do not retry."""


class Abort(BaseException):
    """Unblocks a thread that must leave its epoch; not an ``Exception``, so nobody eats it."""
