"""The way from a device, with streams and events that do nothing and a "device" that is this host's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import xxhash

from holdfast.fault_tolerance import device_staging
from holdfast.fault_tolerance.device_staging import DeviceRows, stage_device
from holdfast.fault_tolerance.staging import Control, Fence


class _Nothing:
    """A stream, or an event, of a device that is never behind."""

    def record(self, stream: object) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(DeviceRows, "stream", _Nothing())
    monkeypatch.setattr(device_staging, "_BOUNCE_BYTES", 64)
    bounces = [(torch.empty(64, dtype=torch.uint8), _Nothing()) for _ in range(2)]
    monkeypatch.setattr(DeviceRows, "bounces", bounces)


def _rows(*lengths: int) -> tuple[DeviceRows, list[torch.Tensor], list[int], int]:
    rows, sources, offsets, end = DeviceRows(), list[torch.Tensor](), list[int](), 0
    for number, length in enumerate(lengths):
        sources.append(torch.randint(0, 256, (length,), dtype=torch.uint8))
        offsets.append(end)
        rows.add(10 + number, sources[-1], end)
        end += -(-length // 64) * 64
    return rows, sources, offsets, end


@pytest.mark.parametrize("lengths", [(0,), (1,), (64,), (65, 0, 63), (640, 1, 129), (7, 128, 200, 64)])
def test_every_row_arrives_in_its_place_with_its_digest(lengths: tuple[int, ...]) -> None:
    rows, sources, offsets, end = _rows(*lengths)
    target = np.zeros(end + 1, dtype=np.uint8)
    found = stage_device(rows, target, Control(), None)
    assert found is not None
    for number, (source, offset) in enumerate(zip(sources, offsets, strict=True)):
        bits = source.numpy().tobytes()
        assert target[offset : offset + source.numel()].tobytes() == bits
        assert found[10 + number] == xxhash.xxh3_128_digest(bits)
    assert target[end] == 0


def _stopped() -> Iterator[tuple[Control, Fence | None]]:
    control = Control()
    control.stop()
    yield control, None
    yield Control(), Fence(np.array([5], dtype=np.int64), 4)


@pytest.mark.parametrize(("control", "fence"), list(_stopped()))
def test_a_call_that_was_ended_says_so(control: Control, fence: Fence | None) -> None:
    rows, _, _, end = _rows(640)
    assert stage_device(rows, np.zeros(end, dtype=np.uint8), control, fence) is None
