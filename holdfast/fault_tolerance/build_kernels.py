"""Compiles ``kernels/`` into the library that ``staging.py`` loads. Needs a C++ compiler and the standard library only.

``setup.py`` does it when the package is installed. ``python -m holdfast.fault_tolerance.build_kernels`` does it again,
after a change of the sources or where the installation found no compiler.
"""

from __future__ import annotations

import sys
from pathlib import Path

from holdfast.native_build import NativeLibrary, main

__all__ = ["NATIVE"]

_KERNELS = Path(__file__).parent / "kernels"

NATIVE = NativeLibrary(
    path=_KERNELS / "libholdfast_staging.so",
    kernels=_KERNELS,
    isas=("portable", "avx2", "avx512"),
    absence="Snapshots will be copied by NumPy: slower, with the same results",
)

if __name__ == "__main__":
    sys.exit(main(NATIVE, sys.argv[1:]))
