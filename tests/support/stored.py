"""Checkpoints written slice by slice from plain bytes, without a snapshotter, and whole tensors read back from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.manifest import Entry, Manifest, digest, lay_out
from holdfast.fault_tolerance.storage import Storage
from holdfast.types import SliceSpec

__all__ = ["Held", "whole_tensors", "write_checkpoint"]

Held = tuple[SliceSpec, bytes]
"""A slice of one rank, and what it holds."""


def write_checkpoint(
    storage: Storage,
    step: int,
    ranks: Sequence[Sequence[Held]],
    *,
    scalars: Mapping[str, object],
    config_digest: str = "cfg",
    layout: str = "",
) -> str:
    """Commit what each rank holds; the directory."""
    folder, receipts = checkpoint.directory(step), dict[int, Mapping[str, Any]]()
    for rank, held in enumerate(ranks):
        offsets, total = lay_out([len(content) for _, content in held])
        data = bytearray(total)
        for offset, (_, content) in zip(offsets, held, strict=True):
            data[offset : offset + len(content)] = content
        entries = tuple(Entry(spec, at, len(c), digest(c)) for at, (spec, c) in zip(offsets, held, strict=True))
        manifest = Manifest(step, 1, rank, len(ranks), dict(scalars), entries, config_digest).to_bytes()
        receipts[rank] = checkpoint.write_rank(storage, folder, rank, data=[data], manifest=manifest)
    checkpoint.commit(storage, step, receipts=receipts, config_digest=config_digest, layout=layout)
    return folder


def whole_tensors(storage: Storage, step: int) -> dict[str, bytes]:
    """Every tensor of a checkpoint put together element by element, replicas compared. Nothing may be missing."""
    folder, whole, seen = checkpoint.directory(step), dict[str, Any](), dict[str, Any]()
    for rank in range(checkpoint.read_commit(storage, step).world):
        stored, data = checkpoint.read_rank(storage, folder, rank)
        for entry in Manifest.from_bytes(stored).entries:
            spec = entry.spec
            rows = np.frombuffer(data[entry.offset : entry.offset + entry.length], np.uint8)
            rows = rows.reshape(spec.stop - spec.start, -1)
            total = int(np.prod(spec.shape))
            tensor = whole.setdefault(spec.name, np.zeros((total, rows.shape[1]), np.uint8))
            count = seen.setdefault(spec.name, np.zeros(total, bool))
            part = slice(spec.start, spec.stop)
            assert np.array_equal(tensor[part][count[part]], rows[count[part]]), f"replicas of {spec.name} differ"
            tensor[part], count[part] = rows, True
    assert all(count.all() for count in seen.values())
    return {name: tensor.tobytes() for name, tensor in whole.items()}
