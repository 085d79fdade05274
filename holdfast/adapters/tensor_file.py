"""Tensors as a safetensors file, without the package of that name, which need not be installed where torch is.

The format: eight bytes that say how long the header is, the header as JSON, the tensors one behind the other. Source:
https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError, ManifestMismatch

__all__ = ["TensorFile", "decode", "encode", "raw_bytes", "tensors_digest", "write_whole"]

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_ALIGNMENT = 8
_LENGTH_BYTES = 8


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytearray:
    """The file's bytes. Raises: ConfigurationError for a dtype that adapters do not have."""
    strange = [f"{name} has dtype {t.dtype}, not a float's" for name, t in tensors.items() if t.dtype not in _NAMES]
    if strange:
        raise ConfigurationError(strange)
    # Large items first, so that each tensor is aligned to its own.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    data = bytearray(len(content).to_bytes(_LENGTH_BYTES, "little") + content)
    for _, tensor in ordered:
        data += raw_bytes(tensor)
    return data


def decode(data: bytearray, place: str) -> dict[str, Tensor]:
    """Tensors on the CPU, with memory of their own. Raises: ManifestMismatch, naming ``place``, for anything else."""
    try:
        start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
        header: dict[str, Any] = json.loads(data[_LENGTH_BYTES:start].decode())
        header.pop("__metadata__", None)
        return {name: _tensor(data, start, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestMismatch(f"{place} is no safetensors file of adapters: {error}") from error


class TensorFile:
    """A file of which some tensors are read at a time. Keeps the header, and no file open.

    Raises: OSError; ManifestMismatch, naming the file, where it is none of ours or ends too early.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            prefix = file.read(_LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            room = path.stat().st_size - _LENGTH_BYTES
            header = file.read(length) if length <= room else b""
        self.header_digest = hashlib.sha256(prefix + header).hexdigest()
        """Of all bytes that are no tensor's."""
        self._start = _LENGTH_BYTES + length
        try:
            self._entries: dict[str, Any] = json.loads(header.decode())
            self._entries.pop("__metadata__", None)
        except (ValueError, AttributeError) as error:
            raise ManifestMismatch(f"{path} is no safetensors file of adapters: {error}") from error

    def names(self, prefix: str) -> list[str]:
        """Of the tensors whose names begin like that."""
        return [name for name in self._entries if name.startswith(prefix)]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """On the CPU, with memory of their own; besides them, one tensor's bytes at a time are in memory."""
        with self._path.open("rb") as file:
            try:
                return {name: self._read(file, self._entries[name]) for name in names}
            except (ValueError, KeyError, TypeError) as error:
                raise ManifestMismatch(f"{self._path} is no safetensors file of adapters: {error}") from error

    def _read(self, file: BinaryIO, entry: Mapping[str, Any]) -> Tensor:
        first, last = entry["data_offsets"]
        file.seek(self._start + first)
        return _tensor(bytearray(file.read(max(0, last - first))), 0, {**entry, "data_offsets": [0, last - first]})


def raw_bytes(tensor: Tensor) -> bytearray:
    """A tensor's elements in row-major order."""
    data = bytearray(tensor.nbytes)
    if data:
        torch.frombuffer(data, dtype=tensor.dtype).copy_(tensor.detach().flatten())
    return data


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the names' order: one changed bit changes it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def write_whole(path: Path, data: bytes | bytearray) -> None:
    """A reader sees the whole file or none, after a power loss too. Raises: OSError."""
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _tensor(data: bytearray, start: int, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    first, last = entry["data_offsets"]
    fits = 0 <= first <= last <= len(data) - start and last - first == prod(shape) * dtype.itemsize
    if not fits or any(size < 0 for size in shape):
        raise ValueError(f"bytes {first} to {last} do not hold {dtype} of shape {shape}")
    if first == last:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(data, dtype=dtype, offset=start + first, count=prod(shape))
    return flat.clone().view(shape)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
