"""What do continual adapters forget, and what does that buy? MoRA, Brainstacks and their rivals at toy scale.

A small byte-level decoder is trained on mixed text, then adapted to four kinds of text, one after the other, in two
orders. Every method of one seed begins with the same base and sees the same batches for as many steps, through one
training loop (`holdfast.adapters.training`); each has its own sweep of learning rates. Numbers are means over seeds ±
half the 95 % interval (Student's t), in bits per byte of text that is never trained on. *Mean diagonal*: of every
domain right after its own task. *Forgetting*: what the earlier domains have lost since, in the end. *Final*: all
domains in the end. *Drift*: loss of text that is no task's, against the base. Of 20 intervals one misses its value by
chance, and claims are not corrected for their number. A model this small says how large effects are *here*.

Differences from the papers: no model of theirs, no task of theirs, a base that knows a little of every domain. Methods
that choose their adapters see the first half of each window, and the second half counts, for all methods alike. What
is "told" the domain or the losses is a bound, not a method.

`--quick` takes some forty minutes on one core, `--million` two hours, the default many. With `--results FILE`
finished parts are kept there, and an interrupted study goes on. Plots are written if
matplotlib is there (pip install matplotlib).
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import adapt_frontier
import adapt_mora
import adapt_stacks
import torch
from adapt_runs import Scale, Study, World
from adapt_text import read_texts
from adapt_ways import Found, find
from record import write_record
from study import Memo, Section, claims_table, counts, judge

__all__ = ["EXPERIMENTS", "FULL", "MILLION", "QUICK", "body", "plot", "run"]

QUICK = Scale(
    name="quick",
    d_model=64,
    layers=2,
    d_ff=160,
    sequence=64,
    sequences=4,
    seeds=4,
    base_steps=1000,
    base_lr=3e-3,
    steps=120,
    warm_up=10,
    rank=4,
    rates=(1e-3, 2e-3, 4e-3, 8e-3),
    windows=32,
    router_windows=32,
    router_width=64,
    router_epochs=32,
    boost_steps=80,
    rounds=3,
    boost_rates=(8e-3,),
    directions=8,
)
MILLION = replace(
    QUICK,
    name="million",
    d_model=160,
    layers=3,
    d_ff=432,
    seeds=3,
    base_steps=2500,
    base_lr=2e-3,
    steps=150,
    boost_steps=100,
    rates=(5e-4, 1e-3, 2e-3, 4e-3),
    boost_rates=(4e-3, 8e-3),
)
FULL = Scale(
    name="full",
    d_model=160,
    layers=4,
    d_ff=432,
    sequence=128,
    sequences=8,
    seeds=6,
    base_steps=4000,
    base_lr=2e-3,
    steps=500,
    warm_up=25,
    rank=8,
    rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    windows=128,
    router_windows=128,
    router_width=128,
    router_epochs=16,
    boost_steps=300,
    rounds=3,
    boost_rates=(1e-3, 2e-3, 4e-3),
    directions=16,
)

EXPERIMENTS: Mapping[str, Callable[[Study], Section]] = {
    "frontier": adapt_frontier.frontier,
    "routing": adapt_mora.routing,
    "modes": adapt_stacks.modes,
    "boosting": adapt_stacks.boosting,
    "null_space": adapt_stacks.null_space,
}


def run(study: Study, names: Sequence[str]) -> dict[str, Section]:
    return {name: EXPERIMENTS[name](study) for name in EXPERIMENTS if name in names}


def body(study: Study, sections: Mapping[str, Section], speed: str) -> str:
    """Of the record: setting, experiments, verdicts."""
    claims = [claim for section in sections.values() for claim in section.claims]
    texts = ", ".join(f"{kind} {text.digest}" for kind, text in study.worlds[0].texts.items())
    setting = (
        f"{study.scale}; {len(study.worlds)} seeds, orders {_orders(study)}. {speed} Digests of the text: {texts}."
    )
    missing = [name for name in EXPERIMENTS if name not in sections]
    parts = [str(__doc__), f"## Setting\n\n{setting[0].upper()}{setting[1:]}"]
    parts += [f"Not run: {', '.join(missing)}."] if missing else []
    parts += [f"## {section.title}\n\n{section.text}" for section in sections.values()]
    rules = "A claim is a set of effects, each one number per seed that has to be above zero. " + " ".join(
        str(judge.__doc__).split()
    )
    return "\n\n".join([*parts, f"## Verdicts\n\n{counts(claims)}\n\n{rules}\n\n{claims_table(claims)}"])


def _orders(study: Study) -> str:
    return " and ".join("–".join(order) for order in dict.fromkeys(tuple(world.order) for world in study.worlds))


def _speed(world: World) -> str:
    started_s, cpu_s = time.perf_counter(), time.process_time()
    size = sum(parameter.numel() for parameter in world.base.parameters())
    steps, wall_s, cpu_s = world.scale.base_steps, time.perf_counter() - started_s, time.process_time() - cpu_s
    rates = f"{60 * steps / cpu_s:,.0f} steps per minute of one core, {60 * steps / wall_s:,.0f} by the clock"
    return f"{size / 1e6:.2f} M parameters; the base trained at {rates}, beside whatever else ran."


# -- pictures ---------------------------------------------------------------------------------------------------------


def plot(study: Study, stem: Path) -> list[Path]:
    """The frontier and the matrices; nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    found, made = find(study), []
    for name, draw in (("frontier", _draw_frontier), ("matrices", _draw_matrices)):
        figure = draw(plt, found)
        made.append(stem.with_name(f"{stem.stem}_{name}.png"))
        figure.savefig(made[-1], dpi=110)
        plt.close(figure)
    return made


def _draw_frontier(plt: Any, found: Mapping[str, Found]) -> Any:
    figure, axes = plt.subplots(figsize=(12, 6.5), layout="constrained")
    for number, (name, system) in enumerate(found.items()):
        means = [(mean(m.diagonal for m in ms), mean(m.forgetting for m in ms)) for ms in system.matrices.values()]
        points = [(mean(m.base for m in system.best), 0.0), *means]
        look = {"color": plt.get_cmap("tab20")(number % 20), "marker": "o^sDv"[number % 5], "markersize": 5}
        line = ":" if system.system.knows else "-"
        axes.plot(*zip(*points, strict=True), line, label=name, **look)
    axes.set(xlabel="mean diagonal, bits per byte", ylabel="forgetting, bits per byte; linear below 0.02")
    axes.set_yscale("symlog", linthresh=0.02)
    axes.set_title("Means over seeds. Lines begin at the base; dotted: told the domain or the losses.")
    figure.legend(fontsize="small", loc="outside right upper")
    return figure


def _draw_matrices(plt: Any, found: Mapping[str, Found]) -> Any:
    """Of each system at its tuned rate, by place in the order."""
    columns = 5
    rows = math.ceil(len(found) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(14, 2.9 * rows), layout="constrained")
    changes = {name: _changes(system) for name, system in found.items()}
    most = max(float(change.abs().max()) for change in changes.values())
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (name, change) in zip(grid.flat, changes.items(), strict=False):
        image = axes.imshow(change.tolist(), cmap="RdBu_r", vmin=-most, vmax=most)
        for row, column in itertools.product(*map(range, change.shape)):
            value = float(change[row, column])
            colour = "white" if abs(value) > most / 2 else "black"
            axes.text(column, row, f"{value:+.2f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_title(name, fontsize=9)
    figure.colorbar(image, ax=grid, label="bits per byte against the base", shrink=0.6)
    figure.suptitle("Rows: after each task. Columns: domains in the order of learning. Means over seeds, tuned rates.")
    return figure


def _changes(system: Found) -> torch.Tensor:
    """[T, T] of bits per byte against the base."""
    matrices = torch.tensor([matrix.rows for matrix in system.best])
    return (matrices[:, 1:] - matrices[:, :1]).mean(0)


# -- command line -----------------------------------------------------------------------------------------------------


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_const", const=QUICK, dest="scale", help="0.13 M parameters, minutes")
    sizes.add_argument("--million", action="store_const", const=MILLION, dest="scale", help="1 M parameters, two hours")
    parser.add_argument("--only", nargs="*", choices=tuple(EXPERIMENTS), default=tuple(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, choices=range(2, 11), metavar="2..10")
    parser.add_argument("--results", type=Path, help="file of finished parts: found ones are not made again")
    parser.add_argument("--no-plots", action="store_true")
    parser.set_defaults(scale=FULL)
    return parser.parse_args()


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    scale = replace(options.scale, seeds=options.seeds or options.scale.seeds)
    texts, memo = read_texts(), Memo(options.results)
    study = Study([World(scale, texts, seed) for seed in range(scale.seeds)], memo)
    speed = _speed(study.worlds[0])
    print(speed, flush=True)
    sections = run(study, options.only)
    found = body(study, sections, speed)
    if memo.reused:
        found += f"\n\n{memo.reused} of the parts were made by earlier calls and read from the file of results."
    theme = re.sub(r"\W", "", f"adapt_{scale.name}")
    path = write_record(theme, "Continual adapters, one thread", found)
    for picture in [] if options.no_plots else plot(study, path):
        print(picture)


if __name__ == "__main__":
    main()
