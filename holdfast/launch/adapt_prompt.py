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
from holdfast.adapters.methods.brainstacks.search import Loss
from holdfast.errors import ConfigurationError
from holdfast.launch.adapt_choices import Shown
from holdfast.launch.adapt_model import choices_of, load_model
from holdfast.launch.adapt_outcomes import features_of, search
from holdfast.launch.adapt_router import load_router, weights_of
from holdfast.launch.curriculum import Curriculum
from holdfast.launch.wording import table
from holdfast.trainer import tokenizer
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.export import export_weights
from holdfast.trainer.model import generate

__all__ = ["Asked", "Prompted"]

_TOP_K = 50
_NO_TASK = "no task, the base alone"


@dataclass(frozen=True, slots=True)
class _Choice:
    """Tasks that may act."""

    words: str
    shown: Shown
    bits: float
    """Per byte of the text."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Which tasks the user wants to act; None where there is no wish."""

    mode: str | None = None
    domain: str | None = None
    task: str | None = None
    first: int | None = None

    def refuse_contradictions(self) -> None:
        """Raises: ConfigurationError."""
        if sum(wish is not None for wish in (self.mode, self.task, self.first)) > 1:
            raise ConfigurationError("--mode, --task and --first each say which tasks act; give one of them")
        if self.domain is not None and self.mode not in ("own-only", "prefix"):
            raise ConfigurationError(f"--domain {self.domain} is of --mode own-only or prefix, not of {self.mode}")


class Prompted:
    """Raises: ConfigurationError for a curriculum without tasks, or with files that are damaged."""

    def __init__(self, curriculum: Curriculum) -> None:
        record = curriculum.record()
        if not record.kept:
            raise ConfigurationError(f"curriculum {curriculum.name} has learned nothing yet")
        self._name, self._config = curriculum.name, ModelConfig(**record.model)
        self._model = load_model(curriculum, record)
        self._choices = choices_of(record)
        self._method = self._choices.method
        self._router = load_router(curriculum, record, self._model)

    def routes(self, text: str) -> str:
        """Every choice of tasks and what it makes of ``text``, best first, and what the router says; where atoms
        compete, how they share it."""
        choices = sorted(self._tried(text), key=lambda choice: choice.bits)
        rows = [["bits per byte of the text", "with"], *([f"{one.bits:.3f}", one.words] for one in choices)]
        return "\n".join([*table(rows), *self._routing(text), *self._shares(text)]) + "\n"

    def write(self, text: str, asked: Asked, *, n: int, temperature: float, seed: int) -> str:
        """The text and what follows it. Raises: ConfigurationError for what cannot be asked of the method."""
        with adapters.using_tasks(self._model, **self._shown(text, asked)):
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

    def _shown(self, text: str, asked: Asked) -> Shown:
        """What acts; if nothing is asked for, what the router chooses, or what serves the text best without one."""
        asked.refuse_contradictions()
        if asked.task is not None or asked.first is not None:
            return {"only": asked.task, "first": asked.first}
        if asked.mode in ("routed", "oracle"):
            self._choices.refuse_routing(asked.mode)
            return self._choices.of(self._routed(text)[1] if asked.mode == "routed" else self._search(text))
        if asked.mode is not None:
            return self._choices.mode(asked.mode, asked.domain)
        if self._router is not None:
            return self._choices.of(self._routed(text)[1])
        return min(self._tried(text), key=lambda choice: choice.bits).shown

    def _tried(self, text: str) -> Iterator[_Choice]:
        ids, tasks = self._checked(text), list(self._choices.tasks)
        yield self._choice(ids, _NO_TASK, first=0)
        for task in tasks if self._method.keeps_tasks else ():
            yield self._choice(ids, f"{task} alone", only=task)
        if not self._method.needs_task and (len(tasks) > 1 or not self._method.keeps_tasks):
            yield self._choice(ids, f"all {len(tasks)} tasks", first=len(tasks))
        if self._method.acts_apart and len(tasks) > 1:
            found = self._search(text)
            yield self._choice(ids, f"what a search found: {_named(found)}", **self._choices.of(found))

    def _search(self, text: str) -> dict[str, float]:
        """The domains that are found to serve the text best."""
        return dict.fromkeys(search(self._choices, self._loss(text)).domains, 1.0)

    def _loss(self, text: str) -> Loss:
        ids = self._checked(text)
        return lambda domains: self._choice(ids, "", **self._choices.of(domains)).bits * math.log(2)

    def _routed(self, text: str) -> tuple[dict[str, float], dict[str, float]]:
        """The probability of every domain, and those that act. Raises: ConfigurationError without a router."""
        if self._router is None:
            raise ConfigurationError(
                f"curriculum {self._name} has no router; the words that taught it train one, with "
                "adapter.router_prompts above 0 and at least two domains"
            )
        prompt = torch.tensor([self._checked(text)[1:]])  # windows of a text that the router knows have no <bos>
        return weights_of(self._router, features_of(self._model, prompt), self._choices)

    def _routing(self, text: str) -> Iterator[str]:
        """What the router says, and what following it costs. An abstention leaves the base alone."""
        if self._router is None:
            return
        told, chosen = self._routed(text)
        loss = self._loss(text)
        bits, best = loss(chosen) / math.log(2), search(self._choices, loss).loss / math.log(2)
        yield f"router   {', '.join(f'{domain} {weight:.2f}' for domain, weight in told.items())}"
        yield f"routed   {_named(chosen)}: {bits:.3f}, {bits - best:+.3f} against what a search finds"

    @torch.no_grad()
    def _choice(self, ids: list[int], words: str, **shown: Any) -> _Choice:
        tokens = torch.tensor([ids], device=self._device)
        with adapters.using_tasks(self._model, **shown):
            logits_TV = self._model(tokens[:, :-1])[0].float()
        nats = float(F.cross_entropy(logits_TV, tokens[0, 1:]))
        return _Choice(words, shown, nats / math.log(2))

    @torch.no_grad()
    def _shares(self, text: str) -> Iterator[str]:
        if not hasattr(self._method, "temperature"):
            return
        with adapters.measure_routing(self._model) as found:
            self._model(torch.tensor([self._checked(text)], device=self._device))
        layers = list(found.values())
        for number, task in enumerate(self._choices.tasks):
            share = sum(layer.mass_by_task[number] for layer in layers) / len(layers)
            yield f"{share:6.1%} of the atoms' weight is {task}'s"

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self._model.parameters()).device
        return device

    def _checked(self, text: str) -> list[int]:
        ids = _ids(text)
        if len(ids) < 2:
            raise ConfigurationError("the text is empty; give at least one letter")
        return ids[-self._config.max_seq_len :]


def _named(domains: Mapping[str, float]) -> str:
    return " + ".join(domains) or _NO_TASK


def _ids(text: str) -> list[int]:
    return [tokenizer.BOS, *tokenizer.encode(text)]
