"""Everything that the commit protocol says, as JSON values and back: messages, records, reports and outcomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from holdfast.errors import InvariantViolation, ManifestMismatch
from holdfast.fault_tolerance.commit import (
    Abort,
    Commit,
    CommitRecord,
    Filled,
    ParityBlock,
    Parts,
    Prepare,
    RankVote,
    Seen,
    Vote,
)
from holdfast.fault_tolerance.commit_outcome import Outcome, Promise, Report

__all__ = ["Spoken", "from_json", "to_json"]

Spoken = Filled | Seen | Prepare | Vote | Commit | Abort | CommitRecord | Promise | Report | Outcome


def to_json(spoken: Spoken) -> dict[str, object]:
    """As a JSON value. Records carry their digest."""
    return {"kind": type(spoken).__name__, **_plain(spoken)}


def from_json(value: Mapping[str, object]) -> Spoken:
    """Inverse of :func:`to_json`; integer keys may have become strings. Raises: ManifestMismatch for anything else,
    and for a record that does not match its digest."""
    try:
        content = dict(value)
        return _KINDS[str(content.pop("kind"))](content)
    except (KeyError, TypeError, ValueError, AttributeError, InvariantViolation) as error:
        raise ManifestMismatch(f"no message of the commit protocol ({error!r}): {str(value)[:200]}") from error


def _plain(value: Any) -> Any:  # Any: a JSON value of whatever shape the fields have
    if isinstance(value, CommitRecord):
        return {**asdict(value), "digest": value.digest}
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (tuple, list)) else value


def _reader(kind: Callable[..., Any]) -> Callable[[Mapping[str, Any]], Any]:
    """Fields of one name have one type in every message."""
    return lambda value: kind(**{n: _FIELDS[n](entry) if n in _FIELDS else entry for n, entry in value.items()})


def _parts(entry: Mapping[str, Mapping[str, Any]]) -> Parts:
    return {int(rank): RankVote(**part) for rank, part in entry.items()}


def _record(value: Mapping[str, Any]) -> CommitRecord:
    content = dict(value)
    digest = content.pop("digest")
    record: CommitRecord = _reader(CommitRecord)(content)
    if record.digest != digest:
        raise ManifestMismatch(f"the record of version {record.version}, epoch {record.epoch}, is damaged: {digest}")
    return record


def _each(read: Callable[[Any], Any]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    return lambda entries: tuple(read(entry) for entry in entries)


_FIELDS: Mapping[str, Callable[[Any], object]] = {
    "parts": _parts,
    "versions": lambda entry: {int(version): _parts(parts) for version, parts in entry.items()},
    "parity": _each(lambda block: ParityBlock(**block)),
    "members": tuple,
    "complete": _each(tuple),
    "record": _record,
    "records": _each(_record),
    "committed": _each(_record),
    "aborted": _each(lambda abort: Abort(**abort)),
    "promises": _each(_reader(Promise)),
    "prepare": _reader(Prepare),
    "vote": _reader(Vote),
}

_KINDS: Mapping[str, Callable[[Mapping[str, Any]], Spoken]] = {
    **{k.__name__: _reader(k) for k in (Filled, Seen, Prepare, Vote, Commit, Abort, Promise, Report, Outcome)},
    "CommitRecord": _record,
}
