"""What a job takes along, against a directory on disk and Ray's own packing."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from holdfast.errors import ConfigurationError
from holdfast.launch.upload import SHIPPED, read_runtime_env, shadowing_names, size_problems


def _write(folder: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(size))


def test_the_files_are_those_that_ray_packs(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    from holdfast.launch.ray_jobs import uploaded_files

    code = tmp_path / "code"
    _write(
        code, {"a.py": 10, "pkg/b.py": 20, "pkg/big.bin": 30, "runs/x.log": 40, "deep/runs/y.log": 50, "skip/c.py": 60}
    )
    _write(code, {".git/objects/1": 70, "venv/lib.py": 80, "pkg/__pycache__/b.pyc": 90, "sub/z.tmp": 100})
    (code / ".gitignore").write_text("skip/\n")
    (code / "sub" / ".gitignore").write_text("*.tmp\n")
    environment = read_runtime_env(None)
    found = uploaded_files(code, environment.excludes)
    package = tmp_path / "package.zip"
    ray_own = [".git", ".venv", "venv", "__pycache__", *environment.excludes]
    create_package(str(code), package, include_gitignore=True, excludes=ray_own)
    with zipfile.ZipFile(package) as packed:
        assert found == {entry.filename: entry.file_size for entry in packed.infolist() if not entry.is_dir()}
    assert set(found) == {"a.py", "pkg/b.py", "deep/runs/y.log", ".gitignore", "sub/.gitignore"}


def test_too_large_an_upload_names_the_five_largest_files_and_the_way_out(tmp_path: Path) -> None:
    sizes = {f"f{n}.npy": n * 2**20 for n in range(1, 8)}
    assert size_problems(sizes, limit_bytes=28 * 2**20, folder=tmp_path) == [], "the limit itself is allowed"
    (problem,) = size_problems(sizes, limit_bytes=28 * 2**20 - 1, folder=tmp_path)
    assert "28.0 MiB in 7 files" in problem and "excludes" in problem and ".gitignore" in problem
    named = [f"f{n}.npy ({n}.0 MiB)" for n in (7, 6, 5, 4, 3)]
    assert ", ".join(named) in problem
    assert "f2.npy" not in problem


@pytest.mark.parametrize(
    ("paths", "shadowing"),
    [
        (["code.py", "train.py"], ["code.py"]),
        (["queue/__init__.py", "queue/x.py"], ["queue"]),
        (["queue/x.py"], []),  # a folder that is no package comes after the standard library
        (["mine/code.py"], []),  # not at the top
        (["random.txt", "json.yaml"], []),
        (["select.cpython-311-x86_64-linux-gnu.so"], ["select.cpython-311-x86_64-linux-gnu.so"]),
    ],
)
def test_names_that_python_would_import_instead_of_its_own(paths: list[str], shadowing: list[str]) -> None:
    assert shadowing_names(paths) == shadowing


def test_the_shipped_environment_leaves_time_for_saving_and_uploads_the_code_of_this_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    environment = read_runtime_env(None)
    assert environment.source == SHIPPED
    assert environment.env_vars == {"RAY_JOB_STOP_WAIT_TIME_S": "120"}
    assert environment.working_dir == tmp_path
    assert environment.warnings() == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("env_vars: {A: 120}", ["env_vars.A=120", 'write "120"']),
        ("excludes: runs", ["excludes='runs'", "list"]),
        ("- a", ["keys and values"]),
        ("working_dir: ./nowhere", ["nowhere", "must be a directory"]),
        ("a: [", ["cannot be read"]),
    ],
)
def test_a_runtime_environment_that_ray_would_refuse_later_is_refused_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("env.yaml").write_text(text)
    with pytest.raises(ConfigurationError) as refused:
        read_runtime_env(Path("env.yaml"))
    assert all(word in str(refused.value) for word in [*words, "env.yaml"])


def test_what_will_be_regretted_is_told(tmp_path: Path) -> None:
    file = tmp_path / "env.yaml"
    file.write_text("pip: [rich]\nworking_dir: s3://bucket/code.zip\n")
    environment = read_runtime_env(file)
    stop, packages = environment.warnings()
    assert "RAY_JOB_STOP_WAIT_TIME_S" in stop and "3 s" in stop
    assert "every node" in packages
    assert environment.working_dir is None, "it is somewhere else already"
