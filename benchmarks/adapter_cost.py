"""What do MoRA's bank and the paging of Brainstacks cost?

All ways take turns in an order drawn anew each round; ratios are of the same round. One thread, fp32.

- Forward and backward of one linear layer, gradient of its input included, with LoRA of rank k, which is MoRA's number
  of active atoms; with MoRA in its eighth task, seven of them frozen, r atoms a task, k = 2r of them active; with one
  LoRA as large as the whole bank. The responses of MoRA are those of the whole bank, which no top-k makes cheaper. Bar:
  MoRA / LoRA of rank k at most 2.
- A forward pass of several layers with all Brainstacks acting: from a list of their tensors, which is the floor;
  through a pager that holds all pages, which are checked when they are read, here before; and as the model's own
  tasks, whose rows are copied out of one tensor in every pass. Bar: paged / floor below 1.05.
- What a process keeps for a library of more and more stacks, of which one acts at a time: all of them, or a pager of a
  budget of two stacks. Bytes of live tensors between passes, base left out, and the most that the pager ever held.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from memory import tensor_bytes
from record import quartiles, ratios, spread, table, write_record
from torch import nn

from holdfast.adapters import Method, adapters_of, create_method, finish_task, inject, start_task, using_tasks
from holdfast.adapters.methods.brainstacks import Brainstacks, Stack, add_stack, page_stacks, stack_digest

TASKS = 8
LAYERS = 4
_BARE, _SMALL, _LARGE, _MORA = "no adapter", "LoRA of rank k", "LoRA of the bank's rank", "MoRA, 8 tasks"
_LISTED, _PAGED, _OWN, _OFF = "listed", "paged, warm", "the model's own", "base"


def rounds_of(ways: Mapping[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each way in each round: the fastest of its repeats; the first two rounds do not count."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-2, rounds):
        for name in random.Random(number).sample(list(ways), len(ways)):
            times = []
            for _ in range(repeats):
                started = time.perf_counter()
                ways[name]()
                times.append(time.perf_counter() - started)
            if number >= 0:
                found[name].append(min(times))
    return found


def compare(found: Mapping[str, Sequence[float]], other: str) -> str:
    rows = [
        [name, spread([1000 * value for value in values]), spread(ratios(values, found[other]), 3)]
        for name, values in found.items()
    ]
    return table(["way", "ms: median (quartiles)", f"/ {other}"], rows)


# -- MoRA -------------------------------------------------------------------------------------------------------------


def adapted(width: int, method: Method | None, tasks: int = 1) -> nn.Sequential:
    """A frozen linear layer in the last of so many tasks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width, bias=False))
    model.requires_grad_(False)
    if method is not None:
        inject(model, method)
        for number in range(tasks):
            start_task(model, f"task {number}")
            with torch.no_grad():
                model[0].current["up"].normal_(0, 0.01)
            if number < tasks - 1:
                finish_task(model)
    return model.train()


def forward_backward(model: nn.Module, tokens: int, width: int) -> None:
    x_PD = torch.ones(tokens, width).cumsum(0).sin_().requires_grad_()
    model(x_PD).sum().backward()


def mora(width: int, tokens: int, rank: int, rounds: int) -> str:
    k, bank = 2 * rank, TASKS * rank
    models = {
        _SMALL: adapted(width, create_method("lora", {"rank": k})),
        _MORA: adapted(width, create_method("mora", {"rank": rank, "top_k": k}), TASKS),
        _LARGE: adapted(width, create_method("lora", {"rank": bank})),
        _BARE: adapted(width, None),
    }
    ways = {name: partial(forward_backward, model, tokens, width) for name, model in models.items()}
    found = rounds_of(ways, rounds, 3)
    ratio = quartiles(ratios(found[_MORA], found[_SMALL]))[1]
    title = f"## MoRA: width {width}, {tokens} tokens, r = {rank}, k = {k}, bank of {bank}, {rounds} rounds"
    return f"{title}\n\nBar, at most 2: {ratio:.2f}, {'held' if ratio <= 2 else 'missed'}.\n\n{compare(found, _SMALL)}"


# -- paging -----------------------------------------------------------------------------------------------------------


def layered(width: int, rank: int) -> nn.Sequential:
    """A frozen model that is to have stacks."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))
    model.requires_grad_(False)
    inject(model, Brainstacks(rank=rank, experts=4, top_k=2))
    return model.eval()


def with_stacks(width: int, rank: int, count: int, library: Path) -> nn.Sequential:
    """All of them in memory, and in the library."""
    model, lineage = layered(width, rank), dict[str, str]()
    for number in range(count):
        domain = f"domain{number}"
        task = f"{domain}/1"
        start_task(model, task)
        with torch.no_grad():
            for layer in adapters_of(model).layers.values():
                layer.current["up"].normal_(0, 0.01)
        finish_task(model)
        digest = stack_digest(model, task)
        add_stack(library, model, Stack(domain, 1, dict(lineage), digest, 0.0, 0.0, 0, 0.0, "never trained"))
        lineage[task] = digest
    return model


def list_stacks(model: nn.Module, owner: nn.Module) -> None:
    """Give a model without tasks the finished ones of another."""
    adapters, others = adapters_of(model), adapters_of(owner)
    adapters.tasks[:] = others.tasks
    for name, layer in adapters.layers.items():
        layer.source = [others.layers[name].task_rows(number) for number in range(len(others.tasks))]


@torch.no_grad()
def forward(model: nn.Module, x_PD: torch.Tensor, weights: Mapping[str, float]) -> torch.Tensor:
    with using_tasks(model, weights=weights):
        found: torch.Tensor = model(x_PD)
    return found


def paging(width: int, tokens: int, rank: int, count: int, rounds: int) -> str:
    x_PD = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder)
        resident, listed, paged = with_stacks(width, rank, count, library), layered(width, rank), layered(width, rank)
        list_stacks(listed, resident)
        everything = dict.fromkeys(adapters_of(resident).tasks, 1.0)
        with page_stacks(paged, library, budget_bytes=1 << 32) as pager:
            is_equal = torch.equal(forward(paged, x_PD, everything), forward(resident, x_PD, everything))
            ways = {
                _LISTED: partial(forward, listed, x_PD, everything),
                _PAGED: partial(forward, paged, x_PD, everything),
                _OWN: partial(forward, resident, x_PD, everything),
                _OFF: partial(forward, resident, x_PD, {}),
            }
            misses = pager.stats.misses
            found = rounds_of(ways, rounds, 3)
            read = pager.stats.misses - misses
    over = 100 * (quartiles(ratios(found[_PAGED], found[_LISTED]))[1] - 1)
    title = f"## Paging: {count} stacks of 4 × rank {rank}, {LAYERS} layers of width {width}, {tokens} tokens"
    told = f"Outputs {'equal' if is_equal else 'NOT equal'} to the bit; {read} pages read while it was timed."
    verdict = f"Bar, below 5 %: {over:+.1f} %, {'held' if over < 5 else 'missed'}."
    return f"{title}, {rounds} rounds\n\n{told} {verdict}\n\n{compare(found, _LISTED)}"


def kept(width: int, rank: int, count: int) -> list[object]:
    """A row of the table of memory."""
    x_PD, most = torch.ones(1, width), 0
    with tempfile.TemporaryDirectory() as folder:
        library, before = Path(folder), tensor_bytes()
        model = with_stacks(width, rank, count, library)
        base = sum(weight.nbytes for weight in model.parameters())
        whole, tasks = tensor_bytes() - before - base, list(adapters_of(model).tasks)
        del model
        paged = layered(width, rank)
        with page_stacks(paged, library, budget_bytes=2 * whole // count) as pager:
            for task in tasks * 2:
                forward(paged, x_PD, {task: 1.0})
                most = max(most, tensor_bytes() - before - base)
            stats = pager.stats
    sizes = [f"{size / 1e6:.2f}" for size in (whole, most, stats.peak_bytes)]
    return [count, *sizes, stats.misses + stats.read_ahead]


def growth(width: int, rank: int, counts: Sequence[int]) -> str:
    rows = [kept(width, rank, count) for count in counts]
    columns = ["stacks", "in memory, MB", "paged, MB", "most that the pager held, MB", "pages read"]
    return f"## Memory against the number of stacks\n\nEvery stack acts twice, in turns.\n\n{table(columns, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="measurements of every way")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 64, 512], help="of a pass")
    parser.add_argument("--rank", type=int, default=8, help="of a task, and of an expert")
    options = parser.parse_args()
    torch.set_num_threads(1)
    width, rank, rounds = options.width, options.rank, options.rounds
    sections = [mora(width, tokens, rank, rounds) for tokens in options.tokens]
    sections += [paging(width, tokens, rank, TASKS, rounds) for tokens in options.tokens]
    sections.append(growth(width, rank, (2, 4, 8, 16)))
    write_record("adapter_cost", "What adapters cost, one thread", "\n\n".join([str(__doc__), *sections]))


if __name__ == "__main__":
    main()
