"""Stacks on disk: a directory of each, with adapters of one task that can be loaded alone, and ``manifest.json``.

The manifest is written last and says by (domain, round) which directory counts, so that a crash leaves the old stack or
the new one. It holds digests of each stack's header and of its tensors in each layer: what is read by the piece is
checked by the piece.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from holdfast.adapters.adapted import adapters_of
from holdfast.adapters.fingerprint import base_fingerprint
from holdfast.adapters.method import Tensors
from holdfast.adapters.methods.brainstacks.stacks import Stack, stack_digest, task_name
from holdfast.adapters.registry import describe_method
from holdfast.adapters.signed_json import read_signed, signed
from holdfast.adapters.store import Sidecar, read_sidecar, save_adapters
from holdfast.adapters.tensor_file import TensorFile, tensors_digest, write_whole
from holdfast.errors import ConfigurationError, ManifestMismatch

__all__ = ["FORMAT_VERSION", "Manifest", "Page", "Record", "add_stack", "read_manifest", "remove_stack"]

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Page:
    """One stack's tensors in one layer."""

    size_bytes: int
    digest: str
    """Of the tensors by their names, see :func:`holdfast.adapters.tensor_file.tensors_digest`."""


@dataclass(frozen=True, slots=True)
class Record:
    """One stack of a library."""

    stack: Stack
    directory: str
    """In the library's."""
    file_digest: str
    """sha256 of its tensor file."""
    header_digest: str
    """sha256 of what comes before the tensors in it."""
    pages: Mapping[str, Page]
    """By layer."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What ``manifest.json`` says."""

    kind: Mapping[str, Any]
    """Method, options, layers and base fingerprint that all the stacks share."""
    records: Sequence[Record]
    """In the order in which they act."""

    @property
    def stacks(self) -> list[Stack]:
        """Oldest first."""
        return [record.stack for record in self.records]

    def sidecar(self, directory: Path, record: Record) -> Sidecar:
        """What a stack says of itself. Raises: ManifestMismatch if that is not what the manifest says of it."""
        at = directory / record.directory
        try:
            sidecar = read_sidecar(at)
        except ConfigurationError as error:
            raise ManifestMismatch(f"{directory / _MANIFEST} names {record.stack.task!r}: {error}") from error
        layers = {name: list(shape) for name, shape in sidecar.layers.items()}
        found = {"method": sidecar.method, "options": dict(sidecar.options), "layers": layers, "base": sidecar.base}
        found |= {"tasks": list(sidecar.tasks), "digest": sidecar.digest}
        wanted = {**self.kind, "tasks": [record.stack.task], "digest": record.file_digest}
        if other := [what for what in wanted if wanted[what] != found[what]]:
            raise ManifestMismatch(
                f"the stack in {at} has another {', '.join(other)} than {_MANIFEST} says of {record.stack.task!r}; "
                "it belongs to another library, or was replaced by hand"
            )
        return sidecar


def add_stack(directory: Path, model: nn.Module, stack: Stack) -> Record:
    """Save a finished task of the model, in the place of the stack of the same domain and round if there is one.

    Raises: ManifestMismatch for a library of another base, method, choice of options or layers, and if the model's
    tensors are not what was frozen; ConfigurationError while a task is being trained, or without such a task; OSError.
    """
    adapters = adapters_of(model)
    if stack.task in adapters.tasks and stack_digest(model, stack.task) != stack.digest:
        raise ManifestMismatch(f"the model's {stack.task!r} is not the stack that was frozen under this name")
    kind = _kind(model)
    manifest = read_manifest(directory) if (directory / _MANIFEST).exists() else Manifest(kind, [])
    if different := [what for what, value in kind.items() if value != manifest.kind[what]]:
        raise ManifestMismatch(f"the library in {directory} is of another {', '.join(different)} than this model")
    name = f"{stack.domain}.{stack.round}-{stack.digest[:16]}"
    save_adapters(model, directory / name, only=stack.task)
    number = adapters.tasks.index(stack.task)
    pages = {name: _page(layer.task_rows(number)) for name, layer in adapters.layers.items()}
    sidecar = read_sidecar(directory / name)
    header = TensorFile(directory / name / sidecar.tensors).header_digest
    record = Record(stack, name, sidecar.digest, header, pages)
    tasks = [old.stack.task for old in manifest.records]
    records = list(manifest.records)
    at = tasks.index(stack.task) if stack.task in tasks else len(tasks)
    records[at : at + 1] = [record]
    _write(directory, manifest, records)
    return record


def remove_stack(directory: Path, domain: str, number: int) -> None:
    """The others stay as they are, but those that were trained on it cannot be replayed any more.

    Raises: ConfigurationError if there is no such stack.
    """
    manifest, task = read_manifest(directory), task_name(domain, number)
    rest = [record for record in manifest.records if record.stack.task != task]
    if len(rest) == len(manifest.records):
        raise ConfigurationError(f"{directory} has no stack {task!r}; it has {[s.task for s in manifest.stacks]}")
    _write(directory, manifest, rest)


def read_manifest(directory: Path) -> Manifest:
    """Raises: ConfigurationError if there is none; ManifestMismatch if it is damaged or of another format."""
    path = directory / _MANIFEST
    try:
        about = read_signed(path, format_version=FORMAT_VERSION)
    except FileNotFoundError as error:
        raise ConfigurationError(f"{directory} holds no library of stacks: it has no {_MANIFEST}") from error
    return Manifest(about["kind"], [_record(entry) for entry in about["records"]])


def _page(tensors: Tensors) -> Page:
    return Page(sum(rows.nbytes for rows in tensors.values()), tensors_digest(tensors))


def _kind(model: nn.Module) -> dict[str, Any]:
    adapters = adapters_of(model)
    return {
        "method": adapters.method.name,
        "options": describe_method(adapters.method),
        "layers": {name: [layer.in_features, layer.out_features] for name, layer in adapters.layers.items()},
        "base": base_fingerprint(model),
    }


def _record(entry: Mapping[str, Any]) -> Record:
    pages = {name: Page(**page) for name, page in entry["pages"].items()}
    return Record(Stack(**entry["stack"]), entry["directory"], entry["file_digest"], entry["header_digest"], pages)


def _write(directory: Path, old: Manifest, records: Sequence[Record]) -> None:
    """And then drop the directories of stacks that no longer count."""
    new = replace(old, records=records)
    write_whole(directory / _MANIFEST, signed({"format_version": FORMAT_VERSION, **asdict(new)}))
    for name in {record.directory for record in old.records} - {record.directory for record in records}:
        shutil.rmtree(directory / name, ignore_errors=True)  # costs space only
