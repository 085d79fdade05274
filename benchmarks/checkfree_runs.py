"""What `checkfree_study.py` trains: a byte-level decoder in six stages, on batches and failures that no method changes.

A :class:`World` is one seed: initial weights, order of batches, failures. Every method of a comparison meets the same
one, so that differences are paired. Validation text is of other files (other chunks, for a single file) than training
text. Results go through a :class:`Memo`, so that an interrupted study goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from study import Memo
from torch import Tensor

from holdfast.fault_tolerance.stage_policy import Repair
from holdfast.optim.config import OptimConfig, OptimName
from holdfast.trainer.config import DataConfig, DataSource, ModelConfig
from holdfast.trainer.sources import find_source
from holdfast.trainer.split import Division, Split
from holdfast.trainer.stage_method import HealingPlan, Method
from holdfast.trainer.stage_simulation import Batch, Failure, StageSimulation, draw_failures

__all__ = [
    "ENDS",
    "EXACT",
    "FULL",
    "INNER",
    "MICROBATCHES",
    "QUICK",
    "STAGES",
    "Memo",
    "Run",
    "Scale",
    "Study",
    "Text",
    "World",
    "apart",
]

STAGES, MICROBATCHES = 6, 4
INNER, ENDS = range(1, STAGES - 1), (0, STAGES - 1)
_TRAIN_BYTES, _VALIDATION_BYTES = 8 << 20, 1 << 20
_LEAST_BYTES = 4096
EXACT = Method(Repair.EXACT)
"""Nothing is ever lost."""
_LONGEST = 4
"""A method that needs more than so many times the steps of the target is given up."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is."""

    name: str
    d_model: int
    d_ff: int
    sequence: int
    """Tokens."""
    sequences: int
    """Of a microbatch."""
    layers: int = STAGES
    seeds: int = 5
    steps: int
    """Of a run with failures."""
    every: int
    """Steps between validations."""
    lr: float
    warm_up: int
    gaps: tuple[float, ...]
    """Mean steps between failures of any of the six stages, most rare first."""
    points: tuple[int, ...]
    """Steps after which a stage is lost, for instant damage."""
    regain: tuple[tuple[int, int], ...]
    """Points and stages after which training goes on until the damage is made good."""
    regain_steps: int
    """At most."""
    healing_budget: int
    """Training steps that healing costs as much as."""
    ages: tuple[int, ...]
    """Steps since a stage's own copy was taken, the youngest first."""
    copy_every: int
    """Steps between such copies in a run with failures."""
    windows: int
    """Of validation."""

    @property
    def target_step(self) -> int:
        """The validation loss of an undisturbed run here is the one that every method has to reach."""
        return self.steps // 2 // self.every * self.every

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            name=self.name,
            d_model=self.d_model,
            n_layers=self.layers,
            n_heads=4,
            n_kv_heads=4,
            d_ff=self.d_ff,
            max_seq_len=self.sequence,
        )

    def __str__(self) -> str:
        tokens = MICROBATCHES * self.sequences * self.sequence
        gaps = ", ".join(f"{gap:g}" for gap in self.gaps)
        return (
            f"{self.name}: width {self.d_model}, {self.layers} layers in {STAGES} stages, {self.steps} steps of "
            f"{MICROBATCHES} × {self.sequences} × {self.sequence} = {tokens} bytes, AdamW at {self.lr:g} after "
            f"{self.warm_up} steps of warm-up, gradients clipped to 1; mean gaps between failures {gaps} steps; "
            f"target: the validation loss of an undisturbed run after {self.target_step} steps"
        )


QUICK = Scale(
    name="quick",
    d_model=64,
    d_ff=160,
    sequence=32,
    sequences=1,
    steps=120,
    every=8,
    lr=3e-3,
    warm_up=10,
    gaps=(60.0, 30.0, 15.0),
    points=(200, 600, 1200),
    regain=((1200, 3),),
    regain_steps=40,
    healing_budget=5,
    ages=(20, 100),
    copy_every=40,
    windows=64,
)
FULL = Scale(
    name="full",
    d_model=96,
    d_ff=256,
    sequence=64,
    sequences=2,
    steps=3000,
    every=20,
    lr=2e-3,
    warm_up=100,
    gaps=(185.0, 83.0, 42.0),
    points=(300, 1000, 3000),
    regain=tuple((point, stage) for point in (300, 1000, 3000) for stage in range(STAGES)),
    regain_steps=300,
    healing_budget=10,
    ages=(100, 1000),
    copy_every=100,
    windows=128,
)


class Text:
    """Bytes to train on and others to validate with."""

    def __init__(self, path: Path | None = None) -> None:
        config = DataConfig() if path is None else DataConfig(source=DataSource.TEXT, path=str(path))
        source = find_source(config)
        division = Division([file.name for file in source.files], config.validation_share)
        limits = {Split.TRAIN: _TRAIN_BYTES, Split.VALIDATION: _VALIDATION_BYTES}
        found, row = {split: bytearray() for split in Split}, 0
        for file in source.files:
            for piece, _ in file.pieces():
                part = found[division.split_of(file.name, row)]
                part += piece
                row += 1
        kept = {split: bytes(part[: limits[split]]) for split, part in found.items()}
        if short := [f"{len(part):,} for {split.value}" for split, part in kept.items() if len(part) < _LEAST_BYTES]:
            raise SystemExit(
                f"{source.origin} has too few bytes: {', '.join(short)}; at least {_LEAST_BYTES} are needed"
            )
        self.title = source.title
        self.digest = hashlib.blake2b(kept[Split.TRAIN] + kept[Split.VALIDATION], digest_size=8).hexdigest()
        self.train, self.validation = (torch.frombuffer(bytearray(kept[split]), dtype=torch.uint8) for split in Split)

    def __str__(self) -> str:
        sizes = f"{len(self.train) / 1e6:.1f} MB to train on, {len(self.validation) / 1e6:.2f} MB of other files"
        return f"{self.title}, {sizes} to validate with, digest {self.digest}"


@dataclass(frozen=True)
class Run:
    """A training with failures."""

    losses: list[float]
    """Validation loss at the start and after every ``Scale.every`` steps made."""
    failures: list[int]
    """Steps before which something was lost; once per lost stage."""
    executed: int
    counted: int
    """Steps whose result counts at the end."""
    batches: str
    """Digest of the order of batches."""

    def reach(self, target: float, every: int) -> tuple[float, bool]:
        """Steps made until the validation loss was ``target``, between two validations by interpolation; and whether
        it ever was: else all of them, which is too few."""
        for number, loss in enumerate(self.losses):
            if loss <= target:
                before = self.losses[number - 1] if number else loss
                share = (before - target) / (before - loss) if before > loss else 0.0
                return max(0, number - 1 + share) * every, True
        return (len(self.losses) - 1) * float(every), False

    def failures_before(self, steps: float) -> int:
        return sum(step < steps for step in self.failures)


class World:
    """One seed."""

    def __init__(self, scale: Scale, text: Text, seed: int) -> None:
        self.scale, self.text, self.seed = scale, text, seed
        windows = torch.linspace(0, len(text.validation) - scale.sequence - 2, scale.windows).long()
        self.validation: Batch = [_windows(text.validation, part, scale.sequence) for part in windows.split(32)]
        self._order = hashlib.blake2b(digest_size=8)

    def starts(self, step: int) -> Tensor:
        """Where the windows of a step begin, int64 [microbatches × sequences]: a function of seed and step."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        count = MICROBATCHES * self.scale.sequences
        return torch.randint(len(self.text.train) - self.scale.sequence - 1, (count,), generator=draw)

    def batch(self, step: int) -> Batch:
        starts = self.starts(step)
        self._order.update(starts.numpy().tobytes())
        return [_windows(self.text.train, part, self.scale.sequence) for part in starts.split(self.scale.sequences)]

    def simulation(self, method: Method) -> StageSimulation:
        scale = self.scale
        config = OptimConfig(name=OptimName.ADAMW, lr=scale.lr, betas=[0.9, 0.999], weight_decay=0.0, grad_clip=1.0)
        return StageSimulation(
            scale.model,
            config,
            method,
            stages=STAGES,
            microbatches=MICROBATCHES,
            batch_of=self.batch,
            learning_rate=lambda step: scale.lr * min(1.0, (step + 1) / scale.warm_up),
            seed=self.seed,
            is_joined=True,
        )

    def schedule(self, gap: float, stages: Iterable[int]) -> list[Failure]:
        """Failures of these stages, out of those of all six with a mean gap of ``gap`` steps between them; of adjacent
        ones lost together, which no average rebuilds, only the first."""
        drawn = draw_failures(1 / (STAGES * gap), steps=self._most, stages=STAGES, seed=10_000 + self.seed)
        wanted = set(stages)
        kept = [Failure(f.step, tuple(s for s in apart(f.stages) if s in wanted)) for f in drawn]
        return [failure for failure in kept if failure.stages]

    def moved_inside(self, gap: float) -> list[Failure]:
        """The failures of all six stages, those of the ends moved to stages inside: as many, at the same steps."""
        inside = {0: 2, STAGES - 1: STAGES - 3}
        return [
            Failure(f.step, apart(sorted({inside.get(s, s) for s in f.stages})))
            for f in self.schedule(gap, range(STAGES))
        ]

    @property
    def _most(self) -> int:
        return _LONGEST * self.scale.steps

    def train(self, method: Method, failures: Sequence[Failure], *, until: int = 0) -> Run:
        """``Scale.steps`` steps, or until ``until`` of them count."""
        return self.go_on(self.simulation(method), failures, until=until)

    def go_on(self, simulation: StageSimulation, failures: Sequence[Failure], *, until: int = 0) -> Run:
        """As ``train``, from where the simulation is; the steps of failures count from there."""
        self._order = hashlib.blake2b(digest_size=8)
        lost, begin = {failure.step: failure.stages for failure in failures}, simulation.executed
        losses, suffered = [simulation.validate(self.validation)], list[int]()
        while self._goes_on(simulation, begin, until):
            if stages := lost.get(simulation.executed - begin):
                suffered += [simulation.executed - begin] * len(stages)
                simulation.fail(stages)
            simulation.train_step()
            if (simulation.executed - begin) % self.scale.every == 0 or simulation.step == until:
                losses.append(simulation.validate(self.validation))
        return Run(losses, suffered, simulation.executed - begin, simulation.step, self._order.hexdigest())

    def _goes_on(self, simulation: StageSimulation, begin: int, until: int) -> bool:
        if not until:
            return simulation.executed - begin < self.scale.steps
        return simulation.step < until and simulation.executed < self._most


def apart(stages: Sequence[int]) -> tuple[int, ...]:
    """Without those that follow one that is kept."""
    kept = list[int]()
    for stage in sorted(stages):
        if not kept or stage > kept[-1] + 1:
            kept.append(stage)
    return tuple(kept)


def _windows(data: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    windows = torch.stack([data[start : start + length + 1] for start in starts]).long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


@dataclass(frozen=True)
class Study:
    """All seeds of one scale."""

    worlds: Sequence[World]
    memo: Memo
    bases: dict[tuple[int, bool, int], StageSimulation] = field(default_factory=dict)
    """Undisturbed trainings by seed, routes and steps."""

    @property
    def scale(self) -> Scale:
        return self.worlds[0].scale

    def of(self, world: World, key: str, make: Callable[[], Any]) -> Any:
        return self.memo.of(f"seed {world.seed}, {key}, {world.text.digest}, {asdict(world.scale)}", make)

    def runs(
        self,
        method: Method,
        failures: Callable[[World], Sequence[Failure]],
        *,
        until: Callable[[World], int] | None = None,
    ) -> list[Run]:
        """One per seed."""
        found = []
        for world in self.worlds:
            lost, end = failures(world), until(world) if until else 0
            key = f"run {method} until {end}, {[(f.step, f.stages) for f in lost if f.step < world.scale.steps * 4]}"
            digest = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
            label = f"{method.repair.value}, {len(lost)} failures, {digest}"
            made = self.of(world, label, lambda: asdict(world.train(method, lost, until=end)))  # noqa: B023
            found.append(Run(**made))
        return found

    def base(self, world: World, *, swapped: bool = False, point: int | None = None) -> StageSimulation:
        """A copy of an undisturbed training up to ``point``, whose boundaries are logged."""
        steps = self.scale.points[-1] if point is None else point
        key = world.seed, swapped, steps
        if key not in self.bases:
            shorter = [k for k in self.bases if k[:2] == key[:2] and k[2] < steps]
            method = replace(EXACT, swapped=swapped, healing=HealingPlan(1))
            made = self.bases[max(shorter)].fork(method) if shorter else world.simulation(method)
            while made.step < steps:
                made.train_step()
            self.bases[key] = made
        return self.bases[key].fork(self.bases[key].method)
