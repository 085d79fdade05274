"""What `optim_quality.py` trains: a byte-level language model and a classifier of digits, both small.

A run is a function of task, seed, learning rate and optimizer: the seed gives initial weights and batches, so that two
optimizers can be compared seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.optim import OptimConfig, StableEmbedding, learning_rate
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.model import Decoder, initialise

__all__ = ["Build", "Digits", "LanguageModel", "Outcome", "Task", "perturb", "train"]

WARM_UP_STEPS = 20
SEQUENCE, SEQUENCES = 128, 4
HELD_OUT_WINDOWS = 64
IMAGES, HELD_OUT_IMAGES = 64, 397
Batch = tuple[Tensor, Tensor]
"""Inputs and targets."""
Build = Callable[[nn.Module, float], torch.optim.Optimizer]
"""Model and learning rate -> optimizer."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    loss: float
    """On the held-out part, NaN when training was given up."""
    is_unstable: bool
    """A loss was not finite, or above the task's bound in the second half of training or at the end."""
    lost: float = 0.0
    """Share of the positive second moments that were stored as 0, over all steps."""


class Task(Protocol):
    name: str
    bound: float
    """The held-out loss of a model that has only learnt how often each class occurs."""
    steps: int

    def model(self, seed: int) -> nn.Module:
        """Fresh weights, the same for the same seed. Its output is logits ``[..., classes]``."""

    def batch(self, draw: torch.Generator) -> Batch:
        """The next batch of the training part."""

    def held_out(self) -> list[Batch]:
        """The held-out part, the same in every run."""


class LanguageModel:
    """The package's decoder on the bytes of a text; the last tenth is held out."""

    def __init__(self, text: Path, steps: int, *, stable_embedding: bool = False) -> None:
        self.name = "bytes, stable embedding" if stable_embedding else "bytes"
        self.steps = steps
        self._has_stable_embedding = stable_embedding
        data = torch.tensor(list(_read(text)), dtype=torch.int64)
        self._train, self._rest = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
        counts = torch.bincount(self._train, minlength=256).double() + 1
        self.bound = float(F.nll_loss((counts / counts.sum()).log().expand(len(self._rest), 256), self._rest))

    def model(self, seed: int) -> nn.Module:
        config = ModelConfig(
            d_model=128, n_layers=2, n_heads=4, n_kv_heads=4, d_ff=256, max_seq_len=SEQUENCE, tie_embeddings=False
        )
        decoder = Decoder(config)
        initialise(decoder, seed)
        if self._has_stable_embedding:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                decoder.embedding = StableEmbedding(config.vocab_size, config.d_model)
        return decoder

    def batch(self, draw: torch.Generator) -> Batch:
        starts = torch.randint(len(self._train) - SEQUENCE - 1, (SEQUENCES,), generator=draw)
        return _windows(self._train, starts)

    def held_out(self) -> list[Batch]:
        starts = torch.linspace(0, len(self._rest) - SEQUENCE - 2, HELD_OUT_WINDOWS).long()
        return [_windows(self._rest, part) for part in starts.split(16)]


class Digits:
    """An MLP on the 1797 images of scikit-learn's digits, 397 of them held out."""

    name = "digits"
    bound = math.log(10)

    def __init__(self, steps: int) -> None:
        self.steps = steps
        images, labels = _digits()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self._images, self._labels = images[order], labels[order]

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def batch(self, draw: torch.Generator) -> Batch:
        chosen = torch.randint(len(self._images) - HELD_OUT_IMAGES, (IMAGES,), generator=draw) + HELD_OUT_IMAGES
        return self._images[chosen], self._labels[chosen]

    def held_out(self) -> list[Batch]:
        return [(self._images[:HELD_OUT_IMAGES], self._labels[:HELD_OUT_IMAGES])]


@torch.no_grad()
def perturb(model: nn.Module, seed: int) -> None:
    """Change every weight by about a millionth of itself: what follows tells how far runs drift apart by chance."""
    draw = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.mul_(1 + 1e-6 * torch.randn(weight.shape, generator=draw))


def train(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, seed: int) -> Outcome:
    """Warm-up, cosine down to a tenth of ``lr``, no gradient clipping."""
    draw, is_unstable = torch.Generator().manual_seed(seed), False
    schedule = OptimConfig(lr=lr, warmup_steps=WARM_UP_STEPS)
    for step in range(task.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step, task.steps)
        loss = _loss(model, task.batch(draw))
        value = loss.item()
        if not math.isfinite(value):
            return Outcome(math.nan, True)
        is_unstable |= step >= task.steps // 2 and value > task.bound
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        parts = [_loss(model, part).item() for part in task.held_out()]
    final = sum(parts) / len(parts)
    return Outcome(final, is_unstable or not final <= task.bound)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def _windows(data: Tensor, starts: Tensor) -> Batch:
    windows = torch.stack([data[start : start + SEQUENCE + 1] for start in starts])
    return windows[:, :-1], windows[:, 1:]


def _read(text: Path) -> bytes:
    path = text / "input.txt" if text.is_dir() else text
    if not path.is_file():
        raise SystemExit(
            f"{path} is missing: the language model needs tinyshakespeare (input.txt, 1.1 MB, from karpathy/char-rnn); "
            "name its file or folder with --text, or leave the task out with --only pairs --tasks digits"
        )
    return path.read_bytes()


def _digits() -> Batch:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit(
            "scikit-learn is missing, whose digits are one of the tasks: pip install scikit-learn, "
            "or leave the task out with --tasks bytes"
        ) from None
    found = load_digits()
    return torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target, dtype=torch.int64)
