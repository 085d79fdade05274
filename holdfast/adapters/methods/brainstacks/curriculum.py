"""The outer loop: domains one after the other, with a manifest of what was frozen and what it did to the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from torch import Tensor, nn

from holdfast.adapters.adapted import adapters_of
from holdfast.adapters.forgetting import LossMatrix
from holdfast.adapters.methods.brainstacks.boosting import BoostPlan, Domain, boost, validate
from holdfast.adapters.methods.brainstacks.library import add_stack
from holdfast.adapters.methods.brainstacks.method import Brainstacks
from holdfast.adapters.methods.brainstacks.projection import protected_directions
from holdfast.adapters.methods.brainstacks.stacks import Stack, check_frozen, ungated
from holdfast.adapters.tasks import use_tasks
from holdfast.adapters.training import Optimizers
from holdfast.errors import ConfigurationError

__all__ = ["Curriculum", "Progress"]


@dataclass(slots=True)
class Progress:
    """What has been learned so far."""

    stacks: list[Stack] = field(default_factory=list)
    """Frozen ones, oldest first."""
    losses: list[dict[str, float]] = field(default_factory=list)
    """After each domain the validation loss of every domain so far with all stacks on."""

    @property
    def matrix(self) -> LossMatrix:
        """What forgetting is read from."""
        return LossMatrix.so_far(self.losses)


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """How domains follow each other."""

    plan: BoostPlan = field(default_factory=BoostPlan)
    directions: int = 32
    """Protected for each earlier domain, in each layer; 0 protects none."""
    samples: int = 25
    """Training batches of each earlier domain that these directions are found from."""
    is_independent: bool = False
    """Train every domain on the bare base: own-only is then what was trained, and ungated is not."""
    library: Path | None = None
    """Where every round is saved as soon as its domain is learned."""
    optimizers: Optimizers | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.directions < 0 or self.samples < 1:
            raise ConfigurationError(
                f"directions={self.directions} must not be negative, and samples={self.samples} must be at least 1"
            )

    def learn(self, model: nn.Module, domains: Sequence[Domain]) -> Progress:
        """In this order; a stack that is frozen is checked after every domain.

        Raises: ConfigurationError if the model has no Brainstacks, or has finished tasks already.
        """
        adapters = adapters_of(model)
        if not isinstance(adapters.method, Brainstacks) or adapters.tasks:
            raise ConfigurationError(
                f"a curriculum starts with brainstacks and no task; this model has {adapters.method.name} with "
                f"{adapters.tasks}"
            )
        progress = Progress()
        for number, domain in enumerate(domains):
            self._learn_one(model, domain, domains[:number], progress)
            check_frozen(model, progress.stacks)
            weights = ungated(progress.stacks)
            progress.losses.append({seen.name: validate(model, seen, weights) for seen in domains[: number + 1]})
        use_tasks(model)
        return progress

    def _learn_one(self, model: nn.Module, domain: Domain, earlier: Sequence[Domain], progress: Progress) -> None:
        stacks = boost(
            model,
            domain,
            self.plan,
            bases=self._bases(model, earlier),
            after=[] if self.is_independent else None,
            optimizers=self.optimizers,
            seed=self.seed,
        )
        progress.stacks += stacks
        if self.library is not None:
            for stack in stacks:
                add_stack(self.library, model, stack)

    def _bases(self, model: nn.Module, earlier: Sequence[Domain]) -> dict[str, Tensor]:
        method = adapters_of(model).method
        assert isinstance(method, Brainstacks)  # or learn would have refused
        if method.projection == "off" or not self.directions or not earlier:
            return {}
        side = "input" if method.projection == "input" else "output"
        samples = {domain.name: self._run_on_samples(model, domain) for domain in earlier}
        return protected_directions(model, samples, count=self.directions, side=side, seed=self.seed)

    def _run_on_samples(self, model: nn.Module, domain: Domain) -> Callable[[], object]:
        return lambda: [domain.loss(model, batch) for batch in islice(domain.batches(1), self.samples)]
