"""torchao's step needs a C++ compiler on the machine that trains.

One step with an empty PATH and no CXX, as in a container without build tools.
"""

from __future__ import annotations

import os
import tempfile

import torch
from ranks import refusal
from steps import after
from verdict import Finding, Kind, conclude, known, ours


def error_of(kind: Kind) -> str:
    os.environ.pop("CXX", None)
    with tempfile.TemporaryDirectory() as empty:
        os.environ["PATH"] = empty
        return refusal(lambda: after(kind, torch.zeros(64, 256), [torch.randn(64, 256)]))


def theirs() -> Finding:
    from torchao.optim import AdamW8bit

    return known(error_of(AdamW8bit), "InvalidCxxCompiler", "steps")


def own() -> Finding:
    error = error_of(ours("AdamW8bit"))
    return Finding(error or "steps", bool(error))


if __name__ == "__main__":
    conclude(theirs, own)
