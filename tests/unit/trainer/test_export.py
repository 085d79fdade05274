"""Weights that leave a run: exact, whole or absent, and readable without Holdfast."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from holdfast.trainer.export import export_weights
from holdfast.trainer.model import Decoder, initialise
from tests.support.tiny_training import TINY


def _weights(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "blocks.0.attention.wq.weight": torch.randn(6, 4, generator=draw),
        "head.norm.weight": torch.randn(4, generator=draw),
        "odd": torch.tensor([0.0, -0.0, float("inf"), 1e-45, 3.4e38]),
    }


def _bits(weights: dict[str, Tensor]) -> dict[str, tuple[list[int], bytes]]:
    return {name: (list(w.shape), w.numpy().tobytes()) for name, w in weights.items()}


def test_what_was_written_reads_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    size = export_weights(_weights(), path, metadata={"format": "pt", "step": "12"})
    assert _bits(safetensors.torch.load_file(path)) == _bits(_weights())
    assert size == path.stat().st_size
    with safetensors.safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "step": "12"}


def test_other_dtypes_are_written_as_they_are(tmp_path: Path) -> None:
    weights = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.arange(4, dtype=torch.int64)}
    export_weights(weights, tmp_path / "w", metadata={})
    read = safetensors.torch.load_file(tmp_path / "w")
    assert all(torch.equal(read[name], weight) and read[name].dtype == weight.dtype for name, weight in weights.items())


def test_missing_directories_are_made_and_only_the_file_is_left(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "export" / "model.safetensors"
    export_weights(_weights(), path, metadata={})
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_a_later_export_replaces_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    export_weights(_weights(1), path, metadata={})
    export_weights(_weights(2), path, metadata={})
    assert _bits(safetensors.torch.load_file(path)) == _bits(_weights(2))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_file_is_on_the_disk_in_full_before_it_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    export_weights(_weights(1), path, metadata={})
    old, seen = path.read_bytes(), []

    def synced(descriptor: int) -> None:
        assert path.read_bytes() == old
        (written,) = [p for p in tmp_path.iterdir() if p != path]
        assert os.path.samestat(os.fstat(descriptor), written.stat())
        seen.append(_bits(safetensors.torch.load_file(written)))

    monkeypatch.setattr(os, "fsync", synced)
    export_weights(_weights(2), path, metadata={})
    assert seen == [_bits(_weights(2))]


class _Killed(BaseException):
    """Not an Exception, as a signal is none."""


@pytest.mark.parametrize("place", ["save", "fsync", "replace"])
@pytest.mark.parametrize("has_old", [True, False])
def test_who_is_interrupted_leaves_the_old_file_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, has_old: bool
) -> None:
    path = tmp_path / "model.safetensors"
    if has_old:
        export_weights(_weights(1), path, metadata={})

    def half_a_file(tensors: object, filename: Path, metadata: object) -> None:
        filename.write_bytes(b"\0" * 20)
        raise _Killed

    def killed(*_: object) -> None:
        raise _Killed

    where: tuple[object, str] = {
        "save": (safetensors.torch, "save_file"),
        "fsync": (os, "fsync"),
        "replace": (Path, "replace"),
    }[place]
    monkeypatch.setattr(*where, half_a_file if place == "save" else killed)
    with pytest.raises(_Killed):
        export_weights(_weights(2), path, metadata={})
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == (["model.safetensors"] if has_old else [])
    if has_old:
        assert _bits(safetensors.torch.load_file(path)) == _bits(_weights(1))


def test_the_file_may_be_read_by_whom_the_umask_lets_read(tmp_path: Path) -> None:
    path, before = tmp_path / "model.safetensors", os.umask(0o027)
    try:
        export_weights(_weights(), path, metadata={})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("is_tied", [False, True])
def test_exported_weights_make_a_model_that_computes_the_same(tmp_path: Path, is_tied: bool) -> None:
    config = replace(TINY, tie_embeddings=is_tied)
    model, other, path = Decoder(config), Decoder(config), tmp_path / "model.safetensors"
    initialise(model, 3)
    export_weights({name: p.detach() for name, p in model.named_parameters()}, path, metadata={})
    weights = safetensors.torch.load_file(path)
    assert ("head.output.weight" in weights) is not is_tied  # a table that is used twice is written once
    other.load_state_dict(weights)
    tokens = torch.randint(259, (2, 9), generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(tokens), other(tokens))
