"""Compiles ``kernels/`` into the library that ``native.py`` loads. Needs a C++ compiler and the standard library only.

``setup.py`` does it when the package is installed. ``python -m holdfast.optim.build_kernels`` does it again, after a
change of the sources or where the installation found no compiler.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "ISAS",
    "LIBRARY",
    "KernelsNotBuilt",
    "build",
    "compile_library",
    "digest",
    "find_compiler",
    "is_current",
    "known_to",
    "sources",
]

KERNELS = Path(__file__).parent / "kernels"
LIBRARY = KERNELS / "libholdfast_optim.so"  # beside its sources: in a package it would look like a Python module

_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
ISAS: dict[str, tuple[str, ...]] = {
    "portable": (),
    "avx2": ("-mavx2",),
    "avx512": _AVX512,
    "avx512vbmi": (*_AVX512, "-mavx512vbmi"),
}
"""Compiler flags of each instruction set, from slow to fast. ``portable`` is in every library."""
_DEFINED_BY = {"avx2": "__AVX2__", "avx512": "__AVX512DQ__", "avx512vbmi": "__AVX512VBMI__"}
"""What a compiler for x86-64 defines when it knows the flags."""

_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a fused multiply-add rounds once instead of twice: other bits on other processors
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",  # GCC 12 suspects its own avx512fintrin.h
    "-Wno-uninitialized",
    "-Wno-unknown-warning-option",  # Clang does not know the first of these
)
_COMPILERS = ("g++", "c++", "clang++")


class KernelsNotBuilt(Exception):
    """Says why in one line; ``details`` is what the compiler said."""

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.details = details


class _Unit(NamedTuple):
    """One object file."""

    name: str
    source: str
    flags: tuple[str, ...]


def build(target: Path, environment: Mapping[str, str], isas: Sequence[str] = tuple(ISAS)) -> list[str]:
    """Compile and put the library at ``target`` in one move: whoever reads or builds it too sees an old or a new one.

    Returns the instruction sets inside, which are those of ``isas`` that the compiler knows. Raises: KernelsNotBuilt,
    and then ``target`` is as it was.
    """
    target = target.absolute()  # compilers run among the sources
    compiler = find_compiler(environment)
    known = known_to(compiler, isas)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".kernels-", dir=target.parent) as directory:
            os.replace(compile_library(compiler, known, Path(directory)), target)
    except OSError as error:
        raise KernelsNotBuilt(f"{target} cannot be written: {error}") from error
    return known


def sources() -> list[Path]:
    return sorted((*KERNELS.glob("*.cpp"), *KERNELS.glob("*.h")))


def digest() -> str:
    """Of the sources and the flags: what a library holds as a string that was built from just these."""
    parts = [repr((_FLAGS, ISAS)).encode()]
    for path in sources():
        parts += [path.name.encode(), path.read_bytes()]
    return hashlib.sha256(b"".join(b"%d:%s" % (len(part), part) for part in parts)).hexdigest()[:32]


def is_current(library: Path) -> bool:
    """Whether it was built from the sources beside it. A library that is not there was not."""
    try:
        return digest().encode() in library.read_bytes()
    except OSError:
        return False


def find_compiler(environment: Mapping[str, str]) -> list[str]:
    """The command that ``CXX`` of the environment names, else the first one found. Raises: KernelsNotBuilt."""
    path = environment.get("PATH")
    if named := shlex.split(environment.get("CXX", "")):
        if not shutil.which(named[0], path=path):
            raise KernelsNotBuilt(f"the C++ compiler CXX={named[0]} was not found")
        return named
    for name in _COMPILERS:
        if found := shutil.which(name, path=path):
            return [found]
    raise KernelsNotBuilt(f"no C++ compiler was found ({', '.join(_COMPILERS)}, or the one that CXX names)")


def known_to(compiler: Sequence[str], isas: Sequence[str]) -> list[str]:
    """Those that the compiler can make code for, ``portable`` always, from slow to fast."""
    return [isa for isa in ISAS if isa == "portable" or (isa in isas and _knows(compiler, isa))]


def compile_library(compiler: Sequence[str], isas: Sequence[str], directory: Path) -> Path:
    """Objects and library go to ``directory``. Raises: KernelsNotBuilt."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda unit: _compile(compiler, unit, directory), _units(isas)))
    out = directory / LIBRARY.name
    command = [*compiler, "-shared", "-pthread", *map(str, objects), "-o", str(out)]
    if sys.platform == "darwin":
        _run([*command, "-Wl,-exported_symbol,_holdfast_*"], "linking")
        return out
    exports = directory / "exports.map"
    exports.write_text("{ global: holdfast_*; local: *; };\n")
    command += [f"-Wl,--version-script={exports}", "-Wl,-z,defs", "-Wl,--gc-sections"]
    try:
        _run([*command, "-static-libstdc++", "-static-libgcc"], "linking")
    except KernelsNotBuilt:  # some distributions have the static ones in a package of their own
        _run(command, "linking")
    return out


def _knows(compiler: Sequence[str], isa: str) -> bool:
    """Also no where the compiler makes code for another kind of processor than x86-64."""
    text = f"#if !defined(__x86_64__) || !defined({_DEFINED_BY[isa]})\n#error\n#endif\n"
    command = [*compiler, *ISAS[isa], "-fsyntax-only", "-x", "c++", "-"]
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True).returncode == 0
    except OSError:
        return False  # the compilation will say why


def _units(isas: Sequence[str]) -> list[_Unit]:
    """From slow to fast: of a function that two objects have, all of the library uses the first."""
    engines = [_Unit(isa, "engine.cpp", (f"-DKERNELS=kernels_{isa}", *ISAS[isa])) for isa in isas]
    has = [f"-DHOLDFAST_HAS_{isa.upper()}" for isa in isas if isa != "portable"]
    library = _Unit("library", "library.cpp", (f'-DHOLDFAST_SOURCES="{digest()}"', *has))
    return [_Unit("team", "team.cpp", ()), _Unit("codebook", "codebook.cpp", ()), library, *engines]


def _compile(compiler: Sequence[str], unit: _Unit, directory: Path) -> Path:
    out = directory / f"{unit.name}.o"
    _run([*compiler, *_FLAGS, *unit.flags, "-c", unit.source, "-o", str(out)], f"the compilation of {unit.name}")
    return out


def _run(command: Sequence[str], what: str) -> None:
    try:
        done = subprocess.run(command, cwd=KERNELS, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise KernelsNotBuilt(f"{command[0]} cannot be run: {error}") from error
    if done.returncode == 0:
        sys.stderr.write(done.stderr)  # warnings
        return
    said = [line for line in done.stderr.splitlines() if line.strip()]
    told = next((line for line in said if "error" in line), said[-1] if said else "it said nothing")
    raise KernelsNotBuilt(f"{what} with {command[0]} failed ({done.returncode}): {told.strip()}", done.stderr)


def main(isas: Sequence[str]) -> int:
    """Build in place, with all instruction sets or some. Returns the exit code."""
    if unknown := set(isas) - set(ISAS):
        sys.stderr.write(f"error: instruction set {min(unknown)!r} does not exist; there are {', '.join(ISAS)}\n")
        return 2
    start = time.monotonic()
    try:
        built = build(LIBRARY, os.environ, isas or tuple(ISAS))
    except KernelsNotBuilt as error:
        sys.stderr.write(f"{error.details}error: {error}\n")
        return 1
    sys.stdout.write(f"{LIBRARY}: {', '.join(built)}; built in {time.monotonic() - start:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
