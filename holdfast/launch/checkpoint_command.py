"""``holdfast checkpoint``: what a run has on disk, whether it is sound, and its weights as a file. Loads no torch."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from holdfast.errors import ConfigurationError, SnapshotError
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.manifest import digest
from holdfast.fault_tolerance.shards import StorageShards, manifest_of
from holdfast.fault_tolerance.storage import Storage, open_storage
from holdfast.fault_tolerance.storage_uri import below
from holdfast.launch.arguments import Parser, add_root
from holdfast.launch.checkpoint_export import export_checkpoint
from holdfast.launch.find_run import find_run
from holdfast.launch.records import read_yaml
from holdfast.launch.run_dir import RunDir
from holdfast.launch.wording import clean, size, table

__all__ = ["checkpoint_command", "recorded_uri"]

_DAMAGED = 1
_REDRAW_S = 0.2


def checkpoint_command(words: Sequence[str]) -> int:
    """Carry out the command line ``words``; the exit code. Raises: ConfigurationError for what does not exist."""
    args = _parser().parse_args(list(words))
    action: Callable[[_Place, argparse.Namespace], int] = args.action
    try:
        return action(_place(args.run, args.root), args)
    except SnapshotError as error:
        sys.stderr.write(f"error: {clean(str(error))}\n")
        return _DAMAGED


# -- the command line -------------------------------------------------------------------------------------------------


def _parser() -> Parser:
    parser = Parser(
        prog="holdfast checkpoint",
        allow_abbrev=False,
        description="Looks at the durable checkpoints of a run, whatever ranks wrote them. Changes nothing in them, so "
        "it may be used while the run trains.",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    listing = _action(actions, "list", _list, "show the checkpoints and why some are not used")
    listing.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    verify = _action(actions, "verify", _verify, "read everything and compare every digest; exit code 1 for damage")
    verify.add_argument("--step", type=int, metavar="N", help="verify this checkpoint only")
    export = _action(actions, "export", _export, "write the whole fp32 weights to DIR/model.safetensors")
    export.add_argument("--step", type=int, metavar="N", help="of which checkpoint; the newest if left out")
    export.add_argument("--to", required=True, metavar="DIR", help="folder of the file, made if it does not exist")
    return parser


def _action(
    actions: argparse._SubParsersAction[Parser],
    name: str,
    does: Callable[[_Place, argparse.Namespace], int],
    what: str,
) -> Parser:
    parser = actions.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".", allow_abbrev=False)
    parser.set_defaults(action=does)
    parser.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        help="id or directory of a run, or the URI of its checkpoints; the newest run if left out",
    )
    add_root(parser)
    return parser


# -- whose checkpoints ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """Where checkpoints are."""

    name: str
    uri: str
    storage: Storage

    def chosen(self, step: int | None) -> int:
        """This step, or the newest that has a complete checkpoint. Raises: ConfigurationError with those that have."""
        good = [found.step for found in checkpoint.list_checkpoints(self.storage)[0]]
        if step in good:
            return step
        if step is None and good:
            return good[0]
        there = f"there are {', '.join(map(str, sorted(good)))}" if good else "there is none"
        wanted = "" if step is None else f" of step {step}"
        raise ConfigurationError(f"{self.name} has no complete checkpoint{wanted} in {self.uri}: {there}")


def _place(name: str | None, root: str | None) -> _Place:
    if name is not None and len(urlsplit(name).scheme) > 1:
        return _Place("storage", name, open_storage(name))
    path = Path(name).expanduser().absolute() if name is not None else Path()
    if name is not None and not (path / "run.json").is_file() and any(path.glob("*step-*")):
        return _Place("directory", str(path), open_storage(str(path)))
    run = find_run(name, root)
    uri = recorded_uri(run)
    return _Place(f"run {run.run_id}", uri, open_storage(uri))


def recorded_uri(run: RunDir) -> str:
    """In the run directory, unless the configuration of the newest attempt names another storage."""
    storage = read_yaml(run.config_file).get("snapshot.storage")
    return below(str(storage), run.path.parent.name, run.run_id) if storage else str(run.checkpoints)


# -- list -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    """A directory of the storage, as a line of the table and as a JSON object."""

    name: str
    step: int | None
    state: str
    """good, rejected, or uncommitted: being written, or left behind by a write that was interrupted."""
    reason: str = ""
    written_at: str | None = None
    ranks: int | None = None
    layout: str | None = None
    bytes: int | None = None
    writer: str | None = None


def _list(place: _Place, args: argparse.Namespace) -> int:
    rows = sorted(_rows(place.storage), key=lambda row: (row.step or 0, row.name))
    if args.json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    elif rows:
        lines = [f"{clean(place.name)}, in {clean(place.uri)}", *table([_HEADER, *map(_cells, rows)])]
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    else:
        sys.stdout.write(f"{clean(place.name)} has no checkpoints in {clean(place.uri)}\n")
    return 0


def _rows(storage: Storage) -> Iterator[_Row]:
    good, rejected = checkpoint.list_checkpoints(storage)
    for found in good:
        yield _Row(
            checkpoint.directory(found.step),
            found.step,
            "good",
            written_at=found.written_at,
            ranks=found.world,
            layout=found.layout,
            bytes=found.bytes,
            writer=found.writer,
        )
    for one in rejected:
        yield _Row(one.name, _step_in(one.name), "rejected", one.reason)
    for name in checkpoint.leftovers(storage):
        yield _Row(name, checkpoint.step_of(name), "uncommitted", "being written, or a write that was interrupted")


def _step_in(name: str) -> int | None:
    """Of ``step-00000150`` and of ``rejected-step-00000150-2``."""
    head, _, rest = name.removeprefix("rejected-").partition("-")
    return checkpoint.step_of(f"{head}-{rest.partition('-')[0]}")


_HEADER = ("STEP", "WRITTEN AT", "RANKS", "BYTES", "WRITER", "STATE")


def _cells(row: _Row) -> Sequence[str]:
    return (
        "?" if row.step is None else str(row.step),
        row.written_at or "-",
        row.layout or str(row.ranks or "-"),
        "-" if row.bytes is None else size(row.bytes),
        row.writer or "-",
        f"{row.state}: {row.reason} ({row.name})" if row.reason else row.state,
    )


# -- verify -----------------------------------------------------------------------------------------------------------


def _verify(place: _Place, args: argparse.Namespace) -> int:
    """Quarantined checkpoints are known to be bad and in nobody's way; they are not read again."""
    steps, damage = _committed(place, args.step), 0
    for step in steps:
        count = 0
        for line in _damage(place.storage, step):
            sys.stdout.write(f"{clean(line)}\n")
            count += 1
        damage += count
        state = f"damaged in {count} place{'' if count == 1 else 's'}" if count else "good"
        sys.stdout.write(f"{checkpoint.directory(step)}: {state}\n")
    if not steps:
        sys.stdout.write(f"{clean(place.name)} has no checkpoints in {clean(place.uri)}\n")
    return _DAMAGED if damage else 0


def _committed(place: _Place, step: int | None) -> Sequence[int]:
    """Whatever has a commit record, sound or not."""
    names = place.storage.list("")
    found = [number for name in names if (number := checkpoint.step_of(name)) is not None]
    steps = [n for n in found if place.storage.exists(f"{checkpoint.directory(n)}/{checkpoint.COMMIT_FILE}")]
    if step is None:
        return steps
    return [step] if step in steps else [place.chosen(step)]


def _damage(storage: Storage, step: int) -> Iterator[str]:
    """One line for each thing that is wrong with a checkpoint."""
    folder = checkpoint.directory(step)
    try:
        found = checkpoint.read_commit(storage, step)
    except SnapshotError as error:
        yield str(error)
        return
    progress = _Progress(folder, found.bytes)
    for rank in found.ranks:
        yield from _damage_of_rank(storage, found, rank, progress)
    progress.clear()


def _damage_of_rank(storage: Storage, found: checkpoint.Checkpoint, rank: int, progress: _Progress) -> Iterator[str]:
    path = f"{checkpoint.directory(found.step)}/{checkpoint.data_file(rank)}"
    try:
        entries = manifest_of(storage, found, rank).entries
        for entry in entries:
            have = digest(storage.read_range(path, entry.offset, entry.offset + entry.length))
            progress.advance(entry.length)
            if have != entry.digest:
                progress.clear()
                yield f"{path}: slice {entry.spec.name!r} has digest {have}, {entry.digest} was written"
    except SnapshotError as error:
        progress.clear()
        yield str(error)


class _Progress:
    """How much has been read, in one line of a terminal that is overwritten; nothing elsewhere."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done, self._shown_s = what, total, 0, 0.0

    def advance(self, n_bytes: int) -> None:
        self._done += n_bytes
        now = time.monotonic()
        if sys.stderr.isatty() and now - self._shown_s > _REDRAW_S:
            self._shown_s = now
            sys.stderr.write(f"\r{self._what}: {size(self._done)} of {size(self._total)} read\033[K")
            sys.stderr.flush()

    def clear(self) -> None:
        if self._shown_s:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


# -- export -----------------------------------------------------------------------------------------------------------


def _export(place: _Place, args: argparse.Namespace) -> int:
    step = place.chosen(args.step)
    path = Path(args.to).expanduser().absolute() / "model.safetensors"
    try:
        n_bytes = export_checkpoint(StorageShards(place.storage, checkpoint.directory(step)), path, step=step)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror or error}; choose another --to") from error
    sys.stdout.write(f"weights of step {step}: {path} ({size(n_bytes)})\n")
    return 0
