"""Builds optimizers over one set of parameters, times their steps in turns, and prints what it found as a line of JSON.

``optim_step.py`` runs this file once for each combination of case, dtype, threads and company, so that neither a peer's
threads nor what a peer compiled is there when another is timed. Of Holdfast it needs ``holdfast.optim`` only.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import logging
import random
import time
import warnings
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import holdfast.optim
from holdfast.optim import native

__all__ = ["CASES", "FLOOR", "FUSED", "KERNELS", "OURS", "PEERS", "Found"]

FLOOR, IN_PLACE = "**floor: plain copy**", "in-place floor: the same reads and writes"
OURS, OURS_32, KERNELS = "**holdfast AdamW8bit**", "holdfast AdamW", "holdfast AdamW8bit, the call of the kernels alone"
FUSED, FOREACH = "torch AdamW fused", "torch AdamW foreach"
PEERS = {"bitsandbytes": "bitsandbytes AdamW8bit", "torchao": "torchao AdamW8bit"}

COMPANIES = {"torch": [IN_PLACE, FUSED, FOREACH, OURS_32], **{package: [name] for package, name in PEERS.items()}}
"""What is timed together, besides the floor and ours."""

TRAFFIC = {torch.float32: 16, torch.bfloat16: 10}
"""Bytes that one 8-bit update has to read and write per parameter: parameter twice, gradient, two codes twice."""

OTHER_BYTES = 128 << 20
"""Touched before each measurement, several times what the last-level cache holds."""

Step = Callable[[], object]


@dataclass(slots=True)
class Found:
    """What was measured of one way."""

    first_s: float
    """The first step, with the allocation of the state and whatever gets compiled."""
    state_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    """One step in each round; the same place in another way's list is the same round."""


def flat(millions: float) -> list[tuple[int, ...]]:
    """One tensor of whole blocks, because torchao keeps other sizes in 32 bits."""
    return [(round(millions * 1e6 / 256) * 256,)]


def gpt(millions: float) -> list[tuple[int, ...]]:
    """A decoder of 12 layers with biases and learned positions: 148 tensors, 98 of them below 4096 elements."""
    width = 512
    layer = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,)]
    layer += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    inner = 12 * sum(torch.Size(shape).numel() for shape in layer)
    vocabulary = max(round((millions * 1e6 - inner) / width) - 1024, 1024)
    return [(vocabulary, width), (1024, width), *layer * 12, (width,), (width,)]


def many(millions: float) -> list[tuple[int, ...]]:
    """Tensors of the smallest size that is kept in 8 bits."""
    return [(4096,)] * round(millions * 20)


def one(millions: float) -> list[tuple[int, ...]]:
    """One tensor with as many elements as the many have together."""
    return [(4096 * round(millions * 20),)]


CASES = {"flat": flat, "list": gpt, "many": many, "one": one}


def bare_ways(count: int, dtype: torch.dtype) -> dict[str, Step]:
    """The floor and the in-place floor for so many parameters."""
    size = count * TRAFFIC[dtype] // 2
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    param, grad = torch.zeros(count, dtype=dtype), torch.full((count,), 1e-3, dtype=dtype)
    codes = torch.zeros(2 * count, dtype=torch.uint8)
    return {
        FLOOR: lambda: target.copy_(source),
        IN_PLACE: lambda: (param.add_(grad), codes.add_(1)),
    }


def optimizer_of(name: str, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Raises: ImportError when it is not installed."""
    if name == FUSED:
        return torch.optim.AdamW(params, fused=True)
    if name == FOREACH:
        return torch.optim.AdamW(params, foreach=True)
    kind = {OURS: "AdamW8bit", OURS_32: "AdamW"}.get(name)
    if kind is not None:
        if kind not in holdfast.optim.__all__:
            raise ImportError(f"this Holdfast has no optimizer called {kind}")
        return getattr(holdfast.optim, kind)(params)
    if name == PEERS["bitsandbytes"]:
        from bitsandbytes.optim import AdamW8bit as TheirAdamW8bit
    else:
        from torchao.optim import AdamW8bit as TheirAdamW8bit
    return TheirAdamW8bit(params)


def parameters(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype, grads: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(s, generator=generator) * 0.02).to(dtype)) for s in shapes]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def kernel_call(optimizer: torch.optim.Optimizer) -> Step:
    """The last thing that a step does: one call of the library with a table of every tensor's addresses, which stay
    what they are here. Raises: ImportError without the library."""
    if not native.isas():
        raise ImportError("the C++ kernels are not built")
    library, calls = native._library(), []

    def noted(*arguments: Any) -> int:
        calls.append(arguments)
        return update(*arguments)

    tables, table_of, update = [], native._table, library.holdfast_update
    native._table = lambda rows: tables.append(table_of(rows)) or tables[-1]  # type: ignore[func-returns-value]
    library.holdfast_update = noted
    try:
        optimizer.step()
    finally:
        native._table, library.holdfast_update = table_of, update
    kept = [(array("q", table), array("f", coefficients)) for table, coefficients in tables]  # the next step's differ

    def step() -> None:
        for (table, coefficients), (isa, rule, _, count, _, options, threads) in zip(kept, calls, strict=True):
            numbers = table.buffer_info()[0], coefficients.buffer_info()[0]
            update(isa, rule, numbers[0], count, numbers[1], options, threads)

    return step


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of its tensors; memory that several share, such as a codebook, counts once."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    parts = [part for tensor in tensors for part in _plain_tensors(tensor)]
    return sum({part.data_ptr(): part.nbytes for part in parts}.values())


def _plain_tensors(tensor: Tensor) -> list[Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def timed(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def take_turns(ways: dict[str, Step], found: dict[str, Found], rounds: int) -> None:
    """Every way once in each round, in an order drawn anew, with caches filled by something else before."""
    other = torch.zeros(OTHER_BYTES, dtype=torch.uint8)
    for number in range(-1, rounds):  # the first is not counted
        for name in random.Random(number).sample(list(ways), len(ways)):
            other.add_(1)
            seconds = timed(ways[name])
            if number >= 0:
                found[name].seconds.append(seconds)


def measure(company: str, case: str, dtype: torch.dtype, millions: float, rounds: int) -> dict[str, Any]:
    shapes = CASES[case](millions)
    count = sum(torch.Size(shape).numel() for shape in shapes)
    generator = torch.Generator().manual_seed(1)
    grads = [(torch.randn(shape, generator=generator) * 1e-3).to(dtype) for shape in shapes]
    bare = bare_ways(count, dtype)
    ways = {FLOOR: bare[FLOOR]} | ({IN_PLACE: bare[IN_PLACE]} if IN_PLACE in COMPANIES[company] else {})
    found = {name: Found(timed(step)) for name, step in ways.items()}
    missing = {}
    for name in [OURS, *(way for way in COMPANIES[company] if way != IN_PLACE)]:
        try:
            optimizer = optimizer_of(name, parameters(shapes, dtype, grads))
        except ImportError as error:
            missing[name] = str(error)
            continue
        gc.collect()
        found[name] = Found(timed(optimizer.step))
        found[name].state_bytes, ways[name] = state_bytes(optimizer), optimizer.step
        if name == OURS and company == "torch":
            found[KERNELS], ways[KERNELS] = Found(0.0), kernel_call(optimizer)
    if company == "torch" or not missing:
        gc.disable()
        take_turns(ways, found, rounds)
    ways_found = {name: asdict(values) for name, values in found.items() if values.seconds}
    return {"tensors": len(shapes), "count": count, "ways": ways_found, "missing": missing, "versions": _versions()}


def _versions() -> dict[str, str]:
    known = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {package: known[package] for package in ("torch", *PEERS) if package in known}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("company", choices=COMPANIES)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--millions", type=float, default=50)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # torchao lists the GPU libraries that it could not load
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    print(json.dumps(measure(options.company, options.case, dtype, options.millions, options.rounds)))


if __name__ == "__main__":
    main()
