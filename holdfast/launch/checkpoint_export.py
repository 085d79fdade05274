"""Weights out of a checkpoint: a safetensors file, one tensor in memory at a time, without torch.

The format: eight bytes that say how long the header is, the header as JSON, the tensors one behind the other. Source:
https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

from holdfast.errors import ManifestMismatch
from holdfast.fault_tolerance.coverage import cover
from holdfast.fault_tolerance.shards import Shards, read_slice
from holdfast.types import SliceSpec

__all__ = ["export_checkpoint"]

_MASTER = "/master"
"""Ends the names of fp32 master weights."""
_ITEM_BYTES = 4
_ALIGNMENT = 8


def export_checkpoint(shards: Shards, path: Path, *, step: int) -> int:
    """Write the whole fp32 weights to ``path``, as a finished run does; a reader sees the whole file or none.

    Returns its bytes. Raises: OSError; ShardCorrupt and ManifestMismatch for weights that are damaged or incomplete.
    """
    specs = _masters(shards)
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            file.write(_header(specs, {"format": "pt", "step": str(step)}))
            for spec in specs:
                file.write(_whole(shards, spec))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


def _masters(shards: Shards) -> Sequence[SliceSpec]:
    """One for each parameter, by name."""
    entries = (entry for manifest in shards.manifests.values() for entry in manifest.entries)
    found = {e.spec.name: e.spec for e in entries if e.spec.name.endswith(_MASTER)}
    if not found:
        raise ManifestMismatch(f"there are no weights in it: no slice has a name that ends with {_MASTER}")
    wanted = (replace(found[name], start=0, stop=prod(found[name].shape)) for name in sorted(found))
    return [replace(spec, dtype="float32") for spec in wanted]


def _header(specs: Sequence[SliceSpec], metadata: Mapping[str, str]) -> bytes:
    content = json.dumps({"__metadata__": metadata, **dict(_places(specs))}, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    return len(content).to_bytes(8, "little") + content


def _places(specs: Sequence[SliceSpec]) -> Iterator[tuple[str, object]]:
    end = 0
    for spec in specs:
        start, end = end, end + spec.stop * _ITEM_BYTES
        yield spec.name.removesuffix(_MASTER), {"dtype": "F32", "shape": spec.shape, "data_offsets": [start, end]}


def _whole(shards: Shards, spec: SliceSpec) -> bytearray:
    """All bytes of a tensor, every stored slice verified."""
    content = bytearray(spec.stop * _ITEM_BYTES)
    for move in cover(shards.manifests, [spec]):
        low, high = move.wanted(spec)
        content[low:high] = memoryview(read_slice(shards, move.source))[slice(*move.stored)]
    return content
