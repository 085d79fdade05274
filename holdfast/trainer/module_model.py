"""The user's own module as :class:`holdfast.trainer.models.Model`.

``model.path=package.module:function`` names a function that takes ``model.options`` and returns an nn.Module: called
with tokens, int64 [B, T], it gives logits [B, T, V] or an object with ``.logits``; if its ``forward`` has an argument
called ``targets``, it gives the mean loss with them, a scalar or an object with ``.loss``.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from holdfast.errors import ConfigurationError, HoldfastError
from holdfast.parallel.partition import LayerCosts, Partition
from holdfast.parallel.pipeline import Part
from holdfast.parallel.pipeline_plan import PipelinePlan
from holdfast.parallel.schedule import Layout
from holdfast.trainer.config import ModelConfig, ModelInit
from holdfast.trainer.models import Names, not_of_a_decoder
from holdfast.trainer.wrapped import Wrapped, answers, fill, seeded

__all__ = ["ModuleModel"]

_TRIED = 4
"""Tokens of the sequence that a module is tried with."""


@dataclass(frozen=True, slots=True)
class _Facts:
    parameters: int
    vocab_size: int
    """0 for a module that gives the loss only."""


class ModuleModel:
    """Built and tried with a few tokens once in the driver, on the CPU, before anything starts."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._where = f"model.path={config.path!r}"

    def problems(self) -> list[str]:
        config = self._config
        if config.init is not ModelInit.FRESH:
            return ["model.init=WEIGHTS is of model=hf; let your function load the weights that it begins with"]
        unused = not_of_a_decoder(config)
        if config.activation_checkpointing:
            unused.append("model.activation_checkpointing=true is not for model=module; do it in your module")
        try:
            _ = self._facts
        except ConfigurationError as error:
            return [*unused, *error.problems]
        return unused

    @property
    def parameters(self) -> int:
        return self._facts.parameters

    @property
    def vocab_size(self) -> int:
        return self._facts.vocab_size

    @property
    def max_seq_len(self) -> int:
        return 0

    @property
    def d_model(self) -> int:
        return 0

    @property
    def digest(self) -> str:
        """Of the function's name and the shapes that it made: the code itself is the user's to keep."""
        shapes = [(name, list(p.shape)) for name, p in self.build(0).named_parameters()]
        return hashlib.sha256(repr((self._config.path, shapes)).encode()).hexdigest()[:32]

    def build(self, seed: int, *, initial: bool = True) -> nn.Module:
        function = self._function()
        with seeded(seed):
            try:
                module = function(**self._config.options)
            except HoldfastError:
                raise
            except Exception as error:  # the user's own code: they are told which, and what it said
                self._refuse(f"cannot build a model with options {self._config.options}: {_said(error)}", error)
        if not isinstance(module, nn.Module):
            self._refuse(f"returned {type(module).__name__}; it must return an nn.Module")
        for name, part in module.named_modules():
            if getattr(part, "track_running_stats", False):
                self._refuse(f"has {name}, a {type(part).__name__} whose running statistics no snapshot holds")
        gives_loss = "targets" in inspect.signature(module.forward).parameters
        return Wrapped(module.float().train(), _call, gives_loss=gives_loss)

    def shapes(self) -> nn.Module:
        return self.build(0)

    def pipeline_problems(self) -> list[str]:
        why = "cannot be divided into the stages of a pipeline, because nobody knows its layers"
        return [
            f"{self._where} {why}; model=hf and the built-in decoder can; train it with parallel=zero1, zero2 or zero3"
        ]

    def layer_costs(self, seq_len: int) -> LayerCosts:
        raise ConfigurationError(self.pipeline_problems())

    def largest_piece(self, plan: PipelinePlan) -> int:
        raise ConfigurationError(self.pipeline_problems())

    def piece(
        self, partition: Partition, layout: Layout, process: int, seed: int, *, initial: bool = True
    ) -> tuple[nn.Module, Sequence[Part]]:
        raise ConfigurationError(self.pipeline_problems())

    def layouts(self, partition: Partition, layout: Layout) -> list[Names]:
        raise ConfigurationError(self.pipeline_problems())

    def with_weights(self, weights: Mapping[str, Tensor]) -> nn.Module:
        model = self.build(0, initial=False)
        fill(model, weights)
        return model.eval()

    @cached_property
    def _facts(self) -> _Facts:
        model = self.build(0).eval()
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        if not count:
            self._refuse("has no parameter that trains")
        tokens = torch.arange(_TRIED)[None]
        logits = self._tried(model, tokens) if answers(model) else None
        if logits is not None and (logits.ndim != 3 or logits.shape[:2] != tokens.shape):
            self._refuse(f"gave logits {list(logits.shape)} for tokens [1, {_TRIED}]; they must be [B, T, vocabulary]")
        loss = self._tried(model, tokens, tokens)
        if loss.numel() != 1:
            self._refuse(f"gave a loss of shape {list(loss.shape)}; it must be one number, the mean over all targets")
        return _Facts(count, logits.shape[-1] if logits is not None else 0)

    @torch.no_grad()
    def _tried(self, model: nn.Module, *arguments: Tensor) -> Tensor:
        try:
            found = model(*arguments)
        except Exception as error:  # the user's own code, as in build
            self._refuse(f"cannot be called with tokens int64 [1, {_TRIED}]: {_said(error)}", error)
        if not isinstance(found, Tensor):
            self._refuse(f"gave {type(found).__name__}; it must give a tensor, or an object with .logits or .loss")
        return found

    def _function(self) -> Callable[..., Any]:
        module, colon, name = self._config.path.partition(":")
        if not (module and colon and name):
            self._refuse("must be <package.module>:<function>, for example my_models.tiny:build")
        try:
            found = getattr(importlib.import_module(module), name, None)
        except Exception as error:  # importing runs the user's own code
            self._refuse(f"cannot be imported: {_said(error)}; is its folder on PYTHONPATH on every node?", error)
        if not callable(found):
            self._refuse(f"is no function: {module} has no callable {name!r}")
        return found  # type: ignore[no-any-return]  # of whatever signature

    def _refuse(self, problem: str, cause: BaseException | None = None) -> NoReturn:
        raise ConfigurationError(f"{self._where} {problem}") from cause


def _call(module: nn.Module, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
    found = module(tokens) if targets is None else module(tokens, targets=targets)
    tensor: Tensor = getattr(found, "logits" if targets is None else "loss", found)
    return tensor


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
