"""Compiles a directory of C++ into one library that Python loads by ctypes. Needs a C++ compiler and nothing else.

Every library is made of the same parts: ``engine.cpp``, compiled once for each instruction set; ``library.cpp``, which
exports functions named ``holdfast_*`` and is told the digest of all sources; and whatever else there is, once. A
package has such a library and a command that builds it in a module ``build_kernels``. Headers that they share are in
``holdfast/kernels``.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "FLAGS_OF",
    "SHARED",
    "IsaChoice",
    "KernelsNotBuilt",
    "NativeLibrary",
    "compile_library",
    "find_compiler",
    "known_to",
    "main",
]

SHARED = Path(__file__).parent / "kernels"
"""Headers that are a part of every library."""

_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
FLAGS_OF: dict[str, tuple[str, ...]] = {
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


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """One library, its sources and what it is built for."""

    path: Path
    """Where it is built in place. Not named like a Python module, since it lies in a package."""
    kernels: Path
    """The directory of its sources."""
    isas: tuple[str, ...]
    """Instruction sets, from slow to fast."""
    absence: str
    """What is to be expected without it, for those who install it: a sentence."""

    def sources(self) -> list[Path]:
        own = sorted((*self.kernels.glob("*.cpp"), *self.kernels.glob("*.h")))
        return [*sorted(SHARED.glob("*.h")), *own]

    def digest(self) -> str:
        """Of the sources and the flags: what a library holds as a string that was built from just these."""
        parts = [repr((_FLAGS, {isa: FLAGS_OF[isa] for isa in self.isas})).encode()]
        for path in self.sources():
            parts += [path.name.encode(), path.read_bytes()]
        return hashlib.sha256(b"".join(b"%d:%s" % (len(part), part) for part in parts)).hexdigest()[:32]

    def is_current(self, built: Path | None = None) -> bool:
        """Whether it was built from the sources that are there. A library that is not there was not."""
        try:
            return self.digest().encode() in (built or self.path).read_bytes()
        except OSError:
            return False

    def load(self) -> ctypes.CDLL | str:
        """The library, or why it cannot be used."""
        if not self.path.exists():
            return f"{self.path} has not been built"
        if not self.is_current():
            return f"{self.path} was built from other sources"
        try:
            return ctypes.CDLL(str(self.path))
        except OSError as error:
            return f"{self.path} cannot be loaded ({error})"

    def usable(self, loaded: ctypes.CDLL | str) -> list[str]:
        """Instruction sets that both what :meth:`load` gave and this processor have, from slow to fast; none without
        the library, which numbers them in the same order."""
        if isinstance(loaded, str):
            return []
        return [name for number, name in enumerate(self.isas) if loaded.holdfast_is_supported(number)]

    def build(self, target: Path, environment: Mapping[str, str], isas: Sequence[str] = ()) -> list[str]:
        """Compile and put the library at ``target`` in one move: whoever reads or builds it too sees an old or a new
        one. With ``isas``, for no others of the library's instruction sets; ``portable`` is always there.

        Returns the instruction sets inside, which are those that the compiler knows. Raises: KernelsNotBuilt, and
        then ``target`` is as it was.
        """
        target = target.absolute()  # compilers run among the sources
        compiler = find_compiler(environment)
        known = known_to(compiler, [isa for isa in self.isas if isa in (isas or self.isas)])
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".kernels-", dir=target.parent) as directory:
                os.replace(compile_library(self, compiler, known, Path(directory)), target)
        except OSError as error:
            raise KernelsNotBuilt(f"{target} cannot be written: {error}") from error
        return known


class IsaChoice:
    """Which instruction set the calls of a library take: the best one, unless somebody insists on another."""

    def __init__(self, best: Callable[[], str | None]) -> None:
        """``best``: the fastest that library and processor have; None without the library."""
        self._best = best
        self._insisted: list[str | None] = []

    def current(self) -> str | None:
        """None: do without the library."""
        return self._insisted[-1] if self._insisted else self._best()

    @contextmanager
    def using(self, isa: str | None) -> Iterator[None]:
        """Inside, :meth:`current` is this one, in every thread. For tests and measurements."""
        self._insisted.append(isa)
        try:
            yield
        finally:
            self._insisted.pop()


class _Unit(NamedTuple):
    """One object file."""

    name: str
    source: str
    flags: tuple[str, ...]


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
    return [isa for isa in FLAGS_OF if isa == "portable" or (isa in isas and _knows(compiler, isa))]


def compile_library(library: NativeLibrary, compiler: Sequence[str], isas: Sequence[str], directory: Path) -> Path:
    """Objects and library go to ``directory``. Raises: KernelsNotBuilt."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda unit: _compile(library, compiler, unit, directory), _units(library, isas))
        objects = [str(path) for path in compiled]
    out = directory / library.path.name
    command = [*compiler, "-shared", "-pthread", *objects, "-o", str(out)]
    if sys.platform == "darwin":
        _run([*command, "-Wl,-exported_symbol,_holdfast_*"], directory, "linking")
        return out
    exports = directory / "exports.map"
    exports.write_text("{ global: holdfast_*; local: *; };\n")
    command += [f"-Wl,--version-script={exports}", "-Wl,-z,defs", "-Wl,--gc-sections"]
    try:
        _run([*command, "-static-libstdc++", "-static-libgcc"], directory, "linking")
    except KernelsNotBuilt:  # some distributions have the static ones in a package of their own
        _run(command, directory, "linking")
    return out


def _knows(compiler: Sequence[str], isa: str) -> bool:
    """Also no where the compiler makes code for another kind of processor than x86-64."""
    text = f"#if !defined(__x86_64__) || !defined({_DEFINED_BY[isa]})\n#error\n#endif\n"
    command = [*compiler, *FLAGS_OF[isa], "-fsyntax-only", "-x", "c++", "-"]
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True).returncode == 0
    except OSError:
        return False  # the compilation will say why


def _units(library: NativeLibrary, isas: Sequence[str]) -> list[_Unit]:
    """From slow to fast: of a function that two objects have, all of the library uses the first."""
    has = [f"-DHOLDFAST_HAS_{isa.upper()}" for isa in isas if isa != "portable"]
    flags = {"library": (f'-DHOLDFAST_SOURCES="{library.digest()}"', *has)}
    once = [path.stem for path in library.sources() if path.suffix == ".cpp" and path.stem != "engine"]
    engines = [_Unit(isa, "engine.cpp", (f"-DKERNELS=kernels_{isa}", *FLAGS_OF[isa])) for isa in isas]
    return [*(_Unit(name, f"{name}.cpp", flags.get(name, ())) for name in once), *engines]


def _compile(library: NativeLibrary, compiler: Sequence[str], unit: _Unit, directory: Path) -> Path:
    out = directory / f"{unit.name}.o"
    command = [*compiler, *_FLAGS, f"-I{SHARED}", *unit.flags, "-c", unit.source, "-o", str(out)]
    _run(command, library.kernels, f"the compilation of {unit.name}")
    return out


def _run(command: Sequence[str], directory: Path, what: str) -> None:
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise KernelsNotBuilt(f"{command[0]} cannot be run: {error}") from error
    if done.returncode == 0:
        sys.stderr.write(done.stderr)  # warnings
        return
    said = [line for line in done.stderr.splitlines() if line.strip()]
    told = next((line for line in said if "error" in line), said[-1] if said else "it said nothing")
    raise KernelsNotBuilt(f"{what} with {command[0]} failed ({done.returncode}): {told.strip()}", done.stderr)


def main(library: NativeLibrary, isas: Sequence[str]) -> int:
    """Build in place, with all instruction sets or some. Returns the exit code."""
    if unknown := set(isas) - set(FLAGS_OF):
        sys.stderr.write(f"error: instruction set {min(unknown)!r} does not exist; there are {', '.join(FLAGS_OF)}\n")
        return 2
    start = time.monotonic()
    try:
        built = library.build(library.path, os.environ, isas)
    except KernelsNotBuilt as error:
        sys.stderr.write(f"{error.details}error: {error}\n")
        return 1
    sys.stdout.write(f"{library.path}: {', '.join(built)}; built in {time.monotonic() - start:.0f} s\n")
    return 0
