"""A curriculum on disk, and what is printed of it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.errors import ConfigurationError
from holdfast.launch.adapt_words import curricula_table, matrix
from holdfast.launch.cli import main
from holdfast.launch.curriculum import Curriculum, Learned, Record, find_curriculum, list_curricula

RECORD = Record(model={"d_model": 8}, adapter={"method": "mora", "options": {"rank": 2}}, base="b" * 64, base_bytes=99)


def learned(task: str, before: float, **bits: float) -> Learned:
    return Learned(
        task=task,
        domain=task.partition(".")[0],
        text=f"/text/{task}",
        directory=f"tasks/{task}",
        digest="d" * 64,
        size_bytes=1000,
        base_bits=before + 1,
        before_bits=before,
        bits=bits,
    )


@pytest.fixture
def curriculum(tmp_path: Path) -> Curriculum:
    (tmp_path / "project" / "school").mkdir(parents=True)
    return Curriculum(tmp_path / "project" / "school")


def test_what_is_written_is_read_and_damage_is_told(curriculum: Curriculum) -> None:
    curriculum.write(RECORD)
    record = curriculum.add(RECORD, learned("code", 3.0, code=2.0))
    assert curriculum.record() == replace(record, learned=list(record.learned))
    file = curriculum.path / "curriculum.json"
    file.write_text(file.read_text().replace("3.0", "1.0"))
    with pytest.raises(ConfigurationError, match="does not match its own digest"):
        curriculum.record()


def test_the_base_is_stored_once_under_its_digest(
    curriculum: Curriculum, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model.safetensors"
    source.write_bytes(b"weights")
    kept = curriculum.keep_base(source, "a" * 64)
    assert kept == curriculum.keep_base(source, "a" * 64) == curriculum.brick("a" * 64)
    assert kept.stat().st_ino == source.stat().st_ino

    def refuse(*_: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refuse)
    copied = curriculum.keep_base(source, "c" * 64)
    assert copied.read_bytes() == b"weights"
    assert copied.stat().st_ino != source.stat().st_ino
    assert len(list(copied.parent.iterdir())) == 2


def test_a_task_is_there_whole_or_not_at_all(
    curriculum: Curriculum, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "adapter"
    source.mkdir()
    (source / "adapter.json").write_text("{}")

    def fail(path: Path, data: bytes) -> None:
        path.write_bytes(data[:1])
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr("holdfast.launch.curriculum.write_whole", fail)
        with pytest.raises(OSError, match="disk full"):
            curriculum.keep_task(source, "code", "e" * 64)
    assert list((curriculum.path / "tasks").iterdir()) == []
    kept = curriculum.keep_task(source, "code", "e" * 64)
    assert (curriculum.path / kept / "adapter.json").read_text() == "{}"
    assert curriculum.keep_task(source, "code", "e" * 64) == kept


def test_curricula_are_found_by_name_by_directory_and_by_age(curriculum: Curriculum, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="none"):
        find_curriculum(None, tmp_path)
    curriculum.write(RECORD)
    other = Curriculum(tmp_path / "project" / "later")
    other.path.mkdir()
    other.write(RECORD)
    os.utime(curriculum.path / "curriculum.json", (1, 1))
    assert list_curricula(tmp_path) == [other, curriculum]
    assert find_curriculum(None, tmp_path) == other
    assert find_curriculum("school", tmp_path) == find_curriculum(str(curriculum.path), tmp_path) == curriculum
    with pytest.raises(ConfigurationError, match="'scool' is not one of those"):
        find_curriculum("scool", tmp_path)


def test_two_teachers_do_not_teach_at_once(curriculum: Curriculum) -> None:
    with curriculum.lock(), pytest.raises(ConfigurationError), curriculum.lock():
        pass


def test_the_matrix_and_its_sums() -> None:
    tasks = [
        learned("code", 3.0, code=2.0),
        learned("law", 4.0, code=2.5, law=3.0),
        learned("sums", 2.0, code=2.6, law=3.5, sums=1.0),
    ]
    told = matrix(replace(RECORD, learned=tasks)).splitlines()
    assert told[0].split() == ["bits", "per", "byte", "code", "law", "sums"]
    assert told[1].split() == ["base", "4.000", "5.000", "3.000"]
    assert told[2].split() == ["after", "code", "2.000"]
    assert told[4].split() == ["after", "sums", "2.600", "3.500", "1.000"]
    assert "2.367" in told[5]  # (2.6 + 3.5 + 1.0) / 3
    assert "+0.550" in told[6]  # (2.6 - 2.0 + 3.5 - 3.0) / 2
    assert "3 tasks 3.0 kB" in told[7]


def test_a_dropped_round_is_listed_and_not_counted(curriculum: Curriculum) -> None:
    kept, dropped = learned("code.1", 3.0, code=2.0), replace(learned("code.2", 2.0, code=2.1), directory="")
    record = replace(RECORD, learned=[kept, dropped])
    assert "code.2" not in matrix(record)
    assert "dropped" in curricula_table(curriculum, record)
    assert record.kept == [kept]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["adapter.base=/b"], "domains is empty"),
        (["domains=[/nowhere]", "adapter.base=/b"], "/nowhere does not exist"),
        (["domains=[/tmp,tmp:/tmp]", "adapter.base=/b"], "'tmp' is there twice"),
        (["domains=[/tmp]"], "adapter.base is empty"),
        (["domains=[/tmp]", "adapter.base=/b", "adapter.method=morra"], "'morra' does not exist"),
        (["domains=[/tmp]", "adapter.base=/b", "parallel.zero_stage=3"], "the base is whole on every rank"),
        (["domains=[/tmp]", "adapter.base=/b"], "'/b' is no file"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    words: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapt", *words, f"root={tmp_path}"]) == 2
    assert problem in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_words_it_tells_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapt"]) == 2
    assert main(["adapt", "--help"]) == 0
    assert "holdfast adapt domains=" in capsys.readouterr().out
