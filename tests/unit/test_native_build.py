"""The build of C++ libraries: what is in one and what is not, and what happens where there can be none."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast import native_build
from holdfast.fault_tolerance.build_kernels import NATIVE as STAGING
from holdfast.native_build import (
    SHARED,
    KernelsNotBuilt,
    NativeLibrary,
    compile_library,
    find_compiler,
    known_to,
    main,
)
from holdfast.optim.build_kernels import NATIVE as OPTIM

_ROOT = Path(__file__).parents[2]
_FUNCTION_OF = {OPTIM: "holdfast_update", STAGING: "holdfast_stage"}
_IS_OBJECT = "D", "R"
"""Kinds of nm for a constant object; a function would be T or W."""

_FAKE_COMPILER = """#!{python}
import sys
from pathlib import Path

args = sys.argv[1:]
if {lacks!r} in args:
    sys.exit("error: what is {lacks}?")
if "-fsyntax-only" not in args:
    out = args[args.index("-o") + 1]
    parts = [Path(arg).read_text() for arg in args if arg.endswith(".o") and arg != out]
    Path(out).write_text("".join([*parts, " ".join(args), chr(10)]))
"""
"""Its objects and libraries are the command lines they were made with."""


def _fake_compiler(directory: Path, lacks: str = "nothing") -> dict[str, str]:
    path = directory / f"c++-without{lacks}"
    path.write_text(_FAKE_COMPILER.format(python=sys.executable, lacks=lacks))
    path.chmod(0o755)
    return {"CXX": str(path)}


@pytest.fixture(scope="module", params=_FUNCTION_OF, ids=["optim", "staging"])
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    return request.param


@pytest.fixture(scope="module")
def compiled(library: NativeLibrary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real library and its objects, with two instruction sets where there are two."""
    try:
        compiler = find_compiler(os.environ)
    except KernelsNotBuilt as error:
        pytest.skip(str(error))
    return compile_library(library, compiler, known_to(compiler, ["avx2"]), tmp_path_factory.mktemp("kernels"))


def _symbols(path: Path, *options: str) -> dict[str, str]:
    """Name to kind, of what an object or library offers to others."""
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    command = ["nm", "--defined-only", "--extern-only", *options, str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: kind for _, kind, name in map(str.split, lines)}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_library_exports_its_own_functions_and_nothing_of_the_runtime_it_brings(
    library: NativeLibrary, compiled: Path
) -> None:
    names = _symbols(compiled, "--dynamic")
    assert _FUNCTION_OF[library] in names
    assert [name for name in names if not name.startswith("holdfast_")] == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_instruction_set_offers_one_symbol_so_that_no_linker_can_mix_two(compiled: Path) -> None:
    """A function that several objects offer is one function in the library, for a processor that it may not be on."""
    engines = [compiled.with_name(f"{isa}.o") for isa in native_build.FLAGS_OF]
    for path in filter(Path.exists, engines):
        ((name, kind),) = _symbols(path).items()
        assert name == f"kernels_{path.stem}" and kind in _IS_OBJECT


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_library_says_which_sources_it_was_built_from(library: NativeLibrary, compiled: Path) -> None:
    loaded = ctypes.CDLL(str(compiled))
    loaded.holdfast_sources.restype = ctypes.c_char_p
    assert loaded.holdfast_sources().decode() == library.digest()
    assert [other for other in _FUNCTION_OF if other.is_current(compiled)] == [library]


def test_a_change_of_a_source_of_its_name_or_of_a_flag_makes_a_library_outdated(
    library: NativeLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = tmp_path / "lib.so"
    library.build(built, _fake_compiler(tmp_path))
    assert library.is_current(built)
    digests = {library.digest()}
    shutil.copytree(library.kernels, tmp_path / "kernels")
    library = replace(library, kernels=tmp_path / "kernels")
    assert library.is_current(built) and SHARED / "dispatch.h" in library.sources()
    header = tmp_path / "kernels" / "abi.h"
    header.write_bytes(header.read_bytes() + b"\n")
    digests.add(library.digest())
    header.rename(header.with_name("abj.h"))
    digests.add(library.digest())
    monkeypatch.setitem(native_build.FLAGS_OF, "avx2", ("-mavx2", "-mfma"))
    digests.add(library.digest())
    assert len(digests) == 4
    assert not library.is_current(built)


def test_a_library_that_is_missing_outdated_or_broken_is_not_loaded_and_it_says_which(tmp_path: Path) -> None:
    library = replace(STAGING, path=tmp_path / "lib.so")
    assert not library.is_current() and library.load() == f"{library.path} has not been built"
    library.path.write_text("of other times")
    assert not library.is_current() and library.load() == f"{library.path} was built from other sources"
    library.build(library.path, _fake_compiler(tmp_path))
    assert library.is_current() and f"{library.path} cannot be loaded (" in str(library.load())


def test_instruction_sets_are_usable_where_library_and_processor_have_them(library: NativeLibrary) -> None:
    class Loaded(ctypes.CDLL):
        def __init__(self) -> None: ...

        holdfast_is_supported = staticmethod(lambda number: number in (0, 2))

    assert library.usable(Loaded()) == ["portable", "avx512"]
    assert library.usable("it is not there") == []


def test_flags_that_the_compiler_does_not_know_leave_their_instruction_set_out(tmp_path: Path) -> None:
    built = tmp_path / "lib.so"
    assert OPTIM.build(built, _fake_compiler(tmp_path, lacks="-mavx512vbmi")) == ["portable", "avx2", "avx512"]
    assert OPTIM.build(built, _fake_compiler(tmp_path, lacks="-mavx512f")) == ["portable", "avx2"]
    made_with = built.read_text()
    assert "kernels_avx2" in made_with and "HOLDFAST_HAS_AVX2" in made_with and "AVX512" not in made_with


def test_instruction_sets_can_be_chosen_and_portable_is_always_there(tmp_path: Path) -> None:
    assert OPTIM.build(tmp_path / "lib.so", _fake_compiler(tmp_path), ["avx512"]) == ["portable", "avx512"]


def test_a_library_is_built_for_its_own_instruction_sets(library: NativeLibrary, tmp_path: Path) -> None:
    environment = _fake_compiler(tmp_path)
    assert library.build(tmp_path / "lib.so", environment) == list(library.isas)
    rest = ["avx512vbmi"] if library is OPTIM else []
    assert library.build(tmp_path / "lib.so", environment, ["avx512vbmi"]) == ["portable", *rest]


def test_every_source_is_compiled_once_and_the_engine_for_each_instruction_set(
    library: NativeLibrary, tmp_path: Path
) -> None:
    library.build(tmp_path / "lib.so", _fake_compiler(tmp_path))
    compiled = [line.split(" -c ")[1].split()[0] for line in (tmp_path / "lib.so").read_text().splitlines()[:-1]]
    once = sorted(path.name for path in library.kernels.glob("*.cpp") if path.name != "engine.cpp")
    assert compiled == [*once, *["engine.cpp"] * len(library.isas)]


def test_a_library_takes_the_place_of_another_in_one_move(tmp_path: Path) -> None:
    """A process that has the old one loaded keeps it whole."""
    built = tmp_path / "new" / "lib.so"
    environment = _fake_compiler(tmp_path)
    STAGING.build(built, environment, ["portable"])
    with built.open() as old:
        STAGING.build(built, environment, ["avx2"])
        assert "avx2" not in old.read()
    assert "avx2" in built.read_text()
    assert os.listdir(built.parent) == ["lib.so"]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"PATH": "/nowhere"}, r"no C\+\+ compiler was found \(g\+\+, c\+\+, clang\+\+, or the one that CXX names\)"),
        ({"PATH": "/nowhere", "CXX": "my-c++ -m64"}, r"the C\+\+ compiler CXX=my-c\+\+ was not found"),
        ({"CXX": shutil.which("false")}, r"the compilation of \w+ with \S+false failed \(1\): it said nothing"),
    ],
    ids=["none", "missing", "failing"],
)
def test_without_a_working_compiler_it_says_why_and_leaves_what_was_there(
    environment: dict[str, str], says: str, tmp_path: Path
) -> None:
    built = tmp_path / "lib.so"
    built.write_text("old")
    with pytest.raises(KernelsNotBuilt, match=says):
        STAGING.build(built, environment)
    assert built.read_text() == "old"
    assert os.listdir(tmp_path) == ["lib.so"]


def test_a_compiler_is_quoted_on_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(KernelsNotBuilt, match=r"failed \(1\): error: what is -fPIC\?$") as caught:
        STAGING.build(tmp_path / "lib.so", _fake_compiler(tmp_path, lacks="-fPIC"))
    assert caught.value.details == "error: what is -fPIC?\n"


def test_without_static_runtime_libraries_it_links_the_shared_ones(tmp_path: Path) -> None:
    STAGING.build(tmp_path / "lib.so", _fake_compiler(tmp_path, lacks="-static-libstdc++"))
    assert "-shared" in (tmp_path / "lib.so").read_text()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KernelsNotBuilt, match=r"/file/lib\.so cannot be written: "):
        STAGING.build(tmp_path / "file" / "lib.so", _fake_compiler(tmp_path))


def test_the_command_builds_in_place_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = replace(OPTIM, path=tmp_path / "lib.so")
    monkeypatch.setenv("CXX", _fake_compiler(tmp_path)["CXX"])
    assert main(library, []) == 0
    assert f"{library.path}: portable, avx2, avx512, avx512vbmi; built in" in capsys.readouterr().out
    monkeypatch.setenv("CXX", "nowhere")
    assert main(library, []) == 1
    assert capsys.readouterr().err == "error: the C++ compiler CXX=nowhere was not found\n"
    assert main(library, ["avx3"]) == 2
    assert "'avx3' does not exist; there are portable, avx2" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["optim", "fault_tolerance"])
def test_each_part_has_the_command(part: str) -> None:
    command = [sys.executable, "-m", f"holdfast.{part}.build_kernels", "avx3"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "'avx3' does not exist" in done.stderr


def _wheel(directory: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Made of a copy of the sources, without pip and its isolation."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(_ROOT / name, directory)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(_ROOT / "holdfast", directory / "holdfast", ignore=ignored, dirs_exist_ok=True)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel"]
    environment = {**os.environ, "HOLDFAST_REQUIRE_KERNELS": "", **environment}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)


def test_a_wheel_is_for_one_platform_with_the_library_and_for_all_without(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    assert _wheel(tmp_path, _fake_compiler(tmp_path)).returncode == 0
    (wheel,) = (tmp_path / "dist").iterdir()
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    for library in _FUNCTION_OF:
        kernels = library.kernels.relative_to(_ROOT)
        assert {str(kernels / name) for name in (library.path.name, "engine.cpp", "abi.h")} <= names
    assert "holdfast/kernels/dispatch.h" in names
    wheel.unlink()

    without = _wheel(tmp_path, {"CXX": "nowhere"})  # what the first build has left is there
    assert without.returncode == 0
    assert "CXX=nowhere was not found. The optimizer will take plain torch operations" in without.stderr
    assert "CXX=nowhere was not found. Snapshots will be copied by NumPy" in without.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")] == []


def test_a_wheel_that_has_to_have_the_library_is_not_made_without(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    done = _wheel(tmp_path, {"CXX": "nowhere", "HOLDFAST_REQUIRE_KERNELS": "1"})
    assert done.returncode != 0
    assert "HOLDFAST_REQUIRE_KERNELS=1, but the C++ compiler CXX=nowhere was not found" in done.stderr
    assert not (tmp_path / "dist").exists()
