"""Causal language models of Hugging Face cut into the stages of a pipeline, by family.

A family is a line in the table: where its parts are, and how a block is called. A process keeps the model's own modules
under their own names, and takes out the layers of others. Rotary tables are computed in every stage; the causal mask is
that of torch's attention kernel, so nothing but hidden states travels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from holdfast.errors import ConfigurationError, InvariantViolation
from holdfast.parallel.partition import Partition
from holdfast.parallel.schedule import Layout
from holdfast.trainer.wrapped import Wrapped

__all__ = ["FAMILIES", "Family", "HfStage", "family_of", "piece_of"]

Run = Callable[[Any, nn.Module, Tensor], Any]
"""The base model, one block and hidden states [B, T, D]; the block's answer."""


@dataclass(frozen=True, slots=True)
class Family:
    """Names of the parts, dotted, and how they work together."""

    base: str
    """The module that holds embedding, blocks and norm."""
    layers: str
    norm: str
    first: Sequence[str]
    """Modules that only a stage that begins with tokens needs, the token table first."""
    embed: Callable[[Any, Tensor], Tensor]
    """The base model and tokens [B, T]; hidden states."""
    run: Run
    head: str = "lm_head"

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """Of a whole model."""
        return list(model.get_submodule(f"{self.base}.{self.layers}").children())


def family_of(config: Any) -> Family:
    """Raises: ConfigurationError for a family that nobody has told how to cut."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ConfigurationError(
            f"a model of type {config.model_type!r} cannot be divided into the stages of a pipeline; those of type "
            f"{', '.join(sorted(FAMILIES))} can; train this one with parallel=zero1, zero2 or zero3"
        )
    return family


def piece_of(
    model: nn.Module,
    config: Any,
    partition: Partition,
    layout: Layout,
    process: int,
    recomputes: bool = False,
) -> tuple[nn.Module, list[HfStage]]:
    """What a process of the pipeline holds of ``model``, which is used up, and its stages, first chunk first.

    Stages that are first or last on some route hold the embedding, or norm and head, whole; a tied table is in both.
    """
    stages = range(process, layout.stages, layout.processes)
    if len(partition.stages) != layout.stages:
        raise InvariantViolation(f"{len(partition.stages)} stages are not the {layout.stages} of the schedule")
    family, runs = family_of(config), [partition.stages[stage].blocks for stage in stages]
    has_head = not layout.last_stages.isdisjoint(stages)
    has_first = not layout.first_stages.isdisjoint(stages)
    _take_out(model, family, {block for run in runs for block in run}, has_first=has_first, has_head=has_head)
    piece = Wrapped(model, _no_logits)
    return piece, [HfStage(model, family, run, recomputes) for run in runs]


def _take_out(model: nn.Module, family: Family, kept: set[int], *, has_first: bool, has_head: bool) -> None:
    base: Any = model.get_submodule(family.base)
    blocks = {str(number): block for number, block in enumerate(family.blocks(model)) if number in kept}
    is_tied = getattr(base, family.first[0]).weight is model.get_submodule(family.head).weight
    setattr(base, family.layers, nn.ModuleDict(blocks))
    for number, name in enumerate(family.first):
        is_needed = has_first or (has_head and is_tied and number == 0)
        if not is_needed:
            setattr(base, name, nn.Identity())
    if not has_head:
        setattr(base, family.norm, nn.Identity())
        setattr(model, family.head, nn.Identity())


def _no_logits(*_: object) -> Tensor:
    raise InvariantViolation("a piece of a model has no logits; its stages have hidden states")


class HfStage:
    """One stage of a piece: see :class:`holdfast.parallel.pipeline.Part`."""

    def __init__(self, model: nn.Module, family: Family, blocks: Sequence[int], recomputes: bool) -> None:
        self._model, self._family, self._recomputes = model, family, recomputes
        self._base: Any = model.get_submodule(family.base)
        self._blocks = [getattr(self._base, family.layers)[str(number)] for number in blocks]

    def embed(self, tokens: Tensor) -> Tensor:
        return self._family.embed(self._base, tokens)

    def __call__(self, hidden: Tensor) -> Tensor:
        for block in self._blocks:
            if self._recomputes and torch.is_grad_enabled():
                hidden = checkpoint(self._through, block, hidden, use_reentrant=False)
            else:
                hidden = self._through(block, hidden)
        return hidden

    def _through(self, block: nn.Module, hidden: Tensor) -> Tensor:
        found = self._family.run(self._base, block, hidden)
        out: Tensor = found[0] if isinstance(found, tuple) else found  # as versions of transformers before 5 answer
        return out

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        head = self._model.get_submodule(self._family.head)
        logits: Tensor = head(getattr(self._base, self._family.norm)(hidden))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


# -- the families -----------------------------------------------------------------------------------------------------


def _positions(hidden: Tensor) -> Tensor:
    return torch.arange(hidden.shape[1], device=hidden.device)[None]


def _embed_llama(base: Any, tokens: Tensor) -> Tensor:
    hidden: Tensor = base.embed_tokens(tokens)
    return hidden


def _run_llama(base: Any, block: nn.Module, hidden: Tensor) -> Any:
    positions = _positions(hidden)
    return block(
        hidden,
        attention_mask=None,
        position_ids=positions,
        use_cache=False,
        position_embeddings=base.rotary_emb(hidden, positions),
    )


def _embed_gpt2(base: Any, tokens: Tensor) -> Tensor:
    words: Tensor = base.wte(tokens)
    hidden: Tensor = base.drop(words + base.wpe(_positions(words)))
    return hidden


def _run_gpt2(_: Any, block: nn.Module, hidden: Tensor) -> Any:
    return block(hidden, use_cache=False)


FAMILIES: Mapping[str, Family] = {
    "llama": Family("model", "layers", "norm", ("embed_tokens",), _embed_llama, _run_llama),
    "gpt2": Family("transformer", "h", "ln_f", ("wte", "wpe", "drop"), _embed_gpt2, _run_gpt2),
}
"""By the ``model_type`` of config.json."""
