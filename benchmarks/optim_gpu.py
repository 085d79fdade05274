"""What share of a GPU's copy bandwidth does a step of the 8-bit AdamW reach, and its peers?

An 8-bit update reads the parameter, its gradient and two codes and writes all but the gradient: 16 bytes per float32
parameter, 10 with bfloat16. The floor is a copy_ on the device that reads and writes as many bytes in all; a share is
floor's time over the step's, of the same round. The ways take turns in an order drawn anew each round, timed by CUDA
events from an idle device, so that a step which the host cannot issue fast enough shows it; the device's cache is
overwritten before each. Peers that are not installed are named and left out. Needs CUDA: exit status 2 without it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import random
import sys
from collections.abc import Callable, Sequence

import torch
from optim_peers import CASES, FUSED, OURS, PEERS, TRAFFIC, optimizer_of
from record import spread, table, write_record
from torch import Tensor

from holdfast.optim.ops import engine_for

FLOOR = "**floor: copy on the device**"
OTHER_BYTES = 256 << 20
"""Written before each measurement, several times what the device's cache holds."""

Step = Callable[[], object]


def floor(count: int, dtype: torch.dtype) -> Step:
    source = torch.ones(count * TRAFFIC[dtype] // 2, dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, grads: Sequence[Tensor]) -> list[Tensor]:
    params = [torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype) * 0.02) for shape in shapes]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def ways_of(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, missing: set[str]) -> dict[str, Step]:
    """The floor and a step of every optimizer that is there, all with the same gradients."""
    grads = [torch.randn(shape, device="cuda", dtype=dtype) * 1e-3 for shape in shapes]
    ways = {FLOOR: floor(sum(grad.numel() for grad in grads), dtype)}
    for name in (OURS, FUSED, *PEERS.values()):
        try:
            ways[name] = optimizer_of(name, parameters(shapes, dtype, grads)).step
        except ImportError as error:
            missing.add(f"{name} ({error})")
    return ways


def timed(step: Step, other: Tensor) -> float:
    """Seconds from the first work of a step to its last."""
    other.add_(1)
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def take_turns(ways: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of every way; the same place is the same round. Two rounds before that are not counted: they compile."""
    other = torch.zeros(OTHER_BYTES, dtype=torch.uint8, device="cuda")
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-2, rounds):
        for name in random.Random(number).sample(list(ways), len(ways)):
            seconds = timed(ways[name], other)
            if number >= 0:
                found[name].append(seconds)
    return found


def section(case: str, dtype: torch.dtype, options: argparse.Namespace, missing: set[str]) -> str:
    shapes = CASES[case](options.millions)
    count = sum(torch.Size(shape).numel() for shape in shapes)
    found = take_turns(ways_of(shapes, dtype, missing), options.rounds)
    gc.collect()
    torch.cuda.empty_cache()
    lines = []
    for name, seconds in found.items():
        shares = [100 * floor_s / s for floor_s, s in zip(found[FLOOR], seconds, strict=True)]
        rates = [TRAFFIC[dtype] * count / s / 1e9 for s in seconds] if name != FUSED else []
        lines.append(
            [name, spread([1e6 * s for s in seconds], 0), spread(rates, 0) if rates else "", spread(shares, 1)]
        )
    columns = ["way", "µs: median (quartiles)", "GB/s of an 8-bit update's bytes", "% of the copy's speed"]
    return f"## {case}, {dtype}: {count / 1e6:.1f} M parameters in {len(shapes)} tensors\n\n{table(columns, lines)}"


def machine() -> str:
    engine = type(engine_for(torch.device("cuda", torch.cuda.current_device()))).__name__
    versions = []
    for package in ("triton", *PEERS):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    found = ", ".join([f"CUDA {torch.version.cuda}", *versions])
    return f"{torch.cuda.get_device_name()}, {found}; holdfast updates with {engine}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["flat", "list"])
    parser.add_argument("--millions", type=float, default=200, help="parameters of a case")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("optim_gpu.py measures on a CUDA device, and torch finds none here.", file=sys.stderr)
        sys.exit(2)
    missing: set[str] = set()
    dtypes = (torch.float32, torch.bfloat16)
    parts = [str(__doc__), machine()]
    parts += [section(case, dtype, options, missing) for case in options.cases for dtype in dtypes]
    parts += [f"Left out: {name}." for name in sorted(missing)]
    hardware = torch.cuda.get_device_name().lower().replace(" ", "-")
    write_record("optim_gpu", "Optimizer steps on a GPU", "\n\n".join(parts), hardware=hardware)


if __name__ == "__main__":
    main()
