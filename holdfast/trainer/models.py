"""What a run must know of a model, and who knows it for each kind of model. No torch until something is built.

A kind of model is a class with the methods of :class:`Model`, and a line in the table at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from holdfast.parallel.partition import LayerCosts, Partition
from holdfast.parallel.pipeline_plan import PipelinePlan
from holdfast.parallel.schedule import Layout
from holdfast.trainer.config import ModelConfig, ModelInit, ModelKind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from holdfast.parallel.pipeline import Part

__all__ = ["Model", "Names", "model_of", "not_of_a_decoder"]

Names = Mapping[str, tuple[int, ...]]
"""Shapes of parameters by name."""


class Model(Protocol):
    """One model. :meth:`problems` comes first: nothing else may be asked of a model that has some."""

    def problems(self) -> list[str]:
        """Everything that is wrong, one sentence each; nothing is built that could be large."""
        ...

    @property
    def parameters(self) -> int:
        """Elements that train; tied ones count once."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_seq_len(self) -> int:
        """Tokens; 0 if it is not known."""
        ...

    @property
    def d_model(self) -> int:
        """Width of the hidden states that stages of a pipeline exchange; 0 if it is not known."""
        ...

    @property
    def digest(self) -> str:
        """Of what decides the computation and is not in the configuration; empty if nothing is."""
        ...

    def build(self, seed: int, *, initial: bool = True) -> nn.Module:
        """Tokens -> logits, or with targets the mean loss: fp32, on the CPU, the same on every rank.

        Without ``initial`` the weights are about to be written over, and may be anything.
        """
        ...

    def shapes(self) -> nn.Module:
        """The same without memory for weights, on the meta device."""
        ...

    # -- in a pipeline --------------------------------------------------------------------------------------------

    def pipeline_problems(self) -> list[str]:
        """Why its layers cannot be divided among the stages of a pipeline."""
        ...

    def layer_costs(self, seq_len: int) -> LayerCosts: ...

    def largest_piece(self, plan: PipelinePlan) -> int:
        """Parameters of the process that has most."""
        ...

    def piece(
        self, partition: Partition, layout: Layout, process: int, seed: int, *, initial: bool = True
    ) -> tuple[nn.Module, Sequence[Part]]:
        """What a process holds, with the names that it has in the whole model, and its stages, first chunk first."""
        ...

    def layouts(self, partition: Partition, layout: Layout) -> list[Names]:
        """Of every process."""
        ...

    # -- what leaves the run --------------------------------------------------------------------------------------

    def with_weights(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """A model on the CPU, ready to be asked, of a run's whole fp32 weights."""
        ...


def model_of(config: ModelConfig) -> Model:
    """The model that ``config`` describes; equal configurations get the same object."""
    return _known(json.dumps({**asdict(config), "kind": config.kind.name, "init": config.init.name}))


@lru_cache(maxsize=8)
def _known(plain: str) -> Model:
    values = json.loads(plain)
    config = ModelConfig(**{**values, "kind": ModelKind[values["kind"]], "init": ModelInit[values["init"]]})
    return _KINDS[config.kind](config)


def not_of_a_decoder(config: ModelConfig) -> list[str]:
    """Sizes that were set and say nothing, because the model has its own."""
    kind, default = config.kind.value, ModelConfig()
    return [
        f"model.{name}={getattr(config, name)} is of the built-in decoder, and model={kind} has its own; leave it out"
        for name in (field.name for field in fields(config))
        if name in _SIZES and getattr(config, name) != getattr(default, name)
    ]


_SIZES = "vocab_size d_model n_layers n_heads n_kv_heads d_ff max_seq_len rope_theta norm_eps tie_embeddings".split()


def _decoder(config: ModelConfig) -> Model:
    from holdfast.trainer.builtin import Builtin

    return Builtin(config)


def _hf(config: ModelConfig) -> Model:
    from holdfast.trainer.hf_model import HfModel

    return HfModel(config)


def _module(config: ModelConfig) -> Model:
    from holdfast.trainer.module_model import ModuleModel

    return ModuleModel(config)


_KINDS: Mapping[ModelKind, Callable[[ModelConfig], Model]] = {
    ModelKind.DECODER: _decoder,
    ModelKind.HF: _hf,
    ModelKind.MODULE: _module,
}
