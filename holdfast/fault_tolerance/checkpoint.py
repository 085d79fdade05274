"""Names and commit protocol of durable checkpoints, over any :class:`~holdfast.fault_tolerance.storage.Storage`.

::

    step-00000150/rank00000.bin               state of rank 0, slice after slice
    step-00000150/rank00000.manifest.arrow    what the bytes are, with a digest for each slice
    step-00000150/commit.json                 written last of all, by the driver: the checkpoint exists
    rejected-step-00000100/reason.txt         quarantined: kept for inspection, never used
    LATEST                                    name of the newest checkpoint; a hint for humans, never trusted

Each file is durable before the next is begun, so a directory without ``commit.json`` is a write that was
interrupted (presumed abort) and one with it is complete unless something damaged it later. The record
carries the length of every file, the digest of every manifest, and a digest of itself.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, cast

import xxhash

from holdfast import __version__
from holdfast.errors import ManifestMismatch, ShardCorrupt, SnapshotError
from holdfast.fault_tolerance.storage import SEAL, Storage

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "COMMIT_FILE",
    "FORMAT_VERSION",
    "LATEST_FILE",
    "Checkpoint",
    "RankFiles",
    "Rejected",
    "commit",
    "data_file",
    "directory",
    "latest",
    "leftovers",
    "list_checkpoints",
    "manifest_file",
    "quarantine",
    "read_commit",
    "read_manifest",
    "read_rank",
    "retain",
    "step_of",
    "write_rank",
]

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
COMMIT_FILE = SEAL
LATEST_FILE = "LATEST"
_REASON_FILE = "reason.txt"
_REJECTED = "rejected-"


@dataclass(frozen=True, slots=True)
class RankFiles:
    """What one rank wrote; as a dictionary it is the receipt that a keeper sends to the driver."""

    manifest_digest: str
    """xxh3-128 of the manifest's bytes, hexadecimal."""
    bytes: int
    """All files together."""
    files: Mapping[str, int]
    """Length of each file by name."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint."""

    step: int
    world: int
    config_digest: str
    ranks: Mapping[int, RankFiles]
    written_at: str
    """UTC, ISO 8601."""
    writer: str
    layout: str = ""
    """How the state is divided among the ranks, in words; checkpoints of equal layouts have equal slices."""

    @property
    def bytes(self) -> int:
        """Size of all ranks' files."""
        return sum(files.bytes for files in self.ranks.values())


@dataclass(frozen=True, slots=True)
class Rejected:
    """A committed or quarantined checkpoint that must not be used."""

    name: str
    reason: str


def directory(step: int) -> str:
    """``step-00000150``; sorts by step up to 10^8 steps."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Inverse of :func:`directory`; None for anything else."""
    found = re.fullmatch(r"step-(\d{8,})", name)
    return int(found[1]) if found and directory(int(found[1])) == name else None


def data_file(rank: int) -> str:
    return f"rank{rank:05d}.bin"


def manifest_file(rank: int) -> str:
    return f"rank{rank:05d}.manifest.arrow"


# -- one rank, in its keeper ------------------------------------------------------------------------------------------


def write_rank(
    storage: Storage, folder: str, rank: int, *, data: Iterable[Buffer], manifest: bytes
) -> dict[str, object]:
    """Write a rank's part, manifest last; returns the receipt for :func:`commit`, JSON values.

    Raises: SnapshotError when the storage is full, or when ``folder`` is committed already.
    """
    if storage.exists(f"{folder}/{COMMIT_FILE}"):
        raise SnapshotError(f"{folder} is committed already; a published checkpoint is never written to again")
    files = {data_file(rank): storage.write(f"{folder}/{data_file(rank)}", data)}
    files[manifest_file(rank)] = storage.write(f"{folder}/{manifest_file(rank)}", [manifest])
    return asdict(RankFiles(_digest(manifest), sum(files.values()), files))


def read_rank(storage: Storage, folder: str, rank: int) -> tuple[bytes, bytes]:
    """Manifest (digest checked) and data (length checked) of one rank of a committed checkpoint.

    The slices' own digests are in the manifest; checking them is the caller's part.
    Raises: SnapshotError when a file is missing, ManifestMismatch for a record that cannot be used or does not know
    the rank, ShardCorrupt for a damaged manifest.
    """
    manifest = read_manifest(storage, _read(storage, folder), rank)
    return manifest, storage.read(f"{folder}/{data_file(rank)}")


def read_manifest(storage: Storage, found: Checkpoint, rank: int) -> bytes:
    """Manifest (digest checked) of one rank of a committed checkpoint, whose files all have their length.

    Raises: as :func:`read_rank`.
    """
    folder, files = directory(found.step), found.ranks.get(rank)
    if files is None:
        raise ManifestMismatch(f"{folder} was written by {found.world} ranks; there is no rank {rank} in it")
    _check_files(storage, folder, files)
    name = f"{folder}/{manifest_file(rank)}"
    manifest = storage.read(name)
    have = _digest(manifest)
    if have != files.manifest_digest:
        raise ShardCorrupt(name, rank=rank, version=found.step, want=files.manifest_digest, have=have)
    return manifest


# -- all ranks, in the driver -----------------------------------------------------------------------------------------


def commit(
    storage: Storage,
    step: int,
    *,
    receipts: Mapping[int, Mapping[str, Any]],
    config_digest: str,
    layout: str = "",
    written_at: datetime | None = None,
) -> Checkpoint:
    """Publish the checkpoint that ranks 0..n-1 have written, then point LATEST to it.

    Repeating a commit changes nothing. Raises: SnapshotError when a rank or a file is missing, has another length than
    its receipt says, or when another checkpoint of this step is committed already.
    """
    folder = directory(step)
    ranks = {rank: _receipt(folder, rank, receipts[rank]) for rank in sorted(receipts)}
    if not ranks or list(ranks) != list(range(len(ranks))):
        raise SnapshotError(f"{folder} cannot be committed: receipts of ranks {list(ranks)}, not of all from 0 on")
    for files in ranks.values():
        _check_files(storage, folder, files)
    moment = (written_at or datetime.now(timezone.utc)).astimezone(timezone.utc).isoformat(timespec="seconds")
    made = Checkpoint(step, len(ranks), config_digest, ranks, moment, f"holdfast {__version__}", layout)
    published = _publish(storage, made)
    _point_to(storage, folder)
    return published


def _publish(storage: Storage, made: Checkpoint) -> Checkpoint:
    folder = directory(made.step)
    if storage.exists(f"{folder}/{COMMIT_FILE}"):
        known = _read(storage, folder)
        if (known.ranks, known.config_digest) != (made.ranks, made.config_digest):
            raise SnapshotError(f"{folder} is committed already, with other content; it is left as it is")
        return known
    storage.write(f"{folder}/{COMMIT_FILE}", [_encode(made)])
    return made


def _point_to(storage: Storage, folder: str) -> None:
    try:
        storage.write(LATEST_FILE, [f"{folder}\n".encode()])
    except SnapshotError as error:  # the checkpoint is published; only the hint is stale
        logger.warning("%s was not updated: %s", LATEST_FILE, error)


def list_checkpoints(storage: Storage) -> tuple[tuple[Checkpoint, ...], tuple[Rejected, ...]]:
    """Checkpoints whose files are all there with the committed length, newest first; and those that are not.

    Interrupted writes are in neither list, see :func:`leftovers`: they say nothing about what was lost.
    """
    good, rejected = list[Checkpoint](), list[Rejected]()
    for name in storage.list(""):
        if name.startswith(_REJECTED):
            rejected.append(Rejected(name, _reason(storage, name)))
        elif step_of(name) is not None and storage.exists(f"{name}/{COMMIT_FILE}"):
            try:
                good.append(_complete(storage, name))
            except SnapshotError as error:
                rejected.append(Rejected(name, str(error)))
    return tuple(sorted(good, key=lambda found: -found.step)), tuple(rejected)


def read_commit(storage: Storage, step: int) -> Checkpoint:
    """The commit record of ``step``. Raises: SnapshotError if there is none, ManifestMismatch if it is unusable."""
    return _read(storage, directory(step))


def leftovers(storage: Storage) -> tuple[str, ...]:
    """Directories of writes that never were committed."""
    names = storage.list("")
    return tuple(n for n in names if step_of(n) is not None and not storage.exists(f"{n}/{COMMIT_FILE}"))


def latest(storage: Storage) -> int | None:
    """The step that LATEST names, which may not exist; None if it names nothing."""
    try:
        return step_of(storage.read(LATEST_FILE).decode(errors="replace").strip())
    except SnapshotError:
        return None


def retain(storage: Storage, keep_last: int) -> tuple[str, ...]:
    """Delete all but the newest ``keep_last`` good checkpoints, and interrupted writes older than the newest.

    Never deleted: the newest good one, the one that LATEST names, damaged and quarantined ones. Returns what went.
    """
    good, _ = list_checkpoints(storage)
    if not good:
        return ()
    named, newest = latest(storage), good[0].step
    doomed = [directory(found.step) for found in good[max(keep_last, 1) :] if found.step != named]
    doomed += [name for name in leftovers(storage) if cast(int, step_of(name)) < newest]
    for name in doomed:
        storage.delete(name)
    return tuple(doomed)


def quarantine(storage: Storage, step: int, reason: str) -> str:
    """Take a checkpoint out of use for good and say why, beside its files; returns its new name."""
    old, taken = directory(step), set(storage.list(""))
    names = [f"{_REJECTED}{old}", *(f"{_REJECTED}{old}-{n}" for n in range(2, len(taken) + 3))]
    new = next(name for name in names if name not in taken)
    storage.rename(old, new)
    storage.write(f"{new}/{_REASON_FILE}", [f"{reason}\n".encode()])
    return new


# -- the record -------------------------------------------------------------------------------------------------------


def _encode(made: Checkpoint) -> bytes:
    record = {"format_version": FORMAT_VERSION, **asdict(made)}
    record["ranks"] = {str(rank): files for rank, files in record["ranks"].items()}
    return json.dumps({**record, "digest": _record_digest(record)}, indent=1).encode()


def _record_digest(record: Mapping[str, Any]) -> str:
    return _digest(json.dumps(record, sort_keys=True).encode())


def _read(storage: Storage, folder: str) -> Checkpoint:
    path = f"{folder}/{COMMIT_FILE}"
    try:
        found = _decode(storage.read(path))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ManifestMismatch(f"{path} is no commit record: {error}") from error
    if directory(found.step) != folder:
        raise ManifestMismatch(f"{path} is the record of step {found.step}; the directory was renamed or copied")
    return found


def _decode(content: bytes) -> Checkpoint:
    record = json.loads(content)
    version = record["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(f"format_version={version}, this Holdfast reads {FORMAT_VERSION}; use the one that wrote it")
    if record.pop("digest") != _record_digest(record):
        raise ValueError("its digest does not match, it was damaged or edited")
    ranks = {int(rank): RankFiles(**files) for rank, files in record["ranks"].items()}
    fields = {k: v for k, v in record.items() if k not in ("format_version", "ranks")}
    return Checkpoint(**fields, ranks=ranks)


def _complete(storage: Storage, folder: str) -> Checkpoint:
    found = _read(storage, folder)
    for files in found.ranks.values():
        _check_files(storage, folder, files)
    return found


def _check_files(storage: Storage, folder: str, files: RankFiles) -> None:
    for name, want in files.files.items():
        path = f"{folder}/{name}"
        if not storage.exists(path):
            raise SnapshotError(f"{path} is missing")
        have = storage.size(path)
        if have != want:
            raise SnapshotError(f"{path} has {have:,} bytes, {want:,} were written")


def _receipt(folder: str, rank: int, receipt: Mapping[str, Any]) -> RankFiles:
    """What a keeper reported, if it tells of the two files that every rank writes."""
    files = RankFiles(**receipt)
    if set(files.files) != {data_file(rank), manifest_file(rank)}:
        raise SnapshotError(f"{folder}: the receipt of rank {rank} names {sorted(files.files)}, not its two files")
    return files


def _reason(storage: Storage, name: str) -> str:
    try:
        return storage.read(f"{name}/{_REASON_FILE}").decode(errors="replace").strip()
    except SnapshotError:
        return "quarantined, the reason was not recorded"


def _digest(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)
