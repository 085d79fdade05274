"""Frozen files that are in their place, gone, or damaged: what a rank reads in each case, and what it is told."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

import pytest

from holdfast.errors import ConfigurationError, SnapshotError
from holdfast.fault_tolerance.bricks import BrickFile
from holdfast.trainer.config import AdapterConfig
from holdfast.trainer.frozen import Frozen

_CONTENTS = {"base/model": b"base", "first/adapter.json": b"about", "first/tensors": b"t1", "second/tensors": b"t2"}


@pytest.fixture
def files(tmp_path: Path) -> list[BrickFile]:
    found = []
    for name, content in _CONTENTS.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        found.append(BrickFile("adapter.base", str(path), hashlib.sha256(content).hexdigest(), len(content)))
    return found


@pytest.fixture
def config(tmp_path: Path) -> AdapterConfig:
    return AdapterConfig(base=str(tmp_path / "base/model"), tasks=[str(tmp_path / "first"), str(tmp_path / "second")])


def _frozen(files: list[BrickFile], told: list[tuple[list[str], str]]) -> Frozen:
    def fetch(file: BrickFile, out: BinaryIO) -> None:
        out.write(_CONTENTS["/".join(Path(file.path).parts[-2:])])

    return Frozen(files, fetch, lambda found, why: told.append(([Path(file.path).name for file in found], why)))


def test_files_in_their_place_are_read_there(files: list[BrickFile], config: AdapterConfig) -> None:
    told: list[tuple[list[str], str]] = []
    with _frozen(files, told).at_hand(config) as found:
        assert found == config
    assert told == []


def test_what_is_gone_or_damaged_is_fetched_and_nothing_of_the_users_is_touched(
    files: list[BrickFile], config: AdapterConfig
) -> None:
    Path(files[0].path).unlink()
    Path(files[2].path).write_bytes(b"tX")
    told: list[tuple[list[str], str]] = []
    with _frozen(files, told).at_hand(config) as found:
        assert Path(found.base).read_bytes() == b"base"
        assert Path(found.tasks[0], "tensors").read_bytes() == b"t1"
        assert Path(found.tasks[0], "adapter.json").read_bytes() == b"about"
        assert found.tasks[1] == config.tasks[1]
        places = [Path(found.base), Path(found.tasks[0])]
    assert not any(place.exists() for place in places)
    assert told == [(["model", "tensors"], "it cannot be read: No such file or directory")]
    assert not Path(files[0].path).exists()
    assert Path(files[2].path).read_bytes() == b"tX"


@pytest.mark.parametrize("is_held", [True, False])
def test_a_file_that_is_nowhere_is_named_with_all_that_was_tried(
    is_held: bool, files: list[BrickFile], config: AdapterConfig
) -> None:
    def fetch(file: BrickFile, out: BinaryIO) -> None:
        raise SnapshotError("0 of 2 pieces are there: node 0 has not piece 0")

    Path(files[0].path).write_bytes(b"another base")
    frozen = Frozen(files, fetch) if is_held else Frozen(files)
    with pytest.raises(ConfigurationError) as refused, frozen.at_hand(config):
        pass
    text = str(refused.value)
    for part in (files[0].path, files[0].digest, hashlib.sha256(b"another base").hexdigest(), "Put that file back"):
        assert part in text
    assert ("node 0 has not piece 0" if is_held else "adapter.in_memory") in text


def test_a_worker_that_warms_up_does_not_mind_what_is_missing(files: list[BrickFile]) -> None:
    Path(files[0].path).unlink()
    Frozen(files).warm_up()
