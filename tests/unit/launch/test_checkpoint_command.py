"""``holdfast checkpoint``: what is shown, what is found damaged, and weights that equal those a run exports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.storage import DirectoryStorage, MemoryStorage
from holdfast.launch import checkpoint_command as command
from holdfast.launch import checkpoint_export
from holdfast.launch.cli import main
from holdfast.launch.run_dir import RunDir
from holdfast.trainer.export import export_weights
from holdfast.types import Quantization, SliceSpec
from tests.support.stored import Held, write_checkpoint

_SHAPES = {"norm.weight": (3,), "blocks.0.w": (5, 7), "blocks.10.w": (4, 4), "scalar": ()}


def _weights(step: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=draw) for name, shape in _SHAPES.items()}


def _ranks(step: int, world: int) -> list[list[Held]]:
    """Weights in ``world`` parts, and codes beside them that are no weights."""
    ranks: list[list[Held]] = [[] for _ in range(world)]
    for name, weight in _weights(step).items():
        cuts = np.linspace(0, weight.numel(), world + 1).astype(int).tolist()
        for rank, (start, stop) in enumerate(pairwise(cuts)):
            if start < stop:
                content = weight.reshape(-1)[start:stop].numpy().tobytes()
                how = Quantization(8, "dynamic-signed", f"{name}/absmax")
                ranks[rank].append((SliceSpec(f"{name}/master", tuple(weight.shape), start, stop, "float32"), content))
                codes = SliceSpec(f"{name}/codes", tuple(weight.shape), start, stop, "uint8", how)
                ranks[rank].append((codes, bytes(range(start, stop))))
    return ranks


def _write(run: RunDir, step: int, *, world: int = 2) -> Path:
    storage = DirectoryStorage(run.checkpoints)
    layout = f"{world} ranks, ZeRO stage 1"
    return run.checkpoints / write_checkpoint(storage, step, _ranks(step, world), scalars={"step": step}, layout=layout)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def run(root: Path) -> RunDir:
    return _made(root, "older", 1.0)


def _made(root: Path, run_id: str, created: float, project: str = "holdfast") -> RunDir:
    return RunDir.create(str(root), project, run_id, config_digest="cfg", clock=lambda: created)


def _said(words: Sequence[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line printed, on either stream."""
    capsys.readouterr()
    assert main(["checkpoint", *words]) == code
    said, complained = capsys.readouterr()
    assert "Traceback" not in complained
    return said + complained


# -- which run ---------------------------------------------------------------------------------------------------------


def test_the_newest_run_is_meant_unless_one_is_named_by_id_directory_or_uri(
    root: Path, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = _made(root, "newer", 2.0, project="other")
    for place, step in ((run, 3), (newer, 4)):
        _write(place, step)
    older = [run.run_id, str(run.path), str(run.checkpoints), f"file://{run.checkpoints}"]
    for words, step in [([], 4), (["newer"], 4), *(([name], 3) for name in older)]:
        (found,) = json.loads(_said(["list", *words, "--json"], 0, capsys))
        assert found["step"] == step, words


def test_a_run_that_does_not_exist_is_answered_with_those_that_do(
    root: Path, run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = _said(["list", "nobody"], 2, capsys)
    assert f"run 'nobody' is neither the directory of a run nor an id below {root}; the newest there are older" in said
    (root / "empty").mkdir()
    said = _said(["list", "--root", str(root / "empty")], 2, capsys)
    assert said == f"error: no run was found below {root / 'empty'}: there is none; --root names another place\n"


def test_checkpoints_are_looked_for_where_the_run_keeps_them(
    root: Path, run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    config = {"data": {"storage": "/no"}, "snapshot": {"keep_last": 2, "storage": str(elsewhere)}, "storage": "/no"}
    run.begin_attempt(config=config, overrides=(), command=())
    folder = write_checkpoint(
        DirectoryStorage(elsewhere / "holdfast" / run.run_id), 9, _ranks(9, 1), scalars={"step": 9}
    )
    (found,) = json.loads(_said(["list", run.run_id, "--json"], 0, capsys))
    assert (found["name"], found["step"]) == (folder, 9)
    run.begin_attempt(config={"snapshot": {"storage": ""}}, overrides=(), command=())
    assert f"has no checkpoints in {run.checkpoints}" in _said(["list", run.run_id], 0, capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: ACTION; see holdfast checkpoint --help"),
        (["wibble"], "argument ACTION: invalid choice: 'wibble'"),
        (["verify", "--step", "x"], "argument --step: invalid int value: 'x'; see holdfast checkpoint verify --help"),
        (["export"], "the following arguments are required: --to"),
        (["list", "s4://bucket"], "storage 's4://bucket' must be"),
    ],
)
def test_bad_arguments_are_told_in_one_line(
    words: list[str], message: str, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    said = _said(words, 2, capsys)
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1


def test_help_is_there_for_each_action(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["list"], ["verify"], ["export"]):
        with pytest.raises(SystemExit) as left:
            main(["checkpoint", *words, "--help"])
        assert left.value.code == 0
        assert "RUN" in capsys.readouterr().out or not words


def test_nothing_that_trains_is_loaded(run: RunDir) -> None:
    _write(run, 3)
    code = (
        "import sys; from holdfast.launch.cli import main; assert main(sys.argv[1:]) == 0; "
        "print({'torch', 'hydra', 'ray', 'deepspeed', 'wandb'} & set(sys.modules))"
    )
    for words in (["list"], ["verify"], ["export", "--to", str(run.export)]):
        call = [sys.executable, "-c", code, "checkpoint", *words]
        done = subprocess.run(call, capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.endswith("set()\n")


# -- list --------------------------------------------------------------------------------------------------------------


def test_the_list_shows_what_is_good_and_why_the_rest_is_not(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    storage = DirectoryStorage(run.checkpoints)
    for step in (150, 20, 30, 40):
        _write(run, step, world=3)
    checkpoint.quarantine(storage, 20, "a digest\x1b[31m did not match")
    (run.checkpoints / "step-00000030" / "rank00002.bin").write_bytes(b"")
    (run.checkpoints / "step-00000040" / checkpoint.COMMIT_FILE).unlink()
    head, header, *lines = _said(["list"], 0, capsys).splitlines()
    assert head == f"run older, in {run.checkpoints}"
    assert header.split() == ["STEP", "WRITTEN", "AT", "RANKS", "BYTES", "WRITER", "STATE"]
    written = checkpoint.read_commit(storage, 150)
    assert [line.split()[0] for line in lines] == ["20", "30", "40", "150"]
    assert "rejected: a digest\\x1b[31m did not match (rejected-step-00000020)" in lines[0]
    assert "rejected: step-00000030/rank00002.bin has 0 bytes" in lines[1]
    assert "uncommitted: being written, or a write that was interrupted (step-00000040)" in lines[2]
    assert lines[3].endswith("good")
    for fact in (written.written_at, "3 ranks, ZeRO stage 1", written.writer, f"{written.bytes / 1000:.1f} kB"):
        assert fact in lines[3]
    rows = json.loads(_said(["list", "--json"], 0, capsys))
    assert [(row["step"], row["state"]) for row in rows] == [
        (20, "rejected"),
        (30, "rejected"),
        (40, "uncommitted"),
        (150, "good"),
    ]
    assert (rows[3]["ranks"], rows[3]["bytes"], rows[3]["writer"]) == (3, written.bytes, written.writer)
    assert len({frozenset(row) for row in rows}) == 1


# -- verify ------------------------------------------------------------------------------------------------------------


def test_sound_checkpoints_are_good_and_nothing_is_written(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (3, 4):
        _write(run, step)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    assert _said(["verify"], 0, capsys) == "step-00000003: good\nstep-00000004: good\n"
    assert _said(["verify", "--step", "4"], 0, capsys) == "step-00000004: good\n"
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
    assert "has no complete checkpoint of step 5 in" in (said := _said(["verify", "--step", "5"], 2, capsys))
    assert said.endswith(": there are 3, 4\n")


def test_every_flipped_byte_of_state_is_found_and_named(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    """Each byte in turn: the slices are small. Bytes between them, which align them, are nobody's."""
    folder = _write(run, 3)
    path = folder / checkpoint.data_file(1)
    whole, storage = path.read_bytes(), DirectoryStorage(run.checkpoints)
    entries = command.manifest_of(storage, checkpoint.read_commit(storage, 3), 1).entries
    for entry in entries:
        for at in range(entry.offset, entry.offset + entry.length):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            lines = list(command._damage(storage, 3))
            assert len(lines) == 1
            assert lines[0].startswith(f"step-00000003/rank00001.bin: slice {entry.spec.name!r} has digest ")
            assert lines[0].endswith(f", {entry.digest} was written")
    said = _said(["verify"], 1, capsys)
    assert said.splitlines() == [lines[0], "step-00000003: damaged in 1 place"]


def test_lost_files_and_damaged_records_are_named_and_the_rest_is_read(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (3, 4, 5):
        _write(run, step)
    (run.checkpoints / "step-00000003" / checkpoint.data_file(0)).unlink()
    manifest = run.checkpoints / "step-00000004" / checkpoint.manifest_file(1)
    manifest.write_bytes(bytes([manifest.read_bytes()[0] ^ 1]) + manifest.read_bytes()[1:])
    record = run.checkpoints / "step-00000005" / checkpoint.COMMIT_FILE
    record.write_text(record.read_text().replace("cfg", "cfh"))
    lines = _said(["verify"], 1, capsys).splitlines()
    assert lines[0] == "step-00000003/rank00000.bin is missing"
    assert "step-00000004/rank00001.manifest.arrow" in lines[2]
    assert "step-00000005/commit.json is no commit record: its digest does not match" in lines[4]
    assert lines[1::2] == [f"step-0000000{step}: damaged in 1 place" for step in (3, 4, 5)]


def test_progress_is_for_terminals(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(run, 3)
    monkeypatch.setattr(command, "_REDRAW_S", -1.0)
    assert "read" not in _said(["verify"], 0, capsys)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    said = _said(["verify"], 0, capsys)
    assert "\rstep-00000003: 4 B of " in said
    assert said.endswith("\r\x1b[K")


# -- export ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 5])
def test_the_weights_equal_those_that_a_run_exports(
    world: int, run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(run, 2)
    _write(run, 7, world=world)
    path, other = tmp_path / "deep" / "er" / "model.safetensors", tmp_path / "other.safetensors"
    said = _said(["export", "--step", "7", "--to", str(path.parent)], 0, capsys)
    assert said == f"weights of step 7: {path} ({path.stat().st_size} B)\n"
    export_weights(_weights(7), other, metadata={"format": "pt", "step": "7"})
    assert _content(path) == _content(other)
    assert path.stat().st_mode == other.stat().st_mode
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]
    for name, weight in load_file(path).items():
        assert torch.equal(weight, _weights(7)[name])
    assert "weights of step 7: " in _said(["export", "--to", str(tmp_path / "newest")], 0, capsys)


def _content(path: Path) -> tuple[object, dict[str, str], bytes]:
    """Header, metadata and data; the order of the metadata is left to chance."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    return json.loads(raw[8 : 8 + length]), metadata, raw[8 + length :]


def test_damaged_weights_are_not_exported_and_leave_nothing_behind(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write(run, 3) / checkpoint.data_file(1)
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    said = _said(["export", "--to", str(tmp_path / "out")], 1, capsys)
    assert said.startswith("error: slice 'norm.weight/master' of rank 1, version 3: digest ")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_in_the_way_is_named(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(run, 3)
    (tmp_path / "file").touch()
    said = _said(["export", "--to", str(tmp_path / "file")], 2, capsys)
    assert said == f"error: {tmp_path}/file/model.safetensors cannot be written: File exists; choose another --to\n"


def test_a_step_without_a_checkpoint_is_answered_with_those_there_are(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "--to", str(tmp_path / "out")]
    assert f"run older has no complete checkpoint in {run.checkpoints}: there is none" in _said(words, 2, capsys)
    for step in (3, 20):
        _write(run, step)
    assert "has no complete checkpoint of step 4 in" in (said := _said([*words, "--step", "4"], 2, capsys))
    assert said.endswith(": there are 3, 20\n")
    assert not (tmp_path / "out").exists()


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read between two writes to the file belongs to one tensor."""
    storage = MemoryStorage()
    folder = write_checkpoint(storage, 3, _ranks(3, 2), scalars={})
    shards, asked = command.StorageShards(storage, folder), list[str]()
    read = checkpoint_export.read_slice

    def noted(shards: command.StorageShards, source: object) -> object:
        asked.append(source.entry.spec.name)  # type: ignore[attr-defined]
        return read(shards, source)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint_export, "read_slice", noted)
    checkpoint_export.export_checkpoint(shards, tmp_path / "model.safetensors", step=3)
    assert asked == sorted(asked)
    assert {name.rpartition("/")[2] for name in asked} == {"master"}
