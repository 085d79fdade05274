"""Which tasks of a curriculum act in each mode. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.adapters.method import Method
from holdfast.errors import ConfigurationError

__all__ = ["MODES", "Choices", "Shown"]

MODES = ("ungated", "own-only", "prefix", "routed", "oracle")
"""All tasks; one domain's; those until one domain was learned; those that the router, or a search, chooses."""

Shown = Mapping[str, Any]
"""Arguments of ``using_tasks``."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What may act of a method's tasks."""

    method: Method
    tasks: Mapping[str, str]
    """Domains by task, oldest first."""

    @property
    def domains(self) -> list[str]:
        """In the order in which they were learned."""
        return list(dict.fromkeys(self.tasks.values()))

    @property
    def can_be_routed(self) -> bool:
        """Whether some domains can act without the others."""
        return bool(self.method.acts_apart or self.method.needs_task)

    def of(self, weights: Mapping[str, float]) -> Shown:
        """These domains and no others, each with its weight; none is the base alone.

        Raises: ConfigurationError where the method cannot do that.
        """
        if not weights:
            return {"first": 0}
        if self.method.acts_apart:
            return {"weights": {task: weights[domain] for task, domain in self.tasks.items() if domain in weights}}
        (domain, *others) = weights
        own = [task for task, of in self.tasks.items() if of == domain]
        if others or weights[domain] != 1:
            raise ConfigurationError(f"{self.method.name} cannot let {dict(weights)} act: its tasks have no weights")
        if len(own) > 1 and not self.method.needs_task:
            raise ConfigurationError(f"{self.method.name} can let one task act alone, and {domain} has {own}")
        return {"only": own[-1]}

    def mode(self, mode: str, domain: str | None) -> Shown:
        """Of the modes that need no text to decide. Raises: ConfigurationError for a domain that is missing, unknown or
        not asked for, and where the method cannot do that."""
        if mode == "ungated":
            self._refuse_together(mode)
            return {"first": len(self.tasks)}
        if domain not in self.domains:
            raise ConfigurationError(f"mode {mode} needs a domain, --domain NAME, of {self.domains}, not {domain!r}")
        if mode == "own-only":
            return self.of({domain: 1.0})
        self._refuse_together(mode)
        return {"first": max(n for n, of in enumerate(self.tasks.values(), start=1) if of == domain)}

    def _refuse_together(self, mode: str) -> None:
        if self.method.needs_task:
            raise ConfigurationError(
                f"{self.method.name} lets one task act at a time, so it has no mode {mode}; use own-only, routed or "
                "oracle"
            )

    def refuse_routing(self, mode: str) -> None:
        """Raises: ConfigurationError where no choice of domains can be made."""
        if not self.can_be_routed:
            raise ConfigurationError(
                f"{self.method.name}'s tasks act together, so it has no mode {mode}; use ungated or prefix"
            )
