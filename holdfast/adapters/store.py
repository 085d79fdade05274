"""Adapters on disk: ``adapter.json``, which says what they are, and a safetensors file that it names.

The JSON file is written last and holds the other one's sha256, so a directory has the old adapters or the new ones,
whatever happens in between; and its own, so that a changed option is noticed too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from holdfast.adapters.adapted import ATTRIBUTE, Adapters, adapters_of
from holdfast.adapters.fingerprint import base_fingerprint
from holdfast.adapters.inject import inject
from holdfast.adapters.registry import create_method, describe_method
from holdfast.adapters.signed_json import read_signed, signed
from holdfast.adapters.targets import exactly
from holdfast.adapters.tensor_file import decode, encode, write_whole
from holdfast.errors import ConfigurationError, ManifestMismatch

__all__ = [
    "FORMAT_VERSION",
    "Sidecar",
    "append_adapters",
    "finished_tasks",
    "fit_adapters",
    "load_adapters",
    "read_sidecar",
    "save_adapters",
    "task_files",
]

FORMAT_VERSION = 1
_SIDECAR = "adapter.json"


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What ``adapter.json`` says."""

    method: str
    options: Mapping[str, Any]
    tasks: Sequence[str]
    """Finished tasks, oldest first."""
    layers: Mapping[str, Sequence[int]]
    """Input and output features of each adapted layer."""
    base: str
    """Fingerprint of the weights that the adapters belong to."""
    tensors: str
    """The safetensors file, in the same directory. Tensors are called ``<layer>.<task number>.<name>``."""
    digest: str
    """sha256 of that file."""
    format_version: int = FORMAT_VERSION


def save_adapters(model: nn.Module, directory: Path, *, only: str | None = None) -> None:
    """Write the finished tasks, or ``only`` one of them.

    Raises: OSError; ConfigurationError while a task is being trained, and for one that is not finished.
    """
    adapters = adapters_of(model)
    tasks = finished_tasks(adapters, only)
    data = encode(_collect(adapters, tasks), {"format": "pt", "method": adapters.method.name})
    digest = hashlib.sha256(data).hexdigest()
    sidecar = Sidecar(
        method=adapters.method.name,
        options=describe_method(adapters.method),
        tasks=tasks,
        layers={name: (layer.in_features, layer.out_features) for name, layer in adapters.layers.items()},
        base=base_fingerprint(model),
        tensors=f"adapter-{digest[:16]}.safetensors",
        digest=digest,
    )
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / sidecar.tensors, data)
    write_whole(directory / _SIDECAR, signed({name: getattr(sidecar, name) for name in Sidecar.__slots__}))
    for older in directory.glob("adapter-*.safetensors"):
        if older.name != sidecar.tensors:
            with suppress(OSError):  # costs space only
                older.unlink()


def read_sidecar(directory: Path) -> Sidecar:
    """Raises: ConfigurationError if there is none; ManifestMismatch if it is damaged or of another format."""
    try:
        return Sidecar(**read_signed(directory / _SIDECAR, format_version=FORMAT_VERSION))
    except FileNotFoundError as error:
        raise ConfigurationError(f"{directory} holds no adapters: it has no {_SIDECAR}") from error


def task_files(directory: Path) -> tuple[Path, Path]:
    """What :func:`save_adapters` has written there. Raises: as :func:`read_sidecar`."""
    return directory / _SIDECAR, directory / read_sidecar(directory).tensors


def load_adapters(model: nn.Module, directory: Path) -> Adapters:
    """Inject what was saved, or put it in the place of a model's own adapters of the same method and layers.

    Everything is checked before the model is touched. Raises: ConfigurationError if there is nothing to load, or a
    task is being trained; ManifestMismatch for another base, method, choice of options or layers, and for damage.
    """
    sidecar = read_sidecar(directory)
    tensors = _read_tensors(directory, sidecar)
    adapters = fit_adapters(model, sidecar, directory)
    for name, layer in adapters.layers.items():
        layer.clear()
        for task in range(len(sidecar.tasks)):
            layer.append(_of_task(tensors, f"{name}.{task}."))
    adapters.tasks[:] = sidecar.tasks
    return adapters


def append_adapters(model: nn.Module, directories: Sequence[Path]) -> None:
    """Put what was saved task by task behind the model's own finished tasks.

    Everything is checked before the model is touched. Raises: as :func:`load_adapters`; ConfigurationError for a task
    that is there already.
    """
    adapters, base = adapters_of(model), base_fingerprint(model) if directories else ""
    found, names = list[dict[str, Tensor]](), list(adapters.tasks)
    for directory in directories:
        sidecar = read_sidecar(directory)
        _need_base(sidecar, base, directory)
        _compare(adapters, sidecar, directory)
        if twice := [name for name in sidecar.tasks if name in names]:
            raise ConfigurationError(f"{directory} holds {', '.join(twice)}, and the model has {', '.join(names)}")
        names += sidecar.tasks
        tensors = _read_tensors(directory, sidecar)
        keys = [f"{layer}.{task}." for task in range(len(sidecar.tasks)) for layer in adapters.layers]
        found += [_of_task(tensors, key) for key in keys]
    layers = list(adapters.layers.values())
    for number, rows in enumerate(found):
        layers[number % len(layers)].append(rows)
    adapters.tasks[:] = names


def fit_adapters(model: nn.Module, sidecar: Sidecar, directory: Path) -> Adapters:
    """The model's own adapters if they are of the kind that ``directory`` holds, or new ones without any task.

    Raises: ManifestMismatch for another base, method, choice of options or layers; ConfigurationError while a task is
    being trained. The model is then as it was.
    """
    _need_base(sidecar, base_fingerprint(model), directory)
    if hasattr(model, ATTRIBUTE):
        adapters = adapters_of(model)
        _compare(adapters, sidecar, directory)
        return adapters
    return inject(model, create_method(sidecar.method, sidecar.options), exactly(sidecar.layers))


def finished_tasks(adapters: Adapters, only: str | None) -> list[str]:
    """All of them, or ``only`` one. Raises: ConfigurationError as :func:`save_adapters` does."""
    if adapters.current is not None:
        raise ConfigurationError(f"task {adapters.current!r} is being trained; finish or abandon it before saving")
    if only is not None and only not in adapters.tasks:
        raise ConfigurationError(f"there is no finished task {only!r}; there are {adapters.tasks}")
    return list(adapters.tasks) if only is None else [only]


def _collect(adapters: Adapters, tasks: Sequence[str]) -> dict[str, Tensor]:
    return {
        f"{name}.{number}.{key}": rows.cpu()
        for name, layer in adapters.layers.items()
        for number, task in enumerate(tasks)
        for key, rows in layer.task_rows(adapters.tasks.index(task)).items()
    }


def _of_task(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): rows for name, rows in tensors.items() if name.startswith(prefix)}


def _read_tensors(directory: Path, sidecar: Sidecar) -> dict[str, Tensor]:
    path = directory / sidecar.tensors
    try:
        data = bytearray(path.read_bytes())
    except FileNotFoundError as error:
        raise ManifestMismatch(f"{directory / _SIDECAR} names {path.name}, which is not there") from error
    if (digest := hashlib.sha256(data).hexdigest()) != sidecar.digest:
        raise ManifestMismatch(f"{path} has sha256 {digest[:16]}…, not {sidecar.digest[:16]}…: it is damaged")
    return decode(data, str(path))


def _need_base(sidecar: Sidecar, base: str, directory: Path) -> None:
    if base != sidecar.base:
        raise ManifestMismatch(
            f"the adapters in {directory} belong to base weights {sidecar.base[:16]}…, this model has {base[:16]}…; "
            "load the weights, in the dtype, that they were trained on"
        )


def _compare(adapters: Adapters, sidecar: Sidecar, directory: Path) -> None:
    """Raises as :func:`load_adapters` does."""
    if adapters.current is not None:
        raise ConfigurationError(f"task {adapters.current!r} is being trained; finish or abandon it before loading")
    layers = {name: [layer.in_features, layer.out_features] for name, layer in adapters.layers.items()}
    pairs = {
        "method": (sidecar.method, adapters.method.name),
        "options": (dict(sidecar.options), describe_method(adapters.method)),
        "layers": ({name: list(shape) for name, shape in sidecar.layers.items()}, layers),
    }
    other = [f"{what} {theirs}, this model {ours}" for what, (theirs, ours) in pairs.items() if theirs != ours]
    if other:
        raise ManifestMismatch(f"the adapters in {directory} have {'; '.join(other)}; eject this model's to load them")
