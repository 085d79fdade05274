"""A curriculum's model in this process, and what its tasks make of a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from holdfast import adapters
from holdfast.adapters.methods.brainstacks.search import greedy
from holdfast.errors import ConfigurationError
from holdfast.launch.curriculum import Curriculum
from holdfast.launch.wording import table
from holdfast.trainer import tokenizer
from holdfast.trainer.adapting import adapted_base
from holdfast.trainer.config import AdapterConfig, ModelConfig
from holdfast.trainer.export import export_weights
from holdfast.trainer.model import generate

__all__ = ["Prompted"]

_TOP_K = 50
_NO_TASK = "no task, the base alone"


@dataclass(frozen=True, slots=True)
class _Choice:
    """Tasks that may act."""

    words: str
    shown: Mapping[str, Any]
    """Arguments of ``using_tasks``."""
    bits: float
    """Per byte of the text."""


class Prompted:
    """Raises: ConfigurationError for a curriculum without tasks, or with files that are damaged."""

    def __init__(self, curriculum: Curriculum) -> None:
        record = curriculum.record()
        if not record.kept:
            raise ConfigurationError(f"curriculum {curriculum.name} has learned nothing yet")
        self._domains = {task.task: task.domain for task in record.kept}
        config = AdapterConfig(
            **record.adapter,
            base=str(curriculum.brick(record.base)),
            tasks=[str(curriculum.path / task.directory) for task in record.kept],
        )
        self._config = ModelConfig(**record.model)
        self._model = adapted_base(config, self._config, record.base).eval()
        self._method = adapters.adapters_of(self._model).method

    def routes(self, text: str) -> str:
        """Every choice of tasks and what it makes of ``text``, best first; where atoms compete, how they share it."""
        choices = sorted(self._choices(text), key=lambda choice: choice.bits)
        rows = [["bits per byte of the text", "with"], *([f"{one.bits:.3f}", one.words] for one in choices)]
        return "\n".join([*table(rows), *self._shares(text)]) + "\n"

    def write(self, text: str, *, task: str | None, first: int | None, n: int, temperature: float, seed: int) -> str:
        """The text and what follows it, with these tasks or with those that serve it best."""
        if task is not None or first is not None:
            shown: Mapping[str, Any] = {"only": task, "first": first}
        else:
            shown = min(self._choices(text), key=lambda choice: choice.bits).shown
        with adapters.using_tasks(self._model, **shown):
            ids = generate(
                self._model,
                _ids(text),
                n,
                temperature=temperature,
                top_k=_TOP_K,
                seed=seed,
                max_seq_len=self._config.max_seq_len,
            )
        return f"{text}{tokenizer.decode(ids)}\n"

    def export(self, path: Path, *, first: int | None) -> int:
        """Base and tasks as the weights of one ordinary model. Returns the file's bytes; the adapters are gone from
        this process's model then.

        Raises: ConfigurationError where the method cannot be merged, or for another number of tasks; OSError.
        """
        adapters.use_tasks(self._model, first=first)
        self._model.load_state_dict(adapters.merge(self._model), strict=False)
        return export_weights(dict(self._model.named_parameters()), path, metadata={"format": "pt"})

    def _choices(self, text: str) -> Iterator[_Choice]:
        ids, tasks = self._checked(text), list(self._domains)
        yield self._choice(ids, _NO_TASK, first=0)
        for task in tasks if self._method.keeps_tasks else ():
            yield self._choice(ids, f"{task} alone", only=task)
        if not self._method.needs_task and (len(tasks) > 1 or not self._method.keeps_tasks):
            yield self._choice(ids, f"all {len(tasks)} tasks", first=len(tasks))
        if self._method.acts_apart and len(tasks) > 1:
            yield self._searched(ids)

    def _searched(self, ids: list[int]) -> _Choice:
        """The domains that a greedy search finds to serve the text."""

        def loss(domains: Mapping[str, float]) -> float:
            return self._choice(ids, "", weights=self._weights(domains)).bits * math.log(2)

        found = greedy(loss, list(dict.fromkeys(self._domains.values())))
        weights = self._weights(dict.fromkeys(found.domains, 1.0))
        return self._choice(ids, f"what a search found: {' + '.join(found.domains) or _NO_TASK}", weights=weights)

    def _weights(self, domains: Mapping[str, float]) -> dict[str, float]:
        return {task: domains[domain] for task, domain in self._domains.items() if domain in domains}

    @torch.no_grad()
    def _choice(self, ids: list[int], words: str, **shown: Any) -> _Choice:
        tokens = torch.tensor([ids])
        with adapters.using_tasks(self._model, **shown):
            logits_TV = self._model(tokens[:, :-1])[0].float()
        nats = float(F.cross_entropy(logits_TV, tokens[0, 1:]))
        return _Choice(words, shown, nats / math.log(2))

    @torch.no_grad()
    def _shares(self, text: str) -> Iterator[str]:
        if not hasattr(self._method, "temperature"):
            return
        with adapters.measure_routing(self._model) as found:
            self._model(torch.tensor([self._checked(text)]))
        layers = list(found.values())
        for number, task in enumerate(self._domains):
            share = sum(layer.mass_by_task[number] for layer in layers) / len(layers)
            yield f"{share:6.1%} of the atoms' weight is {task}'s"

    def _checked(self, text: str) -> list[int]:
        ids = _ids(text)
        if len(ids) < 2:
            raise ConfigurationError("the text is empty; give at least one letter")
        return ids[-self._config.max_seq_len :]


def _ids(text: str) -> list[int]:
    return [tokenizer.BOS, *tokenizer.encode(text)]
