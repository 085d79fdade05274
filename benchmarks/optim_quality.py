"""Does 8-bit state train as well as 32-bit state of the same optimizer, and which parts of the method does that take?

Every comparison is paired: two runs of one seed begin with the same weights and see the same batches, so that their
difference in final held-out loss (nats per byte or per image; negative: 8 bits ended lower) is the optimizer's doing
and chance's. "32-bit, perturbed" is 32-bit state from weights changed by a millionth of themselves: the least that
chance does, since rounding to 8 bits disturbs a run more. Means are over seeds, with the standard deviation between
seeds, and differences with their 95 % interval (Student's t). "No difference seen" is not "equal": what lies inside the
interval is not ruled out, and a few seeds make it wide. Of 20 intervals one misses 0 by chance. A run is unstable when
a loss is not finite, or above the task's bound in the second half of training or at the end; the bound is the loss of
a model that knows no more than how often each class occurs. Unstable runs are counted and left out of differences.

- Pairs: X8bit against X with the same options, on bytes of tinyshakespeare (two-layer decoder) and on scikit-learn's
  digits (MLP). Tensors of fewer than 4096 elements keep 32 bits in both.
- Ablations, AdamW on the bytes: moments kept in fp32 and passed through another store after every step. Dynamic or
  linear map; one absmax per block of 64, 256 or 2048 elements or per tensor; positive second moments kept from
  rounding to 0 or not; with and without a stable embedding (Xavier-uniform weights, LayerNorm behind it, 32-bit state);
  at a learning rate that suits 32 bits and at a hotter one. "Positive v stored as 0" is their share over all
  steps. The paper's stores round freely: "v may become 0".
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from optim_tasks import Build, Digits, LanguageModel, Outcome, Task, perturb, train
from record import table, write_record
from torch import Tensor, nn

from holdfast import optim
from holdfast.optim import AdamW, AdamW8bit, StableEmbedding, dequantize_blockwise, quantize_blockwise

SMALL = 4096
"""Tensors with fewer elements keep 32 bits."""
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class Store:
    """What a moment looks like after it was stored: rounded to 256 values times an absmax."""

    is_dynamic: bool = True
    block_size: int | None = 256
    """None: one absmax for the whole tensor."""
    keeps_positive: bool = True
    """Positive second moments do not become 0."""

    def __call__(self, moment: Tensor, signed: bool) -> Tensor:
        """Shapes: fp32 of any shape, the same back."""
        size, nonzero = self.block_size or moment.numel(), self.keeps_positive and not signed
        if self.is_dynamic:
            codes, absmax = quantize_blockwise(moment, signed, size, nonzero=nonzero)
            return dequantize_blockwise(codes, absmax, signed, size)
        return _linear(moment, signed, size, nonzero)


def _linear(moment: Tensor, signed: bool, block_size: int, nonzero: bool) -> Tensor:
    """Equal steps: 127 of either sign, or 255 positive ones."""
    steps, flat = 127 if signed else 255, moment.reshape(-1)
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % block_size)]).view(-1, block_size)
    absmax = padded.abs().amax(1, keepdim=True)
    codes = (padded / absmax.where(absmax > 0, 1.0) * steps).round_()
    if nonzero:
        codes = torch.maximum(codes, (padded > 0).float())
    return (codes / steps * absmax).view(-1)[: len(flat)].view(moment.shape)


class StoredAdamW(AdamW):
    """AdamW in 32 bits whose large moments go through ``store`` after every step.

    ``kept``: weights whose state stays in 32 bits whatever their size.
    """

    def __init__(self, params: Iterable[Tensor], store: Store, kept: Sequence[Tensor] = (), **options: Any) -> None:
        super().__init__(params, **options)
        large = [p for p in self.param_groups[0]["params"] if p.numel() >= SMALL]
        self._store, self._stored = store, [p for p in large if all(p is not other for other in kept)]
        self._lost = self._positive = 0

    @property
    def lost(self) -> float:
        """Share of the positive second moments that were stored as 0, over all steps."""
        return self._lost / max(1, self._positive)

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        for state in [self.state[param] for param in self._stored]:
            state["exp_avg"].copy_(self._store(state["exp_avg"], True))
            exact = state["exp_avg_sq"].clone()
            state["exp_avg_sq"].copy_(self._store(exact, False))
            positive = int(exact.count_nonzero())
            self._positive += positive
            self._lost += positive - int(state["exp_avg_sq"].count_nonzero())


EXACT, PERTURBED = "32-bit", "32-bit, perturbed"
STORES: Mapping[str, Store] = {
    f"{kind}, {f'blocks of {size}' if size else 'per tensor'}{'' if keeps else ', v may become 0'}": Store(
        kind == "dynamic", size, keeps
    )
    for kind, sizes in (("dynamic", (256, 64, 2048, None)), ("linear", (256, None)))
    for size in sizes
    for keeps in (True, False)
}


USUAL_BETA2 = 0.999


@dataclass(frozen=True)
class Setting:
    """Of the ablations."""

    lr: float
    beta2: float = USUAL_BETA2
    has_stable_embedding: bool = False
    stores: Sequence[str] = tuple(STORES)

    def __str__(self) -> str:
        embedding = "stable" if self.has_stable_embedding else "plain"
        return f"learning rate {self.lr:g}, betas (0.9, {self.beta2:g}), {embedding} embedding"


USUAL, HOT = 2e-3, 1e-2
FEW = ("dynamic, blocks of 256", "dynamic, blocks of 256, v may become 0", "dynamic, per tensor, v may become 0")
SETTINGS = (
    *(Setting(lr, has_stable_embedding=stable) for stable in (False, True) for lr in (USUAL, HOT)),
    Setting(USUAL, beta2=0.95, stores=FEW),
)
MORE = 2
"""Seeds more for AdamW and for the digits, where a run takes no time."""
PAIRS: Mapping[str, tuple[float, float, dict[str, Any]]] = {
    "AdamW": (2e-3, 3e-3, {}),
    "Adam": (2e-3, 3e-3, {}),
    "SGD": (0.1, 0.1, {"momentum": 0.9}),
    "Lion": (1e-3, 1e-3, {}),
    "RMSprop": (1e-3, 1e-3, {}),
    "Adagrad": (1e-2, 3e-2, {}),
    "LAMB": (1e-2, 1e-2, {}),
    "LARS": (10.0, 10.0, {}),
    "AdEMAMix": (1e-3, 1e-3, {}),
}
"""Learning rates for bytes and digits, and what else both of a pair are given."""


@dataclass(frozen=True)
class Case:
    """One way of training, to be run with several seeds."""

    task: Task
    name: str
    build: Build
    lr: float
    is_perturbed: bool = False

    def run(self, seed: int) -> Outcome:
        model = self.task.model(seed)
        if self.is_perturbed:
            perturb(model, seed)
        optimizer = self.build(model, self.lr)
        outcome = train(self.task, model, optimizer, self.lr, seed)
        return replace(outcome, lost=getattr(optimizer, "lost", 0.0))


class Runs:
    """Outcomes; with a file those of earlier calls count too, and new ones are added to it."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._known, self.reused = path, dict[str, Outcome](), 0
        for line in path.read_text().splitlines() if path and path.exists() else ():
            entry = json.loads(line)
            key = entry.pop("case")
            self._known[key] = Outcome(**entry)
        self._older = set(self._known)

    def of(self, case: Case, seed: int) -> Outcome:
        key = f"{case.task.name}, {case.task.steps} steps, {case.name}, lr {case.lr:g}, seed {seed}"
        if key not in self._known:
            started = time.perf_counter()
            self._known[key] = found = case.run(seed)
            print(f"{key}: {found} ({time.perf_counter() - started:.1f} s)", file=sys.stderr, flush=True)
            if self._path:
                with self._path.open("a") as file:
                    file.write(json.dumps({"case": key, **asdict(found)}) + "\n")
        self.reused += key in self._older
        return self._known[key]

    def all(self, cases: Sequence[Case], seeds: int) -> list[list[Outcome]]:
        """Seed by seed, so that what is there after an interruption is balanced."""
        by_seed = [[self.of(case, seed) for case in cases] for seed in range(seeds)]
        return [list(outcomes) for outcomes in zip(*by_seed, strict=True)]


def differences(own: Sequence[Outcome], other: Sequence[Outcome]) -> list[float]:
    """Of the seeds that are stable both ways."""
    return [a.loss - b.loss for a, b in zip(own, other, strict=True) if not (a.is_unstable or b.is_unstable)]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval, infinite for fewer than two values."""
    if len(values) < 2:
        return (values[0] if values else math.nan), math.inf
    return statistics.mean(values), T_95[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def words(values: Sequence[float]) -> list[str]:
    """The interval and what it says."""
    mean, half = interval(values)
    if math.isinf(half):
        return ["–", "too few stable runs"]
    verdict = "no difference seen" if abs(mean) <= half else "lower loss" if mean < 0 else "higher loss"
    return [f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]", verdict]


def losses(outcomes: Sequence[Outcome]) -> str:
    stable = [o.loss for o in outcomes if not o.is_unstable]
    if not stable:
        return "–"
    return f"{statistics.mean(stable):.4f}" + (f" ± {statistics.stdev(stable):.4f}" if len(stable) > 1 else "")


def unstable(outcomes: Sequence[Outcome]) -> str:
    return f"{sum(o.is_unstable for o in outcomes)} of {len(outcomes)}"


def pair_cases(name: str, task: Task) -> list[Case]:
    """32 bits, 8 bits, and for AdamW 32 bits perturbed."""
    lr, options = PAIRS[name][isinstance(task, Digits)], PAIRS[name][2]

    def of(kind: type[torch.optim.Optimizer]) -> Build:
        return lambda model, lr: kind(model.parameters(), lr=lr, **options)

    wide, narrow = of(getattr(optim, name)), of(getattr(optim, f"{name}8bit"))
    moved = [Case(task, f"{name}, perturbed", wide, lr, is_perturbed=True)] if name == "AdamW" else []
    return [Case(task, name, wide, lr), Case(task, f"{name}8bit", narrow, lr), *moved]


def pairs(names: Sequence[str], tasks: Sequence[Task], runs: Runs, seeds: int) -> str:
    columns = ["task", "optimizer", "learning rate", "seeds", "32-bit loss", "8-bit loss", "8-bit − 32-bit", "8 bits"]
    columns += ["unstable: 32-bit", "8-bit"]
    rows, verdicts, by_chance = [], dict[str, list[str]](), ""
    for task in tasks:
        for name in names:
            cases = pair_cases(name, task)
            wide, narrow, *moved = runs.all(cases, seeds + MORE * (name == "AdamW" or isinstance(task, Digits)))
            difference, verdict = words(differences(narrow, wide))
            verdicts.setdefault(verdict, []).append(f"{name} on {task.name}")
            row = [task.name, name, f"{cases[0].lr:g}", len(wide), losses(wide), losses(narrow), difference, verdict]
            rows.append([*row, unstable(wide), unstable(narrow)])
            for outcomes in moved:
                by_chance += f" AdamW on {task.name}, perturbed − 32-bit: {words(differences(outcomes, wide))[0]}."
    bounds = ", ".join(f"{task.name} {task.bound:.3f}" for task in tasks)
    summary = "; ".join(f"{verdict}: {', '.join(of)}" for verdict, of in verdicts.items())
    text = f"8 bits against 32, {summary}. Unstable above: {bounds}.{by_chance}"
    return f"## Pairs, {tasks[0].steps} steps\n\n{text}\n\n{table(columns, rows)}"


def ablation_cases(setting: Setting, task: Task) -> list[Case]:
    """32 bits, 32 bits perturbed, and each store."""
    options, label = {"betas": (0.9, setting.beta2)}, f", beta2 {setting.beta2:g}"

    def exact(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return AdamW(model.parameters(), lr=lr, **options)

    def stored(store: Store, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        kept = [module.weight for module in model.modules() if isinstance(module, StableEmbedding)]
        return StoredAdamW(model.parameters(), store, kept, lr=lr, **options)

    cases = [Case(task, EXACT + label, exact, setting.lr), Case(task, PERTURBED + label, exact, setting.lr, True)]
    ablated = [Case(task, name + label, partial(stored, STORES[name]), setting.lr) for name in setting.stores]
    return [*cases, *ablated]


Ablated = Mapping[Setting, Mapping[str, list[Outcome]]]


def ablate(settings: Sequence[Setting], text: Path, steps: int, runs: Runs, seeds: int) -> Ablated:
    found = {}
    for setting in settings:
        task = LanguageModel(text, steps, stable_embedding=setting.has_stable_embedding)
        outcomes = runs.all(ablation_cases(setting, task), seeds)
        found[setting] = dict(zip((EXACT, PERTURBED, *setting.stores), outcomes, strict=True))
    return found


def ablation_tables(found: Ablated) -> list[str]:
    columns = ["state", "loss", "− 32-bit", "against 32-bit", "unstable", "positive v stored as 0, %"]
    sections = []
    for setting, ways in found.items():
        rows = []
        for name, outcomes in ways.items():
            row = [name, losses(outcomes), *words(differences(outcomes, ways[EXACT])), unstable(outcomes)]
            rows.append([*row, f"{100 * statistics.mean(o.lost for o in outcomes):.2f}"])
        rows[0][2:4] = ["", ""]
        sections.append(f"## Ablations: {setting}, {len(ways[EXACT])} seeds\n\n{table(columns, rows)}")
    return sections


@dataclass
class Tally:
    """Of comparisons of one store with itself, positive second moments kept from 0 or not."""

    comparisons: int = 0
    lower: int = 0
    higher: int = 0
    kept_unstable: int = 0
    free_unstable: int = 0

    def add(self, kept: Sequence[Outcome], free: Sequence[Outcome]) -> None:
        verdict = words(differences(kept, free))[1]
        self.comparisons += 1
        self.lower += verdict == "lower loss"
        self.higher += verdict == "higher loss"
        self.kept_unstable += sum(o.is_unstable for o in kept)
        self.free_unstable += sum(o.is_unstable for o in free)

    def __str__(self) -> str:
        unstable = f"{self.kept_unstable} unstable runs against {self.free_unstable}"
        return f"{self.comparisons} comparisons, loss lower in {self.lower} and higher in {self.higher}, {unstable}"

    def speaks(self) -> str:
        """For keeping them, against it, or neither."""
        gains = (self.free_unstable - self.kept_unstable, self.lower - self.higher)
        if max(gains) > 0 and min(gains) >= 0:
            return "for"
        return "against" if min(gains) < 0 and max(gains) <= 0 else "neither for nor against"


def nonzero_answer(found: Ablated) -> str:
    """Should positive second moments be kept from rounding to 0 by default? Same store with and without."""
    columns = ["setting", "store", "loss: kept − may become 0", "kept", "unstable: kept", "may become 0"]
    rows, in_blocks, others = [], Tally(), Tally()
    for setting, ways in found.items():
        for name in [name for name in ways if f"{name}, v may become 0" in ways]:
            kept, free = ways[name], ways[f"{name}, v may become 0"]
            rows.append([str(setting), name, *words(differences(kept, free)), unstable(kept), unstable(free)])
            (in_blocks if name.startswith("dynamic, blocks") else others).add(kept, free)
    verdict = _verdict(in_blocks.speaks(), others.speaks())
    title = "## Should positive second moments be kept from rounding to 0 by default?"
    text = f"Dynamic map in blocks: {in_blocks}; this speaks {in_blocks.speaks()} keeping them. "
    text += f"Dynamic map per tensor, linear map: {others}; this speaks {others.speaks()} it."
    return f"{title}\n\n{text} {verdict}\n\n{table(columns, rows)}"


def _verdict(in_blocks: str, others: str) -> str:
    if in_blocks == "for":
        return "So yes: on by default."
    if in_blocks == "against":
        return "So no: off by default."
    if others == "for":
        return (
            "So on by default, as a safeguard: no effect seen with the dynamic map in blocks, while other stores "
            "show what it guards against."
        )
    return "These runs do not decide it."


PAPER = (
    ("32-bit", EXACT, "0", "–"),
    ("linear", "linear, per tensor, v may become 0", "90", "–"),
    ("dynamic", "dynamic, per tensor, v may become 0", "10", "–"),
    ("dynamic, block-wise", "dynamic, blocks of 2048, v may become 0", "0", "0"),
    ("not in the paper: linear, v kept positive", "linear, per tensor", "", ""),
    ("not in the paper: dynamic, v kept positive", "dynamic, per tensor", "", ""),
    ("the package's default: blocks of 256, v kept positive", "dynamic, blocks of 256", "", ""),
)
"""Name, its name here, and unstable runs in % in table 3 (209 M parameters), plain and with stable embedding."""


def paper_table(found: Ablated) -> str:
    settings = [setting for setting in found if setting.beta2 == USUAL_BETA2]
    columns = ["state", "paper: unstable, %", "with stable embedding"]
    columns += [f"here: {'stable' if s.has_stable_embedding else 'plain'}, {s.lr:g}" for s in settings]
    rows = []
    for label, name, plain, stable in PAPER:
        here = [
            f"{unstable(found[s][name])}; {_signed(differences(found[s][name], found[s][EXACT]))}"
            if name in found[s]
            else "not run"
            for s in settings
        ]
        rows.append([label, plain, stable, *here])
    title = "## Against the paper's ablation: unstable runs; mean loss − 32-bit of the others"
    return f"{title}\n\n{table(columns, rows)}"


def _signed(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):+.3f}" if values else "–"


def same_optimizer(text: Path, steps: int = 40) -> str:
    """Whether the ablated optimizer with the package's store walks AdamW8bit's path."""
    task, rows = LanguageModel(text, steps), []
    for store in (Store(), Store(keeps_positive=False), Store(block_size=64), Store(block_size=2048)):
        options = {"block_size": store.block_size, "nonzero_second_moment": store.keeps_positive}
        ours, theirs = task.model(0), task.model(0)
        train(task, ours, StoredAdamW(ours.parameters(), store, lr=USUAL), USUAL, 0)
        train(task, theirs, AdamW8bit(theirs.parameters(), lr=USUAL, **options), USUAL, 0)
        weights = [torch.nn.utils.parameters_to_vector(model.parameters()).detach() for model in (ours, theirs)]
        differ, most = int((weights[0] != weights[1]).sum()), float((weights[0] - weights[1]).abs().max())
        rows.append([store.block_size, "kept" if store.keeps_positive else "may become 0", differ, f"{most:.1e}"])
    columns = ["block size", "positive v", f"weights that differ, of {len(weights[0])}", "largest difference"]
    title = f"## The ablated optimizer against AdamW8bit itself, {steps} steps of bytes"
    return f"{title}\n\n{table(columns, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path("tinyshakespeare"), help="input.txt or its folder")
    parser.add_argument("--only", nargs="*", choices=("pairs", "ablations"), default=("pairs", "ablations"))
    parser.add_argument("--optimizers", nargs="*", choices=tuple(PAIRS), default=tuple(PAIRS), help="of the pairs")
    parser.add_argument(
        "--tasks", nargs="*", choices=("bytes", "digits"), default=("bytes", "digits"), help="of the pairs"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        choices=range(2, 9),
        metavar="2..8",
        help=f"of a pair; {MORE} more for AdamW and digits",
    )
    parser.add_argument("--ablation-seeds", type=int, default=3, choices=range(2, 11), metavar="2..10")
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="of the ablations: the first so many")
    parser.add_argument("--steps", type=int, default=300, help="of a run")
    parser.add_argument(
        "--results", type=Path, help="file of outcomes: found ones are not run again, new ones are added"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs, sections = Runs(options.results), []
    if "pairs" in options.only:
        makers = {"bytes": lambda: LanguageModel(options.text, options.steps), "digits": lambda: Digits(options.steps)}
        tasks: list[Task] = [makers[name]() for name in options.tasks]
        sections.append(pairs(options.optimizers, tasks, runs, options.seeds))
    if "ablations" in options.only:
        same = same_optimizer(options.text)
        print(same, file=sys.stderr, flush=True)
        found = ablate(SETTINGS[: options.settings], options.text, options.steps, runs, options.ablation_seeds)
        sections += [nonzero_answer(found), paper_table(found), *ablation_tables(found), same]
        missing = [str(setting) for setting in SETTINGS if setting not in found]
        sections += [f"Not run: ablations with {'; '.join(missing)}."] if missing else []
    if runs.reused:
        sections.append(f"{runs.reused} of these runs were made by earlier calls and read from the file of results.")
    title = "Final loss with 8-bit and with 32-bit optimizer state, one thread"
    write_record("optim_quality", title, "\n\n".join([str(__doc__), *sections]))


if __name__ == "__main__":
    main()
