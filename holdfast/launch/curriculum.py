"""A curriculum on disk: which domains a frozen base has learned so far, and what each of them left.

::

    <root>/<project>/<name>/
      curriculum.json                    signed; replaced as a whole after every task
      router.json                        signed; which router fits these tasks, if one was trained
      driver.lock                        held by whoever teaches
      bricks/<sha256>.safetensors        the base, directions, routers: each stored once, under its digest
      tasks/<task>-<digest>/             adapters of one task each
    <root>/<project>/<name>.<task>/      the run that trained it
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast.adapters.signed_json import read_signed, signed
from holdfast.adapters.tensor_file import write_whole
from holdfast.errors import ConfigurationError, ManifestMismatch
from holdfast.launch import lease

__all__ = ["Curriculum", "Learned", "Record", "find_curriculum", "list_curricula"]

FORMAT_VERSION = 1
_RECORD = "curriculum.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """One finished task."""

    task: str
    domain: str
    text: str
    """Path that it was learned from."""
    directory: str
    """Of its adapters, in the curriculum's; empty for a round that made its domain no better and was dropped."""
    digest: str
    """sha256 of their tensor file."""
    size_bytes: int
    base_bits: float
    """Bits per byte of the domain's held-out text without any task."""
    before_bits: float
    """With the tasks before this one."""
    bits: Mapping[str, float]
    """By domain, of all that were learned until then, with all tasks until then."""

    @property
    def gain(self) -> float:
        """Bits per byte of its own domain."""
        return self.before_bits - self.bits[self.domain]


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What ``curriculum.json`` says."""

    model: Mapping[str, Any]
    """Of the base, as ``ModelConfig`` takes it."""
    adapter: Mapping[str, Any]
    """``method``, ``options``, ``target_modules``, ``nf4`` and, if there are some, ``protected_directions``."""
    base: str
    """sha256 of the base's file."""
    base_bytes: int
    learned: Sequence[Learned] = field(default_factory=tuple)
    directions: Mapping[str, str] = field(default_factory=dict)
    """By domain, the sha256 of those that it stays out of."""
    format_version: int = FORMAT_VERSION

    @property
    def kept(self) -> list[Learned]:
        """Tasks that act, oldest first."""
        return [task for task in self.learned if task.directory]

    @property
    def domains(self) -> list[str]:
        """In the order in which they were learned."""
        return list(dict.fromkeys(task.domain for task in self.learned))

    def texts(self, *, but: str = "") -> dict[str, str]:
        """Paths by domain, without those of one."""
        return {task.domain: task.text for task in self.learned if task.domain != but}


@dataclass(frozen=True, slots=True)
class Curriculum:
    """One curriculum's directory. Only who holds :meth:`lock` writes."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def exists(self) -> bool:
        return (self.path / _RECORD).is_file()

    def lock(self) -> AbstractContextManager[None]:
        """Be the only teacher inside a ``with`` block. Raises: ConfigurationError naming the one there is."""
        self.path.mkdir(parents=True, exist_ok=True)
        return lease.hold(self.path / "driver.lock")

    def record(self) -> Record:
        """Raises: ConfigurationError if there is none, or it is damaged."""
        try:
            about = read_signed(self.path / _RECORD, format_version=FORMAT_VERSION)
        except FileNotFoundError as error:
            raise ConfigurationError(f"{self.path} is no curriculum: it has no {_RECORD}") from error
        except ManifestMismatch as error:
            raise ConfigurationError(str(error)) from error
        return Record(**{**about, "learned": [Learned(**task) for task in about["learned"]]})

    def write(self, record: Record) -> None:
        """A reader sees the old record or the new one. Raises: OSError."""
        write_whole(self.path / _RECORD, signed(asdict(record)))

    def brick(self, digest: str) -> Path:
        """Where frozen weights with this sha256 are."""
        return self.path / "bricks" / f"{digest}.safetensors"

    def keep_base(self, source: Path, digest: str) -> Path:
        """Store the base once, without another copy where the file system allows. Raises: OSError."""
        target = self.brick(digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            return target
        partial = target.with_name(f"{target.name}.tmp-{os.getpid()}")
        try:
            try:
                os.link(source, partial)
            except OSError:  # another file system, or one without links
                shutil.copyfile(source, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return target

    def keep_brick(self, data: bytes | bytearray) -> str:
        """Store other frozen tensors once; their digest. Raises: OSError."""
        digest = hashlib.sha256(data).hexdigest()
        target = self.brick(digest)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, data)
        return digest

    def keep_task(self, source: Path, task: str, digest: str) -> str:
        """Store a task's adapters once; the name of their directory. Raises: OSError."""
        target = self.path / "tasks" / f"{task}-{digest[:16]}"
        if not target.exists():
            partial = target.with_name(f".{target.name}.tmp-{os.getpid()}")
            try:
                partial.mkdir(parents=True)
                for file in source.iterdir():
                    write_whole(partial / file.name, file.read_bytes())
                partial.replace(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return str(target.relative_to(self.path))

    def add(self, record: Record, learned: Learned) -> Record:
        """A task is finished. Raises: OSError."""
        record = replace(record, learned=(*record.learned, learned))
        self.write(record)
        return record


def list_curricula(root: Path) -> list[Curriculum]:
    """All below ``root``, in any project, by name."""
    return [Curriculum(found.parent) for found in sorted(root.glob(f"*/*/{_RECORD}"))]


def find_curriculum(name: str | None, root: Path) -> Curriculum:
    """By directory or name; the newest without one. Raises: ConfigurationError with those that there are."""
    if name is not None and Curriculum(Path(name).expanduser().absolute()).exists():
        return Curriculum(Path(name).expanduser().absolute())
    every = sorted(list_curricula(root), key=lambda one: (one.path / _RECORD).stat().st_mtime)
    same = [one for one in every if name in (None, one.name)]
    if not same or (name is not None and len(same) > 1):
        there = ", ".join(str(one.path) for one in every) or "none"
        raise ConfigurationError(f"curriculum {name or ''!r} is not one of those below {root}: {there}")
    return same[-1]
