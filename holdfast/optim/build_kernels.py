"""Compiles ``kernels/`` into the library that ``native.py`` loads. Needs a C++ compiler and the standard library only.

``setup.py`` does it when the package is installed. ``python -m holdfast.optim.build_kernels`` does it again, after a
change of the sources or where the installation found no compiler.
"""

from __future__ import annotations

import sys
from pathlib import Path

from holdfast.native_build import NativeLibrary, main

__all__ = ["NATIVE"]

_KERNELS = Path(__file__).parent / "kernels"

NATIVE = NativeLibrary(
    path=_KERNELS / "libholdfast_optim.so",
    kernels=_KERNELS,
    isas=("portable", "avx2", "avx512", "avx512vbmi"),
    absence="The optimizer will take plain torch operations on CPUs: slower, with the same results",
)

if __name__ == "__main__":
    sys.exit(main(NATIVE, sys.argv[1:]))
